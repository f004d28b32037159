"""Without a CUDA device Triton kernels run in its interpreter, which has to be asked for before Triton is imported, or
on an emulated card."""

import os
import sys

import emulated_card
import pytest
import torch

if emulated_card.CARD:
    emulated_card.attach()

from dit_quant.kernels.native import library
from native_builds import BUILDS, built

if not emulated_card.CARD and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise pytest.UsageError("triton was imported before tests/kernels/conftest.py could set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton tests put their tensors."""
    return torch.device("cuda" if torch.cuda.is_available() and not emulated_card.CARD else "cpu")


def pytest_collection_modifyitems(config, items):
    if emulated_card.CARD:
        items[:], others = emulated_card.shared(items)
        config.hook.pytest_deselected(items=others)


@pytest.fixture(scope="module", params=BUILDS)
def build(request):
    """The library that this module's calls find."""
    if request.param == "AMX" and (reason := library.amx_refusal()):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        found = built(request.param)
        patch.setattr(library, "library", lambda: found)
        yield request.param
