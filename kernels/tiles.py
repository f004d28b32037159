"""Tile sizes of the linear kernels, per architecture family, operator and bucket of M. Nothing is tuned to start.

Each family lists its tiles from large to small. A large tile reads its operands less often; a small one gives every
multiprocessor something to do. `tile_for` takes the first that does not mostly pad M and that fills the card.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

# multiprocessors of the usual card of each family: A100, 3090, 4090, H100, B200, 5090; 0 is anything else
MULTIPROCESSORS = {0: 64, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
MIN_BUCKET, MAX_BUCKET = 16, 8192
# what every tile's step along K divides, and what 16-byte stores of a row need
EVEN_K, EVEN_N = 128, 16


@dataclass(frozen=True)
class Tile:
    """BLOCK_M x BLOCK_N of the output, BLOCK_K per product, `dots` products per step of the main loop.

    dots 2 on sm_80 to 89: Triton's prefetch of matrix operands, which unpacks int8 registers byte by byte on its way
    around the loop (500 instructions more per step), only acts on loops with one product.
    parts: pieces of the epilogue, where the whole tile's column vectors would not fit in registers.
    early: what the epilogue reads is loaded before a main loop without masks, and `parts` is not used. Measured on
    Hopper; on other cards wherever registers allow it, those that Triton 3.4 to 3.6 count, too, for the largest tile.
    descriptors: int8 operands are loaded through tensor descriptors (TMA): one thread asks for a block, none holds
    addresses. store: y is written that way.
    ahead: int4_linear loads codes to registers, a step before they are decoded.
    decoded: int4_linear decodes the whole weight to memory first, and this is a tile of int8_linear.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    dots: int = 1
    parts: int = 1
    group_m: int = 8
    early: bool = False
    descriptors: bool = False
    store: bool = False
    ahead: bool = False
    decoded: bool = False

    def parts_with(self, directions: bool, even: bool) -> int:
        """Directions want vectors of their own in the epilogue; a loop with masks spills where that is cut."""
        return max(self.parts, 2) if directions and even else self.parts


AMPERE_INT8 = (
    Tile(128, 256, 64, warps=8, stages=3, dots=2),
    Tile(128, 128, 64, warps=4, stages=3, dots=2),
    Tile(64, 128, 64, warps=4, stages=3, dots=2, early=True),
    Tile(64, 64, 64, warps=4, stages=4, dots=2, early=True),
    Tile(32, 64, 64, warps=4, stages=5, dots=2),
    Tile(16, 64, 64, warps=4, stages=5, dots=2),
    Tile(16, 32, 64, warps=4, stages=6, dots=2),
)
AMPERE_INT4 = (
    Tile(128, 128, 64, warps=4, stages=4, early=True),
    Tile(64, 128, 64, warps=4, stages=4, early=True),
    Tile(64, 64, 64, warps=4, stages=4, early=True),
    Tile(32, 64, 128, warps=4, stages=4),
    Tile(16, 64, 128, warps=4, stages=4),
    Tile(16, 32, 128, warps=4, stages=4),
)
# the weight is the left operand here: at least 64 rows of it, any number of tokens
TRANSPOSED_INT4 = (
    Tile(256, 128, 128, warps=8, stages=3, parts=2),
    Tile(128, 128, 128, warps=8, stages=4),
    Tile(64, 128, 128, warps=4, stages=4),
    Tile(64, 64, 128, warps=4, stages=4),
    Tile(32, 64, 128, warps=4, stages=4),
    Tile(16, 64, 128, warps=4, stages=5),
)
TILES: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("int8_linear", 0): (
        Tile(128, 128, 64, warps=8, stages=2),
        Tile(64, 64, 64, warps=4, stages=2),
        Tile(32, 32, 64, warps=4, stages=2),
        Tile(16, 32, 64, warps=2, stages=2),
    ),
    ("int4_linear", 0): (
        Tile(128, 128, 64, warps=8, stages=2),
        Tile(64, 64, 64, warps=4, stages=2),
        Tile(32, 32, 64, warps=4, stages=2),
        Tile(16, 32, 64, warps=2, stages=2),
    ),
    ("int8_linear", 80): AMPERE_INT8,
    ("int8_linear", 86): AMPERE_INT8,
    ("int8_linear", 89): AMPERE_INT8,
    ("int8_linear", 90): (
        Tile(128, 128, 128, warps=4, stages=3, group_m=32, early=True, descriptors=True, store=True),
        Tile(128, 128, 128, warps=4, stages=3, group_m=32, early=True),
        Tile(64, 128, 128, warps=4, stages=4, early=True),
        Tile(64, 64, 128, warps=4, stages=4),
        Tile(16, 64, 128, warps=4, stages=5),
        Tile(16, 32, 128, warps=4, stages=5),
    ),
    ("int8_linear", 100): (
        Tile(128, 256, 128, warps=8, stages=4, parts=4, descriptors=True),
        Tile(128, 256, 128, warps=8, stages=4, parts=4),
        Tile(128, 128, 128, warps=8, stages=4, parts=4, descriptors=True),
        Tile(128, 128, 128, warps=8, stages=4, parts=4),
        Tile(128, 64, 128, warps=4, stages=4, parts=4),
        Tile(64, 64, 128, warps=4, stages=4),
        Tile(16, 64, 128, warps=4, stages=5),
        Tile(16, 32, 128, warps=4, stages=5),
    ),
    ("int8_linear", 120): (
        Tile(128, 256, 64, warps=8, stages=3, dots=2),
        Tile(128, 128, 64, warps=4, stages=4, early=True),
        Tile(64, 128, 64, warps=4, stages=4, early=True),
        Tile(64, 64, 128, warps=4, stages=4, early=True),
        Tile(32, 64, 128, warps=4, stages=4),
        Tile(16, 64, 128, warps=4, stages=5),
        Tile(16, 32, 128, warps=4, stages=5),
    ),
    ("int4_linear", 80): AMPERE_INT4,
    ("int4_linear", 86): AMPERE_INT4,
    ("int4_linear", 89): AMPERE_INT4,
    ("int4_linear", 90): (
        Tile(256, 64, 128, warps=4, stages=3, group_m=2, early=True, descriptors=True, store=True, ahead=True),
        Tile(128, 64, 128, warps=4, stages=4, early=True),
        Tile(64, 64, 128, warps=4, stages=4),
        Tile(32, 64, 128, warps=4, stages=4),
        Tile(16, 64, 128, warps=4, stages=5),
    ),
    ("int4_linear", 100): TRANSPOSED_INT4,
    ("int4_linear", 120): AMPERE_INT4,
}
# int4_linear, by bucket of M: a weight of so many entries is decoded as a whole, to memory that is given back behind
# the product. Measured on an H200 from there on: decoding in the main loop makes it 1.17 to 1.35 times as long as
# int8_linear's. Other families offer this to autotune.py alone, for as many tokens.
DECODED_FROM: dict[int, dict[int, int]] = {90: {4096: 24_000_000, 8192: 9_000_000}}
DECODED_BUCKET = 4096
# K not divisible by 16 is loaded byte by byte: small enough that its addresses fit in registers
RAGGED = Tile(64, 64, 64, warps=8, stages=2)


