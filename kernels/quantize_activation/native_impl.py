"""Activation quantizer in C: one read of x, a row at a time in the first cache."""

from typing import NamedTuple

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
    native = library.required()
    M, K = x.shape
    tokens = tokens_of(x, index, fraction, shift, smooth, directions, hadamard, static_scale, static_zero)
    check(coordinates, directions, M, K)
    p = None if coordinates is None else coordinates.contiguous()
    scale = zero = None
    if tokens.fixed_scale is None:
        scale = torch.empty(M, 1, dtype=torch.float32, device=x.device)
        zero = None if symmetric else torch.empty_like(scale)
    codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    native.quantize_activation(
        address(tokens.x),
        library.DTYPES[x.dtype],
        M,
        K,
        tokens.x.stride(0),
        address(tokens.shift),
        address(tokens.smooth),
        tokens.rank,
        int(find),
        address(p),
        address(tokens.directions),
        hadamard,
        int(symmetric),
        address(tokens.fixed_scale),
        address(tokens.fixed_zero),
        address(codes),
        address(scale),
        address(zero),
        scratch(native.quantizer_buffer(K, tokens.rank, torch.get_num_threads())),
    )
    if tokens.fixed_scale is not None:
        fixed_zero = tokens.fixed_zero
        return codes, tokens.fixed_scale.expand(M, 1), None if fixed_zero is None else fixed_zero.expand(M, 1)
    assert scale is not None
    return codes, scale, zero


class Tokens(NamedTuple):
    """What C takes of a quantizer's input: x [M, K], its rows contiguous; shift, smooth [K] fp32, directions [R, K]
    fp16; fixed_scale, fixed_zero [1] fp32."""

    x: Tensor
    shift: Tensor | None
    smooth: Tensor | None
    directions: Tensor | None
    fixed_scale: Tensor | None
    fixed_zero: Tensor | None

    @property
    def rank(self) -> int:
        return 0 if self.directions is None else len(self.directions)


def tokens_of(
    x: Tensor,
    index: Tensor,
    fraction: Tensor,
    shift: Tensor | None,
    smooth: Tensor | None,
    directions: Tensor | None,
    hadamard: int,
    static_scale: Tensor | None,
    static_zero: Tensor | None,
) -> Tokens:
    """Raises ValueError for a K that Hadamard blocks do not divide, and tables of another size."""
    K = x.shape[1]
    if K % hadamard:
        raise ValueError(f"K={K} is not divisible by the Hadamard block {hadamard}")
    if hadamard not in ROTATIONS:
        raise ValueError(f"no rotation in blocks of {hadamard}")
    x = x.resolve_neg()
    offset = None if shift is None else vector("shift", table_row(shift, index, fraction), K, torch.float32)
    fixed_scale = fixed_zero = None
    if static_scale is not None:
        # a copy: what an op returns must not be a part of what it was given
        fixed_scale = table_row(static_scale[:, None], index, fraction).clone()
        if static_zero is not None:
            fixed_zero = table_row(static_zero[:, None], index, fraction).round()
    return Tokens(
        x if x.stride(1) == 1 else x.contiguous(),
        offset,
        vector("smooth", smooth, K, torch.float32),
        None if directions is None else directions.contiguous(),
        fixed_scale,
        fixed_zero,
    )
