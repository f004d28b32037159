"""The demo itself, on the bundled model. DEMO_OUTPUT names the folder of a run to judge instead of a short one."""

import json
import math
import os
from pathlib import Path

import pytest
from dit_quant.demo import __main__ as demo
from dit_quant.demo.comparison import ENLARGE
from PIL import Image

SHORT = ["--calibration", "6", "--evaluation", "4", "--steps", "10"]
SCHEME_KEYS = {
    *("scheme", "bits_per_weight", "velocity_rel_l2", "final_latent_rel_l2", "psnr_db", "groups"),
    *("layers_quantized", "layers_skipped", "seconds_per_step", "weight_bytes", "weight_bytes_bf16"),
}


@pytest.fixture(scope="module")
def folder(assets, tmp_path_factory):
    """What a run of the demo left."""
    if named := os.environ.get("DEMO_OUTPUT"):
        return Path(named)
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    assert demo.main(["--out", str(out), "--assets", str(assets), *SHORT]) == 0
    return out


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def schemes(report):
    return {row["scheme"]: row for row in report["schemes"]}


def test_only_the_two_files_are_left(folder):
    assert {path.name for path in folder.iterdir()} == {"comparison.png", "report.json"}


def test_report_is_whole(report):
    assert set(report) == {
        *("machine", "versions", "settings", "calibration_prompts", "evaluation_prompts", "full_precision", "schemes")
    }
    assert [row["scheme"] for row in report["schemes"]] == [scheme.name for scheme in demo.SCHEMES]
    assert {"rtn_w8a8", "W8A8", "rtn_w4a8", "W4A8", "htg_paper"} < {scheme.name for scheme in demo.SCHEMES}
    assert report["full_precision"]["seconds_per_step"] > 0
    assert {"python", "torch", "numpy", "dit-quant"} <= set(report["versions"])
    assert {"cpu", "cores", "torch_threads"} <= set(report["machine"])
    assert {"steps", "cfg", "shift", "batch"} <= set(report["settings"])


def test_rows_are_whole(schemes):
    for row in schemes.values():
        assert set(row) == SCHEME_KEYS
        numbers = [row[key] for key in SCHEME_KEYS - {"scheme", "layers_skipped"}]
        assert all(math.isfinite(value) and value > 0 for value in numbers), row
        assert row["layers_quantized"] == 29
        assert len(row["layers_skipped"]) == 15
        assert all(layer["name"] and layer["reason"] for layer in row["layers_skipped"])
        assert math.isclose(row["bits_per_weight"], 16 * row["weight_bytes"] / row["weight_bytes_bf16"])


def test_prompts_do_not_overlap(report):
    used = report["calibration_prompts"] + report["evaluation_prompts"]
    assert len(set(used)) == len(used)


@pytest.mark.parametrize("measure", ["final_latent_rel_l2", "velocity_rel_l2"])
@pytest.mark.parametrize(("ours", "plain"), [("W8A8", "rtn_w8a8"), ("W4A8", "rtn_w4a8"), ("W4A8", "rtn_w4a8_g8")])
def test_calibrated_is_no_worse_than_plain_rounding(schemes, ours, plain, measure):
    assert schemes[ours][measure] <= schemes[plain][measure]


def test_plain_rounding_was_given_as_many_bits(schemes):
    """W4A8's tables cost bits; one plain row must have at least those to spend."""
    assert schemes["rtn_w4a8_g8"]["bits_per_weight"] >= schemes["W4A8"]["bits_per_weight"]


def test_pictures_survive(schemes):
    """Recognisable is for eyes; but a PSNR below 30 dB would show."""
    assert schemes["W8A8"]["psnr_db"] > 40
    assert schemes["W4A8"]["psnr_db"] > 30


@pytest.mark.parametrize(("name", "share"), [("W8A8", 0.55), ("W4A8", 0.35)])
def test_sizes(schemes, name, share):
    assert schemes[name]["weight_bytes"] <= share * schemes[name]["weight_bytes_bf16"]


def test_picture(folder, report):
    with Image.open(folder / "comparison.png") as image:
        columns = min(demo.COLUMNS, len(report["evaluation_prompts"]))
        assert image.format == "PNG"
        assert image.width > columns * 32 * ENLARGE
        assert image.height > 3 * 32 * ENLARGE
        assert len(image.getcolors(2**24)) > 500


@pytest.mark.parametrize("option", ["--calibration", "--evaluation"])
def test_too_many_prompts(assets, tmp_path, capsys, option):
    assert demo.main(["--assets", str(assets), "--out", str(tmp_path / "out"), option, "161"]) == 2
    assert "has 160" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--calibration", "--evaluation", "--steps"])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_senseless_numbers(capsys, option, value):
    with pytest.raises(SystemExit):
        demo.main([option, value])
    assert option in capsys.readouterr().err


def test_missing_and_cut_off_assets(assets, tmp_path, capsys):
    assert demo.main(["--assets", str(tmp_path)]) == 2
    assert "emoji_dit.safetensors" in capsys.readouterr().err
    (tmp_path / "emoji_dit.safetensors").write_bytes((assets / "emoji_dit.safetensors").read_bytes()[:100_000])
    assert demo.main(["--assets", str(tmp_path)]) == 2
    assert "cut off" in capsys.readouterr().err


def test_unusable_output_folder_is_known_at_once(assets, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert demo.main(["--assets", str(assets), "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    target = tmp_path / "report.json"
    demo.replace_file(target, b"old")

    def refuse(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo.os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        demo.replace_file(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert target.read_bytes() == b"old"
