"""int8 x int8 -> int32 matrix product and its floating-point epilogue. The definition of the op."""

import torch
from torch import Tensor

from ..directions import along, check
from ..numerics import addend
from .matmul import int8_matmul


def epilogue(
    accumulator: Tensor,
    *,
    row_scale: Tensor,
    column_scale: Tensor,
    row_zero: Tensor | None,
    column_sum: Tensor | None,
    bias: Tensor | None,
    correction: Tensor | None,
    coordinates: Tensor | None,
    responses: Tensor | None,
    index: Tensor,
    fraction: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """accumulator [M, N] int32 -> row scale * column scale * (acc - zero * column sum) + p B + (b + c(sigma))."""
    y = accumulator.float()
    if row_zero is not None:
        if column_sum is None:
            raise ValueError("an asymmetric activation needs the weight's column sums")
        y = y - row_zero * column_sum.float()
    y = y * row_scale * column_scale.reshape(1, -1)
    check(coordinates, responses, *y.shape)
    if coordinates is not None and responses is not None:
        y = along(y, coordinates, responses)
    added = addend(bias, correction, index, fraction)
    return (y if added is None else y + added).to(dtype)


def int8_linear(
    a: Tensor,
    w: Tensor,
    *,
    row_scale: Tensor,
    column_scale: Tensor,
    index: Tensor,
    fraction: Tensor,
    row_zero: Tensor | None = None,
    column_sum: Tensor | None = None,
    bias: Tensor | None = None,
    correction: Tensor | None = None,
    coordinates: Tensor | None = None,
    responses: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """a [M, K] int8, w [N, K] int8 -> [M, N] dtype.

    row_scale, row_zero [M, 1] fp32; column_scale [N, 1] fp32; column_sum [N] int32; bias [N];
    correction [T, N], looked up at the device-side index and fraction; coordinates [M, R] bf16 of the tokens along
    the quantizer's directions, responses B [R, N] fp16 of the weight to these.
    """
    return epilogue(
        int8_matmul(a, w),
        row_scale=row_scale,
        column_scale=column_scale,
        row_zero=row_zero,
        column_sum=column_sum,
        bias=bias,
        correction=correction,
        coordinates=coordinates,
        responses=responses,
        index=index,
        fraction=fraction,
        dtype=dtype,
    )
