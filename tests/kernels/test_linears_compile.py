"""Every shipped tile of the two linears compiled for every target: integer matrix instructions, no spills, it fits."""

import re
import shutil
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from ahead_of_time import CAPABILITIES, Compiled, compile_all, nvidia_tool
from dit_quant.kernels.tiles import TILES, family_of
from linear_compilations import compilations, int8_compilation

if shutil.which(nvidia_tool("cuobjdump")) is None:
    pytest.skip("this build of Triton has no compiler for NVIDIA cards", allow_module_level=True)

REQUESTS = compilations()


@pytest.fixture(scope="module")
def results() -> list[Compiled]:
    """In Triton's own cache, so that only a changed kernel is compiled again."""
    return compile_all([request for request, _ in REQUESTS])


def test_nothing_shipped_is_left_out():
    for op in ("int8_linear", "int4_linear"):
        for capability in CAPABILITIES:
            listed = [r for r, _ in REQUESTS if r.capability == capability and r.kernel == f"{op}_kernel"]
            sizes = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "DESCRIPTORS")
            blocks = {tuple(r.constexprs.get(size, False) for size in sizes) for r in listed}
            shipped = {(t.block_m, t.block_n, t.block_k, t.descriptors) for t in TILES[op, family_of(capability)]}
            assert shipped <= blocks


@pytest.mark.parametrize("position", range(len(REQUESTS)), ids=[f"{r.name} sm{r.capability}" for r, _ in REQUESTS])
def test_compiles_to_integer_products_within_the_cards_limits(position, results):
    (request, expected), result = REQUESTS[position], results[position]
    assert result.name == request.name
    assert result.faults(expected) == []


def instructions(results, op, capability):
    """Matrix instructions of all tiles of one target that have at least 64 rows and columns."""
    return [
        name
        for (request, _), result in zip(REQUESTS, results, strict=True)
        if request.kernel == f"{op}_kernel" and request.capability == capability
        if min(request.constexprs["BLOCK_M"], request.constexprs["BLOCK_N"]) >= 64
        for name in result.matrix
    ]


@pytest.mark.parametrize("op", ["int8_linear", "int4_linear"])
@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (80, r"mma\.sync.*m16n8k32.*s32\.s8\.s8\.s32"),
        (86, r"mma\.sync.*m16n8k32.*s32\.s8\.s8\.s32"),
        (89, r"mma\.sync.*m16n8k32.*s32\.s8\.s8\.s32"),
        (90, r"wgmma\.mma_async.*s32\.s8\.s8"),
        (100, r"tcgen05\.mma.*kind::i8"),
        (120, r"mma\.sync.*m16n8k32.*s32\.s8\.s8\.s32"),
    ],
)
def test_each_target_uses_its_widest_integer_instruction(op, capability, expected, results):
    found = instructions(results, op, capability)
    assert found
    assert all(re.match(expected, name) for name in found)


def test_hopper_reads_the_decoded_weight_from_registers(results):
    for (request, _), result in zip(REQUESTS, results, strict=True):
        if request.capability == 90:
            wanted = sum(result.matrix.values()) if request.kernel == "int4_linear_kernel" else 0
            assert result.register_operands == wanted


def test_hoppers_4_bit_loop_passes_nothing_on_but_the_weight(results):
    """One barrier between writing decoded weights and reading them, two for the copy engine: levels need none."""
    found = [
        result.barriers
        for (request, _), result in zip(REQUESTS, results, strict=True)
        if request.constexprs.get("AHEAD")
    ]
    assert found
    assert set(found) == {3}


def test_main_loops_move_no_bytes_but_those_of_a_4_bit_weight(results):
    """A byte permutation per weight would cost as much as the product. See Tile.dots for where they came from."""
    for (request, _), result in zip(REQUESTS, results, strict=True):
        # the layout of tensor memory (100) takes more, and AMD cards have no such instruction
        if request.capability == 100 or isinstance(request.capability, str) or request.kernel == "decode_weight":
            continue
        allowed = 0
        if request.kernel == "int4_linear_kernel":
            sizes = request.constexprs
            weights = sizes["BLOCK_N"] * sizes["BLOCK_K"] * sizes["DOTS"] // (32 * result.warps)
            # 2 per 8 weights, 6 with a table, and a few where several levels arrive in one word
            allowed = weights * (6 if "table_ptr" in request.signature else 2) // 8 + 8
        assert result.permutes <= allowed, f"{result.name} sm{result.capability}"


def test_faults_are_seen():
    """Negative control: the tile of sm_80 with one product per step, and one that no card's shared memory holds."""
    tile = TILES["int8_linear", 80][1]
    single, large = (replace(tile, dots=1, stages=4), replace(tile, block_k=128, stages=6))
    shuffling, deep = compile_all([int8_compilation(86, single), int8_compilation(86, large)])
    assert any("spills" in fault for fault in shuffling.faults("s8"))
    assert shuffling.permutes > 100
    assert any("shared memory" in fault for fault in deep.faults("s8"))
    assert any("is not f16" in fault for fault in deep.faults("f16"))
