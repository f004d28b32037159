"""Curvatures of the host's own model classes, probed in its inference mode, are those of plain autograd."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from host_location import ROOT, find_host, why_no_host

pytestmark = pytest.mark.host

SCRIPT = Path(__file__).with_name("compare_probes.py")
FAMILIES = ("sd3", "flux", "wan", "z_image", "qwen_image")
# the last block's text stream ends in layers whose output nothing reads
UNREAD = {"qwen_image": ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")}


@pytest.fixture(scope="module")
def comparison():
    host = find_host()
    if host is None:
        pytest.skip(f"HOST TESTS SKIPPED: {why_no_host()}")
    done = subprocess.run(
        [str(host.python), str(SCRIPT), str(ROOT)],
        cwd=host.root,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_curvatures_are_those_of_autograd(comparison, family):
    """fp32 on both sides; sums over tokens in another order at most."""
    found = comparison[family]
    assert found["notes"] == []
    assert found["probes"] == 1
    assert found["missing"] == [f"transformer_blocks.1.{name}" for name in UNREAD.get(family, ())]
    assert found["layers"] >= 13
    assert found["worst"] < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probe_leaves_no_trace(comparison, family):
    """The model computes the same afterwards, with its own tensors, and no input is counted twice."""
    assert comparison[family]["restored"]
    assert comparison[family]["recorded_once"]
