"""The Triton kernels' tests again, on a card of every kind that is not here: emulated_card.py.

Each card gets another part of the tests; by hand it can have all.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton")

import emulated_card
from ahead_of_time import CAPABILITIES, nvidia_tool
from host_location import ROOT

if shutil.which(nvidia_tool("ptxas")) is None:
    pytest.skip("this build of Triton has no compiler for NVIDIA cards", allow_module_level=True)
# prime, so that no parameter of the tests is always the same
SHARES = 7
LEAST = 80


def run(capability: int) -> str:
    """What pytest wrote."""
    card = {
        "DIT_QUANT_EMULATED_CARD": str(capability),
        "DIT_QUANT_EMULATED_SHARE": f"{CAPABILITIES.index(capability)}/{SHARES}",
    }
    modules = [f"tests/kernels/{name}.py" for name in emulated_card.MODULES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *modules]
    return subprocess.run(command, cwd=ROOT, env=os.environ | card, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def outcomes() -> dict[int, str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(CAPABILITIES, pool.map(run, CAPABILITIES), strict=True))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_pass_on_the_card(capability, outcomes):
    written = outcomes[capability]
    last = written.strip().rpartition("\n")[2]
    passed = re.match(r"(\d+) passed(?:, \d+ skipped)?(?:, \d+ deselected)? in ", last)
    assert passed, written[-4000:]
    assert int(passed[1]) >= LEAST
