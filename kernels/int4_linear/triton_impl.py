"""4-bit weights decoded to int8, in registers inside the main loop or all of them before it, then the int8 product on
tensor cores."""

# Triton's decorators are beyond the type checker
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..descriptors_triton import described, stores
from ..int8_linear.triton_impl import multiply
from ..int8_linear.triton_impl import refusal as int8_refusal
from ..launcher import GROUP_POINTERS, Launcher, launcher
from ..linear_launch import aligned, epilogue_operands, groups_of, launch_options, rank_of, row_stride, run
from ..linear_triton import epilogue_vectors, finish_tile, tile_position
from ..tiles import Tile, bucket_of, candidates, family_of, in_registers, programs
from ..triton_device import capability_of
from .decode_triton import decode_tile, level_pointers, levels_before, levels_of
from .whole_triton import decode

GROUP_SIZES = (16, 32, 64, 128)
# Hopper reads its left operand from registers, data-centre Blackwell from tensor memory: the decoded weight goes there
TRANSPOSED_FAMILIES = (90, 100)


@triton.jit(do_not_specialize=["M", "T"], do_not_specialize_on_alignment=GROUP_POINTERS)
def int4_linear_kernel(
    a_ptr,
    w_ptr,
    levels_ptr,
    table_ptr,
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
    GROUP: tl.constexpr,
    LEVEL_ALIGNMENT: tl.constexpr,
    RANK: tl.constexpr,
    INTERPOLATE: tl.constexpr,
    EVEN_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PERMUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DOTS: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
    OPAQUE: tl.constexpr,
    AHEAD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STORE: tl.constexpr,
):
    """One tile of y [M, N] = epilogue(a [M, K] decoded(w)ᵀ), w [N, K / 8] int32 words of 8 codes.

    TRANSPOSED: the product is w aᵀ, see TRANSPOSED_FAMILIES. EARLY as in int8_linear; DESCRIPTORS too, of a alone,
    and STORE. AHEAD: codes and levels of the following product are on their way to registers during this one.
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
    LEVELS: tl.constexpr = (BLOCK_K + GROUP - 1) // GROUP
    WORDS: tl.constexpr = BLOCK_K // 8
    offs_k = tl.arange(0, BLOCK_K)
    offs_word = tl.arange(0, WORDS)
    # rows past the end are read from the last row and never stored: no mask in the loop
    rows_w = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)
    stride_w = K // 8
    if EVEN_K and BLOCK_M * BLOCK_N >= 4096:
        # 16 bytes per thread and copy; small tiles would spill
        stride_w = tl.multiple_of(stride_w, WORDS)
    stride_levels = tl.multiple_of(K // GROUP, LEVEL_ALIGNMENT)
    if not DESCRIPTORS:
        rows_a = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_m)
        a_ptr += first_m.to(tl.int64) * K
        offs_a = rows_a[:, None] * K + offs_k[None, :]
    w_ptr += first_n.to(tl.int64) * stride_w
    offs_w = rows_w[:, None] * stride_w + offs_word[None, :]
    if AHEAD:
        fours_ptr = level_pointers(levels_ptr, first_n, rows_w, K // GROUP, BLOCK_K, GROUP)
        words, fours = tl.load(w_ptr + offs_w), tl.load(fours_ptr)
    levels_ptr += tl.multiple_of(first_n.to(tl.int64) * stride_levels, LEVEL_ALIGNMENT)
    offs_levels = rows_w[:, None] * stride_levels + tl.arange(0, LEVELS)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K * DOTS):
        for dot in tl.static_range(DOTS):
            k = start + dot * BLOCK_K
            if DESCRIPTORS:
                a = a_ptr.load([first_m, k])
            elif EVEN_K:
                a = tl.load(a_ptr + offs_a)
            else:
                a = tl.load(a_ptr + offs_a, mask=offs_k[None, :] < K - k, other=0)
            if AHEAD:
                levels = levels_of(fours, BLOCK_N, BLOCK_K, GROUP)
            elif EVEN_K:
                words = tl.load(w_ptr + offs_w)
                levels = tl.load(levels_ptr + k // GROUP + offs_levels)
            else:
                words = tl.load(w_ptr + offs_w, mask=offs_word[None, :] < (K - k) // 8, other=0)
                inside = tl.arange(0, LEVELS)[None, :] < stride_levels - k // GROUP
                levels = tl.load(levels_ptr + k // GROUP + offs_levels, mask=inside, other=0)
            w = decode_tile(words, levels, table_ptr, BLOCK_N, BLOCK_K, PERMUTE, not TRANSPOSED)
            if AHEAD:
                following = tl.multiple_of(tl.minimum(k + BLOCK_K, K - BLOCK_K), BLOCK_K)
                words = tl.load(w_ptr + following // 8 + offs_w)
                fours = tl.load(fours_ptr + levels_before(following, GROUP))
            else:
                w_ptr += WORDS
            left, right = (w, a.T) if TRANSPOSED else (a, w.T)
            acc = tl.dot(left, right, acc, out_dtype=tl.int32)
            if not DESCRIPTORS:
                a_ptr += BLOCK_K
    if TRANSPOSED:
        acc = acc.T
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
    """None if int4_linear can run here, else why not."""
    if group_size not in GROUP_SIZES:
        return f"group size {group_size} is not 16, 32, 64 or 128"
    if K % group_size:
        return f"K = {K} is not divisible by the group size {group_size}"
    return int8_refusal(device, K=K, N=N, dtype=dtype)


@lru_cache(maxsize=4096)
def kernel(
    device: torch.device,
    tile: Tile,
    K: int,
    group: int,
    rank: int,
    groups: int,
    transposed: bool,
    descriptors: bool,
    store: bool,
) -> Launcher:
    capability = capability_of(device)
    options = launch_options(tile, K, rank, groups, capability)
    return launcher(
        int4_linear_kernel,
        capability,
        GROUP=group,
        LEVEL_ALIGNMENT=math.gcd(K // group, 16),
        TRANSPOSED=transposed,
        PERMUTE=capability > 0,
        AHEAD=tile.ahead and options["EVEN_K"],
        DESCRIPTORS=descriptors,
        STORE=store,
        **options,
    )


def room(N: int, K: int, device: torch.device) -> Tensor | None:
    """Where a whole weight can be decoded to, for as long as a product lasts; None where memory is too short for it."""
    try:
        return torch.empty((N, K), dtype=torch.int8, device=device)
    except torch.OutOfMemoryError:
        return None


def int4_linear(
    a: Tensor,
    packed: Tensor,
    *,
    levels: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    index: Tensor,
    fraction: Tensor,
    table: Tensor | None = None,
    row_zero: Tensor | None = None,
    column_sum: Tensor | None = None,
    bias: Tensor | None = None,
    correction: Tensor | None = None,
    coordinates: Tensor | None = None,
    responses: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """a [M, K] int8, packed [N, K / 2] uint8, levels [N, G] uint8 -> [M, N] dtype; see reference.py.

    Bit for bit the same wherever the decoded codes lie within int8, as every encoder makes them.
    """
    a = aligned(a)
    (M, K), (N, G) = a.shape, levels.shape
    group = K // G
    if packed.shape != (N, K // 2) or group not in GROUP_SIZES or group * G != K:
        raise ValueError(
            f"codes {tuple(packed.shape)} and levels {tuple(levels.shape)} are no [{N}, {K // 2}] and "
            f"[{N}, {K} / 16, 32, 64 or 128]"
        )
    words, levels = aligned(packed).view(torch.int32), aligned(levels)
    lookup = None if table is None else aligned(table).view(torch.int32)
    y = torch.empty((M, N), dtype=dtype, device=a.device)
    operands = epilogue_operands(
        row_scale, column_scale, row_zero, column_sum, bias, correction, coordinates, responses, index, fraction
    )
    T, strides = groups_of(correction), (row_stride(row_scale), row_stride(row_zero))
    transposed = family_of(capability_of(a.device)) in TRANSPOSED_FAMILIES

    def launch(tile: Tile) -> None:
        if tile.decoded and (codes := room(N, K, a.device)) is not None:
            decode(words, levels, lookup, codes)
            multiply(tile, a, codes, y, operands, rank_of(responses), T, strides)
            return
        if tile.decoded:
            (tile, *_) = in_registers(candidates("int4_linear", capability_of(a.device), bucket_of(M), N, K))
        descriptors, store = tile.descriptors, stores(tile, y)
        kernel(a.device, tile, K, group, rank_of(responses), T, transposed, descriptors, store)(
            programs(tile, M, N),
            described(a, tile.block_m, tile.block_k, descriptors),
            words,
            levels,
            lookup,
            described(y, tile.block_m, tile.block_n, store),
            *operands,
            M,
            N,
            K,
            T,
            *strides,
        )

    if y.numel():
        given = (table, row_zero, bias, correction, responses)
        flags = (dtype, group, *(operand is not None for operand in given))
        run("int4_linear", launch, a.device, M, N, K, flags)
    return y
