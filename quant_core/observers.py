"""Streaming activation statistics of one layer over sigma."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .row_sample import ROWS, RowSample
from .schemes import hadamard_for

# elements of an input that are worked on at a time: bounds the fp32 copy of a 16-bit input (64 MiB)
CHUNK = 2**24
# tokens of a call that its covariance is taken from, where there are twice as many: neighbours are much alike
COVARIANCE_TOKENS = 512
# fractions of its multiples spread evenly
GOLDEN = (5**0.5 - 1) / 2


class NonFiniteActivation(ValueError):
    """A layer's input held NaN or infinity during calibration."""


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration keeps of a layer's input, noisiest sigma first.

    count [T] float64 tokens; mean, minimum, maximum [T, K] fp32; second_moment [B, b, b] fp32 holds
    the mean of x xᵀ over all tokens, in B diagonal blocks of width b = K / B, or is None.
    rows [S, K] fp16 (fp32 where a value is beyond fp16) are tokens of the input, a uniform sample without
    replacement of every timestep at which the layer ran; row_bin [S] int64 their timestep; or both None.
    """

    count: Tensor
    mean: Tensor
    minimum: Tensor
    maximum: Tensor
    second_moment: Tensor | None = None
    rows: Tensor | None = None
    row_bin: Tensor | None = None

    @property
    def features(self) -> int:
        return self.mean.shape[1]


def covariance_block(features: int, limit: int) -> int:
    """Width of the diagonal blocks: all of K up to `limit`, else its largest divisor that holds whole rotations."""
    unit = hadamard_for(features, 256)
    fitting = [size for size in range(unit, min(features, limit) + 1, unit) if features % size == 0]
    return max(fitting, default=unit)


@dataclass(frozen=True)
class Extent:
    """One call's input in brief: tokens; lowest, highest [K] fp32 and sum [K] float64 of every channel, on the CPU."""

    count: int
    minimum: Tensor
    maximum: Tensor
    total: Tensor

    def same_as(self, other: "Extent") -> bool:
        """Whether every number agrees bit by bit."""
        pairs = ((self.minimum, other.minimum), (self.maximum, other.maximum), (self.total, other.total))
        return self.count == other.count and all(torch.equal(a, b) for a, b in pairs)


@dataclass(frozen=True)
class Observation:
    """What one call adds to an observer: extent, second moment (panels, see `outer_mean`), rows for the sample."""

    extent: Extent
    panels: list[Tensor] | None
    keys: Tensor
    rows: Tensor


