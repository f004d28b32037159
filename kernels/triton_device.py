"""Whether Triton kernels can run on a device. Imports no triton: asking is free."""

import importlib.util
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch

# int8 tensor-core instructions of Triton begin here; Turing's were dropped upstream
MIN_CAPABILITY = (8, 0)
# the first one that takes tuples in which operands are absent; torch 2.8 comes with it
OLDEST_TRITON = (3, 4)
AS_IT_IS = nullcontext()
NOT_INSTALLED = "triton is not installed; " + (
    "install triton-windows, in the version for your torch"
    if sys.platform == "win32"
    else "torch brings it on Linux: install torch again"
)


def interpreted() -> bool:
    """Triton's interpreter is asked for: kernels then run on CPU tensors, for tests only."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def capability_of(device: torch.device) -> int:
    """80, 86, ... 120 on CUDA; 0 on HIP and under the interpreter."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    return _capability(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache(maxsize=64)
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def selected(device: torch.device) -> AbstractContextManager[object]:
    """Makes it the current device, on which Triton launches. Looking whether it is takes less than making it so."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return AS_IT_IS
    return torch.cuda.device(device)


def device_refusal(device: torch.device) -> str | None:
    """None where Triton's integer kernels can run, else the reason in one line."""
    if not installed():
        return NOT_INSTALLED
    if interpreted() and device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"no Triton kernels for {device.type} tensors"
    capability = capability_of(device)
    if not torch.version.hip and capability < 10 * MIN_CAPABILITY[0] + MIN_CAPABILITY[1]:
        return f"compute capability {capability // 10}.{capability % 10} < {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return too_old()


@lru_cache(maxsize=1)
def too_old() -> str | None:
    from .version_triton import VERSION, release

    if release() < OLDEST_TRITON:
        return f"triton {VERSION} < {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}: update torch to 2.8 or newer"
    return None
