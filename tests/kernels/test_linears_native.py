"""The C products: exact integer sums, and the definition's bits in the output, at 8 and 4 bits."""

import itertools

import pytest
import torch
from dit_quant.kernels.int4_linear import native_impl as int4_native
from dit_quant.kernels.int4_linear import reference as int4_reference
from dit_quant.kernels.int8_linear import native_impl, reference
from dit_quant.kernels.native.library import library
from dit_quant.kernels.numerics import decode_int4, pack_int4, pack_levels

pytestmark = [
    pytest.mark.usefixtures("build", "poisoned_empty"),
    pytest.mark.skipif(isinstance(library(), str), reason=f"native: {library()}"),
]

# one token, tiles of every height, several chunks of tokens; part of a strip and of a panel, one, several; K in no
# whole words
SHAPES = [
    (1, 1, 1),
    (2, 33, 100),
    (5, 32, 64),
    (7, 31, 3),
    (12, 7, 8),
    (16, 256, 64),
    (17, 300, 130),
    (33, 200, 4100),
    (63, 33, 3088),
    (300, 128, 66),
    (1600, 65, 68),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PARTS = [(), ("zero",), ("bias",), ("correction",), ("directions",), ("zero", "bias", "correction", "directions")]
# N, K, G: groups of 16, 32, 64, 128, 192 and 48, and of sizes that no register holds a whole number of
WEIGHTS = [
    (33, 3088, 193),
    (33, 96, 3),
    (70, 128, 2),
    (63, 256, 2),
    (33, 192, 1),
    (17, 144, 3),
    (7, 100, 5),
    (5, 1028, 257),
    (9, 12, 2),
    (1, 4, 1),
]


def codes(*shape, extreme=False, seed=0):
    random = torch.Generator().manual_seed(seed)
    if extreme:
        return (127 - 254 * torch.randint(0, 2, shape, generator=random)).to(torch.int8)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=random)


def weight4(N, K, G, seed=0):
    random = torch.Generator().manual_seed(seed)
    packed = pack_int4(torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=random))
    multiplier = torch.randint(1, 9, (N, G), dtype=torch.uint8, generator=random)
    return packed, pack_levels(multiplier, torch.randint(0, 16, (N, G), dtype=torch.uint8, generator=random))


def epilogue(M, N, column_sum, parts=(), seed=1):
    """Keywords of an epilogue with the named parts."""
    random = torch.Generator().manual_seed(seed)
    known = {
        "zero": {
            "row_zero": torch.randint(-99, 99, (M, 1), generator=random).float(),
            "column_sum": column_sum.to(torch.int32),
        },
        "bias": {"bias": torch.randn(N, generator=random).bfloat16()},
        "correction": {"correction": torch.randn(3, N, generator=random).half()},
        "directions": {
            "coordinates": torch.randn(M, 3, generator=random).bfloat16(),
            "responses": torch.randn(3, N, generator=random).half(),
        },
    }
    options = {
        "row_scale": torch.rand(M, 1, generator=random),
        # outputs within fp16
        "column_scale": torch.rand(N, 1, generator=random) / 4096,
        "index": torch.tensor([1]),
        "fraction": torch.tensor([0.25]),
    }
    for part in parts:
        options |= known[part]
    return options


@pytest.mark.parametrize("extreme", [True, False], ids=["extreme", "random"])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_integer_sums_are_exact(M, N, K, extreme):
    """Unit scales: the output is the sum itself, rounded once."""
    a, w = codes(M, K, extreme=extreme), codes(N, K, extreme=extreme, seed=2)
    unit = {"row_scale": torch.ones(M, 1), "column_scale": torch.ones(N, 1)}
    y = native_impl.int8_linear(a, w, **unit, index=torch.tensor([0]), fraction=torch.tensor([0.0]))
    assert torch.equal(y, (a.double() @ w.double().T).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [4096, 4097])
def test_outputs_larger_than_a_cache(N, dtype):
    """Past the caches where rows are whole cache lines: not a bit is different, and none is left behind."""
    a, w = codes(2100, 4), codes(N, 4, seed=2)
    options = epilogue(2100, N, w.sum(1), ("zero", "bias"))
    assert a.shape[0] * N * dtype.itemsize > 2**24
    assert torch.equal(*(f.int8_linear(a, w, **options, dtype=dtype) for f in (native_impl, reference)))


