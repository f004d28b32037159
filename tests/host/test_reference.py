"""The demo's readable EmojiDiT and the host's own class are one model: the same file gives the same output."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from host_location import ROOT, find_host, why_no_host

pytestmark = pytest.mark.host

SCRIPT = Path(__file__).with_name("compare_reference.py")


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


def test_one_call_agrees(comparison):
    """fp32 on both sides: what is left is the order of additions."""
    assert comparison["dtype"] == "torch.float32"
    assert len(comparison["errors"]) == 9
    assert max(comparison["errors"].values()) < 1e-5, comparison["errors"]


def test_eight_euler_steps_agree(comparison):
    assert comparison["latent_is_used"] > 0.1
    assert comparison["euler"] < 1e-4


def test_schedule_is_the_hosts(comparison):
    assert comparison["schedule"] < 1e-6
