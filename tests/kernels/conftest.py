"""Without a CUDA device Triton kernels run in its interpreter, which has to be asked for before Triton is imported."""

import os
import sys

import pytest
import torch
from dit_quant.kernels.native import library
from native_builds import BUILDS, built

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise pytest.UsageError("triton was imported before tests/kernels/conftest.py could set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton tests put their tensors."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", params=BUILDS)
def build(request):
    """The library that this module's calls find."""
    if request.param == "AMX" and (reason := library.amx_refusal()):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        found = built(request.param)
        patch.setattr(library, "library", lambda: found)
        yield request.param
