"""The activation quantizer for a layer with directions: what tokens do along these stays in 16 bits.

The definition of the op.
"""

import torch
from torch import Tensor

from ..numerics import lerp_rows
from ..quantize_activation.reference import quantize_activation


def coordinates(
    x: Tensor, directions: Tensor, shift: Tensor | None, smooth: Tensor | None, index: Tensor, fraction: Tensor
) -> Tensor:
    """x [M, K] float, directions V [R, K] fp16 -> p [M, R] bf16: ((x - z) / s) · (V / s), summed in fp32.

    V / s is orthonormal, so that p V is the part of x - z in the span of V. bf16, as p V is then exact in fp32.
    """
    x = x.float()
    if shift is not None:
        x = x - lerp_rows(shift, index, fraction)
    return (x @ dual(directions, smooth).T).to(torch.bfloat16)


def dual(directions: Tensor, smooth: Tensor | None) -> Tensor:
    """V / s² [R, K] fp32: what x is multiplied by for its coordinates."""
    return directions.float() if smooth is None else directions.float() * smooth.float().square().reciprocal()


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
    """x [M, K] float -> codes, scale, zero as `quantize_activation` has them of x - p V, and p [M, R] bf16.

    directions V [R, K] fp16; the rest as there. The order of p's sum is the implementation's to choose: whatever p is,
    codes, scale and zero are bit for bit those that the reference has for it, and the product takes the same p.
    """
    p = coordinates(x, directions, shift, smooth, index, fraction)
    given = {"index": index, "fraction": fraction, "shift": shift, "smooth": smooth, "hadamard": hadamard}
    return *quantize_activation(x, directions=directions, coordinates=p, symmetric=symmetric, **given), p
