"""The torch quantizer against the definition: the same bits, except after a rotation on CPU."""

import pytest
import torch
from dit_quant.kernels.numerics import hadamard as hadamard_matrix
from dit_quant.kernels.numerics import lerp_rows
from dit_quant.kernels.quantize_activation import reference, torch_impl
from near_ties import pairs_on_ties

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SHAPES = [(1, 1), (1, 100), (7, 33), (63, 3088), (100, 7)]
ROWS = {
    "normal": lambda x: x,
    "one-sided": lambda x: x.abs() + 3,
    "constant": lambda x: torch.full_like(x, -2.7),
    "zero": torch.zeros_like,
    "tiny": lambda x: x * 1e-42,
    "far": lambda x: x * 1e-3 + 1e4,
    "outlier": lambda x: x + 1e4 * (torch.arange(x.shape[1]) == 0),
    "ladder": lambda x: x * torch.logspace(-8, 8, x.shape[0])[:, None],
}
STATIC = torch.tensor([0.5, 0.01, 0.02])
ZERO = torch.tensor([3.0, -120.0, 40.4])


@pytest.fixture(autouse=True, params=[2**20, 500], ids=["one block", "blocks"])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(torch_impl, "CPU_BLOCK", request.param)


def at(index=1, fraction=0.0):
    return {"index": torch.tensor([index]), "fraction": torch.tensor([fraction])}


def normal(M, K, seed=0):
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed))


def assert_equal(x, **options):
    found, expected = (f.quantize_activation(x, **options) for f in (torch_impl, reference))
    assert found[0].dtype is torch.int8
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype is b.dtype and a.shape == b.shape and torch.equal(a, b))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("M", "K"), SHAPES)
def test_dynamic_ranges_are_bit_equal(M, K, rows, symmetric):
    assert_equal(ROWS[rows](normal(M, K)), symmetric=symmetric, **at())


@pytest.mark.parametrize("fraction", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
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


def test_ends_on_ties_are_bit_equal():
    assert_equal(pairs_on_ties(), symmetric=False, **at())


@pytest.mark.parametrize("order", [4, 16, 64, 256])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_rotation_of_integers_is_bit_equal(order, symmetric):
    """All sums are exact, whatever their order."""
    x = torch.randint(-999, 1000, (7, 768), generator=torch.Generator().manual_seed(4)).float()
    before, shift = x.clone(), torch.full((3, 768), 5.0)
    for options in ({}, {"shift": shift}, {"smooth": shift[0] - 1}, {"shift": shift, "smooth": shift[0] - 1}):
        assert_equal(x, hadamard=order, symmetric=symmetric, **options, **at())
    assert_equal(x, hadamard=order, static_scale=STATIC, **at())
    assert torch.equal(x, before)


@pytest.mark.parametrize("order", [4, 16, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_rotated_codes_stand_for_the_exact_rotation(order, dtype, symmetric):
    M, K, T = 33, 768, 3
    x, shift, smooth = (5 * normal(M, K)).to(dtype), normal(T, K, seed=1), normal(1, K, seed=2)[0].exp()
    options = {"shift": shift, "smooth": smooth, "hadamard": order, "symmetric": symmetric, **at()}
    codes, scale, zero = torch_impl.quantize_activation(x, **options)
    row = lerp_rows(shift, **at()).double()
    plain = (x.double() - row) / smooth.double()
    H = torch.kron(torch.eye(K // order, dtype=torch.float64), hadamard_matrix(order, torch.float64))
    exact = plain @ H
    restored = scale.double() * (codes.double() - (0 if zero is None else zero.double()))
    # a sum of `order` terms in fp32 is off by at most order u sum |terms|; 1 / s, z / s and their FMA add 3
    u = 2**-24
    terms = ((x.double().abs() + row.abs()) / smooth.double()) @ H.abs()
    assert ((restored - exact).abs() <= 0.5001 * scale.double() + 2 * u * exact.abs() + (order + 3) * u * terms).all()
    # and the definition's codes differ where a sum is next to a tie, by one
    expected = reference.quantize_activation(x, **options)[0]
    assert (codes.int() - expected.int()).abs().max() <= 1


def legacy_precision(value):
    torch.set_float32_matmul_precision(value)


def newer_precision(value):
    torch.backends.mkldnn.matmul.fp32_precision = {"highest": "ieee", "medium": "bf16"}[value]


@pytest.mark.parametrize("set_precision", [legacy_precision, newer_precision])
def test_bf16_inside_fp32_products_is_kept_out(set_precision):
    if set_precision is newer_precision and not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("torch before 2.9")
    set_precision("medium")
    try:
        assert not torch_impl.fp32_products_are_fp32()
        assert_equal(normal(33, 768), hadamard=256, symmetric=False, **at())
    finally:
        set_precision("highest")
    assert torch_impl.fp32_products_are_fp32()


@pytest.mark.parametrize("order", [1, 64])
def test_views_and_parameters_are_taken(order):
    wide = torch.nn.Parameter(normal(63, 2 * 192))
    x = wide[:, ::2]
    for options in (
        {},
        {"shift": normal(3, 192).requires_grad_()},
        {"smooth": normal(1, 192)[0].exp().requires_grad_()},
    ):
        found = torch_impl.quantize_activation(x, hadamard=order, symmetric=False, **options, **at())
        plain = {name: value.detach() for name, value in options.items()}
        expected = torch_impl.quantize_activation(x.detach().clone(), hadamard=order, symmetric=False, **plain, **at())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_order_that_is_no_power_of_4_is_refused():
    with pytest.raises(ValueError, match="block 32 is not a power of 4"):
        torch_impl.quantize_activation(normal(7, 64), hadamard=32, **at())


def test_runs_anywhere():
    assert torch_impl.refusal(torch.device("cpu")) is None
