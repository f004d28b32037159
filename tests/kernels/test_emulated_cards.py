"""The Triton kernels' tests again, on a card of every kind that is not here: emulated_card.py.

Each card gets another part of the tests; by hand it can have all.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

import emulated_card
from ahead_of_time import CAPABILITIES, nvidia_tool
from benchmark_scripts import load
from host_location import ROOT

if shutil.which(nvidia_tool("ptxas")) is None:
    pytest.skip("this build of Triton has no compiler for NVIDIA cards", allow_module_level=True)
OLDEST = os.environ.get("DIT_QUANT_OLDEST_TRITON", "")
# capability, and the folder of another Triton
CARDS = [*((capability, "") for capability in CAPABILITIES), *((90, OLDEST) for _ in OLDEST[:1])]
# prime, so that no parameter of the tests is always the same
SHARES = 19
LEAST = 50


def run(card: tuple[int, str], cache: Path) -> str:
    """What pytest wrote."""
    capability, triton = card
    environment = load("dry_launches").compiling(cache if triton else None, Path(triton) if triton else None)
    environment["DIT_QUANT_EMULATED_CARD"] = str(capability)
    environment["DIT_QUANT_EMULATED_SHARE"] = f"{CARDS.index(card)}/{SHARES}"
    modules = [f"tests/kernels/{name}.py" for name in emulated_card.MODULES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *modules]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[tuple[int, str], str]:
    cache = tmp_path_factory.mktemp("cache")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(CARDS, pool.map(lambda card: run(card, cache), CARDS), strict=True))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"{card[0]}{' oldest Triton' if card[1] else ''}")
def test_kernels_pass_on_the_card(card, outcomes):
    written = outcomes[card]
    last = written.strip().rpartition("\n")[2]
    passed = re.match(r"(\d+) passed(?:, \d+ skipped)?, \d+ deselected in ", last)
    assert passed, written[-4000:]
    assert int(passed[1]) >= LEAST
