"""Every row has a tile that its registers and shared memory hold."""

import pytest
from dit_quant.kernels.row_tiles import LONGEST_FUSED_ROW, LONGEST_ROW, REGISTER_FILE, SHARED_MEMORY, finds, plan, plans

# the widest row that adaln_quantize takes
WIDEST = 12288


@pytest.mark.parametrize("tables", [0, 1, 2])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("prologue", "longest"), [("plain", LONGEST_ROW), ("layer", WIDEST), ("swiglu", LONGEST_FUSED_ROW)]
)
def test_every_row_has_a_tile(prologue, longest, itemsize, tables):
    assert plan(longest + 1, 1, tables, itemsize, prologue) is None or prologue == "layer"
    for K in (*range(1, 300), *range(300, longest, 100), longest):
        order = max(n for n in (1, 4, 16, 64, 256) if K % n == 0)
        tile = plan(K, order, tables, itemsize, prologue)
        if tile is None:
            # fp32 with both tables: the registers end
            assert (itemsize, tables) == (4, 2)
            assert K > WIDEST
            continue
        assert tile.width * tile.chunks >= K > tile.width * (tile.chunks - 1)
        assert tile.width % order == 0
        # a thread's columns in one piece: fewer would spread a butterfly, more would split a load
        assert tile.rows * tile.width == 32 * tile.warps * 8
        assert tile.programs_per_multiprocessor >= 1
        if K > 1024:
            assert tile.width * tile.chunks <= 1.34 * K


@pytest.mark.parametrize("capability", [0, 80, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_rows_with_coordinates_fit_where_a_tile_is_offered(itemsize, capability):
    offered = 0
    for K in (*range(16, 300, 16), *range(320, LONGEST_ROW + 1, 64)):
        order = max(n for n in (1, 4, 16, 64, 256) if K % n == 0)
        tile = plan(K, order, 2, itemsize, "plain", True, capability, True)
        assert (tile is not None) == finds(K, order, 2, itemsize, capability)
        if tile is None:
            assert K > 12288, "no width of a published model but the longest goes without"
            continue
        offered += 1
        assert tile.width * tile.chunks >= K > tile.width * (tile.chunks - 1)
        assert tile.width % order == 0
        assert 32 * tile.warps * tile.registers <= REGISTER_FILE
    assert offered > 180
    assert not finds(LONGEST_ROW + 64, 64, 2, itemsize, capability)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("prologue", ["plain", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("tables", [0, 2])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_ahead_fit_in_shared_memory(itemsize, tables, prologue, capability):
    """Of all programs that registers let onto a multiprocessor, a kilobyte of each for the driver, and its sums."""
    for K in (*range(16, 300, 16), *range(320, LONGEST_ROW + 1, 64)):
        tile = plan(K, 1, tables, itemsize, prologue, capability=capability)
        if tile is None:
            continue
        assert not (tile.prefetch and tile.stages > 1)
        row = tile.width * tile.chunks * itemsize * (2 if prologue == "swiglu" else 1)
        taken = tile.programs_per_multiprocessor * ((tile.stages - 1) * tile.rows * row + 1024 + 512)
        assert taken <= SHARED_MEMORY[capability], K


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("K", [3072, 3840, 4608, 5120, 6144, 10240, 12288, 13824, 15360])
def test_rows_of_published_models_have_two_tiles_on_their_way(K, capability):
    """In half precision, with shift and scale. Where the copy fills registers, ptxas asks for it half a row later."""
    assert plan(K, 1, 2, 2, capability=capability).stages >= 3


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_rows_side_by_side_are_fetched_to_registers(capability):
    """From shared memory each would be spread over all warps of the program."""
    for K, order in ((16, 1), (64, 1), (256, 256), (1152, 64), (1536, 256), (2304, 256)):
        found = plan(K, order, 2, 2, capability=capability)
        assert found.rows > 1
        assert (found.prefetch, found.stages) == (True, 1)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_row_without_rotation_has_as_few_warps_as_hold_it(itemsize, capability):
    """What a tile costs whatever its size is then shared by many columns, and the memory has several tiles to fetch."""
    for K, warps in ((320, 1), (1152, 1), (1536, 1), (2304, 2), (3072, 2), (4608, 4), (6144, 4), (12288, 8)):
        found = plan(K, 1, 2, itemsize, capability=capability)
        assert (found.rows, found.warps) == (1, warps)
        assert found.stages > 1


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("K", [1536, 3072, 6144])
def test_two_rows_share_what_is_read_of_the_directions(K, capability):
    """A thread holds 24 columns of both; without a rotation its sums would spill."""
    found = [plan(K, order, 2, 2, "plain", True, capability, True) for order in (256, 1)]
    assert [tile.rows * tile.width * tile.chunks // (32 * tile.warps) for tile in found] == [48, 24]
    assert found[0].programs_per_multiprocessor * found[0].warps >= 8


def test_sixteen_warps_share_a_row_where_a_rotation_outlasts_their_sums():
    assert [plan(12288, order, 2, 2, capability=90).warps for order in (1, 256)] == [8, 16]


def test_rows_beside_other_loads_are_fetched_to_registers():
    """Directions and modulations are loaded in the same loop, and 16-byte copies want rows of 16 entries."""
    for given in ({"directions": True}, {"prologue": "layer"}, {"K": 3080}):
        found = plan(**({"K": 3072, "order": 1, "tables": 2, "itemsize": 2, "capability": 90} | given))
        assert (found.prefetch, found.stages) == (True, 1)


@pytest.mark.parametrize("find", [False, True])
def test_the_planned_tile_is_the_first_of_those_compared(find):
    for K in (256, 1152, 3072, 12288):
        row = (K, 1, 2, 2, "plain", find, 90, find)
        assert plan(*row) == plans(*row)[0]
        assert len(set(plans(*row))) == len(plans(*row))
        assert len(plans(*row)) > 1 or K == 256
    assert plans(LONGEST_ROW + 64, 1, 2, 2) == ()
    assert plan(LONGEST_ROW + 64, 1, 2, 2) is None
