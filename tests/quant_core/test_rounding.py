"""GPTQ follows its definition, beats rounding to nearest where it should, and is it where nothing correlates."""

import math

import pytest
import torch
from dit_quant.kernels.numerics import pack_int4
from dit_quant.quant_core import rounding
from dit_quant.quant_core.grid import SHRINK, channel_step, fit_levels, int4_grid, int8_grid, nearest_level
from dit_quant.quant_core.memory import COVARIANCE_LIMITS
from dit_quant.quant_core.observers import covariance_block
from dit_quant.quant_core.rounding import GPTQ_DAMP, gptq_int4, gptq_int8, round_nearest, round_weight
from dit_quant.quant_core.schemes import Rounding, WeightArgs, group_size_for

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def moments(K, seed):
    """Second moment of correlated tokens with a few loud directions, as in a trained network."""
    mix = normal(K, K, seed=seed, dtype=torch.float64)
    x = normal(4 * K, K, seed=seed + 1, dtype=torch.float64) @ mix * normal(K, seed=seed + 2).double().exp()
    return x.T @ x / len(x)


def damped(H):
    """What GPTQ minimizes: the moment plus its damping."""
    return H + GPTQ_DAMP * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def loss(weight, decoded, H):
    E = weight.double() - decoded.double()
    return (E @ damped(H) * E).sum(dim=1)  # [N]


def eight(weight, H):
    grid = int8_grid(weight)
    return gptq_int8(weight, H, grid), grid


# weight, H -> codes and grid by GPTQ; weight -> grid of rounding to nearest
METHODS = {
    "w8": (eight, int8_grid),
    "w4": (lambda w, H: gptq_int4(w, H, 4, True), lambda w: int4_grid(w, 4, True)),
    "w4 asymmetric": (lambda w, H: gptq_int4(w, H, 4, False), lambda w: int4_grid(w, 4, False)),
}
EVERY_METHOD = pytest.mark.parametrize(("gptq", "grid_of"), METHODS.values(), ids=METHODS.keys())


@EVERY_METHOD
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("K", [36, 100, 260])
def test_gptq_is_better_than_nearest(K, seed, gptq, grid_of):
    """In the metric that it minimizes, damping included. Greedy, so a single row may lose; 63 rows may not.

    Over these moments a row's ratio of losses has mean 0.43 to 0.56 and deviation below 0.2; the mean of 63
    independent rows therefore stays 10 standard errors (0.025 each) below 0.85.
    """
    weight, H = normal(63, K, seed=seed + 9), moments(K, seed)
    codes, grid = gptq(weight, H[None])
    plain = grid_of(weight)
    calibrated = loss(weight, grid.decode(codes, 0), H)
    nearest = loss(weight, plain.decode(round_nearest(weight, plain), 0), H)
    assert calibrated.sum() < 0.85 * nearest.sum()


def assert_same_grid(a, b):
    assert torch.equal(a.scale, b.scale)
    if hasattr(a, "levels"):
        assert torch.equal(a.levels, b.levels)


@EVERY_METHOD
def test_gptq_of_white_inputs_is_nearest(gptq, grid_of):
    """Nothing to compensate and no column dearer than another: H a multiple of the identity, or no activity."""
    weight = normal(33, 100)
    grid = grid_of(weight)
    for variance in (1.0, 1e-6, 3e7, 0.0):
        codes, found = gptq(weight, variance * torch.eye(100, dtype=torch.float64)[None])
        assert_same_grid(found, grid)
        assert torch.equal(codes, round_nearest(weight, grid))


