"""Launching the Triton quantizers; what quantize_activation, quantize_along and their fused relatives share."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autotune
from .directions import check
from .launcher import Launcher, launcher
from .row_tiles import VECTOR, Tile, plans
from .triton_device import capability_of, device_refusal, selected

ORDERS = (1, 4, 16, 64, 256)
# tiles that are compared where choices are measured: each takes seconds to compile
MOST_TRIED = 6
LONG_CONSTANTS: dict[str, Any] = {"WIDTH": 4096, "VECTOR": VECTOR, "num_warps": 16}


class Form(NamedTuple):
    """What a quantizer is compiled for: rows of K columns, as `plans` describes them, and where their range is from."""

    device: torch.device
    K: int
    order: int
    tables: int
    itemsize: int
    prologue: str
    rank: int
    ranges: str
    find: bool

    def tiles(self) -> tuple[Tile, ...]:
        """Best first."""
        row = (self.K, self.order, self.tables, self.itemsize, self.prologue, self.rank > 0)
        return plans(*row, capability_of(self.device), self.find)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def refusal(
    device: torch.device,
    *,
    K: int,
    N: int | None = None,
    group_size: int | None = None,
    hadamard: int = 1,
    dtype: torch.dtype = torch.float32,
) -> str | None:
    """Why the Triton quantizers cannot take this, or None."""
    if hadamard not in ORDERS:
        return f"Hadamard block {hadamard} is not 1, 4, 16, 64 or 256"
    if K % hadamard:
        return f"K={K} is not divisible by the Hadamard block {hadamard}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype} is not float32, float16 or bfloat16"
    return device_refusal(device)


def launch(
    x: Tensor,
    *,
    up: Tensor | None = None,
    prologue: str = "plain",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    tokens: int = 1,
    eps: float = 0.0,
    index: Tensor,
    fraction: Tensor,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    directions: Tensor | None = None,
    coordinates: Tensor | None = None,
    find: bool = False,
    hadamard: int = 1,
    symmetric: bool = True,
    static_scale: Tensor | None = None,
    static_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x (and up) [M, K], last dimension contiguous -> codes [M, K], scale [M, 1], zero [M, 1] or None.

    gamma, beta [B, K] serve `tokens` consecutive rows each. find: coordinates [M, R] are written, not read; only where
    `finds` says so. Everything else as in the references.
    """
    M, K = x.shape
    if hadamard not in ORDERS or K % hadamard:
        raise ValueError(
            f"K={K} cannot be rotated in Hadamard blocks of {hadamard}; use one of {ORDERS} that divides K"
        )
    check(coordinates, directions, M, K)
    # rows may lie apart, columns not
    x = x if x.stride(1) == 1 else x.contiguous()
    up, gamma, beta = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (up, gamma, beta))
    ranges = "static" if static_scale is not None else "symmetric" if symmetric else "asymmetric"
    rows = 1 if ranges == "static" else M
    with_zero = static_zero is not None if ranges == "static" else not symmetric
    codes = torch.empty((M, K), dtype=torch.int8, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    zero = torch.empty((rows, 1), dtype=torch.float32, device=x.device) if with_zero else None
    pointers = (
        contiguous(shift),
        contiguous(smooth),
        contiguous(directions),
        contiguous(coordinates),
        contiguous(static_scale),
        contiguous(static_zero) if ranges == "static" else None,
        index,
        fraction if fraction.device == x.device else fraction.to(x.device),
        codes,
        scale,
        zero,
    )
    T = next((table.shape[0] for table in (shift, static_scale) if table is not None), 1)
    sizes = (M, K, T, x.stride(0), 0 if up is None else up.stride(0))
    tables, rank = (shift is not None) + (smooth is not None), 0 if directions is None else directions.shape[0]
    form = Form(x.device, K, hadamard, tables, x.element_size(), prologue, rank, ranges, find)
    norm = contiguous(weight), contiguous(bias), gamma, beta
    strides = 0 if gamma is None else gamma.stride(0), 0 if beta is None else beta.stride(0)

    def run(tile: Tile | None) -> None:
        kernel, tile = rows_kernel(form, tile)
        if tile is None:
            kernel(M, x, up, *pointers, *sizes)
        else:
            most = multiprocessors(x.device) * tile.programs_per_multiprocessor
            kernel(min(-(-M // tile.rows), most), x, up, *norm, *pointers, *sizes, tokens, *strides, eps)

    if M:
        with selected(x.device):
            run(fastest_tile(run, M, x.dtype, form) if autotune.enabled(x.device) else None)
    return codes, for_all_rows(scale, M), None if zero is None else for_all_rows(zero, M)


def fastest_tile(run: Callable[[Tile], None], M: int, dtype: torch.dtype, form: Form) -> Tile | None:
    """Of the tiles for such rows that which is measured to be the fastest, see autotune.py."""
    options = form.tiles()
    if not options:
        return None
    flags = (dtype, form.order, form.tables, form.prologue, form.rank, form.ranges, form.find)
    key = autotune.key_of("quantize_rows", form.device, capability_of(form.device), M, 0, form.K, flags)
    return autotune.tuned_tile(key, options[:MOST_TRIED], options[0], run, form.device)


@lru_cache(maxsize=1024)
def rows_kernel(form: Form, tile: Tile | None) -> tuple[Launcher, Tile | None]:
    """What quantizes such rows, with this tile or the planned one; without any, a program per row that reads it
    twice."""
    from .quantize_rows_triton import quantize_long_rows, quantize_rows

    capability = capability_of(form.device)
    tile = tile or next(iter(form.tiles()), None)
    given = {
        "PROLOGUE": form.prologue,
        "RANGE": form.ranges,
        "ORDER": form.order,
        "RANK": form.rank,
        # an addition fused with the product before it would round once instead of twice
        "enable_fp_fusion": False,
    }
    if tile is None:
        return launcher(quantize_long_rows, capability, **given, **LONG_CONSTANTS), None
    options = tile.compiler_options(form.ranges, form.prologue, form.find, form.tables) if capability else {}
    return launcher(quantize_rows, capability, FIND=form.find, **given, **tile.constants(form.K), **options), tile


def for_all_rows(value: Tensor, M: int) -> Tensor:
    """[1, 1] or [M, 1] -> [M, 1]."""
    return value if value.shape[0] == M else value.expand(M, 1)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
