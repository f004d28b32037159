"""Activation quantizer: shift, scale, optional rotation, round to int8. The definition of the op."""

import torch
from torch import Tensor

from ..directions import along, check
from ..numerics import INT8_MAX, lerp_rows, rotate, round_sum, safe_scale


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
    """x [M, K] fp32 -> round(x (1 / scale) + zero) [M, K] int8: the product is rounded to fp32, the sum to an integer.
    Only a static range needs the clamp."""
    codes = x * scale.reciprocal()
    codes = codes.round() if zero is None else round_sum(codes, zero)
    return codes.clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def asymmetric_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Range -> (scale, zero): low at code -127 and high at 127, or next to it; a constant row c != 0 keeps its value.

    No entry has a code beyond. With u = 2**-24 and m the magnitude, the codes of high and low before rounding differ by
    less than 254 + 10.5 u m / scale: spread, span, scale, its inverse and both products are rounded once each. Without
    the 16 u m by which the range is widened, some rows far off zero would reach 128.
    """
    magnitude, spread = torch.maximum(high.abs(), low.abs()), high - low
    # a constant row has no spread: give it the step of its magnitude, so that its one value is exact to 1/254
    span = torch.where(spread > 0, spread, magnitude)
    # x / scale and zero must not leave fp32's exact integers: a far-off row falls back to a symmetric range
    far = magnitude > span * 2**7
    scale = safe_scale(torch.where(far, 2 * magnitude, span + magnitude * 2**-20), 2 * INT8_MAX)
    # half down, so that low's code rounds to -127 or -126
    zero = -INT8_MAX - (low * scale.reciprocal() - 0.5).ceil()
    return scale, torch.where(far, torch.zeros_like(zero), zero)
