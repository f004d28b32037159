"""gelu_quantize in one kernel."""

from torch import Tensor

from ..quantize_rows import launch, refusal

__all__ = ["gelu_quantize", "refusal"]

PROLOGUES = {"tanh": "gelu_tanh", "none": "gelu"}


def gelu_quantize(
    x: Tensor,
    *,
    approximate: str = "tanh",
    index: Tensor,
    fraction: Tensor,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    hadamard: int = 1,
    symmetric: bool = True,
    static_scale: Tensor | None = None,
    static_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the reference, but for the last bits of tanh and erf; rows of x may lie apart."""
    if approximate not in PROLOGUES:
        raise ValueError(f"GELU {approximate!r} is not known; use 'tanh' or 'none'")
    return launch(
        x,
        prologue=PROLOGUES[approximate],
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )
