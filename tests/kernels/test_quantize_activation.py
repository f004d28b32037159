"""Activation quantizer: every row within half a step, whatever its range."""

import pytest
import torch
from dit_quant.kernels import quantize_activation
from dit_quant.kernels.numerics import hadamard as hadamard_matrix
from dit_quant.kernels.numerics import lerp_rows
from dit_quant.kernels.quantize_activation import reference
from near_ties import pairs_on_ties

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SHAPES = [(1, 1), (1, 100), (7, 33), (33, 63), (100, 7)]
ROWS = {
    "normal": lambda x: x,
    "one-sided": lambda x: x.abs() + 3,
    "negative": lambda x: -x.abs() - 3,
    "constant": lambda x: torch.full_like(x, -2.7),
    "zero": torch.zeros_like,
    "tiny": lambda x: x * 1e-42,
    "offset": lambda x: x + 1e3,
    "far": lambda x: x * 1e-3 + 1e4,
    "outlier": lambda x: x + 1e4 * (torch.arange(x.shape[1]) == 0),
    "ladder": lambda x: x * torch.logspace(-8, 8, x.shape[0])[:, None],
}


def at(index=0, fraction=0.0):
    return {"index": torch.tensor([index]), "fraction": torch.tensor([fraction])}


def normal(M, K, seed=0):
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed))


def restored(codes, scale, zero):
    return scale.double() * (codes.double() - (0 if zero is None else zero.double()))


def allowed(scale, size):
    """Half a step, and the rounding of x / scale in fp32: half a unit of x's own last place, doubled for slack."""
    return 0.5001 * scale.double() + 2**-23 * size.double().abs()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("M", "K"), SHAPES)
def test_dynamic_rows_are_within_half_a_step(M, K, rows, symmetric):
    x = ROWS[rows](normal(M, K))
    codes, scale, zero = quantize_activation(x, symmetric=symmetric, **at())
    assert codes.dtype is torch.int8
    assert codes.min() >= -127
    assert (scale > 0).all()
    assert scale.shape == (M, 1)
    assert ((restored(codes, scale, zero) - x).abs() <= allowed(scale, x)).all()
    if symmetric:
        assert zero is None
    else:
        assert torch.equal(zero, zero.round())
        # beyond, x / scale + zero would lose its fraction in fp32
        assert (zero.abs() <= 2**15 + 127).all()


def ends():
    """[5, 100000, 2]: rows of their two ends, centred to nearly as far off as a symmetric range begins."""
    x = torch.cat([normal(90_000, 2).sort(dim=1).values, pairs_on_ties()])
    offsets = torch.tensor([0.0, 1.0, 10.0, 60.0, 127.0])[:, None, None]
    return x + offsets * (x[:, 1:] - x[:, :1]) * torch.rand(5, 100_000, 1, generator=torch.Generator().manual_seed(5))


def test_no_entry_of_a_dynamic_range_has_a_code_beyond():
    """The codes are not clamped, they are within: those of both ends, between which all others lie. Ties and offsets of
    all sizes."""
    x = ends().flatten(0, 1)
    scale, zero = reference.asymmetric_range(x[:, :1], x[:, 1:])
    codes = reference.round_sum(x * scale.reciprocal(), zero)
    assert codes.amin() == -127
    assert codes.amax() == 127


def test_the_step_of_the_spread_alone_would_be_too_small():
    x = ends().flatten(0, 1)
    scale = (x[:, 1:] - x[:, :1]).clamp(min=1e-6) / 254
    zero = -127 - (x[:, :1] * scale.reciprocal() - 0.5).ceil()
    assert reference.round_sum(x * scale.reciprocal(), zero).amax() == 128


def test_asymmetric_halves_the_step_of_one_sided_rows():
    x = normal(33, 100).abs()
    _, symmetric, _ = quantize_activation(x, symmetric=True, **at())
    _, asymmetric, _ = quantize_activation(x, symmetric=False, **at())
    # 254 steps over max - min <= max, against 127 steps over max
    assert (asymmetric <= symmetric * 0.5 * (1 + 2**-22)).all()


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
def test_offset_costs_an_asymmetric_row_nothing(offset):
    x = normal(7, 63)
    _, scale, _ = quantize_activation(x + offset, symmetric=False, **at())
    _, centred, _ = quantize_activation(x, symmetric=False, **at())
    # x + offset is rounded to fp32 first; 2**-20 of the magnitude widen the range of 4 or more
    torch.testing.assert_close(scale, centred, rtol=2**-22 * (1 + offset) + 2**-20 * (4 + offset) / 4, atol=0)


