"""A whole 4-bit weight decoded to int8 in memory, for a product with so many tokens that it outlasts that."""

# Triton's decorators are beyond the type checker
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launcher import Launcher, launcher
from ..tiles import EVEN_N
from ..triton_device import capability_of
from .decode_triton import decode_tile, level_pointers, levels_before, levels_of

WIDEST = 512


@triton.jit
def decode_weight(
    w_ptr, levels_ptr, table_ptr, codes_ptr, K,
    GROUP: tl.constexpr, PERMUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K] of the int8 codes [N, K] from w [N, K / 8] int32 words of 8 codes, both divided evenly."""
    steps = K // BLOCK_K
    first_n = (tl.program_id(0) // steps * BLOCK_N).to(tl.int64)
    first_k = tl.multiple_of(tl.program_id(0) % steps * BLOCK_K, BLOCK_K)
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    stride_w = tl.multiple_of(K // 8, 16)
    w_ptr += first_n * stride_w + first_k // 8
    words = tl.load(w_ptr + rows[:, None] * stride_w + tl.arange(0, BLOCK_K // 8)[None, :])
    fours_ptr = level_pointers(levels_ptr, first_n, rows, K // GROUP, BLOCK_K, GROUP)
    levels = levels_of(tl.load(fours_ptr + levels_before(first_k, GROUP)), BLOCK_N, BLOCK_K, GROUP)
    codes = decode_tile(words, levels, table_ptr, BLOCK_N, BLOCK_K, PERMUTE, False)
    codes_ptr += first_n * K + first_k
    tl.store(codes_ptr + rows[:, None] * K + columns[None, :], codes)


@lru_cache(maxsize=256)
def kernel(device: torch.device, width: int, group: int) -> Launcher:
    capability = capability_of(device)
    return launcher(
        decode_weight,
        capability,
        GROUP=group,
        PERMUTE=capability > 0,
        BLOCK_N=EVEN_N,
        BLOCK_K=width,
        num_warps=4,
        enable_fp_fusion=False,
    )


def decode(words: Tensor, levels: Tensor, table: Tensor | None, codes: Tensor) -> None:
    """words [N, K / 8] int32, levels [N, G] uint8, table 4 int32 words -> `codes` [N, K] int8, written.

    N and K are multiples of EVEN_N and EVEN_K, and the operands aligned. On the current device.
    """
    (N, K), G = codes.shape, levels.shape[1]
    width = math.gcd(K, WIDEST)
    kernel(codes.device, width, K // G)(N // EVEN_N * (K // width), words, levels, table, codes, K)
