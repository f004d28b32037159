"""Timestep groups: total, half-open intervals of sigma, and the device-side pair that selects one."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIGMA_FLOOR = 1e-5


def log_snr(sigma: float, flow: bool) -> float:
    """Log signal-to-noise ratio: 2 ln((1 - sigma) / sigma) for flows, -2 ln sigma else; clamped, so total."""
    if flow:
        sigma = min(max(sigma, SIGMA_FLOOR), 1 - SIGMA_FLOOR)
        return 2 * math.log((1 - sigma) / sigma)
    return -2 * math.log(min(max(sigma, SIGMA_FLOOR), 1 / SIGMA_FLOOR))


@dataclass(frozen=True)
class TimestepGroups:
    """T groups, noisiest first.

    edges: T - 1 sigmas, strictly decreasing; group g holds edges[g] <= sigma < edges[g - 1], so that every
    sigma from 0 to infinity belongs to exactly one group.
    centres: one sigma per group, strictly decreasing; interpolation runs between them in log-SNR.
    """

    edges: tuple[float, ...]
    centres: tuple[float, ...]
    flow: bool = True
    interpolate: bool = False

    def __post_init__(self) -> None:
        if len(self.centres) != len(self.edges) + 1:
            raise ValueError(f"{len(self.edges)} edges need {len(self.edges) + 1} centres, got {len(self.centres)}")
        for name, values in (("edges", self.edges), ("centres", self.centres)):
            if any(not math.isfinite(v) or v < 0 for v in values):
                raise ValueError(f"{name} must be finite sigmas >= 0, got {values}")
            if any(a <= b for a, b in itertools.pairwise(values)):
                raise ValueError(f"{name} must strictly decrease, got {values}")

    def __len__(self) -> int:
        return len(self.centres)

    def index(self, sigma: float) -> int:
        """The group that holds sigma; total on 0..infinity."""
        return sum(sigma < edge for edge in self.edges)

    def locate(self, sigma: float) -> tuple[int, float]:
        """sigma -> (row, fraction towards the next row); fraction 0 unless `interpolate`."""
        if not self.interpolate or len(self) == 1:
            return self.index(sigma), 0.0
        position = log_snr(sigma, self.flow)
        knots = [log_snr(centre, self.flow) for centre in self.centres]
        row = min(max(sum(position >= knot for knot in knots) - 1, 0), len(self) - 2)
        width = knots[row + 1] - knots[row]
        fraction = (position - knots[row]) / width if width > 0 else 0.0
        return row, min(max(fraction, 0.0), 1.0)

    def to_json(self) -> dict:
        return {
            "edges": list(self.edges),
            "centres": list(self.centres),
            "flow": self.flow,
            "interpolate": self.interpolate,
        }

    @staticmethod
    def from_json(data: dict) -> "TimestepGroups":
        return TimestepGroups(
            tuple(float(v) for v in data["edges"]),
            tuple(float(v) for v in data["centres"]),
            bool(data["flow"]),
            bool(data["interpolate"]),
        )


SINGLE_GROUP = TimestepGroups((), (1.0,))


def groups_from_sizes(sigmas: Sequence[float], sizes: Sequence[int], flow: bool, interpolate: bool) -> TimestepGroups:
    """Calibrated sigmas (strictly decreasing) cut into runs of `sizes` -> groups with edges half-way in log-SNR."""
    if sum(sizes) != len(sigmas) or any(size < 1 for size in sizes):
        raise ValueError(f"group sizes {list(sizes)} do not cut {len(sigmas)} sigmas")
    edges, centres, start = [], [], 0
    for size in sizes:
        run = sigmas[start : start + size]
        if start:
            edges.append(between(sigmas[start - 1], run[0], flow))
        centres.append(
            run[len(run) // 2] if len(run) % 2 else between(run[len(run) // 2 - 1], run[len(run) // 2], flow)
        )
        start += size
    return TimestepGroups(tuple(edges), tuple(centres), flow, interpolate)


def between(high: float, low: float, flow: bool) -> float:
    """The sigma half-way in log-SNR, kept strictly inside (low, high] against rounding.

    An fp32 number: samplers that call half-way between two steps hit it, and `index` and the device must agree there.
    """
    middle = (log_snr(high, flow) + log_snr(low, flow)) / 4
    sigma = 1 / (1 + math.exp(middle)) if flow else math.exp(-middle)
    sigma = torch.tensor(sigma, dtype=torch.float32).item()
    return sigma if low < sigma < high else (low + high) / 2


class TimestepState:
    """The active (row, fraction) of every distinct partition of a model, on the device.

    Updated by value of sigma and in place: kernels and captured graphs read the same memory at every step.
    """

    def __init__(self, partitions: Sequence[TimestepGroups]):
        self.partitions = tuple(partitions)
        count = max(len(self.partitions), 1)
        width = max((len(p) for p in self.partitions), default=1)
        self._edges = torch.full((count, max(width - 1, 1)), -math.inf)
        self._knots = torch.full((count, width), math.inf)
        self._last = torch.zeros(count, dtype=torch.int64)
        self._smooth = torch.zeros(count, dtype=torch.bool)
        self._flow = torch.ones(count, dtype=torch.bool)
        for i, groups in enumerate(self.partitions):
            self._edges[i, : len(groups.edges)] = torch.tensor(groups.edges)
            self._knots[i, : len(groups)] = torch.tensor([log_snr(c, groups.flow) for c in groups.centres])
            self._last[i] = max(len(groups) - 2, 0)
            self._smooth[i] = groups.interpolate and len(groups) > 1
            self._flow[i] = groups.flow
        self.index = torch.zeros(count, dtype=torch.int64)
        self.fraction = torch.zeros(count)

    @property
    def device(self) -> torch.device:
        return self.index.device

    def to(self, device: torch.device) -> None:
        """Moves the tables once; later calls with the same device do nothing."""
        if self.index.device == device:
            return
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def update(self, sigma: Tensor) -> None:
        """sigma: one-element tensor on any device. No value is read back to the host."""
        self.to(sigma.device)
        level = sigma.detach().reshape(-1)[:1].float()
        piecewise = (level < self._edges).sum(dim=1)
        bounded = torch.where(
            self._flow, level.clamp(SIGMA_FLOOR, 1 - SIGMA_FLOOR), level.clamp(SIGMA_FLOOR, 1 / SIGMA_FLOOR)
        )
        ratio = torch.where(self._flow, (1 - bounded).clamp(min=SIGMA_FLOOR) / bounded, 1 / bounded)
        position = 2 * ratio.log()
        row = torch.minimum((position[:, None] >= self._knots).sum(dim=1) - 1, self._last).clamp(min=0)
        low = self._knots.gather(1, row[:, None])[:, 0]
        high = self._knots.gather(1, (row + 1).clamp(max=self._knots.shape[1] - 1)[:, None])[:, 0]
        fraction = ((position - low) / (high - low)).clamp(0, 1)
        self.index.copy_(torch.where(self._smooth, row, piecewise))
        # centres below the floor share a knot: 0 / 0 there must be 0, as in `locate`
        self.fraction.copy_(torch.where(self._smooth & (high > low), fraction, torch.zeros_like(fraction)))

    def select(self, slot: int) -> tuple[Tensor, Tensor]:
        """(index [1], fraction [1]) of one partition, views of the shared memory."""
        return self.index[slot : slot + 1], self.fraction[slot : slot + 1]


def distinct(partitions: Sequence[TimestepGroups]) -> tuple[TimestepGroups, ...]:
    """Partitions in order of first use, without repeats: the slots of a TimestepState."""
    return tuple(dict.fromkeys(partitions))
