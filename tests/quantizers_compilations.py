"""What of the Triton quantizers is compiled ahead of time: their shipped tiles at real widths."""

from itertools import product

from ahead_of_time import CAPABILITIES, Compilation
from dit_quant.kernels.quantize_rows import LONG_CONSTANTS
from dit_quant.kernels.row_tiles import finds, plan

MODULE = "dit_quant.kernels.quantize_rows_triton"
TENSORS = (
    *("x", "up", "weight", "bias", "gamma", "beta", "shift", "smooth"),
    *("directions", "coordinates", "static_scale", "static_zero"),
)
POINTERS = (*TENSORS, "index", "fraction", "codes", "scale", "zero")
FIXED = {"index": "*i64", "fraction": "*fp32", "codes": "*i8", "scale": "*fp32"}
# tables that the presets store: (shift, smooth)
COLUMNS = {"shift": "*fp16", "smooth": "*fp16"}
DIRECTIONS = {"directions": "*fp16", "coordinates": "*bf16"}
TABLES = {
    "plain": {},
    "tables": COLUMNS,
    "directions": COLUMNS | DIRECTIONS,
    "finding directions": COLUMNS | DIRECTIONS,
}
RANK = 4


def compilation(K, capability, *, order=1, ranges="asymmetric", prologue="plain", dtype="bf16", tables="tables"):
    """One kernel at one width, with the tile that `launch` would choose."""
    present = {"x": f"*{dtype}", **FIXED, **TABLES[tables]}
    if ranges == "asymmetric":
        present["zero"] = "*fp32"
    if ranges == "static":
        present |= {"static_scale": "*fp32"}
    if prologue == "swiglu":
        present["up"] = f"*{dtype}"
    if prologue in ("layer", "rms"):
        present |= {"gamma": f"*{dtype}", "beta": f"*{dtype}"}
    itemsize = {"fp32": 4, "bf16": 2, "fp16": 2}[dtype]
    directions, find = "directions" in tables, tables.startswith("finding")
    held = len(TABLES[tables].keys() & COLUMNS)
    tile = plan(K, order, held, itemsize, prologue, directions, capability, find)
    long = tile is None
    pointers = [name for name in POINTERS if not (long and name in ("weight", "bias", "gamma", "beta"))]
    signature = {f"{name}_ptr": f"{present[name]}:16" for name in pointers if name in present}
    constexprs: dict[str, object] = {f"{name}_ptr": None for name in pointers if name not in present}
    signature |= {"M": "i32", "T": "i32", "K": "i32:16", "x_stride": "i32:16", "up_stride": "i32:16"}
    constexprs |= {"PROLOGUE": prologue, "RANGE": ranges, "ORDER": order, "RANK": RANK * directions}
    options: dict[str, object] = {"enable_fp_fusion": False}
    if tile is None:
        constexprs |= LONG_CONSTANTS
    else:
        signature |= {"tokens": "i32", "gamma_stride": "i32:16", "beta_stride": "i32:16", "eps": "fp32"}
        constexprs |= tile.constants(K) | {"FIND": find}
        options |= tile.compiler_options(ranges, prologue, find, held)
    options["num_warps"] = constexprs.pop("num_warps")
    return Compilation(
        name=f"{prologue} {dtype} K{K} H{order} {ranges} {tables}",
        module=MODULE,
        kernel="quantize_long_rows" if long else "quantize_rows",
        signature=signature,
        constexprs=constexprs,
        capability=capability,
        options=options,
    )


def coordinates_compilation(K, capability, dtype="bf16"):
    """The kernel that finds the coordinates of tokens [M, K], for a layer with shift and scale."""
    present = {
        "x": f"*{dtype}",
        "directions": "*fp16",
        **COLUMNS,
        "index": "*i64",
        "fraction": "*fp32",
        "found": "*bf16",
    }
    signature = {f"{name}_ptr": f"{kind}:16" for name, kind in present.items()}
    signature |= {"M": "i32", "T": "i32", "K": "i32:16", "x_stride": "i32:16"}
    sizes = {"RANK": RANK, "ROWS": 2, "WIDTH": 1024}
    return Compilation(
        name=f"coordinates {dtype} K{K}",
        module="dit_quant.kernels.quantize_along.triton_impl",
        kernel="coordinates_kernel",
        signature=signature,
        constexprs=sizes,
        capability=capability,
        options={"num_warps": 4, "enable_fp_fusion": False},
    )


def compilations(all: bool = False):
    """(Compilation, expected matrix instructions): a few for every run, or all."""
    for capability in CAPABILITIES:
        if all:
            for K, ranges, tables in product(
                (64, 1152, 1536, 3072, 3840, 5120, 12288, 13824, 15360, 16384),
                ("symmetric", "asymmetric", "static"),
                TABLES,
            ):
                if "directions" in tables and ranges != "asymmetric":
                    continue
                if tables.startswith("finding") and not finds(K, 256, 2, 2, capability):
                    continue
                order = max(n for n in (1, 64, 256) if K % n == 0)
                for block, dtype in product((1, order), ("bf16", "fp32")):
                    yield compilation(K, capability, order=block, ranges=ranges, tables=tables, dtype=dtype), ""
            for K, prologue in product((1152, 3072, 5120), ("layer", "rms")):
                yield compilation(K, capability, order=64, prologue=prologue), ""
            for K, prologue in product((4608, 12288, 13824, 15360, 20480), ("gelu", "gelu_tanh", "swiglu")):
                yield compilation(K, capability, order=256, prologue=prologue), ""
                yield compilation(K, capability, prologue=prologue, dtype="fp32", tables="plain"), ""
        else:
            yield compilation(1152, capability, order=64, tables="finding directions"), ""
            yield compilation(3072, capability, order=256), ""
            yield compilation(3072, capability, order=256, tables="finding directions"), ""
            yield compilation(3072, capability, order=1, ranges="symmetric", tables="plain"), ""
            yield compilation(12288, capability, order=256, tables="finding directions"), ""
            yield compilation(15360, capability, order=256, ranges="static"), ""
    if not all:
        yield compilation(15360, 90, order=256, dtype="fp32"), ""
        for capability in (80, 89, 90, 120):
            yield compilation(15360, capability, order=256, tables="finding directions"), ""
        yield compilation(20480, 90, order=256, tables="directions"), ""
        yield compilation(3072, 90, order=256, prologue="layer"), ""
        yield compilation(12288, 90, order=256, prologue="gelu_tanh"), ""
        yield compilation(12288, 90, order=256, prologue="swiglu"), ""
        # these spill where the compiler is not told how many registers it has
        yield compilation(13824, 90, prologue="gelu", dtype="fp32", tables="plain"), ""
        yield compilation(13824, 100, order=256, prologue="gelu"), ""
        yield compilation(15360, 90, tables="plain"), ""
        for K, capability, ranges, dtype in (
            (13824, 90, "symmetric", "bf16"),
            (12288, 100, "asymmetric", "bf16"),
            (1536, 100, "static", "fp32"),
            (3072, 100, "static", "fp32"),
            (3840, 120, "static", "bf16"),
            (12288, 120, "symmetric", "fp32"),
        ):
            yield compilation(K, capability, order=256, ranges=ranges, dtype=dtype, tables="plain"), ""
