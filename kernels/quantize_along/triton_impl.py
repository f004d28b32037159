"""Coordinates and codes in one kernel; where a row and its sums do not fit in registers, in two."""

# Triton's decorators are beyond the type checker
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..directions import MOST
from ..directions_triton import direction, neighbours, plus_products, row_sums, store_coordinates
from ..launcher import GROUP_POINTERS, Launcher, launcher
from ..quantize_activation.triton_impl import quantize_activation, refusal
from ..quantize_rows import contiguous, launch
from ..quantizing_triton import table_row
from ..row_tiles import finds
from ..triton_device import capability_of, selected

__all__ = ["coordinates", "quantize_along", "refusal"]

# every table is read once for two rows; a row's 16-byte loads of all four warps lie side by side
ROWS, WIDTH, WARPS = 2, 1024, 4


@triton.jit(do_not_specialize=["M", "T"], do_not_specialize_on_alignment=GROUP_POINTERS)
def coordinates_kernel(
    x_ptr,
    directions_ptr,
    shift_ptr,
    smooth_ptr,
    index_ptr,
    fraction_ptr,
    found_ptr,
    M,
    K,
    T,
    x_stride,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ROWS rows of p = ((x - z) / s) · (V / s): a stream of columns, four directions at a time."""
    index = tl.load(index_ptr)
    fraction = tl.load(fraction_ptr).to(tl.float32)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < M
    x_ptr += rows.to(tl.int64)[:, None] * x_stride
    for first in tl.static_range(0, RANK, 4):
        p0 = tl.zeros((ROWS, WIDTH // 2), tl.float32)
        p1, p2, p3 = p0, p0, p0
        for start in range(0, K, WIDTH):
            columns = start + tl.arange(0, WIDTH)
            within = columns < K
            y = tl.load(x_ptr + columns[None, :], mask=inside[:, None] & within[None, :], other=0.0).to(tl.float32)
            if shift_ptr is not None:
                y = y - table_row(shift_ptr, index, fraction, T, K, columns, within)[None, :]
            if smooth_ptr is not None:
                s = tl.load(smooth_ptr + columns, mask=within, other=1.0, eviction_policy="evict_last").to(tl.float32)
                y = y * (1.0 / (s * s))[None, :]
            # one load for both rows, of which each thread holds the same columns
            both, ys = tl.arange(0, WIDTH)[None, :], neighbours(y)
            p0 = plus_products(ys, direction(directions_ptr, first, start, both, K), p0)
            if first + 1 < RANK:
                p1 = plus_products(ys, direction(directions_ptr, first + 1, start, both, K), p1)
            if first + 2 < RANK:
                p2 = plus_products(ys, direction(directions_ptr, first + 2, start, both, K), p2)
            if first + 3 < RANK:
                p3 = plus_products(ys, direction(directions_ptr, first + 3, start, both, K), p3)
        sums = row_sums((p0, p1, p2, p3)).to(tl.bfloat16)
        store_coordinates(found_ptr, sums, rows, inside, first, RANK)


@lru_cache(maxsize=64)
def kernel(device: torch.device, rank: int) -> Launcher:
    # the bits of the kernel that also quantizes, which has none of them fused
    given = {"WIDTH": WIDTH, "num_warps": WARPS, "enable_fp_fusion": False}
    return launcher(coordinates_kernel, capability_of(device), RANK=rank, ROWS=ROWS, **given)


def coordinates(
    x: Tensor, directions: Tensor, shift: Tensor | None, smooth: Tensor | None, index: Tensor, fraction: Tensor
) -> Tensor:
    """As the reference, but for the order of the sums."""
    M, K = x.shape
    R = check(directions, K)
    x = x if x.stride(1) == 1 else x.contiguous()
    found = torch.empty((M, R), dtype=torch.bfloat16, device=x.device)
    with selected(x.device):
        if found.numel():
            kernel(x.device, R)(
                triton.cdiv(M, ROWS),
                x,
                directions.contiguous(),
                contiguous(shift),
                contiguous(smooth),
                index,
                fraction.to(x.device),
                found,
                M,
                K,
                1 if shift is None else shift.shape[0],
                x.stride(0),
            )
    return found


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
    """As the reference: one kernel that reads x once, or two, of which the second finds x in the card's cache."""
    M, K = x.shape
    R = check(directions, K)
    given = {"index": index, "fraction": fraction, "shift": shift, "smooth": smooth, "hadamard": hadamard}
    tables = (shift is not None) + (smooth is not None)
    if finds(K, hadamard, tables, x.element_size(), capability_of(x.device)):
        p = torch.empty((M, R), dtype=torch.bfloat16, device=x.device)
        return *launch(x, directions=directions, coordinates=p, symmetric=symmetric, find=True, **given), p
    p = coordinates(x, directions, shift, smooth, index, fraction)
    return *quantize_activation(x, directions=directions, coordinates=p, symmetric=symmetric, **given), p


def check(directions: Tensor, K: int) -> int:
    """How many there are."""
    R, columns = directions.shape
    if R > MOST or columns != K:
        raise ValueError(f"directions {tuple(directions.shape)} are not [at most {MOST}, {K}]")
    return R
