"""The C quantizer against the definition: the same bits, rotated or not."""

import pytest
import torch
from dit_quant.kernels.native.library import library
from dit_quant.kernels.quantize_activation import native_impl, reference
from near_ties import pairs_on_ties

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.skipif(isinstance(library(), str), reason=f"native: {library()}"),
]

# rows that fill no register, exactly some, and more than a portion of rows
SHAPES = [(1, 1), (1, 100), (7, 33), (63, 3088), (100, 7), (17, 16)]
ROWS = {
    "normal": lambda x: x,
    "one-sided": lambda x: x.abs() + 3,
    "negative": lambda x: -x.abs() - 3,
    "constant": lambda x: torch.full_like(x, -2.7),
    "zero": torch.zeros_like,
    "tiny": lambda x: x * 1e-42,
    "far": lambda x: x * 1e-3 + 1e4,
    "outlier": lambda x: x + 1e4 * (torch.arange(x.shape[1]) == 0),
    "ladder": lambda x: x * torch.logspace(-8, 8, x.shape[0])[:, None],
    "one NaN": lambda x: torch.where(torch.arange(x.numel()).view_as(x) == x.numel() // 2, torch.nan, x),
    "one infinity": lambda x: torch.where(torch.arange(x.numel()).view_as(x) == x.numel() // 2, -torch.inf, x),
}
STATIC = torch.tensor([0.5, 0.01, 0.02])
ZERO = torch.tensor([3.0, -120.0, 40.4])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def at(index=1, fraction=0.0):
    return {"index": torch.tensor([index]), "fraction": torch.tensor([fraction])}


def normal(M, K, seed=0):
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed))


def assert_equal(x, **options):
    found, expected = (f.quantize_activation(x, **options) for f in (native_impl, reference))
    assert found[0].dtype is torch.int8
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype is b.dtype
            # an asymmetric row with a NaN has a zero point of NaN, which carries it to the output
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("M", "K"), SHAPES)
def test_dynamic_ranges_are_bit_equal(M, K, rows, symmetric):
    assert_equal(ROWS[rows](normal(M, K)), symmetric=symmetric, **at())


@pytest.mark.parametrize("fraction", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables", [("shift",), ("smooth",), ("shift", "smooth")], ids="+".join)
@pytest.mark.parametrize(
    "ranges",
    [{}, {"symmetric": False}, {"static_scale": STATIC}, {"static_scale": STATIC, "static_zero": ZERO}],
    ids=["symmetric", "asymmetric", "static", "static, zero"],
)
def test_tables_are_bit_equal(ranges, tables, dtype, fraction):
    K = 100
    known = {"shift": normal(3, K, seed=1).half(), "smooth": normal(1, K, seed=2)[0].exp()}
    options = {name: known[name] for name in tables} | ranges
    assert_equal((3 * normal(63, K)).to(dtype), **options, **at(1, fraction))


@pytest.mark.parametrize("order", [4, 16, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_rotations_are_bit_equal(order, dtype, symmetric):
    """Sums in the reference's order: the same bits, not merely the same codes but for ties."""
    K = 5 * order
    options = {"shift": normal(3, K, seed=1).half(), "smooth": normal(1, K, seed=2)[0].exp(), "symmetric": symmetric}
    assert_equal((3 * normal(63, K)).to(dtype), hadamard=order, **options, **at(1, 0.3))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equal(normal(100, 256), hadamard=64, **at())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("view", [lambda x: x.T, lambda x: x[:, 3:40], lambda x: x[::2]], ids=["T", "columns", "rows"])
def test_views_are_read_in_place(view):
    assert_equal(view(normal(63, 63)), **at())


def test_ends_on_ties_are_bit_equal():
    assert_equal(pairs_on_ties(), symmetric=False, **at())


def test_rows_that_do_not_fit_the_rotation_are_an_error():
    with pytest.raises(ValueError, match="K=100 is not divisible by the Hadamard block 16"):
        native_impl.quantize_activation(normal(3, 100), hadamard=16, **at())


def test_tables_of_another_length_are_an_error():
    with pytest.raises(ValueError, match="smooth has 99 entries, not 100"):
        native_impl.quantize_activation(normal(3, 100), smooth=torch.ones(99), **at())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_is_not_ours(dtype):
    """What C writes into is of the size that C takes it for, whatever else runs in the process has set."""
    x = normal(7, 100)
    expected = reference.quantize_activation(x, symmetric=False, **at())
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = native_impl.quantize_activation(x, symmetric=False, **at())
    finally:
        torch.set_default_dtype(usual)
    assert [t.dtype for t in found] == [torch.int8, torch.float32, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_default_device_is_not_ours():
    x = normal(7, 100)
    group = at()
    expected = reference.quantize_activation(x, symmetric=False, **group)
    with torch.device("meta"):
        found = native_impl.quantize_activation(x, symmetric=False, **group)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
