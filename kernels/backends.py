"""Backends: in which order they are asked, and where each keeps its implementation of an op."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

AUTO = "auto"
# backend -> file in the folder of each op, in order of preference
FILES = {
    "triton": "triton_impl",
    "comfy_kitchen": "kitchen_impl",
    "native": "native_impl",
    "torch": "torch_impl",
    "reference": "reference",
}
BACKENDS = tuple(FILES)
# off CUDA the others cannot run at all, or only interpreted; `native` is C for the CPU
PORTABLE = ("native", "torch", "reference")


@dataclass(frozen=True)
class Shape:
    """All that the choice of a backend may depend on.

    dtype: of x for the quantizer, of the output for the products; M: rounded up to a power of 2; N and group_size
    None where the op has none; symmetric: tokens without a zero point; static: ranges fixed per timestep group.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    M: int
    K: int
    N: int | None = None
    group_size: int | None = None
    hadamard: int = 1
    symmetric: bool = True
    static: bool = False


@dataclass(frozen=True)
class Implementation:
    """One backend's function for an op, and its opinion of a shape: None, or why it refuses."""

    function: Callable
    refusal: Callable[[Shape], str | None]


def check_name(name: str, source: str) -> str:
    """`name` if it is `auto` or a backend. Raises ValueError that says where the name came from."""
    if name != AUTO and name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; choose one of {', '.join((AUTO, *BACKENDS))}")
    return name


def order(device: torch.device, first: str = AUTO) -> tuple[str, ...]:
    """Backends to ask on a device. `first`: one to ask before all others."""
    usual = tuple(name for name in BACKENDS if name != "native") if device.type == "cuda" else PORTABLE
    return usual if first == AUTO else (first, *(name for name in usual if name != first))


@lru_cache(maxsize=64)
def load(op: str, backend: str) -> Implementation | str:
    """The backend's implementation of an op, or why there is none. Imported at the first call."""
    try:
        module = importlib.import_module(f".{op}.{FILES[backend]}", __package__)
        return Implementation(getattr(module, op), _asking(getattr(module, "refusal", None)))
    except ModuleNotFoundError as error:
        missing = error.name or ""
        return f"no {op}" if missing.endswith(FILES[backend]) else f"{missing} is not installed"
    except Exception as error:
        # a broken installation of Triton raises nearly anything; the reason is shown, another backend runs
        return f"does not import: {type(error).__name__}: {first_line(error)}"


def _asking(refusal: Callable[..., str | None] | None) -> Callable[[Shape], str | None]:
    """Shape -> refusal(device, ...) with those of the shape's fields that the function has parameters for."""
    if refusal is None:
        return lambda shape: None
    names = [name for name in inspect.signature(refusal).parameters if name != "device"]
    return lambda shape: refusal(shape.device, **{name: getattr(shape, name) for name in names})


def first_line(error: BaseException) -> str:
    """An error's message, short enough for a report."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
