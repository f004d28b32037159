"""int8 x int8 product on integer tensor cores, with the epilogue in the same kernel."""

# Triton's decorators are beyond the type checker
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.3: the same tiles without the copy engine
    TensorDescriptor: Any = None

from .. import autotune
from ..tiles import Tile, tile_for
from ..triton_device import capability_of, device_refusal

# 127**2 K < 2**31
MAX_K = 2**17
OUTPUT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def tile_position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile of this program: GROUP_M rows of tiles are walked column by column, so that L2 sees both operands again."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % rows, within // rows


@triton.jit
def table_row(table_ptr, index_ptr, fraction_ptr, T, N, offs_n, mask_n, INTERPOLATE: tl.constexpr):
    """Row index + fraction of a [T, N] table at offs_n, fp32; both stay on the device. As numerics.lerp_rows."""
    index = tl.load(index_ptr).to(tl.int64)
    low = tl.load(table_ptr + index * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if INTERPOLATE:
        following = tl.minimum(index + 1, T - 1)
        high = tl.load(table_ptr + following * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        low = low + tl.load(fraction_ptr) * (high - low)
    return low


@triton.jit
def store_tile(
    acc,
    y_ptr,
    row_scale_ptr,
    row_zero_ptr,
    column_scale_ptr,
    column_sum_ptr,
    bias_ptr,
    correction_ptr,
    index_ptr,
    fraction_ptr,
    M,
    N,
    T,
    stride_row_scale,
    stride_row_zero,
    first_m,
    first_n,
    INTERPOLATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] int32 -> y; the fp32 operations of the reference in its order, none of them fused.

    PARTS 2: one half of the columns after the other, for tiles whose column vectors would not fit in registers.
    """
    if PARTS > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            store_tile(
                left if half == 0 else right,
                y_ptr,
                row_scale_ptr,
                row_zero_ptr,
                column_scale_ptr,
                column_sum_ptr,
                bias_ptr,
                correction_ptr,
                index_ptr,
                fraction_ptr,
                M,
                N,
                T,
                stride_row_scale,
                stride_row_zero,
                first_m,
                first_n + half * HALF,
                INTERPOLATE,
                BLOCK_M,
                HALF,
                PARTS // 2,
            )
    else:
        offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        mask_m, mask_n = offs_m < M, offs_n < N
        y = acc.to(tl.float32)
        if row_zero_ptr is not None:
            row_zero = tl.load(row_zero_ptr + offs_m * stride_row_zero, mask=mask_m, other=0.0)
            column_sum = tl.load(column_sum_ptr + offs_n, mask=mask_n, other=0).to(tl.float32)
            y = y - row_zero[:, None] * column_sum[None, :]
        row_scale = tl.load(row_scale_ptr + offs_m * stride_row_scale, mask=mask_m, other=0.0)
        column_scale = tl.load(column_scale_ptr + offs_n, mask=mask_n, other=0.0)
        y = y * row_scale[:, None] * column_scale[None, :]
        if bias_ptr is not None:
            y = y + tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if correction_ptr is not None:
            y = y + table_row(correction_ptr, index_ptr, fraction_ptr, T, N, offs_n, mask_n, INTERPOLATE)[None, :]
        # M N may pass 2**31, a tile never does: one scalar in int64, offsets in int32
        y_ptr += first_m.to(tl.int64) * N
        tl.store(
            y_ptr + tl.arange(0, BLOCK_M)[:, None] * N + offs_n[None, :],
            y.to(y_ptr.dtype.element_ty),
            mask=mask_m[:, None] & mask_n[None, :],
        )


# M changes with every resolution and prompt: a kernel specialized on it would be compiled again
@triton.jit(do_not_specialize=["M", "T"])
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
    index_ptr,
    fraction_ptr,
    M,
    N,
    K,
    T,
    stride_row_scale,
    stride_row_zero,
    INTERPOLATE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DOTS: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One tile of y [M, N] = epilogue(a [M, K] w [N, K]ᵀ); an absent operand is None.

    DESCRIPTORS: a and w come as tensor descriptors, and the copy engine of Hopper and later fills shared memory.
    """
    tile_m, tile_n = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
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
    store_tile(
        acc,
        y_ptr,
        row_scale_ptr,
        row_zero_ptr,
        column_scale_ptr,
        column_sum_ptr,
        bias_ptr,
        correction_ptr,
        index_ptr,
        fraction_ptr,
        M,
        N,
        T,
        stride_row_scale,
        stride_row_zero,
        first_m,
        first_n,
        INTERPOLATE,
        BLOCK_M,
        BLOCK_N,
        PARTS,
    )


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
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """a [M, K] int8, w [N, K] int8 -> [M, N] dtype; see reference.py. Bit for bit the same."""
    a, w = aligned(a), aligned(w)
    (M, K), N = a.shape, w.shape[0]
    if w.shape[1] != K:
        raise ValueError(f"a has {K} columns, w {w.shape[1]}")
    y = torch.empty((M, N), dtype=dtype, device=a.device)
    operands = epilogue_operands(row_scale, column_scale, row_zero, column_sum, bias, correction, index, fraction)
    strides = row_stride(row_scale), row_stride(row_zero)

    def launch(tile: Tile) -> None:
        descriptors = tile.descriptors and TensorDescriptor is not None
        int8_linear_kernel[(triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),)](
            descriptor(a, tile.block_m, tile.block_k) if descriptors else a,
            descriptor(w, tile.block_n, tile.block_k) if descriptors else w,
            y,
            *operands,
            M,
            N,
            K,
            groups_of(correction),
            *strides,
            DESCRIPTORS=descriptors,
            **launch_options(tile, K, correction),
        )

    if y.numel():
        flags = (dtype, row_zero is not None, bias is not None, correction is not None)
        run("int8_linear", launch, a.device, M, N, K, flags)
    return y


def run(op: str, launch: Callable[[Tile], None], device: torch.device, M: int, N: int, K: int, flags: tuple) -> None:
    """launch(tile) on the tensors' device, with the tabled tile or, where asked for, the tuned one."""
    capability = capability_of(device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if autotune.enabled() and device.type == "cuda":
            tile = autotune.tuned_tile(op, launch, device, capability, M, N, K, flags)
        else:
            tile = tile_for(op, capability, M, N, K)
        launch(tile)


def launch_options(tile: Tile, K: int, correction: Tensor | None) -> dict:
    """The constexprs that both linears share, and Triton's own options. No fused multiply-add: it has other bits."""
    return {
        "INTERPOLATE": groups_of(correction) > 1,
        "EVEN_K": K % (tile.block_k * tile.dots) == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "DOTS": tile.dots,
        "PARTS": tile.parts,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": False,
    }


def descriptor(operand: Tensor, rows: int, columns: int):
    """What the copy engine needs to know of a contiguous [*, K] operand that is read in blocks of [rows, columns]."""
    # not operand.stride(): that of a single row may be anything
    return TensorDescriptor(operand, list(operand.shape), [operand.shape[1], 1], [rows, columns])


def aligned(operand: Tensor) -> Tensor:
    """Contiguous and at an address that words and descriptors can be read from: a view into a file may not be."""
    operand = operand.contiguous()
    return operand if operand.data_ptr() % 16 == 0 else operand.clone()


def epilogue_operands(
    row_scale: Tensor,
    column_scale: Tensor,
    row_zero: Tensor | None,
    column_sum: Tensor | None,
    bias: Tensor | None,
    correction: Tensor | None,
    index: Tensor,
    fraction: Tensor,
) -> tuple[Tensor | None, ...]:
    """In the order of the kernels' arguments. column_sum only matters where a zero point multiplies it."""
    if row_zero is not None and column_sum is None:
        raise ValueError("an asymmetric activation needs the weight's column sums")
    return (
        row_scale,
        row_zero,
        column_scale.contiguous(),
        None if row_zero is None or column_sum is None else column_sum.contiguous(),
        None if bias is None else bias.contiguous(),
        None if correction is None else correction.contiguous(),
        None if correction is None else index,
        None if correction is None else fraction,
    )


def row_stride(rows: Tensor | None) -> int:
    """Elements between rows of [M, 1]; 0 where one value is expanded."""
    return 0 if rows is None else rows.stride(0)


def groups_of(correction: Tensor | None) -> int:
    return 1 if correction is None else correction.shape[0]
