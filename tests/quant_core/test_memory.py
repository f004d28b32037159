"""Memory plans: what they promise is what the statistics take, and no more than the budget."""

import itertools

import pytest
import torch
from dit_quant.quant_core.collector import Collector
from dit_quant.quant_core.curvature import CurvatureCollector
from dit_quant.quant_core.memory import (
    COVARIANCE_LIMITS,
    CURVATURE_PART,
    MemoryPlan,
    moment_nbytes,
    plan_memory,
    row_nbytes,
    split_passes,
    sums_nbytes,
)
from dit_quant.quant_core.row_sample import ROWS
from hypothesis import given, settings
from hypothesis import strategies as st

# 4 blocks of a transformer: q, k, v, out, fc1, and fc2 four times as wide
FEATURES = {f"{i}.{name}": K for i in range(4) for name, K in zip("qkvo1", [512] * 5, strict=True)}
FEATURES |= {f"{i}.2": 2048 for i in range(4)}
BINS = 10


OUTPUTS = {name: 2048 if name.endswith("1") else 512 for name in FEATURES}


def plan(budget, passes=1, bins=BINS, features=FEATURES, outputs=None):
    return plan_memory(features, budget=int(budget), bins=bins, passes=passes, outputs=outputs)


def needed(limit):
    return sum(moment_nbytes(K, limit) for K in FEATURES.values())


@pytest.mark.parametrize("budget", [0, 2.5e6, 20e6, 40e6, 60e6, 1e9])
@pytest.mark.parametrize("passes", [1, 3])
def test_statistics_take_what_was_planned(budget, passes):
    """Real tensors: every layer fed with its own input at more noise levels than there are bins."""
    found = plan(budget, passes)
    assert found.nbytes <= budget or budget == 0
    small = moments = 0
    for names in found.passes:
        collector = Collector(
            {name: FEATURES[name] for name in names},
            flow=True,
            covariance=found.covariance,
            max_bins=found.bins,
            rows=found.rows,
        )
        for sigma in torch.linspace(1, 0.1, BINS + 3).tolist():
            collector.at(sigma)
            for name in names:
                collector.record(name, torch.full((30, FEATURES[name]), sigma))
        total = collector.nbytes
        kept = sum(o.moment.nbytes for o in collector.groups() if o.moment is not None)
        small, moments = small + total - kept, max(moments, kept)
    assert small + moments == found.nbytes


@given(
    st.lists(st.sampled_from([64, 256, 1024, 1536, 3072, 4096, 15360]), min_size=1, max_size=30),
    st.floats(6, 10),
    st.integers(1, 8),
    st.integers(1, 64),
)
@settings(max_examples=200, deadline=None)
def test_the_budget_is_kept_or_refused(widths, exponent, passes, bins):
    features, budget = {str(i): K for i, K in enumerate(widths)}, int(10**exponent)
    try:
        found = plan_memory(features, budget=budget, bins=bins, passes=passes)
    except ValueError:
        assert sum(16 * K for K in widths) * min(bins, 8) * 2 > budget
        return
    assert found.nbytes <= budget
    assert found.bins <= bins
    assert found.rows <= ROWS
    assert len(found.passes) <= passes
    assert sorted(itertools.chain(*found.passes), key=int) == list(features)
    # more passes never make it worse, nor does more memory
    if passes < 8:
        more = plan_memory(features, budget=budget, bins=bins, passes=passes + 1)
        assert (more.covariance or 0) >= (found.covariance or 0)
    more = plan_memory(features, budget=2 * budget, bins=bins, passes=passes)
    assert (more.covariance or 0) >= (found.covariance or 0)


@pytest.mark.parametrize("limit", COVARIANCE_LIMITS)
def test_one_pass_where_one_is_enough(limit):
    """However many are allowed: a pass is a whole sampling of all prompts."""
    found = plan(2**40, passes=8)
    assert found.covariance == max(COVARIANCE_LIMITS)
    assert found.passes == (tuple(FEATURES),)
    assert found.rows == ROWS


def test_wider_blocks_in_as_few_passes_as_they_need():
    widths = {passes: plan(40e6, passes).covariance for passes in range(1, 9)}
    assert widths[1] < widths[8]
    for passes in range(1, 9):
        found = plan(40e6, passes)
        fewest = next(p for p in range(1, 9) if widths[p] == widths[passes])
        assert len(found.passes) == fewest
        # and not narrower than need be: wider blocks need more passes in the same room, or one does not fit at all
        moments = [sum(moment_nbytes(FEATURES[name], found.covariance) for name in part) for part in found.passes]
        room = 40e6 - (found.nbytes - max(moments))
        for limit in (limit for limit in COVARIANCE_LIMITS if limit > found.covariance):
            sizes = {name: moment_nbytes(K, limit) for name, K in FEATURES.items()}
            parts = split_passes(sizes, int(room))
            assert parts is None or len(parts) > passes


