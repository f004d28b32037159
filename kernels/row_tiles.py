"""Tiles of the Triton quantizers, from a count of registers and shared memory: whole rows of K columns."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import ceil
from typing import Any

from .tiles import family_of

# a row of more columns is read twice: its registers would spill on one card or another
LONGEST_ROW = 15360
LONGEST_FUSED_ROW = 13824
# a thread's neighbouring columns: 16 bytes of a half-precision row, 8 bytes of codes
VECTOR = 8
REGISTER_FILE = 65536
# bytes of a multiprocessor per architecture family; a program's own and its sums over rows
SHARED_MEMORY = {80: 164 * 1024, 86: 100 * 1024, 89: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}
SHARED_MEMORY_RESERVED = 1536


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
            "COLUMNS": K,
            "VECTOR": self.vector,
            "PREFETCH": self.prefetch,
            "STAGES": self.stages,
            "HOLD_SHIFT": self.hold_shift,
            "num_warps": self.warps,
        }

    @property
    def programs_per_multiprocessor(self) -> int:
        return max(1, min(2048, REGISTER_FILE // self.registers) // (32 * self.warps))

    def compiler_options(self, ranges: str, prologue: str, find: bool, tables: int) -> dict[str, Any]:
        """Registers for NVIDIA's compiler, so that exactly the programs that are launched fit on a multiprocessor.

        Left alone it spills a few bytes to fit one more, or takes so many that one program of 8 warps fits, not two.
        Not for forms that need more than the plan counts: a norm or a gate, dynamic ranges of 8 chunks on 4 warps;
        but for all where it counts so many that they may have the most.
        """
        counted = prologue in ("plain", "gelu") if self.warps == 8 else (prologue, ranges) == ("plain", "static")
        counted = counted or find or (self.stages > 1 and prologue == "plain" and tables == 0)
        if not counted and self.registers <= 168:
            return {}
        return {"maxnreg": min(255, REGISTER_FILE // (32 * self.warps * self.programs_per_multiprocessor) // 8 * 8)}


@dataclass(frozen=True)
class Row:
    """What a quantizer's rows are, as `plans` takes them."""

    K: int
    order: int
    tables: int
    itemsize: int
    prologue: str
    directions: bool
    capability: int
    find: bool

    @property
    def inputs(self) -> int:
        return 2 if self.prologue == "swiglu" else 1

    @property
    def light(self) -> bool:
        """Only shifted and scaled."""
        return self.order == 1 and self.prologue == "plain" and not self.directions

    @property
    def staged(self) -> bool:
        """May come through shared memory. Other loads of the loop would too, odd rows are no 16-byte copies, and an
        erf outlasts a load."""
        passes = self.prologue not in ("layer", "rms", "gelu") and not self.directions
        return passes and self.capability >= 80 and self.K % 16 == 0


def plan(*row: Any, **more: Any) -> Tile | None:
    """The best of `plans` for such rows, or None."""
    return next(iter(plans(*row, **more)), None)


