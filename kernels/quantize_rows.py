"""Choosing a tile and launching the Triton quantizers; what quantize_activation and its fused relatives share."""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import ceil
from typing import Any

import torch
from torch import Tensor

from .directions import check
from .launcher import Launcher, launcher
from .tiles import family_of
from .triton_device import capability_of, device_refusal

# a row of more columns is read twice: its registers would spill on one card or another
LONGEST_ROW = 15360
LONGEST_FUSED_ROW = 13824
ORDERS = (1, 4, 16, 64, 256)
# a thread's neighbouring columns: 16 bytes of a half-precision row, 8 bytes of codes
VECTOR = 8
REGISTER_FILE = 65536
# bytes of a multiprocessor per architecture family; a program's own and its sums over rows
SHARED_MEMORY = {80: 164 * 1024, 86: 100 * 1024, 89: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}
SHARED_MEMORY_RESERVED = 3 * 1024
LONG_CONSTANTS: dict[str, Any] = {"WIDTH": 4096, "VECTOR": VECTOR, "num_warps": 16}


@dataclass(frozen=True)
class Tile:
    """rows x (chunks x width) columns per step of a program. The next tile is loaded to registers meanwhile
    (`prefetch`), or the next stages - 1 to shared memory. `hold_shift`: the shift stays in registers from tile to tile,
    else it is read anew."""

    rows: int
    width: int
    chunks: int
    warps: int
    prefetch: bool
    registers: int
    hold_shift: bool = True
    stages: int = 1

    @property
    def vector(self) -> int:
        """Neighbouring columns that one thread holds."""
        return min(self.width, VECTOR)

    def constants(self, K: int) -> dict[str, Any]:
        """Compile-time arguments and options of `quantize_rows`."""
        return {
            "ROWS": self.rows,
            "WIDTH": self.width,
            "CHUNKS": self.chunks,
            "PADDED": self.width * self.chunks != K,
            "VECTOR": self.vector,
            "PREFETCH": self.prefetch,
            "STAGES": self.stages,
            "HOLD_SHIFT": self.hold_shift,
            "num_warps": self.warps,
        }

    @property
    def programs_per_multiprocessor(self) -> int:
        return max(1, min(2048, REGISTER_FILE // self.registers) // (32 * self.warps))

    def compiler_options(self, ranges: str, prologue: str, find: bool) -> dict[str, Any]:
        """Registers for NVIDIA's compiler, so that exactly the programs that are launched fit on a multiprocessor.

        Left alone it spills a few bytes to fit one more, or takes so many that one program of 8 warps fits, not two.
        Not for forms that need more than the plan counts: a norm or a gate, dynamic ranges of 8 chunks on 4 warps.
        """
        counted = prologue in ("plain", "gelu") if self.warps == 8 else (prologue, ranges) == ("plain", "static")
        if not (counted or find):
            return {}
        return {"maxnreg": min(255, REGISTER_FILE // (32 * self.warps * self.programs_per_multiprocessor) // 8 * 8)}


@lru_cache(maxsize=256)
def plan(
    K: int,
    order: int,
    tables: int,
    itemsize: int,
    prologue: str = "plain",
    directions: bool = False,
    capability: int = 0,
    find: bool = False,
) -> Tile | None:
    """Tile for rows of K columns, or None where the registers do not hold a row.

    tables: per-column fp32 values that stay in registers (shift, 1 / smooth); itemsize: bytes per entry of x; find: the
    coordinates along the directions are found too. Fewest padded columns first, then the next tile's loads in flight,
    then at least 512 threads on a multiprocessor.
    """
    if (LONGEST_ROW if prologue == "plain" else LONGEST_FUSED_ROW) < K:
        return None
    inputs = 2 if prologue == "swiglu" else 1
    # other loads of the loop would go through shared memory too; odd rows are no 16-byte copies; erf outlasts a load
    staged = capability >= 80 and not directions and prologue not in ("layer", "rms", "gelu") and K % 16 == 0
    if K <= 256:
        width = max(16, order, 1 << (K - 1).bit_length())
        registers = 96 + 32 * find
        tile = Tile(4 * 32 * VECTOR // width, width, chunks=1, warps=4, prefetch=not staged, registers=registers)
        return staging(tile, itemsize * inputs, capability) if staged else tile
    best, least = None, float("inf")
    gelu = prologue == "gelu"
    fetching = (False,) if gelu else (False, True) if staged else (True, False)
    holding = (True, False) if (find or gelu) and tables == 2 else (True,)
    for width, prefetch, hold in product((256, 512, 1024, 2048, 4096), fetching, holding):
        chunks, warps = ceil(K / width), max(4, width // (32 * VECTOR))
        # the row in fp32, the tables, the coming tile, and what was read off the compiled kernels
        columns = VECTOR * chunks
        registers = columns * (1 + tables - (not hold)) + 32 + 8 * gelu
        if directions:
            # compute capability 10 multiplies in pairs, which have to lie side by side
            registers += 16 + columns // 4 + 8 * (capability // 10 == 10 and columns > 24)
        if find:
            registers += VECTOR + 8 * (width * chunks > K)
            # rows side by side in a program; the widest rows on compute capability 8 and 12
            registers += 16 * (width < 32 * VECTOR * warps) + 8 * (capability // 10 in (8, 12) and columns > 56)
            registers += 24 * (itemsize == 4 and columns > 56)
            # rows at any address: a mask and an address for every few columns
            registers += 40 * (K % 16 > 0)
        registers += columns * itemsize * inputs // 4 if prefetch else 8 * (itemsize == 4)
        if registers > min(REGISTER_FILE // (32 * warps), 232 if find else 196):
            continue
        tile = Tile(warps * 32 * VECTOR // width, width, chunks, warps, prefetch, max(64, registers), hold)
        if staged and not prefetch:
            tile = staging(tile, itemsize * inputs, capability)
        # sums over a row want registers more than they want warps, and another program for the time they take
        idle = 16 - min(16, tile.programs_per_multiprocessor * warps)
        alone = 0.05 * (tile.programs_per_multiprocessor == 1)
        crowded = 0.0075 * idle + alone if find else 0.1 * (registers > 128)
        waiting = 0.1 * (not prefetch and tile.stages == 1)
        cost = width * chunks * (1 + waiting + 0.05 * (not hold) + crowded + 0.01 * (warps > 8))
        if cost < least:
            best, least = tile, cost
    return best


def staging(tile: Tile, itemsize: int, capability: int) -> Tile:
    """As many tiles ahead as shared memory holds for all programs of a multiprocessor, three at the most."""
    room = SHARED_MEMORY[family_of(capability)] // tile.programs_per_multiprocessor - SHARED_MEMORY_RESERVED
    ahead = room // (tile.rows * tile.width * tile.chunks * itemsize)
    return replace(tile, stages=1 + min(3, ahead))


def finds(K: int, order: int, tables: int, itemsize: int, capability: int = 0) -> bool:
    """Whether the kernel that quantizes rows of K columns can find their coordinates too."""
    return plan(K, order, tables, itemsize, "plain", True, capability, True) is not None


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
    with torch.cuda.device_of(x):
        kernel, tile = rows_kernel(x.device, K, hadamard, tables, x.element_size(), prologue, rank, ranges, find)
        if M == 0:
            pass
        elif tile is not None:
            most = multiprocessors(x.device) * tile.programs_per_multiprocessor
            norm = contiguous(weight), contiguous(bias), gamma, beta
            strides = 0 if gamma is None else gamma.stride(0), 0 if beta is None else beta.stride(0)
            kernel(min(-(-M // tile.rows), most), x, up, *norm, *pointers, *sizes, tokens, *strides, eps)
        else:
            kernel(M, x, up, *pointers, *sizes)
    return codes, for_all_rows(scale, M), None if zero is None else for_all_rows(zero, M)


@lru_cache(maxsize=1024)
def rows_kernel(
    device: torch.device,
    K: int,
    order: int,
    tables: int,
    itemsize: int,
    prologue: str,
    rank: int,
    ranges: str,
    find: bool,
) -> tuple[Launcher, Tile | None]:
    """What quantizes rows of K columns; without a tile, a program per row that reads it twice."""
    from .quantize_rows_triton import quantize_long_rows, quantize_rows

    capability = capability_of(device)
    tile = plan(K, order, tables, itemsize, prologue, rank > 0, capability, find)
    # an addition fused with the product before it would round once instead of twice
    given = {"PROLOGUE": prologue, "RANGE": ranges, "ORDER": order, "RANK": rank, "enable_fp_fusion": False}
    if tile is None:
        return launcher(quantize_long_rows, capability, **given, **LONG_CONSTANTS), None
    options = tile.compiler_options(ranges, prologue, find) if capability else {}
    return launcher(quantize_rows, capability, FIND=find, **given, **tile.constants(K), **options), tile


def for_all_rows(value: Tensor, M: int) -> Tensor:
    """[1, 1] or [M, 1] -> [M, 1]."""
    return value if value.shape[0] == M else value.expand(M, 1)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