def test_samples_give_way_to_the_narrowest_covariances():
    everything = plan(2**40)
    narrow = needed(COVARIANCE_LIMITS[-1])
    sums = sums_nbytes(FEATURES) * BINS
    tight = plan(sums + narrow + 1e5)
    assert tight.covariance == COVARIANCE_LIMITS[-1]
    assert tight.rows < everything.rows
    assert plan(sums + narrow - 1).covariance is None
    assert plan(sums + narrow).rows == 0


def test_fewer_bins_before_nothing_fits():
    one = sums_nbytes(FEATURES)
    assert plan(9 * one + 10).bins == 9
    assert plan(8 * one).bins == 8
    with pytest.raises(ValueError, match=r"memory_gb.*raise it, or set 0"):
        plan(8 * one - 1)
    assert plan(3 * one, bins=3).bins == 3


def test_zero_switches_covariances_off_and_limits_nothing_else():
    found = plan(0)
    assert (found.covariance, found.rows, found.bins) == (None, ROWS, BINS)
    assert found.nbytes < plan(2**40).nbytes - needed(256)
    assert found.passes == (tuple(FEATURES),)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(50, 300))
def test_parts_hold_every_layer_once_within_the_capacity(sizes, capacity):
    named = {f"l{i}": size for i, size in enumerate(sizes)}
    parts = split_passes(named, capacity)
    if max(sizes) > capacity:
        assert parts is None
        return
    assert sorted(itertools.chain(*parts)) == sorted(named)
    assert all(sum(named[name] for name in part) <= capacity for part in parts)
    # no two of them would fit in one
    loads = sorted(sum(named[name] for name in part) for part in parts)
    assert len(loads) == 1 or loads[0] + loads[1] > capacity
    names = list(named)
    assert all(sorted(part, key=names.index) == list(part) for part in parts)


def test_equal_layers_mostly_stay_together():
    """q, k and v of a block read the same input, which is observed once if they meet: a boundary parts one block."""
    sizes = {f"{i}.{name}": size for i in range(40) for name, size in (("q", 3), ("k", 3), ("v", 3), ("2", 12))}
    parts = split_passes(sizes, 250)
    homes = {name: n for n, part in enumerate(parts) for name in part}
    parted = sum(len({homes[f"{i}.{name}"] for name in "qkv"}) > 1 for i in range(40))
    assert len(parts) == 4
    assert parted < len(parts)


@pytest.mark.parametrize(("budget", "expected"), [(1e9, 256), (80e6, 256), (56e6, 128), (28e6, 64), (14e6, None)])
def test_curvatures_take_their_part_and_no_more(budget, expected):
    """Real tensors again. N sums to 18432 here: 18.9 MB at 256 channels a block, half as much at 128."""
    found = plan(budget, outputs=OUTPUTS)
    assert found.curvature == expected
    assert found.nbytes <= budget
    moments = {name: moment_nbytes(K, found.covariance) for name, K in FEATURES.items()} if found.covariance else {}
    curvature = CurvatureCollector(OUTPUTS if expected else {}, expected or 1)
    for name, N in OUTPUTS.items() if expected else ():
        curvature.record(name, torch.ones(3, N))
    assert curvature.nbytes <= CURVATURE_PART * budget
    sums = found.bins * (sums_nbytes(FEATURES) + found.rows * row_nbytes(FEATURES))
    assert sums + sum(moments.values()) + curvature.nbytes == found.nbytes


def test_several_passes_share_curvatures_too():
    found = plan(56e6, passes=4, outputs=OUTPUTS)
    assert found.curvature == 256
    assert len(found.passes) > 1
    assert found.nbytes <= 56e6


@pytest.mark.parametrize("budget", [20e6, 24e6, 28e6, 40e6])
def test_curvatures_never_cost_the_covariances(budget):
    """Without covariances they would be of no use."""
    assert plan(budget, outputs=OUTPUTS).covariance is not None or plan(budget).covariance is None


def test_without_covariances_there_are_no_curvatures():
    """Rounding to nearest has no use for them."""
    assert plan(0, outputs=OUTPUTS).curvature is None
    found = plan(2.5e6, outputs=OUTPUTS)
    assert found.covariance is None
    assert found.curvature is None


def test_the_report_line():
    found = MemoryPlan(4096, 24, 28, (("a",), ("b",)), int(3.14 * 2**30))
    assert str(found) == "covariance blocks up to 4096, 24 rows sampled per noise level, 2 passes, 3.1 GB"
    beside = MemoryPlan(4096, 24, 28, (("a",),), int(3.14 * 2**30), 128)
    assert str(beside).startswith("covariance blocks up to 4096, curvature blocks up to 128, 24 rows")
    assert str(plan(0)).startswith(f"no covariances, {ROWS} rows")
    assert "1 pass, " in str(plan(2**40))
