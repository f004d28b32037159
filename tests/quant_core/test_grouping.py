"""Clustering of adjacent timesteps against brute force, and the partitions made of it."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from dit_quant.quant_core.grouping import (
    Linkage,
    centred_gram,
    group_layer_paper,
    group_model,
    members,
    merge_tree,
    model_features,
    step_shift,
    tree_of,
)
from dit_quant.quant_core.schemes import Shift
from dit_quant.quant_core.timesteps import TimestepGroups
from drift import drift
from hypothesis import given, settings
from hypothesis import strategies as st


def spread(z, w, rows):
    """Weighted within-group sum of squares."""
    centre = sum(w[r] * z[r] for r in rows) / sum(w[r] for r in rows)
    return sum(w[r] * ((z[r] - centre) ** 2).sum() for r in rows)


def cost(z, w, a, b, linkage):
    if linkage is Linkage.WARD:
        return spread(z, w, a + b) - spread(z, w, a) - spread(z, w, b)
    if linkage is Linkage.AVERAGE:
        return np.mean([((z[i] - z[j]) ** 2).sum() for i in a for j in b])
    return ((sum(z[i] for i in a) / len(a) - sum(z[j] for j in b) / len(b)) ** 2).sum()


def brute_force(z, w, linkage):
    """Partitions with T, T - 1, ... 1 runs, as lists of rows."""
    runs = [[t] for t in range(len(z))]
    found = [[list(run) for run in runs]]
    while len(runs) > 1:
        costs = [cost(z, w, a, b, linkage) for a, b in itertools.pairwise(runs)]
        at = costs.index(min(costs))
        runs = [*runs[:at], runs[at] + runs[at + 1], *runs[at + 2 :]]
        found.append([list(run) for run in runs])
    return found


def features(T, D, seed=0):
    random = np.random.default_rng(seed)
    return np.cumsum(random.normal(size=(T, D)), axis=0), random.uniform(1, 9, size=T)


@pytest.mark.parametrize("linkage", Linkage)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("T", "D"), [(1, 1), (2, 7), (5, 1), (7, 3), (12, 33)])
def test_tree_is_the_greedy_one(T, D, linkage, weighted):
    z, w = features(T, D, seed=T * D)
    w = w if weighted else np.ones(T)
    tree = merge_tree(z, linkage, w if weighted else None)
    for runs in brute_force(z, w, linkage):
        assert tree.sizes(len(runs)) == tuple(len(run) for run in runs)
        total = spread(z, w, list(range(T)))
        rest = sum(spread(z, w, run) for run in runs)
        assert tree.unexplained[len(runs) - 1] == pytest.approx(rest / total if T > 1 else 0, abs=1e-12)
    assert tree.drift == pytest.approx(spread(z, w, list(range(T))) / w.sum(), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 14), st.integers(1, 5), st.sampled_from(list(Linkage)), st.integers(0, 999))
def test_cuts_are_nested_partitions_that_explain_more_and_more(T, D, linkage, seed):
    z, w = features(T, D, seed)
    tree = merge_tree(z, linkage, w)
    edges = []
    for groups in range(1, T + 1):
        sizes = tree.sizes(groups)
        assert len(sizes) == groups
        assert sum(sizes) == T
        assert min(sizes) >= 1
        edges.append(set(np.cumsum(sizes)))
    assert all(coarse <= fine for coarse, fine in itertools.pairwise(edges))
    assert all(a >= b for a, b in itertools.pairwise(tree.unexplained))
    assert tree.unexplained[-1] == 0
    if T > 1:
        assert tree.unexplained[0] == pytest.approx(1)
    assert 1 <= tree.auto() <= min(10, T)


@pytest.mark.parametrize("linkage", Linkage)
def test_a_constant_offset_changes_no_merge(linkage):
    """Channels far off centre must not drown the drift in the squares."""
    z, _ = features(12, 33)
    near, far = merge_tree(z, linkage), merge_tree(z * 1e-3 + 1e5, linkage)
    assert [m.middle for m in near.merges] == [m.middle for m in far.merges]


def test_auto_finds_plateaus_and_ignores_negligible_drift():
    random = np.random.default_rng(0)
    levels = np.repeat([0.0, 4.0, 9.0], [5, 8, 4])[:, None] + 0.01 * random.normal(size=(17, 7))
    tree = merge_tree(levels, Linkage.WARD)
    assert tree.auto() == 3
    assert tree.sizes(3) == (5, 8, 4)
    assert merge_tree(levels * 1e-4, Linkage.WARD).auto() == 1
    assert merge_tree(np.zeros((9, 7)), Linkage.WARD).auto() == 1
    assert merge_tree(np.arange(100.0)[:, None] ** 3, Linkage.CENTROID).auto() <= 10


def test_equal_costs_merge_the_noisier_pair():
    assert merge_tree(np.arange(5.0)[:, None], Linkage.CENTROID).merges[0].middle == 1


@pytest.mark.parametrize("groups", [-1, 0, 6])
def test_impossible_cuts_are_refused(groups):
    with pytest.raises(ValueError, match="choose 1 to 5"):
        merge_tree(np.arange(5.0)[:, None], Linkage.WARD).sizes(groups)


@pytest.mark.parametrize(
    ("z", "w", "message"),
    [
        (np.zeros((0, 3)), None, "features must be"),
        (np.zeros(3), None, "features must be"),
        (np.zeros((3, 2)), np.ones(2), "one weight each"),
        (np.full((3, 2), np.nan), None, "finite"),
        (np.zeros((3, 2)), np.zeros(3), "positive"),
    ],
)
def test_unusable_features_are_refused(z, w, message):
    with pytest.raises(ValueError, match=message):
        merge_tree(z, Linkage.WARD, w)


def test_step_shifts_are_those_of_the_raw_samples():
    found = drift(33, 4)
    s = found.statistics()
    middle, mean = step_shift(s, Shift.MIDRANGE), step_shift(s, Shift.MEAN)
    for t, x in enumerate(found.samples):
        x = x.double().numpy()
        np.testing.assert_allclose(middle[t], (x.max(axis=0) + x.min(axis=0)) / 2, rtol=1e-15, atol=1e-15)
        # the mean is stored in fp32
        np.testing.assert_allclose(mean[t], x.mean(axis=0), rtol=2**-23, atol=1e-7)


def features_of(layers):
    return np.concatenate([*model_features(layers)], axis=1)


def test_every_layer_weighs_the_same_whatever_its_width_and_unit():
    narrow, wide = drift(7, 5, seed=1), drift(100, 5, seed=1)
    louder = drift(7, 5, seed=1)
    louder = type(louder)(louder.sigmas, tuple(1000 * x for x in louder.samples))
    np.testing.assert_allclose(
        features_of({"a": narrow.statistics()}), features_of({"a": louder.statistics()}), rtol=1e-4, atol=1e-6
    )
    both = features_of({"a": narrow.statistics(), "b": wide.statistics()})
    alone = [features_of({"l": x.statistics()}) for x in (narrow, wide)]
    square = lambda f: np.square(f[0] - f[-1]).sum()  # noqa: E731
    assert square(both) == pytest.approx((square(alone[0]) + square(alone[1])) / 2)


def test_model_partition_comes_from_its_tree():
    found = drift(33, 9)
    layers = {"a": found.statistics()}
    for count in (1, 4, 9):
        grouping = group_model(found.sigmas, layers, groups=count)
        assert len(grouping.groups) == count
        assert tuple(len(rows) for rows in members(found.sigmas, grouping.groups)) == grouping.tree.sizes(count)
    assert len(group_model(found.sigmas, layers).groups) == grouping.tree.auto()
    assert group_model(found.sigmas, layers, groups=3, interpolate=True).groups.interpolate
    with pytest.raises(ValueError, match="no layers"):
        group_model(found.sigmas, {})


@pytest.mark.parametrize(("T", "expected"), [(1, 1), (9, 1), (19, 1), (20, 2), (35, 3)])
def test_published_grouping_cuts_a_tenth_of_the_steps(T, expected):
    """Centroid linkage on the layer's own mid-ranges, against brute force on raw samples."""
    found = drift(7, T, seed=T)
    groups = group_layer_paper(found.sigmas, found.statistics(), True)
    z = np.stack([(x.amax(dim=0) + x.amin(dim=0)).double().numpy() / 2 for x in found.samples])
    runs = next(r for r in brute_force(z, np.ones(T), Linkage.CENTROID) if len(r) == expected)
    assert [groups.index(sigma) for sigma in found.sigmas] == [g for g, run in enumerate(runs) for _ in run]


