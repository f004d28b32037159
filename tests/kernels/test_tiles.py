"""Tables of tiles: every shape has one, it depends on the bucket of M alone, and it fits the card."""

from dataclasses import replace

import pytest
from ahead_of_time import SHARED_LIMIT
from dit_quant.kernels.tiles import (
    EVEN_K,
    MULTIPROCESSORS,
    RAGGED,
    TILES,
    bucket_of,
    candidates,
    decodes_first,
    family_of,
    in_registers,
    programs,
    tile_for,
)

OPS = ("int8_linear", "int4_linear")
FAMILIES = (0, 80, 86, 89, 90, 100, 120)


@pytest.mark.parametrize(
    ("capability", "family"),
    [
        *((0, 0), (75, 0), (80, 80), (86, 86), (87, 86), (89, 89), (90, 90), (100, 100)),
        *((103, 80), (110, 80), (120, 120), (121, 120), (130, 80)),
    ],
)
def test_every_capability_has_a_family(capability, family):
    assert family_of(capability) == family


@pytest.mark.parametrize(
    ("M", "bucket"), [(0, 16), (1, 16), (16, 16), (17, 32), (4096, 4096), (4097, 8192), (10**6, 8192)]
)
def test_buckets_are_powers_of_two(M, bucket):
    assert bucket_of(M) == bucket


def test_all_families_have_tables_for_both_products():
    assert {(op, family) for op in OPS for family in FAMILIES} == set(TILES)
    assert set(MULTIPROCESSORS) == set(FAMILIES)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tables_run_from_large_to_small_and_end_at_one_token(op, family):
    tiles = TILES[op, family]
    areas = [tile.block_m * tile.block_n for tile in tiles]
    assert areas == sorted(areas, reverse=True)
    assert tiles[-1].block_m == 16
    for tile in tiles:
        assert tile.block_k * tile.dots in (64, EVEN_K)
        assert tile.group_m in (2, 4, 8, 16, 32)
        # what Triton keeps in flight at least: one stage fewer than asked for on cards without asynchronous products
        weight_bytes = tile.block_n * tile.block_k // (2 if op == "int4_linear" else 1)
        stage = tile.dots * (tile.block_m * tile.block_k + weight_bytes)
        assert stage * (tile.stages - 1) <= SHARED_LIMIT.get(family, 64 * 1024)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("capability", [0, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize(("N", "K"), [(1, 16), (33, 112), (1152, 4608), (3072, 3072), (21504, 3072), (5120, 13824)])
def test_one_tile_per_bucket_and_it_pads_little(op, capability, N, K):
    for low, high in ((1, 16), (17, 32), (65, 128), (2049, 4096), (8193, 100000)):
        tile = tile_for(op, capability, low, N, K)
        assert tile == tile_for(op, capability, high, N, K)
        assert tile in candidates(op, capability, bucket_of(low), N, K)
        assert tile.block_m < 2 * max(low, 9)


def test_many_tokens_get_the_large_tile_and_few_fill_the_card():
    large = TILES["int8_linear", 86][0]
    assert tile_for("int8_linear", 86, 4096, 3072, 3072) == large
    few = tile_for("int8_linear", 86, 256, 3072, 3072)
    assert programs(few, 256, 3072) >= MULTIPROCESSORS[86] > programs(large, 256, 3072)


def test_uneven_shapes_avoid_the_tile_without_spare_registers():
    largest = tile_for("int8_linear", 90, 8192, 4096, 4096)
    assert largest == TILES["int8_linear", 90][0]
    for N, K in ((4096, 4096 + 16), (4095, 4096)):
        for tile in candidates("int8_linear", 90, 8192, N, K):
            assert tile.block_m * tile.block_n < largest.block_m * largest.block_n
    assert tile_for("int8_linear", 90, 8192, 4096, 100) == RAGGED


@pytest.mark.parametrize("capability", [0, 80, 86, 89, 90, 100, 120])
def test_a_weight_is_decoded_first_by_default_where_that_was_measured_to_pay(capability):
    """The tokens of a bucket of 4096 are 2049 and more."""
    for M, N, K in ((2049, 9216, 3072), (4097, 3072, 3072), (100000, 21504, 3072)):
        tile = tile_for("int4_linear", capability, M, N, K)
        assert tile.decoded == (capability == 90) == decodes_first(capability, bucket_of(M), N, K)
    for M, N, K in ((2048, 21504, 3072), (4096, 3072, 3072), (8192, 1536, 1536), (8192, 21504, 3072 + 16)):
        assert not tile_for("int4_linear", capability, M, N, K).decoded


@pytest.mark.parametrize("capability", [0, 80, 86, 89, 90, 100, 120])
def test_decoding_first_is_offered_once_with_the_tile_of_such_an_8_bit_product(capability):
    for bucket, N, K in ((4096, 1536, 1536), (8192, 9216, 3072)):
        decoded, *others = candidates("int4_linear", capability, bucket, N, K)
        assert replace(decoded, decoded=False) == candidates("int8_linear", capability, bucket, N, K)[0]
        assert tuple(others) == in_registers((decoded, *others)) == candidates("int4_linear", capability, 2048, N, K)
    for bucket, N, K in ((2048, 9216, 3072), (8192, 9216, 3072 + 16), (8192, 9216 + 8, 3072), (8192, 64, 100)):
        tiles = candidates("int4_linear", capability, bucket, N, K)
        assert in_registers(tiles) == tiles
    assert not any(tile.decoded for tile in candidates("int8_linear", capability, 8192, 9216, 3072))
