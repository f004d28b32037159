"""int8 x int8 product on integer tensor cores, with the epilogue in the same kernel."""

# Triton's decorators are beyond the type checker
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..descriptors_triton import described, stores
from ..launcher import GROUP_POINTERS, Launcher, launcher
from ..linear_launch import aligned, epilogue_operands, groups_of, launch_options, rank_of, row_stride, run
from ..linear_triton import epilogue_vectors, finish_tile, tile_position
from ..tiles import Tile, programs
from ..triton_device import capability_of, device_refusal

# 127**2 K < 2**31
MAX_K = 2**17
OUTPUT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


# M changes with every resolution and prompt: a kernel specialized on it would be compiled again
@triton.jit(do_not_specialize=["M", "T"], do_not_specialize_on_alignment=GROUP_POINTERS)
def int8_linear_kernel(
    a_ptr,
    w_ptr,
    y_ptr,
    row_scale_ptr,
    row_zero_ptr,
    column_scale_ptr,
    column_sum_ptr,
    bias_ptr,
    correction_ptr,
    coordinates_ptr,
    responses_ptr,
    index_ptr,
    fraction_ptr,
    M,
    N,
    K,
    T,
    stride_row_scale,
    stride_row_zero,
    RANK: tl.constexpr,
    INTERPOLATE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DOTS: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
    OPAQUE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STORE: tl.constexpr,
):
    """One tile of y [M, N] = epilogue(a [M, K] w [N, K]ᵀ); an absent operand is None.

    EARLY: what the epilogue reads is loaded before the main loop, which hides how long that takes.
    DESCRIPTORS: a and w come as tensor descriptors, and the copy engine of Hopper and later fills shared memory.
    STORE: y does too, and the copy engine writes it.
    """
    tile_m, tile_n = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    operands = (
        row_scale_ptr, row_zero_ptr, column_scale_ptr, column_sum_ptr, bias_ptr, correction_ptr, coordinates_ptr,
        responses_ptr, index_ptr, fraction_ptr, T, stride_row_scale, stride_row_zero,
    )  # fmt: skip
    vectors = None
    if EARLY:
        vectors = epilogue_vectors(
            operands, M, N, first_m, first_n, RANK, INTERPOLATE, BLOCK_M, BLOCK_N, OPAQUE
        )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    if DESCRIPTORS:
        for k in range(0, K, BLOCK_K):
            a, w = a_ptr.load([first_m, k]), w_ptr.load([first_n, k])
            acc = tl.dot(a, w.T, acc, out_dtype=tl.int32)
    else:
        offs_k = tl.arange(0, BLOCK_K)
        # rows past the end are read from the last row and never stored: no mask in the loop
        a_ptr += first_m.to(tl.int64) * K
        w_ptr += first_n.to(tl.int64) * K
        offs_a = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_m)[:, None] * K + offs_k[None, :]
        offs_w = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)[None, :] * K + offs_k[:, None]
        for k in range(0, K, BLOCK_K * DOTS):
            for dot in tl.static_range(DOTS):
                if EVEN_K:
                    a, w = tl.load(a_ptr + offs_a), tl.load(w_ptr + offs_w)
                else:
                    left = K - k - dot * BLOCK_K
                    a = tl.load(a_ptr + offs_a, mask=offs_k[None, :] < left, other=0)
                    w = tl.load(w_ptr + offs_w, mask=offs_k[:, None] < left, other=0)
                acc = tl.dot(a, w, acc, out_dtype=tl.int32)
                a_ptr += BLOCK_K
                w_ptr += BLOCK_K
    finish_tile(
        acc, vectors, operands, y_ptr, M, N, first_m, first_n, RANK, INTERPOLATE, BLOCK_M, BLOCK_N, PARTS, STORE
    )  # fmt: skip


def refusal(
    device: torch.device,
    *,
    K: int,
    N: int | None = None,
    group_size: int | None = None,
    hadamard: int = 1,
    dtype: torch.dtype = torch.float32,
) -> str | None:
    """None if int8_linear can run here, else why not."""
    reason = device_refusal(device)
    if reason is None and K > MAX_K:
        reason = f"K = {K} > {MAX_K}: int32 sums may overflow"
    if reason is None and dtype not in OUTPUT_TYPES:
        reason = f"output {dtype} is not fp32, fp16 or bf16"
    return reason


@lru_cache(maxsize=4096)
def kernel(
    device: torch.device, tile: Tile, K: int, rank: int, groups: int, descriptors: bool, store: bool
) -> Launcher:
    capability = capability_of(device)
    options = launch_options(tile, K, rank, groups, capability)
    return launcher(int8_linear_kernel, capability, DESCRIPTORS=descriptors, STORE=store, **options)


def multiply(
    tile: Tile,
    a: Tensor,
    w: Tensor,
    y: Tensor,
    operands: tuple[Tensor | None, ...],
    rank: int,
    groups: int,
    strides: tuple[int, int],
) -> None:
    """One launch, on the current device: y [M, N] from `aligned` a [M, K] and w [N, K]. operands: of
    `epilogue_operands`; strides: of row scale and row zero."""
    (M, K), N = a.shape, w.shape[0]
    descriptors, store = tile.descriptors, stores(tile, y)
    kernel(a.device, tile, K, rank, groups, descriptors, store)(
        programs(tile, M, N),
        described(a, tile.block_m, tile.block_k, descriptors),
        described(w, tile.block_n, tile.block_k, descriptors),
        described(y, tile.block_m, tile.block_n, store),
        *operands,
        M,
        N,
        K,
        groups,
        *strides,
    )


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
    """a [M, K] int8, w [N, K] int8 -> [M, N] dtype; see reference.py. Bit for bit the same."""
    a, w = aligned(a), aligned(w)
    (M, K), N = a.shape, w.shape[0]
    if w.shape[1] != K:
        raise ValueError(f"a has {K} columns, w {w.shape[1]}")
    y = torch.empty((M, N), dtype=dtype, device=a.device)
    operands = epilogue_operands(
        row_scale, column_scale, row_zero, column_sum, bias, correction, coordinates, responses, index, fraction
    )
    T, strides = groups_of(correction), (row_stride(row_scale), row_stride(row_zero))

    def launch(tile: Tile) -> None:
        multiply(tile, a, w, y, operands, rank_of(responses), T, strides)

    if y.numel():
        flags = (dtype, row_zero is not None, bias is not None, correction is not None, responses is not None)
        run("int8_linear", launch, a.device, M, N, K, flags)
    return y
