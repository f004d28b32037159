"""Adjacency-constrained hierarchical clustering of timesteps (HTG, arXiv 2503.06930, algorithm 1)."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from .observers import LayerStatistics
from .schemes import Shift
from .timesteps import TimestepGroups, groups_from_sizes

AUTO_UNEXPLAINED = 0.10
# directions pick up token by token what the groups leave: more of these would cost bytes and gain nothing
AUTO_UNEXPLAINED_BESIDE_DIRECTIONS = 0.5
# a root-mean-square drift below one int8 step of the half-range cannot be seen by the codes
AUTO_NEGLIGIBLE = (1 / 127) ** 2
# beside the error of 4-bit weights five times as much is lost: some 2 % of the input's power, 1 % of the error
AUTO_NEGLIGIBLE_W4 = (5 / 127) ** 2
AUTO_MAX_GROUPS = 10


class Linkage(Enum):
    """Cost of merging two adjacent runs of timesteps."""

    CENTROID = "centroid"  # squared distance of the member means: the paper's
    AVERAGE = "average"  # mean squared distance between members
    WARD = "ward"  # growth of the within-group sum of squares


@dataclass(frozen=True)
class Merge:
    """Runs [start, middle) and [middle, end) became one at cost `height`."""

    start: int
    middle: int
    end: int
    height: float


@dataclass(frozen=True)
class MergeTree:
    """All T - 1 merges in order, and the share of variance left unexplained by 1..T groups."""

    timesteps: int
    merges: tuple[Merge, ...]
    unexplained: tuple[float, ...]
    drift: float

    def sizes(self, groups: int) -> tuple[int, ...]:
        """Lengths of the runs when the tree is cut at `groups`. Raises ValueError outside 1..T."""
        if not 1 <= groups <= self.timesteps:
            raise ValueError(f"{groups} groups do not fit {self.timesteps} timesteps; choose 1 to {self.timesteps}")
        cuts = set(range(1, self.timesteps))
        for merge in self.merges[: self.timesteps - groups]:
            cuts.discard(merge.middle)
        edges = [0, *sorted(cuts), self.timesteps]
        return tuple(b - a for a, b in itertools.pairwise(edges))

    def auto(self, negligible: float = AUTO_NEGLIGIBLE, unexplained: float = AUTO_UNEXPLAINED) -> int:
        """Fewest groups that leave a tenth of the drift, or that share of it, unexplained; 1 where the drift is
        negligible beside the range."""
        if self.drift < negligible:
            return 1
        enough = (g for g, rest in enumerate(self.unexplained, start=1) if rest <= unexplained)
        return min(next(enough, self.timesteps), AUTO_MAX_GROUPS, self.timesteps)


def merge_tree(features: NDArray, linkage: Linkage, weights: NDArray | None = None) -> MergeTree:
    """features [T, D], noisiest first; weights [T] occupancies for Ward (default 1) -> MergeTree.

    Greedy, as published: the cheapest adjacent pair is merged until one run is left; ties go to the noisier pair.
    """
    z = np.asarray(features, dtype=np.float64)
    w = np.ones(len(z)) if weights is None else np.asarray(weights, dtype=np.float64)
    if z.ndim != 2 or len(z) == 0 or w.shape != (len(z),):
        raise ValueError(f"features must be [T, D] with one weight per row, got {z.shape} and {w.shape}")
    if not np.isfinite(z).all() or not (w > 0).all():
        raise ValueError("features must be finite and weights positive")
    z = z - z.mean(axis=0)  # a common offset would drown the drift in the squares
    gram = z @ z.T
    square = np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram  # [T, T] squared distances
    runs = [(t, t + 1) for t in range(len(z))]
    merges: list[Merge] = []
    left_over = {len(z): 0.0}
    spread = 0.0
    while len(runs) > 1:
        costs = [_cost(z, w, square, a, b, linkage) for a, b in itertools.pairwise(runs)]
        at = int(np.argmin(costs))
        (start, middle), (_, end) = runs[at], runs[at + 1]
        spread += _cost(z, w, square, runs[at], runs[at + 1], Linkage.WARD)
        merges.append(Merge(start, middle, end, float(costs[at])))
        runs[at : at + 2] = [(start, end)]
        left_over[len(runs)] = spread
    total = left_over[1]
    unexplained = tuple(left_over[g] / total if total > 0 else 0.0 for g in range(1, len(z) + 1))
    return MergeTree(len(z), tuple(merges), unexplained, float(total / w.sum()))


def _cost(z: NDArray, w: NDArray, square: NDArray, a: tuple[int, int], b: tuple[int, int], linkage: Linkage) -> float:
    """Cost of merging runs a and b. Centroids are plain member means, as in the paper; Ward's are weighted."""
    if linkage is Linkage.AVERAGE:
        return float(square[a[0] : a[1], b[0] : b[1]].mean())
    if linkage is Linkage.CENTROID:
        return float(np.square(z[slice(*a)].mean(axis=0) - z[slice(*b)].mean(axis=0)).sum())
    wa, wb = w[slice(*a)], w[slice(*b)]
    gap = np.average(z[slice(*a)], axis=0, weights=wa) - np.average(z[slice(*b)], axis=0, weights=wb)
    return float(wa.sum() * wb.sum() / (wa.sum() + wb.sum()) * np.square(gap).sum())


