"""Directions: the strongest of what shift and scale leave, and what is left behind them."""

import pytest
import torch
from dit_quant.quant_core.convert import LayerInput, quantize_weight
from dit_quant.quant_core.covariance import rounding_hessian, scaled
from dit_quant.quant_core.directions import find_directions, less, strongest
from dit_quant.quant_core.grouping import members
from dit_quant.quant_core.linear import quant_linear
from dit_quant.quant_core.metrics import relative_l2
from dit_quant.quant_core.observers import LayerObserver
from dit_quant.quant_core.schemes import PRESETS, Scale
from dit_quant.quant_core.shift_scale import channel_scale, group_mean
from dit_quant.quant_core.timesteps import SINGLE_GROUP, TimestepGroups
from drift import drift

N, K = 33, 96
GROUPS = TimestepGroups((0.55,), (0.8, 0.3))
SCHEME = PRESETS["W8A8"].with_options(directions=4)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks(count, width, seed=0):
    """Positive semidefinite, some directions much stronger than others."""
    mix = normal(count, width, width, seed=seed).double() * torch.logspace(0, -2, width, dtype=torch.float64)
    return mix @ mix.transpose(1, 2)


def found_for(scheme=SCHEME, K=K, block=None, groups=GROUPS, weight=None):
    source = drift(K, 6)
    statistics, rows = source.statistics(block), members(source.sigmas, groups)
    shift = group_mean(statistics, rows)
    weight = normal(N, K) if weight is None else weight
    scale = channel_scale(statistics, rows, shift, weight, scheme)
    found = find_directions(rounding_hessian(statistics, rows, shift, None, 1), scale, weight, scheme)
    return source, statistics, rows, shift, weight, found


@pytest.mark.parametrize(("count", "width"), [(1, 5), (1, 64), (3, 32)])
@pytest.mark.parametrize("wanted", [1, 4])
def test_strongest_are_the_leading_eigenvectors(count, width, wanted):
    H = blocks(count, width)
    found = strongest(H, wanted)
    exact = torch.linalg.eigvalsh(torch.block_diag(*H)).flip(0)[:wanted]
    torch.testing.assert_close(found.power, exact, rtol=1e-2, atol=0)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(wanted, dtype=torch.float64))
    moved = found.vectors @ torch.block_diag(*H)
    assert relative_l2(moved, found.power[:, None] * found.vectors) < 0.1


def test_no_more_than_a_block_holds_and_none_negative():
    found = strongest(torch.zeros(2, 3, 3, dtype=torch.float64), 9)
    assert found.vectors.shape == (3, 6)
    assert (found.power == 0).all()


@pytest.mark.parametrize("block", [None, 32])
def test_directions_are_orthonormal_once_scaled(block):
    *_, (scale, V, why) = found_for(block=32 if block else K)
    assert why == ""
    assert V.dtype is torch.float16
    assert V.shape == (4, K)
    U = V.double() / scale.double()
    torch.testing.assert_close(U @ U.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=2e-3)


@pytest.mark.parametrize("scaling", [Scale.BALANCED, Scale.NONE])
def test_what_is_left_is_the_covariance_of_the_rest(scaling):
    """`less` against tokens whose part along V is taken off one by one."""
    scheme = SCHEME.with_options(scale=scaling)
    source, statistics, rows, shift, _, (scale, V, _) = found_for(scheme, block=K)
    s = torch.ones(K, dtype=torch.float64) if scale is None else scale.double()
    U, rest = V.double() / s, []
    for t, x in enumerate(source.samples):
        group = next(g for g, inside in enumerate(rows) if t in inside)
        x = (x.double() - shift[group]) / s
        rest.append(x - x @ U.T @ U)
    rest = torch.cat(rest)
    left = less(rounding_hessian(statistics, rows, shift, scale, 1), V, scale)
    assert relative_l2(left[0], rest.T @ rest / len(rest)) < 1e-4
    assert (torch.linalg.eigvalsh(left[0]) > -1e-6 * left[0].diagonal().mean()).all()


