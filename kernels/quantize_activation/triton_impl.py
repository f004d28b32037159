"""quantize_activation in one kernel: one read of x, one write of the codes."""

from torch import Tensor

from ..quantize_rows import launch, refusal

__all__ = ["quantize_activation", "refusal"]


def quantize_activation(
    x: Tensor,
    *,
    index: Tensor,
    fraction: Tensor,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    directions: Tensor | None = None,
    coordinates: Tensor | None = None,
    hadamard: int = 1,
    symmetric: bool = True,
    static_scale: Tensor | None = None,
    static_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the reference, bit for bit; rows of x may lie apart. |static_zero| < 2**21."""
    return launch(
        x,
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        directions=directions,
        coordinates=coordinates,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )
