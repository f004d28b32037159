"""Coordinates and quantizer in C: one read of x, a row at a time in the first cache."""

import torch
from torch import Tensor

from ..quantize_activation.native_impl import quantize_rows, refusal

__all__ = ["quantize_along", "refusal"]


def quantize_along(
    x: Tensor,
    *,
    directions: Tensor,
    index: Tensor,
    fraction: Tensor,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    hadamard: int = 1,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """As the reference, but for the order of p's sum."""
    p = torch.empty(len(x), len(directions), dtype=torch.bfloat16, device=x.device)
    codes, scale, zero = quantize_rows(
        x, index, fraction, shift, smooth, directions, p, hadamard, symmetric, None, None, find=True
    )
    return codes, scale, zero, p