def step_shift(statistics: LayerStatistics, kind: Shift) -> NDArray:
    """Per-timestep shift z_t [T, K] float64: the mid-range of HTG eq. 2, or the mean."""
    if kind is Shift.MIDRANGE:
        return (statistics.maximum.double() + statistics.minimum.double()).numpy() / 2
    return statistics.mean.double().numpy()


def model_features(layers: Mapping[str, LayerStatistics], kind: Shift = Shift.MEAN) -> NDArray:
    """One row per timestep for a partition shared by all layers: shifts relative to each layer's half-range.

    Every layer weighs the same, whatever its width and magnitude.
    """
    rows = []
    for statistics in layers.values():
        half_range = float((statistics.maximum - statistics.minimum).double().mean()) / 2
        z = step_shift(statistics, kind)
        rows.append(z / (half_range or 1.0) / np.sqrt(z.shape[1] * len(layers)))
    return np.concatenate(rows, axis=1)


@dataclass(frozen=True)
class Grouping:
    """One partition for the whole model, with the tree it was cut from.

    automatic: the tree chose the number of groups, so that a scheme may cut it where its own needs are met.
    """

    groups: TimestepGroups
    tree: MergeTree
    linkage: Linkage
    automatic: bool


def group_model(
    sigmas: tuple[float, ...],
    layers: Mapping[str, LayerStatistics],
    *,
    groups: int | None = None,
    linkage: Linkage = Linkage.WARD,
    kind: Shift = Shift.MEAN,
    flow: bool = True,
    interpolate: bool = False,
    negligible: float = AUTO_NEGLIGIBLE,
    unexplained: float = AUTO_UNEXPLAINED,
) -> Grouping:
    """One partition of the sigmas for all layers; `groups=None` lets the tree choose (see MergeTree.auto)."""
    if not layers:
        raise ValueError("the calibration holds no layers")
    occupancy = np.mean([s.count.numpy() for s in layers.values()], axis=0)
    tree = merge_tree(model_features(layers, kind), linkage, np.maximum(occupancy, 1))
    sizes = tree.sizes(tree.auto(negligible, unexplained) if groups is None else groups)
    return Grouping(groups_from_sizes(sigmas, sizes, flow, interpolate), tree, linkage, groups is None)


def group_layer_paper(sigmas: tuple[float, ...], statistics: LayerStatistics, flow: bool) -> TimestepGroups:
    """HTG as published: this layer's mid-ranges, centroid linkage, max(1, T / 10) groups."""
    tree = merge_tree(step_shift(statistics, Shift.MIDRANGE), Linkage.CENTROID)
    return groups_from_sizes(sigmas, tree.sizes(max(1, len(sigmas) // 10)), flow, False)


def members(sigmas: tuple[float, ...], groups: TimestepGroups) -> list[list[int]]:
    """Calibrated timesteps of each group; an empty group takes the timestep nearest to its centre."""
    rows: list[list[int]] = [[] for _ in range(len(groups))]
    for t, sigma in enumerate(sigmas):
        rows[groups.index(sigma)].append(t)
    for g, found in enumerate(rows):
        if not found:
            found.append(min(range(len(sigmas)), key=lambda t: abs(sigmas[t] - groups.centres[g])))
    return rows
