"""swiglu_quantize in one kernel."""

from torch import Tensor

from ..quantize_rows import launch, refusal
from .reference import halves

__all__ = ["refusal", "swiglu_quantize"]


def swiglu_quantize(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    gate_first: bool = True,
    index: Tensor,
    fraction: Tensor,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    hadamard: int = 1,
    symmetric: bool = True,
    static_scale: Tensor | None = None,
    static_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the reference, but for the last bits of exp; rows of gate and up may lie apart."""
    if up is None:
        gate, up = halves(gate, gate_first)
    return launch(
        gate,
        up=up,
        prologue="swiglu",
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )
