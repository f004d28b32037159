"""Compiling before timing: every width and preset falls to exactly one process, and a process does its share."""

import json
import subprocess
import sys

import pytest
from benchmark_scripts import BENCHMARKS, load

precompile, shapes, layers = (load(name) for name in ("precompile", "kernel_shapes", "kernel_layers"))


@pytest.mark.parametrize("shares", [1, 2, 8, 16])
def test_shares_cover_everything_once(shares):
    timed = shapes.cases("cuda", False)
    found = [case for share in range(max(shares - 1, 1)) for case in precompile.share_of(timed, share, shares)]
    assert sorted(found, key=str) == sorted(((case, M, p) for case, M in timed for p in layers.PRESET_NAMES), key=str)
    owners = {}
    for share in range(max(shares - 1, 1)):
        for layer, _, preset in precompile.share_of(timed, share, shares):
            assert owners.setdefault((layer.K, preset), share) == share


def test_a_process_does_its_share():
    job = {"device": "cpu", "share": 0, "shares": 5, "timed": [["PixArt", "attention projection", 1]]}
    command = [sys.executable, str(BENCHMARKS / "precompile.py"), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    job["timed"][0][1] = "no such layer"
    done = subprocess.run([*command[:2], json.dumps(job)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "KeyError" in done.stderr.splitlines()[-1]
