"""What the first call of a model compiles: every kernel once, in a cache that was empty."""

import json

import pytest
from benchmark_scripts import load
from dit_quant.kernels.triton_device import installed

# asked without an import: kernels of this process must be told first that they are interpreted
pytestmark = pytest.mark.skipif(not installed(), reason="Triton is not installed")

compile_times = load("compile_times")


def test_double_and_single_blocks_are_one_model():
    found = compile_times.models("flux")
    assert list(found) == ["FLUX"]
    assert {(3072, 9216), (15360, 3072)} <= set(found["FLUX"])


def test_kernels_are_compiled_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compile_times, "PRESET_NAMES", ("W8A8 fast",))
    # the quantizer is the same for both layers; so are the tiles of their products
    monkeypatch.setattr(compile_times, "models", lambda containing: {"X": [(3072, 9216), (3072, 12288)]})
    out = tmp_path / "times.json"
    assert compile_times.main(["--capability", "86", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    row = result["rows"]["X"]["W8A8 fast"]
    assert row["kernels"] == 3
    assert 0 < row["longest"] < row["seconds"]
    assert f"{row['seconds']:.1f} s (3)" in compile_times.compile_table(result)
    assert "compute capability 8.6" in capsys.readouterr().out


def test_an_unknown_model_is_an_error(tmp_path, capsys):
    assert compile_times.main(["--models", "unet", "--out", str(tmp_path / "x.json")]) == 2
    assert "no model with 'unet'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
