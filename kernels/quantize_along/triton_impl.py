"""Coordinates on tensor cores: one read of x, in products of TF32, which has three bits more than the result."""

# Triton's decorators are beyond the type checker
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..directions import MOST
from ..quantize_activation.triton_impl import quantize_activation, refusal
from ..quantizing_triton import table_row

__all__ = ["coordinates", "quantize_along", "refusal"]

# the narrowest product that tensor cores have: directions are padded to it
LEAST = 16
BLOCK_M, BLOCK_K, WARPS, STAGES = 32, 128, 4, 3
# few AMD cards have TF32
PRECISION = "ieee" if torch.version.hip else "tf32"


@triton.jit(do_not_specialize=["M", "T"])
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
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M rows of p = ((x - z) / s) · (V / s)."""
    index = tl.load(index_ptr)
    fraction = tl.load(fraction_ptr).to(tl.float32)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, PADDED)
    inside = rows < M
    x_ptr += rows.to(tl.int64)[:, None] * x_stride
    total = tl.zeros((BLOCK_M, PADDED), tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        within = columns < K
        x = tl.load(x_ptr + columns[None, :], mask=inside[:, None] & within[None, :], other=0.0).to(tl.float32)
        if shift_ptr is not None:
            x = x - table_row(shift_ptr, index, fraction, T, K, columns, within)[None, :]
        v = tl.load(
            directions_ptr + ranks[None, :] * K + columns[:, None],
            mask=within[:, None] & (ranks < RANK)[None, :],
            other=0.0,
        ).to(tl.float32)
        if smooth_ptr is not None:
            s = tl.load(smooth_ptr + columns, mask=within, other=1.0).to(tl.float32)
            v = v * tl.div_rn(1.0, s * s)[:, None]
        total = tl.dot(x, v, total, input_precision=PRECISION)
    tl.store(
        found_ptr + rows[:, None] * RANK + ranks[None, :],
        total.to(tl.bfloat16),
        mask=inside[:, None] & (ranks < RANK)[None, :],
    )


def coordinates(
    x: Tensor, directions: Tensor, shift: Tensor | None, smooth: Tensor | None, index: Tensor, fraction: Tensor
) -> Tensor:
    """As the reference, but for the order of the sums and the rounding of what is multiplied."""
    (M, K), R = x.shape, len(directions)
    if R > MOST or directions.shape[1] != K:
        raise ValueError(f"directions {tuple(directions.shape)} are not [at most {MOST}, {K}]")
    x = x if x.stride(1) == 1 else x.contiguous()
    shift, smooth = (None if t is None else t.contiguous() for t in (shift, smooth))
    found = torch.empty((M, R), dtype=torch.bfloat16, device=x.device)
    with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        if found.numel():
            coordinates_kernel[(triton.cdiv(M, BLOCK_M),)](
                x,
                directions.contiguous(),
                shift,
                smooth,
                index,
                fraction.to(x.device),
                found,
                M,
                K,
                1 if shift is None else shift.shape[0],
                x.stride(0),
                RANK=R,
                PADDED=LEAST,
                BLOCK_M=BLOCK_M,
                BLOCK_K=BLOCK_K,
                PRECISION=PRECISION,
                num_warps=WARPS,
                num_stages=STAGES,
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
    """As the reference: two kernels, of which the second finds x in the card's cache."""
    p = coordinates(x, directions, shift, smooth, index, fraction)
    given = {"index": index, "fraction": fraction, "shift": shift, "smooth": smooth, "hadamard": hadamard}
    return *quantize_activation(x, directions=directions, coordinates=p, symmetric=symmetric, **given), p
