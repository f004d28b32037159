"""Grids: levels within int8, searched as well as their candidates allow, and exact where a weight lies on them."""

import itertools
import math

import pytest
import torch
from dit_quant.kernels.numerics import decode_int4, pack_int4, pack_levels
from dit_quant.quant_core import grid as grid_module
from dit_quant.quant_core.grid import (
    REACH,
    SHRINK,
    WIDEST_MULTIPLIER,
    Int4Grid,
    Int8Grid,
    channel_step,
    fit_levels,
    int4_grid,
    int8_grid,
    nearest_level,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SYMMETRIES = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outlier(w):
    w = w.clone()
    w[0, 0] = 1e4
    return w


def mixed(w):
    """One-sided, zero and tiny rows side by side."""
    w = w.clone()
    w[0::3] = w[0::3].abs()
    w[1::3] = -w[1::3].abs() - 1
    w[-1] = 0
    return w


WEIGHTS = {
    "normal": lambda w: w,
    "one-sided": lambda w: w.abs() + 2,
    "negative": lambda w: -w.abs(),
    "zero": torch.zeros_like,
    "outlier": with_outlier,
    "mixed": mixed,
    "tiny": lambda w: w * 1e-30,
    "huge": lambda w: w * 1e30,
    "ladder": lambda w: w * torch.logspace(-6, 6, w.shape[1]),
}
KINDS = pytest.mark.parametrize("kind", WEIGHTS)


@KINDS
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (33, 63), (63, 100)])
def test_int8_is_within_half_a_step(shape, kind):
    weight = WEIGHTS[kind](normal(*shape))
    grid = int8_grid(weight)
    codes = grid.encode(weight, 0)
    assert codes.dtype is torch.int8
    assert codes.min() >= -127
    # round-to-nearest; the quotient is rounded once
    assert ((grid.decode(codes, 0) - weight).abs() <= 0.5001 * grid.scale).all()
    assert (grid.scale * 127 <= weight.abs().amax(dim=1, keepdim=True) * (1 + 2**-22)).logical_or(grid.scale == 1).all()


def allowed(multiplier, zero):
    """What the 16 codes decode to, as far as int8 holds it."""
    return [(code - zero) * multiplier for code in range(16) if abs((code - zero) * multiplier) <= 127]


@pytest.mark.parametrize("multiplier", range(1, 16))
def test_nearest_level_is_the_nearest_that_int8_holds(multiplier):
    units = torch.cat([torch.arange(-1000, 1001) / 4, torch.tensor([-1e30, 1e30]), 99 * normal(999)])
    for zero in range(16):
        m, z = torch.tensor(float(multiplier)), torch.tensor(float(zero))
        codes = nearest_level(units, m, z)
        decoded = (codes - z) * m
        assert ((codes >= 0) & (codes <= 15) & (decoded.abs() <= 127)).all()
        levels = torch.tensor(allowed(multiplier, zero), dtype=torch.float64)
        best = (levels[:, None] - units.double()).abs().amin(dim=0)
        # at a tie the rounded quotient may choose either side: two fp32 roundings of numbers up to 16 or 1e30
        assert ((decoded.double() - units.double()).abs() <= best + 2**-22 * (16 * m + units.abs())).all()


@KINDS
@SYMMETRIES
@pytest.mark.parametrize(("N", "K", "size"), [(1, 4, 4), (7, 100, 20), (33, 64, 64), (63, 256, 16)])
def test_int4_is_stored_as_it_decodes(N, K, size, kind, symmetric):
    """The float grid and the stored bytes say the same, and no code leaves int8."""
    weight = WEIGHTS[kind](normal(N, K))
    grid = int4_grid(weight, size, symmetric)
    codes = grid.encode(weight, 0)
    assert codes.dtype is torch.uint8
    assert codes.max() <= 15
    stored = decode_int4(pack_int4(codes), grid.levels)
    assert stored.min() >= -127
    assert torch.equal(stored.float(), (grid.decode(codes, 0) / grid.scale).round())
    # the integer product is exact in fp32, its product with the scale is rounded up to twice
    torch.testing.assert_close(stored.float() * grid.scale, grid.decode(codes, 0), rtol=2**-22, atol=0)
    if symmetric:
        assert (grid.zero == 8).all()
    again = Int4Grid.unpack(grid.scale, grid.levels, size)
    assert torch.equal(again.multiplier, grid.multiplier)
    assert torch.equal(again.zero, grid.zero)