def test_members_partition_the_timesteps_and_no_group_is_empty():
    sigmas = (0.9, 0.7, 0.4, 0.1)
    assert members(sigmas, TimestepGroups((0.5,), (0.8, 0.2))) == [[0, 1], [2, 3]]
    # no calibrated sigma lies in 0.45 <= sigma < 0.6: the one nearest to its centre stands in
    assert members(sigmas, TimestepGroups((0.6, 0.45), (0.8, 0.5, 0.2))) == [[0, 1], [2], [2, 3]]


def test_a_layer_that_sees_nothing_but_sigma_has_no_say():
    """One value at each timestep: its mean drifts and its range is none, so that no measure compares the two."""
    found = drift(33, 9)
    statistics = found.statistics()
    only = np.sin(np.arange(9)[:, None] * np.arange(5) * 3.0) * 50
    alone = replace(
        statistics, mean=torch.tensor(only), minimum=torch.tensor(only).float(), maximum=torch.tensor(only).float()
    )
    expected = group_model(found.sigmas, {"a": statistics})
    assert group_model(found.sigmas, {"a": statistics, "embedded": alone}).groups == expected.groups
    # where there is no other layer it is all there is to go by
    assert group_model(found.sigmas, {"embedded": alone}).tree.drift > 0


def test_a_wide_model_is_grouped_without_all_of_it_in_memory_at_once():
    found = drift(64, 12)
    layers = {str(i): found.statistics() for i in range(5)}
    whole = merge_tree(features_of(layers), Linkage.WARD)
    grams = sum(centred_gram(part) for part in model_features(layers))
    tree = tree_of(grams, Linkage.WARD)
    assert [(m.start, m.middle, m.end) for m in tree.merges] == [(m.start, m.middle, m.end) for m in whole.merges]
    np.testing.assert_allclose(tree.unexplained, whole.unexplained, rtol=1e-12, atol=1e-15)
