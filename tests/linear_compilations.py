"""Ahead-of-time compilations of the two linears: every tile that kernels/tiles.py ships, on every target."""

from itertools import product

from ahead_of_time import CAPABILITIES, Compilation
from dit_quant.kernels.tiles import EVEN_N, RAGGED, TILES, Tile, family_of

# wgmma and mma.sync; tensor memory of sm_100
INT8 = r"s32\.s8\.s8|kind::i8$"
AMD_TARGETS = ("gfx942", "gfx1100")
AMD_INT8 = r"_i32_\d+x\d+x\d+_iu?8$"
# what a full layer passes: asymmetric tokens, bias, corrections of several timestep groups, directions
POINTERS = {
    "a_ptr": "*i8:16",
    "w_ptr": "*i8:16",
    "y_ptr": "*bf16:16",
    "row_scale_ptr": "*fp32:16",
    "row_zero_ptr": "*fp32:16",
    "column_scale_ptr": "*fp32:16",
    "column_sum_ptr": "*i32:16",
    "bias_ptr": "*bf16:16",
    "correction_ptr": "*fp16:16",
    "coordinates_ptr": "*bf16:16",
    "responses_ptr": "*fp16:16",
    "index_ptr": "*i64:16",
    "fraction_ptr": "*fp32:16",
}
SIZES = {"M": "i32", "T": "i32"}
DIRECTIONS = ("coordinates_ptr", "responses_ptr")
OPTIONAL = (
    "row_zero_ptr",
    "column_sum_ptr",
    "bias_ptr",
    "correction_ptr",
    "index_ptr",
    "fraction_ptr",
    *DIRECTIONS,
)
RANK = 4


def int8_compilation(
    capability: int | str, tile: Tile, *, plain: bool = False, ragged: bool = False, odd: bool = False
) -> Compilation:
    """plain: no optional operand, fp32 output. ragged: any N, K % 16 == 0, masks in the loop. odd: any N and K."""
    return compilation("int8_linear", POINTERS, {}, capability, tile, plain, ragged, odd)


def int4_compilation(
    capability: int | str,
    tile: Tile,
    *,
    group: int = 16,
    table: bool = False,
    plain: bool = False,
    ragged: bool = False,
) -> Compilation:
    """As `int8_compilation`."""
    pointers = {**POINTERS, "w_ptr": "*i32:16", "levels_ptr": "*u8:16", "table_ptr": "*i32:16"}
    constexprs: dict[str, object] = {
        "GROUP": group,
        "LEVEL_ALIGNMENT": 1 if ragged or group > 16 else 16,
        "TRANSPOSED": isinstance(capability, int) and family_of(capability) in (90, 100),
        "PERMUTE": isinstance(capability, int),
    }
    constexprs["AHEAD"] = tile.ahead and not ragged
    if not table:
        constexprs["table_ptr"] = None
    return compilation("int4_linear", pointers, constexprs, capability, tile, plain, ragged)


def decode_compilation(capability: int | str, *, group: int = 16, table: bool = False, width: int = 512) -> Compilation:
    """A whole 4-bit weight to int8."""
    signature = {
        "w_ptr": "*i32:16",
        "levels_ptr": "*u8:16",
        "table_ptr": "*i32:16",
        "codes_ptr": "*i8:16",
        "K": "i32:16",
    }
    constexprs: dict[str, object] = {
        "GROUP": group,
        "PERMUTE": isinstance(capability, int),
        "BLOCK_N": EVEN_N,
        "BLOCK_K": width,
    }
    if not table:
        del signature["table_ptr"]
        constexprs["table_ptr"] = None
    return Compilation(
        name=f"decode_weight {width} G{group}" + " table" * table,
        module="dit_quant.kernels.int4_linear.whole_triton",
        kernel="decode_weight",
        signature=signature,
        constexprs=constexprs,
        capability=capability,
        options={"num_warps": 4, "enable_fp_fusion": False},
    )