@KINDS
@SYMMETRIES
@pytest.mark.parametrize(("N", "K", "size"), [(1, 4, 4), (7, 100, 20), (33, 64, 64), (63, 256, 16)])
def test_int4_without_search_is_within_its_step(N, K, size, kind, symmetric):
    """Min-max, its step rounded to the int8 grid: half a step, and half an int8 step per level that is lost.

    The squared error of a group also never exceeds that of the next wider step, which covers the group: there
    half a step from rounding, half from the rounded zero at one end, none from int8, which holds REACH.
    """
    weight = WEIGHTS[kind](normal(N, K))
    grid = int4_grid(weight, size, symmetric, shrink=(1.0,))
    assert (weight.abs() <= REACH * 1.0001 * grid.scale).all()
    groups = (weight / grid.scale).unflatten(1, (-1, size))
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    wanted = torch.maximum(high / 7, -low / 8) if symmetric else (high - low) / 15
    assert (wanted <= WIDEST_MULTIPLIER * 1.0001).all()
    wide = wanted.mul(0.99999).ceil().clamp(min=1)
    errors = ((grid.decode(grid.encode(weight, 0), 0) - weight) / grid.scale).unflatten(1, (-1, size))
    assert (errors.square().sum(dim=2) <= size * (0.5001 * wide).square() + 1e-3).all()


def test_a_lopsided_channel_keeps_its_largest_weight():
    """Its step must grow until int8 holds the far end: 15 levels of 12 would end at 180."""
    for weight in (normal(33, 64).abs(), -normal(33, 64).abs(), 1 + normal(33, 64) / 8):
        grid = int4_grid(weight, 16, False, shrink=(1.0,))
        largest = weight.abs().argmax(dim=1, keepdim=True)
        codes = grid.encode(weight, 0)
        error = (grid.decode(codes, 0) - weight).abs().gather(1, largest)
        step = grid.step(0, 64).gather(1, largest)
        # half a step, and a whole one where the narrower of two multipliers was better for the other 15
        assert (error <= 1.0001 * step).all()


def test_multipliers_use_their_range():
    """The widest group of a channel takes WIDEST_MULTIPLIER, whatever the magnitude."""
    weight = normal(7, 256) * torch.logspace(-6, 6, 7)[:, None]
    for symmetric in (True, False):
        multiplier = int4_grid(weight, 16, symmetric, shrink=(1.0,)).multiplier
        assert (multiplier.amax(dim=1) >= WIDEST_MULTIPLIER - 1).all()


def test_zero_is_always_a_level():
    weight = normal(33, 64)
    weight[:, ::3] = 0
    weight[7] = weight[7].abs() + 1
    weight[7, 0] = 0
    for symmetric in (True, False):
        grid = int4_grid(weight, 16, symmetric)
        assert (grid.decode(grid.encode(weight, 0), 0)[weight == 0] == 0).all()


def test_every_code_returns_from_its_value():
    """encode(decode(codes)) == codes wherever int8 holds the product, at any column offset."""
    levels = torch.cartesian_prod(torch.arange(1.0, 16), torch.arange(16.0))  # [240, 2]
    codes = torch.arange(16, dtype=torch.uint8).repeat(240, 2)
    for scale in (1e-12, 0.007, 3.3e5):
        grid = Int4Grid(torch.full((240, 1), scale), levels[:, :1].expand(240, 2), levels[:, 1:].expand(240, 2), 16)
        fits = ((codes - levels[:, 1:]) * levels[:, :1]).abs() <= 127
        assert torch.equal(grid.encode(grid.decode(codes, 0), 0)[fits], codes[fits])
        assert torch.equal(grid.decode(codes[:, 5:], 5), grid.decode(codes, 0)[:, 5:])
        assert torch.equal(grid.encode(grid.decode(codes, 0)[:, 5:], 5)[fits[:, 5:]], codes[:, 5:][fits[:, 5:]])
        eight = Int8Grid(torch.full((1, 1), scale))
        every = torch.arange(-127, 128, dtype=torch.int8)[None]
        assert torch.equal(eight.encode(eight.decode(every, 0), 0), every)