@EVERY_METHOD
def test_gptq_without_correlation_keeps_the_nearest_level(gptq, grid_of):
    """For any diagonal H; at 4 bits its search weighs each column by its own entry."""
    weight, diagonal = normal(33, 100), normal(100, seed=1, dtype=torch.float64).abs() + 0.1
    codes, grid = gptq(weight, torch.diag(diagonal)[None])
    assert torch.equal(codes, round_nearest(weight, grid))
    if grid_of is not int8_grid:
        importance = damped(torch.diag(diagonal)).diagonal().float().unflatten(0, (25, 4))
        symmetric = bool((grid.zero == 8).all())
        found = fit_levels(weight.unflatten(1, (25, 4)), channel_step(weight, 4, symmetric), symmetric, importance)
        assert torch.equal(grid.multiplier, found[0])
        assert torch.equal(grid.zero, found[1])


@pytest.mark.parametrize("batch", [1, 8, 128])
@pytest.mark.parametrize("K", [1, 7, 33])
def test_gptq_int8_follows_its_definition(K, batch, monkeypatch):
    """Column by column, the later columns move to where they best make up for the errors so far."""
    monkeypatch.setattr(rounding, "ALONE", batch)
    weight, H = normal(7, K, seed=3), moments(K, 5)
    grid = int8_grid(weight)
    order = H.diagonal().argsort(descending=True).tolist()
    error = torch.zeros(7, K, dtype=torch.float64)
    expected = torch.zeros(7, K)
    for i, k in enumerate(order):
        target = corrected(weight, error, damped(H), order[:i], order[i:])[:, :1]
        code = grid.encode(target, k)
        expected[:, k : k + 1] = code
        error[:, k : k + 1] = grid.decode(code, k).double() - weight.double()[:, k : k + 1]
    assert torch.equal(gptq_int8(weight, H[None], grid).float(), expected)


def corrected(weight, error, A, done, rest):
    """The columns `rest` where they minimize eᵀ A e, given the errors e of the columns `done`."""
    target = weight.double()[:, rest]
    if done:
        target = target - error[:, done] @ torch.linalg.solve(A[rest][:, rest], A[rest][:, done]).T
    return target.float()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("K", "size"), [(4, 4), (36, 4), (48, 16), (40, 20)])