def tokens(x: Tensor, features: int) -> Tensor:
    """x [..., K] -> [M, K]."""
    return x.detach().reshape(-1, features)


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """x [M, K] in parts of up to CHUNK elements."""
    return x.split(max(1, CHUNK // x.shape[1]))


def extent_of(x: Tensor, name: str, sigma: float) -> Extent:
    """x [M, K] -> Extent. Raises NonFiniteActivation naming the layer and sigma.

    Sums are fp32 within a chunk: torch adds in a cascade, so their error is that of a few roundings of
    mean |x|, not of M; the fp32 second moment they are combined with is no better.
    """
    parts = []
    for part in chunks(x):
        low, high, total = part.amin(dim=0), part.amax(dim=0), part.sum(dim=0, dtype=torch.float32)
        parts.append(torch.stack([low.float(), high.float(), total]).cpu())  # [3, K], the only wait for the device
    low, high, total = torch.stack(parts, dim=1)
    low, high = low.amin(dim=0), high.amax(dim=0)
    # a float64 sum of fp32 numbers is finite where all of them are
    if not math.isfinite(float(low.sum(dtype=torch.float64) + high.sum(dtype=torch.float64))):
        raise NonFiniteActivation(
            f"{name}: the input holds NaN or infinity at sigma {sigma:.4g}; "
            "the full-precision model is already broken there, check its dtype or the LoRAs on it"
        )
    return Extent(x.shape[0], low, high, total.double().sum(dim=0))


def panel_starts(block: int) -> range:
    """Where the row panels of a symmetric b x b block begin. Of 8, the upper triangle takes 9/16 of the work."""
    return range(0, block, max(128, -(-block // 8)))


def spread_tokens(count: int, seed: int) -> Tensor | slice:
    """Which of `count` tokens a covariance is taken from: one of every few, at another place in each, or all."""
    step = count // COVARIANCE_TOKENS
    if step < 2:
        return slice(None)
    strata = torch.arange(count // step, dtype=torch.float64)
    return (strata * step + ((strata + seed) * GOLDEN % 1 * step).floor()).long()


def outer_mean(x: Tensor, block: int, mean: Tensor, seed: int = 0) -> list[Tensor]:
    """Mean of x xᵀ over the M tokens of x [M, K], in diagonal blocks: panels [B, c, b - i], rows i .. i + c of each.

    mean [K] of all tokens. Of long inputs the covariance comes from some tokens (`spread_tokens`); with the mean of
    all of them added it is still above mean meanᵀ. A panel starts at the diagonal; what is left of it is known by
    symmetry. On the CPU: artists need the GPU's memory for sampling.
    """
    starts = panel_starts(block)
    chosen = spread_tokens(x.shape[0], seed)
    whole = isinstance(chosen, slice)
    sample = x[chosen if whole else chosen.to(x.device)]
    centre = None if whole else sample.mean(dim=0, dtype=torch.float32)
    panels: list[Tensor] = []
    for part in chunks(sample):
        moved = part.float() if centre is None else part.float() - centre
        blocks = moved.unflatten(1, (-1, block)).permute(1, 0, 2)  # [B, M, b]
        found = [blocks[:, :, i : i + starts.step].transpose(1, 2) @ blocks[:, :, i:] for i in starts]
        panels = [total.add_(new) for total, new in zip(panels, found, strict=True)] if panels else found
    panels = [panel.mul_(1 / sample.shape[0]).cpu() for panel in panels]
    if not whole:
        m = mean.float().unflatten(0, (-1, block))  # [B, b]
        for i, panel in zip(starts, panels, strict=True):
            panel.addcmul_(m[:, i : i + starts.step, None], m[:, None, i:])
    return panels


class LayerObserver:
    """Accumulates LayerStatistics on the CPU, one row per sigma bin. The only mutable state of calibration.

    block: width of the covariance blocks or None for none; rows: size of the row sample per bin.
    """

    def __init__(self, name: str, features: int, block: int | None, rows: int = ROWS):
        self.name, self.features, self.block = name, features, block
        self.count = torch.zeros(0, dtype=torch.float64)
        self.total = torch.zeros(0, features, dtype=torch.float64)
        self.minimum = torch.zeros(0, features)
        self.maximum = torch.zeros(0, features)
        self.moment: Tensor | None = None
        self.sample = RowSample(features, rows)
        self._mirrored = True

    @property
    def ran(self) -> bool:
        return bool((self.count > 0).any())

    @property
    def nbytes(self) -> int:
        """Memory of all statistics."""
        return sum(value.nbytes for value in self._state().values())

    def reserve(self, bins: int) -> None:
        """Grows to `bins` rows; new rows are empty."""
        missing = bins - len(self.count)
        if missing <= 0:
            return
        for name, fill in (("count", 0.0), ("total", 0.0), ("minimum", torch.inf), ("maximum", -torch.inf)):
            rows = getattr(self, name)
            setattr(self, name, torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), fill)]))
        self.sample.reserve(bins)

    def update(self, x: Tensor, row: int, sigma: float) -> None:
        """x [..., K] of a call at bin `row`. Raises NonFiniteActivation naming the layer and sigma."""
        x = tokens(x, self.features)
        self.add(self.observe(x, row, sigma, extent_of(x, self.name, sigma)), row)

    def observe(self, x: Tensor, row: int, sigma: float, extent: Extent) -> Observation:
        """What x [M, K] would add at bin `row`; x may change afterwards. Has no effect."""
        start = int(self.count[row]) if row < len(self.count) else 0
        keys, rows = self.sample.candidates(x, row, start, sigma)
        panels = None if self.block is None else outer_mean(x, self.block, extent.total / extent.count, start + row)
        return Observation(extent, panels, keys, rows)

    def add(self, seen: Observation, row: int) -> None:
        """Counts an observation in."""
        self.reserve(row + 1)
        extent = seen.extent
        if seen.panels is not None:
            self._add_moment(seen.panels, extent.count / (float(self.count.sum()) + extent.count))
        self.count[row] += extent.count
        self.total[row] += extent.total
        self.minimum[row] = torch.minimum(self.minimum[row], extent.minimum)
        self.maximum[row] = torch.maximum(self.maximum[row], extent.maximum)
        self.sample.add(row, seen.keys, seen.rows)

    def _add_moment(self, panels: list[Tensor], share: float) -> None:
        """Moves the running mean by `share` of the way to a call's; a mean needs no copy when it is done."""
        if self.moment is None:
            count = self.features // panels[0].shape[2]
            self.moment = torch.zeros(count, panels[0].shape[2], panels[0].shape[2])
        for i, panel in zip(panel_starts(self.moment.shape[1]), panels, strict=True):
            self.moment[:, i : i + panel.shape[1], i:].lerp_(panel, share)
        self._mirrored = False

    def _mirror(self) -> None:
        """Fills what is left of the panels, which sums never read."""
        if self._mirrored or self.moment is None:
            return
        starts = panel_starts(self.moment.shape[1])
        for i in starts:
            end = i + starts.step
            self.moment[:, end:, i:end] = self.moment[:, i:end, end:].transpose(1, 2)
        self._mirrored = True

    def merge_rows(self, keep: int, drop: int) -> None:
        """Joins two sigma bins into row `keep`; row `drop` is empty afterwards."""
        self.count[keep] += self.count[drop]
        self.total[keep] += self.total[drop]
        self.minimum[keep] = torch.minimum(self.minimum[keep], self.minimum[drop])
        self.maximum[keep] = torch.maximum(self.maximum[keep], self.maximum[drop])
        self.count[drop], self.total[drop] = 0, 0
        self.minimum[drop], self.maximum[drop] = torch.inf, -torch.inf
        self.sample.merge(keep, drop)

    def copy(self, name: str) -> "LayerObserver":
        """An independent observer in the same state."""
        twin = copy.copy(self)
        twin.name = name
        for field in ("count", "total", "minimum", "maximum"):
            setattr(twin, field, getattr(self, field).clone())
        twin.moment = None if self.moment is None else self.moment.clone()
        twin.sample = self.sample.copy()
        return twin

    def _state(self) -> dict[str, Tensor]:
        state = {"count": self.count, "total": self.total, "minimum": self.minimum, "maximum": self.maximum}
        state |= {"keys": self.sample.keys, "rows": self.sample.values}
        return state if self.moment is None else state | {"moment": self.moment}

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, for a resumable file; not a copy."""
        self._mirror()
        return self._state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`; shapes were checked by the reader."""
        self.count, self.total = tensors["count"], tensors["total"]
        self.minimum, self.maximum = tensors["minimum"], tensors["maximum"]
        self.sample.keys, self.sample.values = tensors["keys"], tensors["rows"]
        self.moment = tensors.get("moment")
        self._mirrored = True

    def statistics(self, order: list[int]) -> LayerStatistics:
        """Rows in `order` (noisiest first). Raises ValueError if never called.

        The second moment is the observer's own memory, not a copy: it is most of what calibration holds.
        """
        if not self.ran:
            raise ValueError(f"{self.name}: never ran during calibration")
        self._mirror()
        # a layer skipped at some sigma takes that row from the nearest sigma at which it ran
        rank = {row: i for i, row in enumerate(order)}
        seen = [row for row in order if self.count[row] > 0]
        source = [min(seen, key=lambda s: abs(rank[s] - rank[row])) for row in order]
        rows, row_bin = self.sample.rows(order)
        return LayerStatistics(
            count=self.count[order],
            mean=(self.total[source] / self.count[source][:, None]).float(),
            minimum=self.minimum[source],
            maximum=self.maximum[source],
            second_moment=self.moment,
            rows=rows,
            row_bin=row_bin,
        )
