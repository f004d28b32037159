"""Compiling before timing: every case falls to one process, and those of one kernel to the same one."""

import json
import subprocess
import sys

import pytest
from benchmark_scripts import BENCHMARKS, load

precompile, shapes, layers, kernels, fused = (
    load(name) for name in ("precompile", "kernel_shapes", "kernel_layers", "kernels", "fused")
)
CASES = {
    "kernels": kernels.kernels_of(shapes.cases("cuda", False)),
    "fused": fused.kernels_of(fused.cases("cuda", False)),
}


@pytest.mark.parametrize("shares", [1, 2, 8, 16])
@pytest.mark.parametrize("script", CASES)
def test_shares_cover_everything_once(script, shares):
    cases = CASES[script]
    found = [(share, case) for share in range(shares) for case in precompile.share_of(cases, share, shares)]
    assert sorted((case for _, case in found), key=str) == sorted(cases, key=str)
    owners = {}
    for share, case in found:
        assert owners.setdefault(cases[case], share) == share
        assert shares == 1 or share < shares - 1


def test_every_layer_and_input_is_among_the_cases():
    named = {(layer.model, layer.name) for layer in shapes.LAYERS}
    assert {case[:2] for case in CASES["kernels"]} == named
    assert {case[-1] for case in CASES["kernels"]} == set(layers.PRESET_NAMES)
    places = {(place.op, place.K, preset) for place, _ in fused.cases("cuda", False) for preset in fused.FUSIBLE}
    assert {(case[0], case[2], case[-1]) for case in CASES["fused"]} == places


def process(job):
    command = [sys.executable, str(BENCHMARKS / "precompile.py"), json.dumps(job)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("script", "case"),
    [
        ("kernels", ["PixArt", "attention projection", 1, "W8A8"]),
        ("fused", ["adaln_quantize", "PixArt", 1152, 2, "W4A8"]),
    ],
)
def test_a_process_does_its_share(script, case):
    job = {"script": script, "device": "cpu", "check": False, "cases": [case]}
    done = process(job)
    assert done.returncode == 0, done.stderr[-1000:]
    job["cases"][0][-1] = "no such preset"
    done = process(job)
    assert done.returncode != 0
    assert "KeyError: 'no such preset'" in done.stderr.splitlines()[-1]


def test_what_went_wrong_is_told_and_no_choice_of_tiles_is_kept(monkeypatch, tmp_path):
    kept = tmp_path / "autotune.json"
    monkeypatch.setenv("DIT_QUANT_AUTOTUNE_CACHE", str(kept))
    script = tmp_path / "made_up.py"
    script.write_text(
        "import os, pathlib\n"
        "def launch(device, name):\n"
        "    cache = pathlib.Path(os.environ['DIT_QUANT_AUTOTUNE_CACHE'])\n"
        "    cache.write_text('tiles')\n"
        "    assert name == 'right', name\n"
        "def check(device):\n"
        "    pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(precompile, "MOST", 2)
    assert precompile.compile_all("made_up", {("right",): 1}, "cpu") == []
    assert precompile.compile_all("made_up", {("right",): 1, ("wrong",): 2}, "cpu") == ["AssertionError: wrong"]
    assert not kept.exists()