@pytest.mark.parametrize("with_zero", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("M", "K"), SHAPES)
def test_static_ranges_hold_every_unclamped_entry(M, K, with_zero):
    x = 3 * normal(M, K)
    scale_table = torch.tensor([0.5, 0.01, 0.02])
    zero_table = torch.tensor([3.0, -120.0, 40.0]) if with_zero else None
    for group in range(3):
        codes, scale, zero = quantize_activation(
            x, symmetric=not with_zero, static_scale=scale_table, static_zero=zero_table, **at(group)
        )
        assert torch.equal(scale, scale_table[group].expand(M, 1))
        exact = x.double() / scale.double() + (0 if zero is None else zero.double())
        inside = exact.abs() <= 127
        error = (restored(codes, scale, zero) - x).abs()
        assert (error <= allowed(scale, x))[inside].all()
        assert torch.equal(codes[~inside], (127 * exact.sign()).to(torch.int8)[~inside])


@pytest.mark.parametrize("order", [1, 4, 64])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_codes_stand_for_the_transformed_activation(order, symmetric):
    M, K, T = 33, 192, 3
    x, shift = 5 * normal(M, K), normal(T, K, seed=1)
    smooth = normal(1, K, seed=2)[0].exp()
    codes, scale, zero = quantize_activation(
        x, shift=shift, smooth=smooth, hadamard=order, symmetric=symmetric, **at(1)
    )
    H = torch.kron(torch.eye(K // order, dtype=torch.float64), hadamard_matrix(order, torch.float64))
    plain = (x.double() - shift[1].double()) / smooth.double()
    # a dot product of length `order` in fp32 is off by at most order u |x|, u = 2**-24; difference and quotient add 2
    slack = (order + 2) * 2**-24 * ((x.abs() + shift[1].abs()) / smooth).double().norm(dim=1, keepdim=True)
    assert ((restored(codes, scale, zero) - plain @ H).abs() <= allowed(scale, plain @ H) + slack).all()


@pytest.mark.parametrize(("index", "fraction"), [(0, 0.0), (0, 0.3), (1, 0.75), (2, 0.0), (1, 1.0)])
def test_interpolation_is_the_lerp_of_the_tables(index, fraction):
    x, T, K = normal(7, 33), 3, 33
    tables = {
        "shift": normal(T, K, seed=1).half(),
        "static_scale": torch.tensor([0.01, 0.03, 0.07]),
        "static_zero": torch.tensor([-10.0, 5.0, 33.0]),
    }
    where = at(index, fraction)
    row = {name: lerp_rows(table, **where)[None] for name, table in (("shift", tables["shift"]),)}
    row["static_scale"] = lerp_rows(tables["static_scale"][:, None], **where)
    row["static_zero"] = lerp_rows(tables["static_zero"][:, None], **where).round()
    found = quantize_activation(x, symmetric=False, **tables, **where)
    expected = quantize_activation(x, symmetric=False, **row, **at())
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_first(dtype):
    x = normal(7, 33).to(dtype)
    for a, b in zip(
        quantize_activation(x, symmetric=False, **at()),
        quantize_activation(x.float(), symmetric=False, **at()),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_rows_do_not_see_each_other():
    x = normal(33, 63) * torch.logspace(-3, 3, 33)[:, None]
    codes, scale, zero = quantize_activation(x, symmetric=False, **at())
    order = torch.randperm(33, generator=torch.Generator().manual_seed(4))
    shuffled = quantize_activation(x[order], symmetric=False, **at())
    for a, b in zip((codes, scale, zero), shuffled, strict=True):
        assert torch.equal(a[order], b)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("value", [-1e4, -2.7, -1e-20, 1e-20, 1e-3, 0.3, 5.0, 1e30])
def test_constant_rows_keep_their_value(value, symmetric):
    """No spread to measure a step from: half of 1/127 or 1/254 of the value itself, never a step of 1."""
    codes, scale, zero = quantize_activation(torch.full((7, 33), value), symmetric=symmetric, **at())
    error = (restored(codes, scale, zero) - value).abs().max()
    assert error <= 0.5001 * abs(value) / (127 if symmetric else 254)
