"""Activation quantizer in C: one read of x, a row at a time in the first cache."""

import torch
from torch import Tensor

from ..directions import check
from ..native import library
from ..native.arguments import address, table_row, vector
from ..native.scratch import scratch

ROTATIONS = (1, 4, 16, 64, 256)


def refusal(device: torch.device, dtype: torch.dtype, hadamard: int) -> str | None:
    """None, or why the op does not run."""
    if hadamard not in ROTATIONS:
        return f"no rotation in blocks of {hadamard}"
    return library.refusal(device, dtype)


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
    """As the reference, and bit-equal to it."""
    return quantize_rows(
        x, index, fraction, shift, smooth, directions, coordinates, hadamard, symmetric, static_scale, static_zero
    )


def quantize_rows(
    x: Tensor,
    index: Tensor,
    fraction: Tensor,
    shift: Tensor | None,
    smooth: Tensor | None,
    directions: Tensor | None,
    coordinates: Tensor | None,
    hadamard: int,
    symmetric: bool,
    static_scale: Tensor | None,
    static_zero: Tensor | None,
    find: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """codes, scale, zero. find: the coordinates are found first, and written."""
    native = library.library()
    if isinstance(native, str):
        raise RuntimeError(native)
    M, K = x.shape
    if K % hadamard:
        raise ValueError(f"K={K} is not divisible by the Hadamard block {hadamard}")
    if x.stride(1) != 1:
        x = x.contiguous()
    offset = None if shift is None else vector("shift", table_row(shift, index, fraction), K, torch.float32)
    smooth = vector("smooth", smooth, K, torch.float32)
    check(coordinates, directions, M, K)
    p, V = (None if v is None else v.contiguous() for v in (coordinates, directions))
    rank = 0 if V is None else len(V)
    fixed_scale = fixed_zero = scale = zero = None
    if static_scale is not None:
        fixed_scale = table_row(static_scale[:, None], index, fraction).clone()
        if static_zero is not None:
            fixed_zero = table_row(static_zero[:, None], index, fraction).round()
    else:
        scale = torch.empty(M, 1)
        zero = None if symmetric else torch.empty(M, 1)
    codes = torch.empty(M, K, dtype=torch.int8)
    native.quantize_activation(
        address(x),
        library.DTYPES[x.dtype],
        M,
        K,
        x.stride(0),
        address(offset),
        address(smooth),
        rank,
        int(find),
        address(p),
        address(V),
        hadamard,
        int(symmetric),
        address(fixed_scale),
        address(fixed_zero),
        address(codes),
        address(scale),
        address(zero),
        scratch(native.quantizer_buffer(K, rank, torch.get_num_threads())),
    )
    if fixed_scale is not None:
        return codes, fixed_scale.expand(M, 1), None if fixed_zero is None else fixed_zero.expand(M, 1)
    assert scale is not None
    return codes, scale, zero