def test_scale_is_balanced_for_what_the_directions_leave():
    """By turns: the product of both energies that rounding costs is below what the first scale gives."""
    _, statistics, rows, shift, weight, (scale, V, _) = found_for(block=K)
    first = channel_scale(statistics, rows, shift, weight, SCHEME)
    C = rounding_hessian(statistics, rows, shift, None, 1)

    def cost(s, V):
        left = less(scaled(C, s), V, s)
        return float(left[0].diagonal().sum() * (weight.double() * s.double()).square().sum())

    plain = strongest(scaled(C, first), 4).vectors * first
    assert cost(scale, V) < cost(first, plain)


def test_more_directions_less_error():
    source = drift(K, 6)
    weight, errors = normal(N, K) / 8, []
    for count in (0, 2, 6):
        scheme = SCHEME.with_options(directions=count)
        layer, report = quantize_weight("a", weight, scheme, GROUPS, LayerInput(source.sigmas, source.statistics(K)))
        assert report.directions == count == (0 if layer.directions is None else len(layer.directions))
        row, fraction = GROUPS.locate(source.sigmas[0])
        y = quant_linear(source.samples[0], layer, None, torch.tensor([row]), torch.tensor([fraction]))
        errors.append(relative_l2(y, source.samples[0] @ weight.T))
    assert errors[0] > errors[1] > errors[2]


def test_one_dominant_direction_is_found_and_set_apart():
    """Tokens that differ along one line only: eight bits would be spent on it, so that nothing else is seen."""
    line, x = normal(K, seed=1), normal(200, K, seed=2)
    x = x + 100 * normal(200, 1, seed=3) * line
    observer = LayerObserver("a", K, K)
    observer.update(x, 0, 0.5)
    source = LayerInput((0.5,), observer.statistics([0]))
    weight = normal(N, K, seed=4)
    weight -= (weight @ line)[:, None] * line / line.square().sum()  # blind to the line
    errors = []
    for count in (0, 1):
        scheme = SCHEME.with_options(directions=count)
        layer, _ = quantize_weight("a", weight, scheme, SINGLE_GROUP, source)
        y = quant_linear(x, layer, None, torch.tensor([0]), torch.tensor([0.0]))
        errors.append(relative_l2(y, x @ weight.T))
    assert errors[1] < errors[0] / 10


@pytest.mark.parametrize("count", [0, 1])
def test_bias_correction_centres_what_the_directions_leave(count):
    """Without a shift, 4 bits move the mean of the output; the correction puts it back."""
    source, weight = drift(K, 6), normal(N, K) / 8
    coarse = PRESETS["rtn_w4a8"].with_options(directions=count)
    x = torch.cat(source.samples)
    moved = []
    for correct in (False, True):
        scheme = coarse.with_options(bias_correction=correct)
        layer, _ = quantize_weight("a", weight, scheme, SINGLE_GROUP, LayerInput(source.sigmas, source.statistics(K)))
        y = quant_linear(x, layer, None, torch.tensor([0]), torch.tensor([0.0]))
        moved.append(float((y - x @ weight.T).mean(dim=0).norm()))
    assert moved[1] < moved[0] / 3


@pytest.mark.parametrize(
    ("K", "block", "factor", "message"),
    [(8, 8, 1, "too narrow"), (96, None, 1, "second moments"), (96, 96, 1e9, "fp16")],
    ids=["narrow", "no moments", "overflow"],
)
def test_a_layer_without_them_says_why_and_works(K, block, factor, message):
    source = drift(K, 6)
    weight = factor * normal(N, K)
    layer, report = quantize_weight("a", weight, SCHEME, GROUPS, LayerInput(source.sigmas, source.statistics(block)))
    assert layer.directions is None
    assert layer.responses is None
    assert "no directions" in report.note
    assert message in report.note
    y = quant_linear(source.samples[0], layer, None, torch.tensor([0]), torch.tensor([0.0]))
    assert relative_l2(y, source.samples[0] @ weight.T) < 0.05


def test_the_same_every_time():
    first, second = (found_for(block=32)[-1] for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