def test_gptq_int4_follows_its_definition(K, size, symmetric):
    """Whole groups in order of importance. A group's levels are searched on the columns as corrected by then,
    each column weighted by the loss per squared error that is left when all later columns make up for it."""
    weight, H = normal(7, K, seed=3), moments(K, 5)
    A, scale = damped(H), channel_step(weight, size, symmetric)
    groups = H.diagonal().unflatten(0, (-1, size)).mean(dim=1).argsort(descending=True)
    order = [int(g) * size + j for g in groups for j in range(size)]
    error = torch.zeros(7, K, dtype=torch.float64)
    expected, multiplier, zero = torch.zeros(7, K), torch.zeros(7, K // size), torch.zeros(7, K // size)
    for i, k in enumerate(order):
        target, g = corrected(weight, error, A, order[:i], order[i:]), k // size
        if i % size == 0:
            left = [1 / torch.linalg.inv(A[order[j:]][:, order[j:]])[0, 0] for j in range(i, i + size)]
            m, z = fit_levels(target[:, None, :size], scale, symmetric, torch.stack(left).float()[None])
            multiplier[:, g], zero[:, g] = m[:, 0], z[:, 0]
        expected[:, k] = nearest_level(target[:, 0] / scale[:, 0], multiplier[:, g], zero[:, g])
        value = (expected[:, k] - zero[:, g]) * multiplier[:, g] * scale[:, 0]
        error[:, k] = value.double() - weight.double()[:, k]
    codes, grid = gptq_int4(weight, H[None], size, symmetric)
    assert torch.equal(grid.multiplier, multiplier)
    assert torch.equal(grid.zero, zero)
    assert torch.equal(codes.float(), expected)


def test_searching_levels_in_their_turn_beats_levels_fixed_in_advance():
    """Negative control of the search inside GPTQ: without clipping candidates, wide groups lose."""
    weight, H = normal(63, 128, seed=9), moments(128, 0)
    losses = []
    for shrink in (SHRINK, (1.0,)):
        codes, grid = gptq_int4(weight, H[None], 64, True, shrink)
        losses.append(float(loss(weight, grid.decode(codes, 0), H).sum()))
    assert losses[0] < losses[1]


@EVERY_METHOD
def test_a_weight_on_its_grid_stays(gptq, grid_of):
    """No error, nothing to feed back, whatever the moments. A grid of powers of two, so that nothing is rounded."""
    weight = torch.randint(-8, 8, (33, 100), generator=torch.Generator().manual_seed(1)).float()
    weight[:, 0::4], weight[:, 1::4] = -8, 7
    weight = weight * (12 if grid_of is not int8_grid else 1) / 64
    if grid_of is int8_grid:
        weight[:, 0] = 127 / 64
    codes, grid = gptq(weight, moments(100, 1)[None])
    assert torch.equal(grid.decode(codes, 0), weight)
    assert_same_grid(grid, grid_of(weight))


@EVERY_METHOD
def test_blocks_are_independent(gptq, grid_of):
    weight = normal(7, 60, seed=1)
    blocks = torch.stack([moments(20, seed) for seed in (1, 4, 7)])
    together, _ = gptq(weight, blocks)
    other = blocks.clone()
    other[1] = moments(20, 11)
    changed, _ = gptq(weight, other)
    assert torch.equal(together[:, :20], changed[:, :20])
    assert torch.equal(together[:, 40:], changed[:, 40:])
    assert not torch.equal(together[:, 20:40], changed[:, 20:40])


@EVERY_METHOD
def test_blocks_are_those_of_one_block_diagonal_moment(gptq, grid_of):
    weight, H = normal(7, 40, seed=1), torch.stack([moments(20, 1), moments(20, 1)])
    codes, grid = gptq(weight, H)
    whole, whole_grid = gptq(weight, torch.block_diag(*H)[None])
    assert torch.equal(codes, whole)
    assert_same_grid(grid, whole_grid)


@EVERY_METHOD
@pytest.mark.parametrize("kind", ["dead channels", "no activity", "rank one", "cancelled"])
def test_degenerate_moments_still_round(kind, gptq, grid_of):
    """Dead inputs, and moments that fp32 cancellation left indefinite (a large mean taken off its square)."""
    K = 36
    H = moments(K, 2)
    if kind == "dead channels":
        H[5] = H[:, 5] = H[9] = H[:, 9] = 0
    elif kind == "no activity":
        H = torch.zeros_like(H)
    elif kind == "rank one":
        v = normal(K, seed=8, dtype=torch.float64)
        H = torch.outer(v, v)
    else:
        noise = normal(K, K, seed=8, dtype=torch.float64)
        H = torch.eye(K, dtype=torch.float64) + (noise + noise.T)
    weight = normal(7, K)
    codes, grid = gptq(weight, H[None])
    decoded = grid.decode(codes, 0)
    assert (decoded.abs() <= 127.01 * grid.scale).all()
    # a column far off would show: nothing that is fed back may grow without bound
    assert (decoded - weight).norm() < 0.5 * weight.norm()
    if kind == "dead channels":
        assert torch.equal(codes[:, [5, 9]], round_nearest(weight, grid)[:, [5, 9]])


@pytest.mark.parametrize("search", [True, False], ids=["search", "min-max"])
@pytest.mark.parametrize("rounding", Rounding)
def test_rounded_4_bits_are_their_grid_packed(rounding, search):
    weight, H, C = normal(33, 64), moments(64, 1)[None], moments(33, 2)[None]
    shrink = SHRINK if search else (1.0,)
    curvature = C if rounding is Rounding.GUIDED else None
    args = WeightArgs(4, 32, symmetric=False, rounding=rounding, search=search)
    rounded = round_weight(weight, args, 32, H, curvature)
    if rounding is not Rounding.NEAREST:
        codes, grid = gptq_int4(weight, H, 32, False, shrink, curvature)
    else:
        grid = int4_grid(weight, 32, False, shrink)
        codes = round_nearest(weight, grid)
    assert torch.equal(rounded.qdata, pack_int4(codes))
    assert torch.equal(rounded.levels, grid.levels)
    assert torch.equal(rounded.scale, grid.scale)
    assert torch.equal(rounded.int8().float(), (grid.decode(codes, 0) / grid.scale).round())


@pytest.mark.parametrize("rounding", Rounding)
def test_rounded_8_bits_are_their_grid(rounding):
    weight, H, C = normal(33, 64), moments(64, 1)[None], moments(33, 2)[None]
    curvature = C if rounding is Rounding.GUIDED else None
    rounded = round_weight(weight, WeightArgs(8, rounding=rounding), 64, H, curvature)
    grid = int8_grid(weight)
    nearest = rounding is Rounding.NEAREST
    codes = round_nearest(weight, grid) if nearest else gptq_int8(weight, H, grid, curvature)
    assert rounded.levels is None
    assert torch.equal(rounded.int8(), codes)
    assert torch.equal(rounded.scale, grid.scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_without_moments_rounds_to_nearest(bits):
    """Whatever is known of the curvature."""
    weight, C = normal(33, 64), moments(33, 2)[None]
    plain = round_weight(weight, WeightArgs(bits, rounding=Rounding.NEAREST), 16, None)
    for kind in (Rounding.GPTQ, Rounding.GUIDED):
        calibrated = round_weight(weight, WeightArgs(bits, rounding=kind), 16, None, C)
        assert torch.equal(calibrated.qdata, plain.qdata)
        assert torch.equal(calibrated.int8(), plain.int8())


def test_the_inputs_are_left_alone():
    given = normal(7, 40, seed=1), moments(40, 1)[None], moments(7, 2)[None]
    before = [tensor.clone() for tensor in given]
    weight, H, C = given
    gptq_int4(weight, H, 4, False, curvature=C)
    gptq_int8(weight, H, int8_grid(weight), C)
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


def test_groups_that_reach_over_blocks_are_those_of_the_moment_in_one_block():
    """Memory decides how wide blocks are, the artist how wide groups: neither asks the other."""
    weight, blocks = normal(7, 96, seed=1), torch.stack([moments(32, seed) for seed in (1, 4, 7)])
    codes, grid = gptq_int4(weight, blocks, 24, False)
    whole, whole_grid = gptq_int4(weight, torch.block_diag(*blocks)[None], 24, False)
    assert torch.equal(codes, whole)
    assert_same_grid(grid, whole_grid)


def test_every_group_size_of_the_node_fits_the_blocks_of_every_width():
    for K in (1152, 1440, 1536, 1920, 2304, 2432, 3072, 3360, 3840, 4096, 4220, 5120, 10240, 12288, 13824, 15360):
        for limit in COVARIANCE_LIMITS:
            b = covariance_block(K, limit)
            for wanted in range(16, 257, 16):
                size = group_size_for(K, wanted)
                assert K % math.lcm(b, size) == 0


def test_columns_that_never_vary_do_not_decide_the_levels():
    """Their error reaches no output, in whatever unit the activations are."""
    weight, dead = normal(33, 64, seed=1), torch.arange(0, 64, 2)
    weight[:, dead] *= 20
    live = torch.ones(64, dtype=torch.bool)
    live[dead] = False
    lost = []
    for unit in (1e-4, 1.0, 1e4):
        H = moments(64, 3) * unit
        H[dead], H[:, dead] = 0, 0
        codes, grid = gptq_int4(weight, H[None], 16, False)
        E = (weight - grid.decode(codes, 0))[:, live].double()
        lost.append(float((E @ H[live][:, live] * E).sum() / unit))
    assert max(lost) < 1.01 * min(lost)
