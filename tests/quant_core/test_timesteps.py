"""Timestep groups: total, half-open, and the device-side pair equal to its definition."""

import itertools
import math

import pytest
import torch
from dit_quant.quant_core.timesteps import (
    SINGLE_GROUP,
    TimestepGroups,
    TimestepState,
    between,
    distinct,
    groups_from_sizes,
    log_snr,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

# fp32 values: the state compares in fp32, so that both sides see the same edges
levels = st.floats(0, 1, width=32)
noise = st.floats(0, 200, width=32)
relaxed = settings(deadline=None, max_examples=100)


@st.composite
def partitions(draw, flow=None, most=7):
    flow = draw(st.booleans()) if flow is None else flow
    values = draw(st.lists(levels if flow else noise, min_size=1, max_size=2 * most - 1, unique=True))
    values = sorted(values, reverse=True)
    values = values if len(values) % 2 else values[1:]
    return TimestepGroups(tuple(values[1::2]), tuple(values[0::2]), flow, draw(st.booleans()))


@relaxed
@given(partitions(), st.one_of(noise, st.just(math.inf)))
def test_every_sigma_is_in_exactly_one_group(groups, sigma):
    bounds = [math.inf, *groups.edges, 0.0]
    holding = [g for g, (high, low) in enumerate(itertools.pairwise(bounds)) if low <= sigma < high]
    if sigma == math.inf:
        holding = [0]
    assert holding == [groups.index(sigma)]


@relaxed
@given(partitions())
def test_groups_are_half_open(groups):
    for g, edge in enumerate(groups.edges):
        assert groups.index(edge) == g
        assert groups.index(math.nextafter(edge, -math.inf)) == g + 1


@relaxed
@given(partitions(), noise, noise)
def test_less_noise_never_means_an_earlier_group(groups, a, b):
    high, low = max(a, b), min(a, b)
    assert groups.index(high) <= groups.index(low)
    # log-SNR is monotone up to the rounding of one logarithm
    assert sum(groups.locate(high)) <= sum(groups.locate(low)) + 1e-9


@relaxed
@given(partitions(), st.one_of(noise, st.just(math.inf)))
def test_location_is_within_the_table(groups, sigma):
    row, fraction = groups.locate(sigma)
    assert 0 <= row < len(groups)
    assert 0 <= fraction <= 1
    if not groups.interpolate:
        assert (row, fraction) == (groups.index(sigma), 0)
    elif len(groups) > 1:
        assert row <= len(groups) - 2


@pytest.mark.parametrize("flow", [True, False], ids=["flow", "eps"])
def test_interpolation_meets_the_centres(flow):
    groups = TimestepGroups((0.8, 0.3), (0.9, 0.5, 0.1), flow, True)
    assert [sum(groups.locate(c)) for c in groups.centres] == pytest.approx([0, 1, 2])
    middle = between(0.9, 0.5, flow)
    assert groups.locate(middle)[1] == pytest.approx(0.5)
    assert groups.locate(between(0.5, 0.1, flow)) == (1, pytest.approx(0.5))
    assert sum(groups.locate(0.0)) == 2
    assert sum(groups.locate(1.0 if flow else 1e9)) == 0


@relaxed
@given(partitions(), noise)
def test_interpolation_is_linear_between_the_centres(groups, sigma):
    knots = [log_snr(c, groups.flow) for c in groups.centres]
    assume(groups.interpolate and min((b - a for a, b in itertools.pairwise(knots)), default=1) > 1e-6)
    # float64 on both sides, a quotient of differences
    assert sum(groups.locate(sigma)) == pytest.approx(interpolated(knots, log_snr(sigma, groups.flow)), abs=1e-7)


def pair(state, slot):
    index, fraction = state.select(slot)
    return int(index), float(fraction)


@settings(deadline=None, max_examples=200)
@given(st.lists(partitions(), min_size=1, max_size=4), st.lists(noise, min_size=1, max_size=4))
def test_state_equals_the_definition(mixed, sigmas):
    state = TimestepState(mixed)
    for sigma in sigmas:
        state.update(torch.tensor([sigma]))
        for slot, groups in enumerate(mixed):
            row, fraction = pair(state, slot)
            if not groups.interpolate or len(groups) == 1:
                assert (row, fraction) == (groups.index(sigma), 0.0)
                continue
            assert 0 <= row <= len(groups) - 2
            assert 0 <= fraction <= 1
            assert_interpolates_alike(groups, sigma, row + fraction)


def assert_interpolates_alike(groups, sigma, found):
    """fp32 log-SNR: 1 - sigma is off by u near 1, a ratio by 2u, and positions up to 24 round by 24 u, u = 2**-24."""
    clean = max(1 - sigma, 1e-5) if groups.flow else 1.0
    slack = 2 * (2**-24 / clean + 2 * 2**-24) + 3 * 24 * 2**-24
    position = log_snr(sigma, groups.flow)
    knots = [log_snr(c, groups.flow) for c in groups.centres]
    reachable = [interpolated(knots, position + d) for d in (-slack, slack)]
    assert min(reachable) - 1e-6 <= found <= max(reachable) + 1e-6


def interpolated(knots, position):
    """Row + fraction, written as a sum over segments. A segment of no width is a step."""
    total = 0.0
    for low, high in itertools.pairwise(knots):
        total += min(max((position - low) / (high - low), 0), 1) if high > low else float(position >= low)
    return total


def test_state_is_updated_in_place():
    """Captured graphs and kernels hold the address."""
    state = TimestepState([TimestepGroups((0.5,), (0.7, 0.2)), SINGLE_GROUP])
    views = [state.select(slot) for slot in range(2)]
    address = [tensor.data_ptr() for view in views for tensor in view]
    for sigma, expected in ((0.9, 0), (0.5, 0), (0.4, 1), (0.0, 1), (0.7, 0)):
        state.update(torch.tensor(sigma))
        assert views[0][0].item() == expected
        assert views[1][0].item() == 0
    assert address == [tensor.data_ptr() for slot in range(2) for tensor in state.select(slot)]


@pytest.mark.parametrize("centres", [(1.0, 0.999999), (0.8, 1e-6, 0.0), (1.0, 0.999999, 0.0)])
def test_centres_that_clamp_to_one_log_snr_give_no_nan(centres):
    """Schedules that end at 0 may hold two sigmas below the floor of log-SNR."""
    edges = tuple((a + b) / 2 for a, b in itertools.pairwise(centres))
    groups = TimestepGroups(edges, centres, True, True)
    state = TimestepState([groups])
    for sigma in (1.0, 0.999999, 0.5, 1e-6, 0.0):
        state.update(torch.tensor([sigma]))
        row, fraction = pair(state, 0)
        assert 0 <= fraction <= 1
        assert 0 <= row <= len(centres) - 2
        assert all(0 <= part <= 2 for part in groups.locate(sigma))


def test_state_of_no_partitions_exists():
    TimestepState([]).update(torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("edges", "centres", "message"),
    [
        ((0.5,), (0.7,), "centres"),
        ((), (), "centres"),
        ((0.5, 0.5), (0.7, 0.5, 0.1), "edges must strictly decrease"),
        ((0.4, 0.5), (0.7, 0.5, 0.1), "edges must strictly decrease"),
        ((0.5,), (0.1, 0.7), "centres must strictly decrease"),
        ((-0.5,), (0.7, 0.1), "edges must be finite"),
        ((math.nan,), (0.7, 0.1), "edges must be finite"),
        ((0.5,), (math.inf, 0.1), "centres must be finite"),
    ],
)
def test_invalid_partitions_are_refused(edges, centres, message):
    with pytest.raises(ValueError, match=message):
        TimestepGroups(edges, centres)


@relaxed
@given(st.lists(st.floats(1e-4, 0.9999), min_size=1, max_size=20, unique=True), st.booleans(), st.data())
def test_cutting_a_schedule_keeps_every_run_in_its_group(sigmas, flow, data):
    sigmas = sorted(sigmas, reverse=True)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sigmas) - 1)))) if len(sigmas) > 1 else []
    sizes = [b - a for a, b in itertools.pairwise([0, *cuts, len(sigmas)])]
    try:
        groups = groups_from_sizes(sigmas, sizes, flow, False)
    except ValueError:
        # neighbours one rounding apart have nothing between them
        assert min(a - b for a, b in itertools.pairwise(sigmas)) < 1e-12
        return
    found = [groups.index(sigma) for sigma in sigmas]
    assert found == [g for g, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize("sizes", [(), (2,), (4,), (3, 0), (4, -1)])
def test_sizes_that_do_not_cut_the_schedule_are_refused(sizes):
    with pytest.raises(ValueError, match="do not cut 3 sigmas"):
        groups_from_sizes((0.9, 0.5, 0.1), sizes, True, False)


@relaxed
@given(partitions())
def test_json_round_trip(groups):
    assert TimestepGroups.from_json(groups.to_json()) == groups


def test_distinct_keeps_first_use_order():
    a, b = TimestepGroups((0.5,), (0.7, 0.2)), TimestepGroups((0.4,), (0.7, 0.2))
    assert distinct([a, SINGLE_GROUP, b, a]) == (a, SINGLE_GROUP, b)