def family_of(capability: int) -> int:
    """10 major + minor -> key of the tables; 0 for none (HIP, interpreter).

    Of the data-centre Blackwells only 10.0 has int8 tensor memory; 10.3 and 11.0 run the instructions of sm_80.
    """
    major = capability // 10
    if major == 8:
        return 89 if capability >= 89 else 86 if capability >= 86 else 80
    if major in (9, 12):
        return 10 * major
    return 0 if capability < 80 else 100 if capability == 100 else 80


def bucket_of(M: int) -> int:
    """Next power of two in 16 ... 8192: what choices of tiles may depend on, never M itself."""
    return min(max(1 << (max(M, 1) - 1).bit_length(), MIN_BUCKET), MAX_BUCKET)


def candidates(op: str, capability: int, bucket: int, N: int, K: int) -> tuple[Tile, ...]:
    """Tiles that suit the operands, large to small; never empty."""
    if K % 16:
        return (RAGGED,)
    tiles = TILES[op, family_of(capability)]
    if K % EVEN_K or N % EVEN_N:
        # masks and scattered addresses take the registers that the largest tile needs for its sums
        tiles = tuple(tile for tile in tiles if tile.block_m * tile.block_n < tiles[0].block_m * tiles[0].block_n)
    elif op == "int4_linear" and bucket >= DECODED_BUCKET:
        tiles = (replace(TILES["int8_linear", family_of(capability)][0], decoded=True), *tiles)
    return tuple(tile for tile in tiles if tile.block_m <= bucket)


def decodes_first(capability: int, bucket: int, N: int, K: int) -> bool:
    """Whether int4_linear had better decode its whole weight first."""
    least = DECODED_FROM.get(family_of(capability), {}).get(bucket)
    return least is not None and least <= N * K


def tile_for(op: str, capability: int, M: int, N: int, K: int) -> Tile:
    """Default tile of a product [M, K] x [N, K]."""
    return _tile_for_bucket(op, capability, bucket_of(M), N, K)


@lru_cache(maxsize=4096)
def _tile_for_bucket(op: str, capability: int, bucket: int, N: int, K: int) -> Tile:
    fitting = candidates(op, capability, bucket, N, K)
    if not decodes_first(capability, bucket, N, K):
        fitting = in_registers(fitting)
    wanted = MULTIPROCESSORS[family_of(capability)]
    for tile in fitting:
        if programs(tile, bucket, N) >= wanted:
            return tile
    return max(fitting, key=lambda tile: programs(tile, bucket, N))


def in_registers(tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
    """Without those for which a whole weight is decoded."""
    return tuple(tile for tile in tiles if not tile.decoded)


def programs(tile: Tile, M: int, N: int) -> int:
    """Tiles of an [M, N] output."""
    return -(-M // tile.block_m) * -(-N // tile.block_n)
