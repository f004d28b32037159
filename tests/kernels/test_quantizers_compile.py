"""The quantizers compile for every card, keep a row in registers, and move 16 bytes at a time."""

import re
from pathlib import Path

import pytest
from ahead_of_time import CAPABILITIES, compile_all
from quantizers_compilations import compilations, coordinates_compilation

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled():
    requests = [request for request, _ in compilations()]
    return list(zip(requests, compile_all(requests), strict=True))


def test_nothing_spills(compiled):
    assert {request.capability for request, _ in compiled} == set(CAPABILITIES)
    faults = {f"{request.name} sm_{request.capability}": result.faults("") for request, result in compiled}
    assert {name: fault for name, fault in faults.items() if fault} == {}


def test_coordinates_of_rows_beyond_registers_compile():
    results = compile_all([coordinates_compilation(20480, capability) for capability in CAPABILITIES])
    assert [result.faults("") for result in results] == [[]] * len(CAPABILITIES)


def tile_copies(constexprs) -> int:
    """Copies of 16 bytes that a thread starts for a tile; 0 where tiles do not pass through shared memory."""
    if constexprs.get("STAGES", 1) == 1:
        return 0
    return constexprs["CHUNKS"] * (2 if constexprs["PROLOGUE"] == "swiglu" else 1)


def test_rows_stay_in_registers(compiled):
    """Shared memory holds tiles on their way and a few values per warp and row, never a row that is worked on: a
    rotation moves it between lanes only."""
    for request, result in compiled:
        tile = request.constexprs
        coming = (tile.get("STAGES", 1) - 1) * tile_copies(tile) * 16 * 32 * result.warps
        if request.signature["x_ptr"].startswith("*fp32"):
            coming *= 2
        # what row_tiles.py leaves for it beside tiles and the driver's kilobyte
        values = 512 if coming else 2048
        assert result.shared <= values + coming, (request.name, result.shared)


def test_tiles_ahead_are_on_their_way_while_one_is_worked_on(compiled):
    """Copied past the registers, in pieces of 16 bytes, and all but the one that is due may still be under way."""
    seen = set()
    for request, result in compiled:
        copies, stages = tile_copies(request.constexprs), request.constexprs.get("STAGES", 1)
        ptx = Path(result.cubin).with_suffix(".ptx").read_text(encoding="utf-8")
        started = re.findall(r"cp\.async\.c[ag]\.shared\.global\S* [^;]*?, 0x(\w+)", ptx)
        if not copies:
            assert not started, request.name
            continue
        twice = 2 if request.signature["x_ptr"].startswith("*fp32") else 1
        assert started == ["10"] * (stages * copies * twice), (request.name, started)
        under_way = [int(count) for count in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)]
        assert under_way == [(stages - 2) * copies, 0], request.name
        seen.add(request.capability)
    assert seen == set(CAPABILITIES)


def test_directions_reach_threads_without_shared_memory(compiled):
    """Two barriers for each sum, largest value and store of a program's rows, and for the tables before its loop; two
    more for each of 20 rows of the directions, were they loaded once for rows side by side."""
    seen = 0
    for request, result in compiled:
        if request.constexprs.get("FIND") and request.constexprs["ROWS"] > 1:
            ptx = Path(result.cubin).with_suffix(".ptx").read_text(encoding="utf-8")
            assert len(re.findall(r"\bbar\.sync\b", ptx)) <= 26, (request.name, request.capability)
            seen += 1
    assert seen >= len(CAPABILITIES)


def test_wide_accesses(compiled):
    """Rows are read 16 bytes at a time and codes written 8 at a time, rotated or not."""
    for request, result in compiled:
        ptx = Path(result.cubin).with_suffix(".ptx").read_text(encoding="utf-8")
        loads = re.findall(r"ld\.global\S*?\.v4\.b32|cp\.async\.cg", ptx)
        stores = re.findall(r"st\.global\S*?\.v2\.b32", ptx)
        chunks = request.constexprs.get("CHUNKS", 1)
        assert len(loads) >= chunks, request.name
        assert len(stores) >= chunks, request.name
        assert not re.search(r"st\.global\S*\.b8 ", ptx), request.name


def test_no_addition_is_fused_with_a_product(compiled):
    """The reference rounds both. A rotation fuses with the exact product by 1/2 only: once per column and stage."""
    seen = 0
    for request, result in compiled:
        if request.constexprs["PROLOGUE"] != "plain" or "CHUNKS" not in request.constexprs:
            continue
        tile = request.constexprs
        columns = tile["ROWS"] * tile["WIDTH"] * tile["CHUNKS"] // (32 * result.warps)
        stages = {1: 0, 64: 3, 256: 4}[tile["ORDER"]]
        # a direction's product is exact as well, and the order of its coordinate's sum nobody's business
        along = tile["RANK"] * (2 if tile["FIND"] else 1)
        ptx = Path(result.cubin).with_suffix(".ptx").read_text(encoding="utf-8")
        found = re.findall(r"\bfma\.rn\.f32(?:x2)?[^;]*", ptx)
        # sm_100 has pairs in one instruction
        fused = sum(1 + ("f32x2" in each) for each in found)
        # where the last chunk reaches beyond the row, LLVM computes a stage of its 8 columns twice, or two
        again = fused - columns * (stages + along)
        padded = tile["WIDTH"] * tile["CHUNKS"] > tile["COLUMNS"]
        twice = (0, tile["VECTOR"], 2 * tile["VECTOR"]) if padded else (0,)
        assert again in twice, (request.name, request.capability)
        if not any("f32x2" in each for each in found):
            assert sum("0f3F000000" not in each for each in found) == columns * along
        seen += 1
    assert seen >= 5 * len(CAPABILITIES)
