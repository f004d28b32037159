"""What calibration keeps under a memory budget: width of covariance blocks, sampled rows, passes over the prompts."""

from collections.abc import Mapping
from dataclasses import dataclass

from .curvature import CURVATURE_BLOCK
from .feedback import largest_divisor
from .observers import covariance_block
from .row_sample import ROWS

COVARIANCE_LIMITS = (4096, 2048, 1024, 512, 256)
# the largest part of the budget that row samples may take from wide covariances
SAMPLE_PART = 1 / 8
CURVATURE_LIMITS = (CURVATURE_BLOCK, CURVATURE_BLOCK // 2, CURVATURE_BLOCK // 4)
# the largest part of it for curvatures: they gain more than the widest covariances do
CURVATURE_PART = 1 / 4
FEWEST_BINS = 8


@dataclass(frozen=True)
class MemoryPlan:
    """covariance: widest block (see `covariance_block`) or None; rows: sampled per noise level; bins: noise levels;
    curvature: widest block (see `CurvatureCollector`) or None.

    passes: the layers to observe in each pass over the prompts, all of them once; nbytes: the most that the
    statistics take in memory at a time, in which the covariances of finished passes are on disk.
    """

    covariance: int | None
    rows: int
    bins: int
    passes: tuple[tuple[str, ...], ...]
    nbytes: int
    curvature: int | None = None

    def __str__(self) -> str:
        blocks = "no covariances" if self.covariance is None else f"covariance blocks up to {self.covariance}"
        if self.curvature is not None:
            blocks += f", curvature blocks up to {self.curvature}"
        passes = "1 pass" if len(self.passes) == 1 else f"{len(self.passes)} passes"
        return f"{blocks}, {self.rows} rows sampled per noise level, {passes}, {self.nbytes / 2**30:.2g} GB"


def plan_memory(
    features: Mapping[str, int],
    *,
    budget: int,
    bins: int,
    passes: int = 1,
    rows: int = ROWS,
    outputs: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """The widest covariance blocks that `budget` bytes hold in up to `passes` passes, in as few as they need.

    features: K of every layer; outputs: N of those whose curvature is wanted. Fewer rows are sampled than asked for
    where they would take more than their part, and fewer bins are kept where nothing else fits. Budget 0: no
    covariances, no curvatures, and no limit for the rest. Raises ValueError when the sums of a few noise levels exceed
    the budget.
    """
    everything = (tuple(features),)
    if budget == 0:
        return MemoryPlan(None, rows, bins, everything, bins * (sums_nbytes(features) + rows * row_nbytes(features)))
    fitting = min(bins, budget // max(sums_nbytes(features), 1))
    if fitting < min(bins, FEWEST_BINS):
        raise ValueError(
            f"memory_gb={budget / 2**30:.3g}: the sums of {len(features)} layers over {min(bins, FEWEST_BINS)} noise "
            f"levels need {min(bins, FEWEST_BINS) * sums_nbytes(features) / 2**30:.3g} GB; raise it, or set 0 for "
            "no covariances and no limit"
        )
    free = budget - fitting * sums_nbytes(features)
    most = min(rows, int(min(free, budget * SAMPLE_PART)) // max(fitting * row_nbytes(features), 1))
    wide = [(limit, most) for limit in COVARIANCE_LIMITS]
    narrow = [(COVARIANCE_LIMITS[-1], fewer) for fewer in range(most - 1, -1, -1)]
    for curvature in curvature_limits(outputs or {}, int(budget * CURVATURE_PART * passes)):
        beside = {name: curvature_nbytes(N, curvature) for name, N in (outputs or {}).items() if curvature}
        for limit, kept in wide + narrow:
            samples = fitting * kept * row_nbytes(features)
            sizes = {name: moment_nbytes(K, limit) + beside.get(name, 0) for name, K in features.items()}
            parts = split_passes(sizes, free - samples)
            if parts is not None and len(parts) <= passes:
                largest = max(sum(sizes[name] for name in part) for part in parts)
                return MemoryPlan(limit, kept, fitting, parts, budget - free + samples + largest, curvature)
    samples = fitting * most * row_nbytes(features)
    return MemoryPlan(None, most, fitting, everything, budget - free + samples)


def sums_nbytes(features: Mapping[str, int]) -> int:
    """Count and sum in float64, minimum and maximum in fp32, of one bin."""
    return sum(8 + K * (8 + 4 + 4) for K in features.values())


def row_nbytes(features: Mapping[str, int]) -> int:
    """One sampled row in fp16, with its key, of one bin."""
    return sum(8 + 2 * K for K in features.values())


def moment_nbytes(features: int, limit: int) -> int:
    """The diagonal blocks of one layer's second moment, fp32."""
    return features * covariance_block(features, limit) * 4


def curvature_limits(outputs: Mapping[str, int], capacity: int) -> list[int | None]:
    """What to try: curvature blocks that `capacity` bytes hold for layers of N outputs, widest first, and then none."""
    sizes = {limit: sum(curvature_nbytes(N, limit) for N in outputs.values()) for limit in CURVATURE_LIMITS}
    return [*(limit for limit in CURVATURE_LIMITS if outputs and sizes[limit] <= capacity), None]


def curvature_nbytes(outputs: int, limit: int) -> int:
    """The diagonal blocks of one layer's curvature, fp32."""
    return outputs * largest_divisor(outputs, limit) * 4


def split_passes(sizes: Mapping[str, int], capacity: int) -> tuple[tuple[str, ...], ...] | None:
    """Layers in parts of at most `capacity` bytes, as few as first-fit decreasing finds; None when one is larger.

    Equal layers stay in the model's order, so those that read the same input mostly meet in one part.
    """
    parts: list[list[str]] = []
    left: list[int] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if sizes[name] > capacity:
            return None
        at = next((i for i, room in enumerate(left) if sizes[name] <= room), len(parts))
        if at == len(parts):
            parts.append([])
            left.append(capacity)
        parts[at].append(name)
        left[at] -= sizes[name]
    return tuple(tuple(name for name in sizes if name in part) for part in map(set, parts))
