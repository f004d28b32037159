"""Activation quantizer in C: one read of x, a row at a time in the first cache."""

import torch
from torch import Tensor

from ..directions import check
from ..native import library
from ..native.arguments import address, check_group, group_of, table
from ..native.scratch import scratch
from ..native.structs import DTYPES, Tokens
from ..numerics import lerp_rows

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
    tokens = tokens_of(x, shift, smooth, directions, hadamard, symmetric, static_scale, static_zero)
    check(coordinates, directions, M, K)
    p = None if coordinates is None else coordinates.contiguous()
    scale = zero = None
    if static_scale is not None:
        scale = lerp_rows(static_scale[:, None], index, fraction).expand(M, 1)
        if static_zero is not None:
            zero = lerp_rows(static_zero[:, None], index, fraction).round().expand(M, 1)
    else:
        scale = torch.empty(M, 1, dtype=torch.float32, device=x.device)
        zero = None if symmetric else torch.empty_like(scale)
    codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    found = native.quantize_activation(
        tokens,
        group_of(index, fraction),
        address(p),
        int(find),
        address(codes),
        address(scale),
        address(zero),
        scratch(native.quantizer_buffer(K, tokens.rank, torch.get_num_threads())),
    )
    check_group(found, index, shift=shift, static_scale=static_scale, static_zero=static_zero)
    return codes, scale, zero


def tokens_of(
    x: Tensor,
    shift: Tensor | None,
    smooth: Tensor | None,
    directions: Tensor | None,
    hadamard: int,
    symmetric: bool,
    static_scale: Tensor | None,
    static_zero: Tensor | None,
) -> Tokens:
    """x [M, K], or [..., K] that is contiguous. Raises ValueError for a K that Hadamard blocks do not divide, and
    tables of another size."""
    K = x.shape[-1]
    if K % hadamard:
        raise ValueError(f"K={K} is not divisible by the Hadamard block {hadamard}")
    if hadamard not in ROTATIONS:
        raise ValueError(f"no rotation in blocks of {hadamard}")
    x = x.resolve_neg()
    if not x.is_contiguous() and x.stride(1) != 1:
        x = x.contiguous()
    stride = K if x.is_contiguous() else x.stride(0)
    z, factor = table("shift", shift, K, timesteps=True), table("smooth", smooth, K)
    scale = table("static_scale", static_scale, 1, timesteps=True)
    zero = table("static_zero", static_zero, 1, timesteps=True)
    V = None if directions is None else directions.contiguous()
    tokens = Tokens(
        x=address(x),
        dtype=DTYPES[x.dtype],
        order=hadamard,
        symmetric=symmetric,
        M=x.numel() // K,
        K=K,
        stride=stride,
        rank=0 if V is None else V.shape[0],
        shift=z,
        smooth=factor,
        fixed_scale=scale,
        fixed_zero=zero,
        directions=address(V),
    )
    tokens.kept = x, z, factor, scale, zero, V
    return tokens