def on_grid(N, G, size, symmetric, seed=0):
    """A weight on a 4-bit grid whose groups use all of their range -> weight, its grid and codes."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=random).float()  # noqa: E731
    multiplier = draw(1, WIDEST_MULTIPLIER + 1, N, G)
    multiplier[:, 0] = WIDEST_MULTIPLIER
    zero = torch.full((N, G), 8.0) if symmetric else draw(5, 11, N, G)
    grid = Int4Grid(0.5 ** draw(0, 9, N, 1), multiplier, zero, size)
    codes = draw(0, 16, N, G * size)
    codes[:, ::size], codes[:, 1::size] = 0, 15
    return grid.decode(codes, 0), grid, codes.to(torch.uint8)


@SYMMETRIES
def test_a_weight_on_its_grid_is_found_exactly(symmetric):
    """Scales are powers of two, so that every number on the way is exact."""
    weight, grid, codes = on_grid(33, 6, 16, symmetric)
    found = int4_grid(weight, 16, symmetric)
    assert torch.equal(found.scale, grid.scale)
    assert torch.equal(found.multiplier, grid.multiplier)
    assert torch.equal(found.zero, grid.zero)
    assert torch.equal(found.encode(weight, 0), codes)


def error_of(units, multiplier, zero, importance):
    """Weighted squared error in float64 of one group, by brute force over the levels that int8 holds."""
    levels = allowed(multiplier, zero)
    return sum(w * min((level - u) ** 2 for level in levels) for u, w in zip(units, importance, strict=True))


def candidates(units, symmetric):
    """(multiplier, zero) that the search may choose from, in Python."""
    low, high = min(*units, 0.0), max(*units, 0.0)
    wanted = max(high / 7, -low / 8) if symmetric else (high - low) / 15
    steps = {min(15, max(1, f(wanted * share))) for share in SHRINK for f in (math.floor, math.ceil)}
    if symmetric:
        return {(m, 8) for m in steps}
    centres = {m: (15 - (max(units) + min(units)) / m) / 2 for m in steps}
    return {(m, min(15, max(0, f(centres[m])))) for m in steps for f in (math.floor, math.ceil)}


@SYMMETRIES
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("size", [4, 16, 20])
def test_search_equals_brute_force_over_its_candidates(size, weighted, symmetric):
    N, G = 7, 5
    weight = normal(N, G * size, seed=size) ** 3
    weight[3] = weight[3].abs()
    importance = normal(G, size, seed=1).exp() if weighted else None
    # not the channel's own step: there the widest group wants 12 steps but for a rounding, and may try 13
    groups, scale = weight.unflatten(1, (-1, size)), 1.01 * channel_step(weight, size, symmetric)
    multiplier, zero = fit_levels(groups, scale, symmetric, importance)
    for n, g in itertools.product(range(N), range(G)):
        units = (groups[n, g] / scale[n]).tolist()
        shares = [1.0] * size if importance is None else importance[g].tolist()
        chosen = int(multiplier[n, g]), int(zero[n, g])
        errors = {pair: error_of(units, *pair, shares) for pair in candidates(units, symmetric)}
        # sums of up to 20 squares in fp32 may rank two candidates that are this close either way
        assert errors[chosen] <= min(errors.values()) * (1 + 1e-5)


@SYMMETRIES
@pytest.mark.parametrize("size", [4, 16, 64])
def test_search_is_never_worse_than_min_max(size, symmetric):
    """Group by group; and among 64 weights clipping pays."""
    weight = normal(33, 256, seed=2)
    errors = []
    for shrink in (SHRINK, (1.0,)):
        grid = int4_grid(weight, size, symmetric, shrink)
        lost = (grid.decode(grid.encode(weight, 0), 0) - weight).double() / grid.scale
        errors.append(lost.square().unflatten(1, (-1, size)).sum(dim=2))
    # fp32 sums rank the candidates
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    if size == 64:
        assert errors[0].sum() < 0.99 * errors[1].sum()


@SYMMETRIES
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("budget", [1, 3000])
def test_batches_of_the_search_change_nothing(symmetric, weighted, budget, monkeypatch):
    weight = normal(7, 240)
    groups, scale = weight.unflatten(1, (-1, 16)), channel_step(weight, 16, symmetric)
    importance = normal(15, 16, seed=1).exp() if weighted else None
    whole = fit_levels(groups, scale, symmetric, importance)
    monkeypatch.setattr(grid_module, "SEARCH_BUDGET", budget)
    parts = fit_levels(groups, scale, symmetric, importance)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_importance_decides_which_weight_is_clipped():
    """One rare weight far out: kept where it matters, given up where it does not."""
    group = torch.cat([torch.linspace(-1, 1, 15), torch.tensor([2.4])])[None, None]
    scale = torch.full((1, 1), 0.02)
    careless, careful = torch.ones(1, 16), torch.ones(1, 16)
    careless[0, -1], careful[0, -1] = 1e-3, 1e3
    errors = []
    for importance in (careless, careful):
        multiplier, zero = fit_levels(group, scale, False, importance)
        grid = Int4Grid(scale, multiplier, zero, 16)
        errors.append((grid.decode(grid.encode(group[0], 0), 0) - group[0]).abs()[0])
    assert errors[0][-1] > 4 * errors[1][-1]
    assert errors[0][:-1].square().sum() < errors[1][:-1].square().sum()


def test_levels_are_packed_by_the_kernels_rule():
    multiplier, zero = torch.tensor([[3.0, 15.0]]), torch.tensor([[0.0, 9.0]])
    grid = Int4Grid(torch.ones(1, 1), multiplier, zero, 4)
    assert torch.equal(grid.levels, pack_levels(multiplier.to(torch.uint8), zero.to(torch.uint8)))