def compilation(
    op: str,
    pointers: dict,
    constexprs: dict,
    capability: int | str,
    tile: Tile,
    plain: bool,
    ragged: bool,
    odd: bool = False,
) -> Compilation:
    # no preset has 4 bits and directions
    directions = op == "int8_linear" and not plain
    sizes = {**SIZES, "N": "i32" if ragged or odd else "i32:16", "K": "i32" if odd else "i32:16"}
    signature = {name: kind for name, kind in {**pointers, **sizes}.items() if name not in constexprs}
    constexprs = {
        **constexprs,
        "stride_row_scale": 1,
        "stride_row_zero": 0 if plain else 1,
        "RANK": RANK if directions else 0,
        "INTERPOLATE": not plain,
        "EVEN_K": not (ragged or odd),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "DOTS": tile.dots,
        "PARTS": tile.parts_with(directions, not (ragged or odd)),
        "EARLY": tile.early and not (ragged or odd),
        "OPAQUE": isinstance(capability, int),
        "DESCRIPTORS": tile.descriptors,
        "STORE": tile.store and not odd,
    }
    if tile.descriptors:
        signature["a_ptr"] = f"tensordesc<i8[{tile.block_m},{tile.block_k}]>"
        if op == "int8_linear":
            signature["w_ptr"] = f"tensordesc<i8[{tile.block_n},{tile.block_k}]>"
    if plain:
        signature = {**signature, "y_ptr": "*fp32:16"}
    if constexprs["STORE"]:
        signature["y_ptr"] = f"tensordesc<{'fp32' if plain else 'bf16'}[{tile.block_m},{tile.block_n}]>"
    absent = OPTIONAL if plain else () if directions else DIRECTIONS
    signature = {name: kind for name, kind in signature.items() if name not in absent}
    constexprs |= dict.fromkeys(absent)
    form = "".join(f" {word}" for word, said in (("plain", plain), ("ragged", ragged), ("odd", odd)) if said)
    detail = f" G{constexprs['GROUP']}" + " table" * ("table_ptr" in signature) if op == "int4_linear" else ""
    blocks = (
        f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.warps} s{tile.stages} d{tile.dots}"
        + " early" * tile.early
        + " tma" * tile.descriptors
        + " store" * tile.store
        + " ahead" * tile.ahead
    )
    return Compilation(
        name=f"{op} {blocks}{detail}{form}",
        module=f"dit_quant.kernels.{op}.triton_impl",
        kernel=f"{op}_kernel",
        signature=signature,
        constexprs=constexprs,
        capability=capability,
        options={"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False},
    )


def compilations(all: bool = False) -> list[tuple[Compilation, str]]:
    """(compilation, expected matrix instruction): every shipped tile, and other forms of a kernel.

    Not `all`: the other forms of one tile per operator, on one target per kind of matrix instruction.
    """
    found = []
    for capability in CAPABILITIES:
        for build, op in ((int8_compilation, "int8_linear"), (int4_compilation, "int4_linear")):
            tiles = TILES[op, family_of(capability)]
            found += [build(capability, tile) for tile in tiles]
            if not all and capability not in (86, 90, 100):
                continue
            found += [build(capability, tile, plain=True) for tile in (tiles if all else tiles[:1])]
            smaller = [tile for tile in tiles if tile.block_m * tile.block_n < tiles[0].block_m * tiles[0].block_n]
            # the largest tile is for even shapes alone, see tiles.candidates
            found += [build(capability, tile, ragged=True) for tile in (smaller if all else smaller[:1])]
        int4_tiles = TILES["int4_linear", family_of(capability)]
        if all or capability in (86, 90, 100):
            found += [
                int4_compilation(capability, tile, table=True) for tile in (int4_tiles if all else int4_tiles[:1])
            ]
            found.append(int8_compilation(capability, RAGGED, odd=True))
        for group in (32, 64, 128) if all else (128,) if capability in (86, 90) else ():
            found += [
                int4_compilation(capability, tile, group=group) for tile in (int4_tiles if all else int4_tiles[:1])
            ]
    expected = [(request, INT8) for request in found]
    for target in (*CAPABILITIES, *AMD_TARGETS):
        every = product((16, 32, 64, 128), (False, True), (128, 256, 512))
        for group, table, width in every if all else ((16, False, 512), (128, True, 128)):
            expected.append((decode_compilation(target, group=group, table=table, width=width), ""))
    for target in AMD_TARGETS:
        for build, op in ((int8_compilation, "int8_linear"), (int4_compilation, "int4_linear")):
            expected += [(build(target, tile), AMD_INT8) for tile in (TILES[op, 0] if all else TILES[op, 0][:1])]
    return expected