@lru_cache(maxsize=256)
def plans(
    K: int,
    order: int,
    tables: int,
    itemsize: int,
    prologue: str = "plain",
    directions: bool = False,
    capability: int = 0,
    find: bool = False,
) -> tuple[Tile, ...]:
    """Tiles for rows of K columns, best first; none where the registers do not hold a row.

    tables: per-column fp32 values that stay in registers (shift, 1 / smooth); itemsize: bytes per entry of x; find: the
    coordinates along the directions are found too: threads may then hold the same columns of two rows, and read the
    directions once. Fewest padded columns first, then the next tile's loads in flight, then at least 512 threads on a
    multiprocessor; rows that are only shifted and scaled get few threads with many columns each instead.
    """
    row = Row(K, order, tables, itemsize, prologue, directions, capability, find)
    if (LONGEST_ROW if prologue == "plain" else LONGEST_FUSED_ROW) < K:
        return ()
    if K <= 256:
        width = max(16, order, 1 << (K - 1).bit_length())
        registers = 96 + 32 * find
        return (Tile(4 * 32 * VECTOR // width, width, chunks=1, warps=4, prefetch=True, registers=registers),)
    costs = {tile: cost(row, tile) for tile in tiles_of(row)}
    return tuple(sorted(costs, key=lambda tile: costs[tile]))


def tiles_of(row: Row) -> Iterator[Tile]:
    """Of rows of more than 256 columns, those that their registers hold."""
    fetching = (False,) if row.prologue == "gelu" else (False, True) if row.staged else (True, False)
    holding = (True, False) if (row.find or row.prologue == "gelu") and row.tables == 2 else (True,)
    together = (1, 2) if row.find and row.order > 1 else (1,)
    for width, prefetch, hold, rows in product((256, 512, 1024, 2048, 4096), fetching, holding, together):
        fewest = 1 if row.light and row.staged and not prefetch else 4
        chunks, warps = ceil(row.K / width), max(fewest, width // (32 * VECTOR))
        # of fewer columns a thread would share little, and more of two rows spill on one card or another
        if rows == 2 and not (chunks == 3 and prefetch and hold):
            continue
        registers = registers_of(row, width, chunks, warps, prefetch, hold, rows)
        if registers > min(REGISTER_FILE // (32 * warps), 232 if row.find else 196):
            continue
        tile = Tile(rows * warps * 32 * VECTOR // width, width, chunks, warps, prefetch, max(64, registers), hold)
        # of rows side by side Triton would spread each over all warps: more sums between them, more barriers
        if row.staged and not prefetch and tile.rows == 1:
            tile = staging(tile, row.itemsize * row.inputs, row.capability)
        yield tile


def registers_of(row: Row, width: int, chunks: int, warps: int, prefetch: bool, hold: bool, rows: int) -> int:
    """Of a thread: its part of a row in fp32, the tables, the coming tile, and what was read off the compiled kernels.
    rows: how many it holds the same columns of."""
    columns, family = VECTOR * chunks, row.capability // 10
    registers = columns * (rows + row.tables - (not hold)) + 32 + 24 * (row.staged and row.tables == 0)
    if row.prologue == "gelu":
        registers += 8 + 16 * (not hold)
    if row.directions:
        # compute capability 10 multiplies in pairs, which have to lie side by side
        registers += 16 + columns // 4 + 8 * (family == 10 and columns > 24)
    if row.find:
        registers += VECTOR + 8 * (width * chunks > row.K)
        if width < 32 * VECTOR * warps:
            # rows side by side in a program; a shift held for many columns of them passes through shared memory
            registers += 16 + 16 * (columns > 24)
        # the widest rows on any compute capability but 9
        registers += 16 * (family in (8, 10, 12) and columns > 48)
        # ptxas finds these for 16 warps, except on compute capability 12
        registers -= 8 * (warps == 16 and columns == 32 and family != 12)
        registers += 24 * (row.itemsize == 4 and columns > 56)
        # rows at any address: a mask and an address for every few columns
        registers += 80 * (row.K % 16 > 0)
    coming = columns * row.itemsize * row.inputs * rows // 4
    return registers + (coming if prefetch else 8 * (row.itemsize == 4))


def cost(row: Row, tile: Tile) -> float:
    """What a tile takes, in columns that it computes. The fractions are what was measured on an H200, or counted."""
    columns, warps = VECTOR * tile.chunks, tile.warps
    if row.find:
        # sums over a row want registers more than they want warps, another program for the time they take, and many
        # columns to share it: 150 instructions a tile beside 46 an entry
        idle = 16 - min(16, tile.programs_per_multiprocessor * warps)
        crowded = 0.01 * idle + 0.05 * (tile.programs_per_multiprocessor == 1) + 3.3 / columns
    elif row.light:
        # 9 instructions an entry and 146 a tile: its range, scale, addresses. One tile ahead keeps no memory busy
        crowded = 17 / columns + 0.1 * tile.prefetch
    else:
        crowded = 0.1 * (tile.registers > 128)
    waiting = 0.1 * (not tile.prefetch and tile.stages == 1)
    # the sums of 16 warps, which a rotation outlasts
    wide = (0.12 if row.order == 1 and row.prologue == "plain" else 0.01) * (warps > 8)
    # of 52 instructions an entry 4 to 5 are shared with the other row: conversions of directions, and loads
    shared = 0.09 * (tile.rows * tile.width == 2 * 32 * VECTOR * warps)
    return tile.width * tile.chunks * (1 + waiting + 0.05 * (not tile.hold_shift) + crowded + wide - shared)


def staging(tile: Tile, itemsize: int, capability: int) -> Tile:
    """As many tiles ahead as shared memory holds for all programs of a multiprocessor, three at the most."""
    room = SHARED_MEMORY[family_of(capability)] // tile.programs_per_multiprocessor - SHARED_MEMORY_RESERVED
    ahead = room // (tile.rows * tile.width * tile.chunks * itemsize)
    return replace(tile, stages=1 + min(3, ahead))


def finds(K: int, order: int, tables: int, itemsize: int, capability: int = 0) -> bool:
    """Whether the kernel that quantizes rows of K columns can find their coordinates too."""
    return plan(K, order, tables, itemsize, "plain", True, capability, True) is not None
