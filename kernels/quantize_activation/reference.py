"""Activation quantizer: shift, scale, optional rotation, round to int8. The definition of the op."""

import torch
from torch import Tensor

from ..directions import along, check
from ..numerics import INT8_MAX, lerp_rows, rotate, safe_scale


def transform(
    x: Tensor,
    shift: Tensor | None,
    smooth: Tensor | None,
    index: Tensor,
    fraction: Tensor,
    order: int,
    directions: Tensor | None = None,
    coordinates: Tensor | None = None,
) -> Tensor:
    """x [M, K] -> ((x - z(sigma) - p V) / s) H, fp32; the division is a product with 1 / s."""
    x = x.float()
    if shift is not None:
        x = x - lerp_rows(shift, index, fraction)
    check(coordinates, directions, *x.shape)
    if directions is not None and coordinates is not None:
        x = along(x, coordinates, directions, -1.0)
    if smooth is not None:
        x = x * smooth.float().reciprocal()
    return rotate(x, order)


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
    """x [M, K] float -> codes [M, K] int8, scale [M, 1] fp32, zero [M, 1] fp32 (integers) or None.

    x - z - p V ~ s * scale * (codes - zero), row by row.

    shift [T, K], smooth [K], directions [R, K] fp16 and coordinates [M, R] bf16 as in `transform`; index, fraction [1]
    choose the timestep group on the device.
    Dynamic per-token ranges unless static_scale [T] (and static_zero [T] when asymmetric) are given.
    """
    x = transform(x, shift, smooth, index, fraction, hadamard, directions, coordinates)
    if static_scale is not None:
        scale = lerp_rows(static_scale[:, None], index, fraction).expand(x.shape[0], 1)
        zero = None
        if static_zero is not None:
            zero = lerp_rows(static_zero[:, None], index, fraction).round().expand(x.shape[0], 1)
    elif symmetric:
        scale, zero = safe_scale(x.abs().amax(dim=-1, keepdim=True), INT8_MAX), None
    else:
        scale, zero = asymmetric_range(x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True))
    return encode(x, scale, zero), scale, zero


def encode(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """x [M, K] fp32 -> round(x (1 / scale)) + zero [M, K] int8. The product is rounded before zero is added, so
    that a fused multiply-add changes nothing."""
    codes = (x * scale.reciprocal()).round()
    return (codes if zero is None else codes + zero).clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def asymmetric_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Range -> (scale, zero) with low at code -127 and high at 127; a constant row c != 0 keeps its value."""
    spread = high - low
    # a constant row has no spread: give it the step of its magnitude, so that its one value is exact to 1/254
    scale = safe_scale(torch.where(spread > 0, spread, torch.maximum(high.abs(), low.abs())), 2 * INT8_MAX)
    # x / scale and zero must not leave fp32's exact integers: a far-off row falls back to a symmetric range
    far = torch.maximum(high.abs(), low.abs()) > scale * 2**15
    scale = torch.where(far, safe_scale(torch.maximum(high.abs(), low.abs()), INT8_MAX), scale)
    zero = torch.where(far, torch.zeros_like(scale), -INT8_MAX - (low * scale.reciprocal()).round())
    return scale, zero
