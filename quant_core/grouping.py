"""Adjacency-constrained hierarchical clustering of timesteps (HTG, arXiv 2503.06930, algorithm 1)."""

import itertools
from collections.abc import Iterator, Mapping
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
    if z.ndim != 2 or len(z) == 0:
        raise ValueError(f"features must be [T, D], got {z.shape}")
    return tree_of(centred_gram(z), linkage, weights)


def centred_gram(z: NDArray) -> NDArray:
    """Products [T, T] of the rows of z [T, D] less their mean: a common offset would drown the drift in the squares."""
    z = z - z.mean(axis=0)
    return z @ z.T


def tree_of(gram: NDArray, linkage: Linkage, weights: NDArray | None = None) -> MergeTree:
    """As `merge_tree`, from the products of its features, see `centred_gram`."""
    T = len(gram)
    w = np.ones(T) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (T,):
        raise ValueError(f"{T} timesteps need one weight each, got {w.shape}")
    if not np.isfinite(gram).all() or not (w > 0).all():
        raise ValueError("features must be finite and weights positive")
    square = np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram  # [T, T] squared distances
    runs = [(t, t + 1) for t in range(T)]
    merges: list[Merge] = []
    left_over = {T: 0.0}
    spread = 0.0
    while len(runs) > 1:
        costs = [_cost(gram, w, square, a, b, linkage) for a, b in itertools.pairwise(runs)]
        at = int(np.argmin(costs))
        (start, middle), (_, end) = runs[at], runs[at + 1]
        spread += _cost(gram, w, square, runs[at], runs[at + 1], Linkage.WARD)
        merges.append(Merge(start, middle, end, float(costs[at])))
        runs[at : at + 2] = [(start, end)]
        left_over[len(runs)] = spread
    total = left_over[1]
    unexplained = tuple(left_over[g] / total if total > 0 else 0.0 for g in range(1, T + 1))
    return MergeTree(T, tuple(merges), unexplained, float(total / w.sum()))


def _cost(
    gram: NDArray, w: NDArray, square: NDArray, a: tuple[int, int], b: tuple[int, int], linkage: Linkage
) -> float:
    """Cost of merging runs a and b. Centroids are plain member means, as in the paper; Ward's are weighted."""
    if linkage is Linkage.AVERAGE:
        return float(square[a[0] : a[1], b[0] : b[1]].mean())
    if linkage is Linkage.CENTROID:
        w = np.ones(len(w))
    wa, wb = w[slice(*a)], w[slice(*b)]
    gap = np.zeros(len(w))  # of the two centroids, as a sum over timesteps
    gap[slice(*a)], gap[slice(*b)] = wa / wa.sum(), -wb / wb.sum()
    distance = max(float(gap @ gram @ gap), 0.0)
    return distance if linkage is Linkage.CENTROID else wa.sum() * wb.sum() / (wa.sum() + wb.sum()) * distance


def step_shift(statistics: LayerStatistics, kind: Shift) -> NDArray:
    """Per-timestep shift z_t [T, K] float64: the mid-range of HTG eq. 2, or the mean."""
    if kind is Shift.MIDRANGE:
        return (statistics.maximum.double() + statistics.minimum.double()).numpy() / 2
    return statistics.mean.double().numpy()


def model_features(layers: Mapping[str, LayerStatistics], kind: Shift = Shift.MEAN) -> Iterator[NDArray]:
    """Layer by layer one row per timestep, for a partition shared by all: shifts relative to the layer's half-range.

    Every layer weighs the same, whatever its width and magnitude, but those that see nothing but sigma: inputs of one
    value at each timestep are all drift, whatever they do to the picture.
    """
    half_ranges = {name: float((s.maximum - s.minimum).double().mean()) / 2 for name, s in layers.items()}
    chosen = [name for name, half_range in half_ranges.items() if half_range > 0] or list(layers)
    for name in chosen:
        z = step_shift(layers[name], kind)
        yield z / (half_ranges[name] or 1.0) / np.sqrt(z.shape[1] * len(chosen))


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
    gram = np.zeros((len(sigmas), len(sigmas)))
    for features in model_features(layers, kind):
        gram += centred_gram(features)
    tree = tree_of(gram, linkage, np.maximum(occupancy, 1))
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