def test_sums_pass_through_the_whole_of_int32():
    """Inside, a + 128 of both signs: partial sums wrap around, the total does not."""
    K = 2**17
    a, w = torch.full((2, K), 127, dtype=torch.int8), torch.full((1, K), -127, dtype=torch.int8)
    unit = {"row_scale": torch.ones(2, 1), "column_scale": torch.ones(1, 1)}
    y = native_impl.int8_linear(a, w, **unit, index=torch.tensor([0]), fraction=torch.tensor([0.0]))
    assert (y.double() == float(torch.tensor(-K * 127.0**2))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_epilogue_has_the_definitions_bits(M, N, K, parts, dtype):
    a, w = codes(M, K), codes(N, K, seed=2)
    options = epilogue(M, N, w.sum(1), parts)
    found, expected = (f.int8_linear(a, w, **options, dtype=dtype) for f in (native_impl, reference))
    assert found.dtype is dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_reach_the_output(dtype):
    """A NaN or an infinity in a scale, and outputs past the type's largest, as the definition has them."""
    a, w = codes(20, 64), codes(40, 64, seed=2)
    options = epilogue(20, 40, w.sum(1), ("zero", "bias"))
    options["row_scale"][3], options["row_scale"][5] = torch.nan, torch.inf
    options["column_scale"][7] *= 1e38
    found, expected = (f.int8_linear(a, w, **options, dtype=dtype) for f in (native_impl, reference))
    assert expected.isnan().any()
    assert expected.isinf().any()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@pytest.mark.parametrize(("N", "K", "G"), WEIGHTS)
def test_four_bits_have_the_definitions_bits(N, K, G, parts):
    a, (packed, levels) = codes(29, K), weight4(N, K, G)
    options = epilogue(29, N, decode_int4(packed, levels).sum(1), parts)
    found, expected = (f.int4_linear(a, packed, levels=levels, **options) for f in (int4_native, int4_reference))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [4, 16, 64])
def test_every_code_zero_and_multiplier_within_int8(size):
    triples = [
        (code, zero, multiplier)
        for code, zero, multiplier in itertools.product(range(16), range(16), range(1, 16))
        if abs((code - zero) * multiplier) <= 127
    ]
    code, zero, multiplier = torch.tensor(triples, dtype=torch.uint8).T.contiguous()
    packed = pack_int4(code[:, None].repeat(1, size))
    a = torch.ones(1, size, dtype=torch.int8)
    given = {"levels": pack_levels(multiplier[:, None], zero[:, None])} | epilogue(1, len(code), code)
    found, expected = (f.int4_linear(a, packed, **given) for f in (int4_native, int4_reference))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("N", "K", "G"), WEIGHTS)
def test_table_takes_the_place_of_the_zeros(N, K, G):
    a, (packed, levels) = codes(5, K), weight4(N, K, G)
    table = torch.tensor([-15, -12, -10, -8, -6, -4, -2, -1, 0, 1, 3, 5, 7, 9, 12, 15], dtype=torch.int8)
    given = {"levels": levels, "table": table} | epilogue(5, N, torch.zeros(N))
    found, expected = (f.int4_linear(a, packed, **given) for f in (int4_native, int4_reference))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_changes_nothing(threads):
    a, w = codes(130, 64), codes(70, 64, seed=2)
    options = epilogue(130, 70, w.sum(1), ("zero",))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(native_impl.int8_linear(a, w, **options), reference.int8_linear(a, w, **options))
    finally:
        torch.set_num_threads(before)


def test_a_large_output_is_written_to_its_last_entry():
    """From four MiB on it lies in huge pages."""
    a, w = codes(1100, 16), codes(1029, 16, seed=2)
    options = epilogue(1100, 1029, w.sum(1), ("bias",))
    assert torch.equal(native_impl.int8_linear(a, w, **options), reference.int8_linear(a, w, **options))


def test_views_are_read_as_they_are():
    a, w = codes(64, 30).T, codes(64, 40, seed=2).T
    options = epilogue(30, 40, w.sum(1))
    options["row_scale"] = torch.tensor([0.5]).expand(30, 1)
    assert torch.equal(native_impl.int8_linear(a, w, **options), reference.int8_linear(a, w, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": codes(33, 99)}, "a weight of 99 bytes a row does not fit tokens of K=100"),
        ({"w": codes(33, 100).view(torch.uint8)}, "weights int8"),
        ({"row_scale": torch.ones(6, 1)}, "row_scale has 6 entries, not 7"),
        ({"column_scale": torch.ones(32, 1)}, "column_scale has 32 entries, not 33"),
        ({"bias": torch.ones(1)}, "bias has 1 entries, not 33"),
        ({"row_zero": torch.ones(7, 1), "column_sum": None}, "needs the weight's column sums"),
    ],
    ids=str,
)
def test_what_would_be_read_past_its_end_is_an_error(change, message):
    given = {"a": codes(7, 100), "w": codes(33, 100)} | epilogue(7, 33, torch.zeros(33)) | change
    with pytest.raises(ValueError, match=message):
        native_impl.int8_linear(given.pop("a"), given.pop("w"), **given)


def test_levels_that_do_not_fit_are_an_error():
    packed, levels = weight4(33, 96, 3)
    with pytest.raises(ValueError, match=r"levels \(33, 5\) torch.uint8 do not fit a weight of N=33, K=96"):
        int4_native.int4_linear(
            codes(7, 96), packed, levels=levels.repeat(1, 2)[:, :5], **epilogue(7, 33, torch.zeros(33))
        )
