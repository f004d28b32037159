"""Where a weight's integer levels lie: int8 per channel, or 16 levels per group on the channel's int8 grid."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.numerics import INT4_MAX, INT8_MAX, MULTIPLIER_MAX, pack_levels, round_clamp, safe_scale, unpack_levels

# step sizes tried around min-max: clipping a rare value pays at 16 levels
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# multiplier of a channel's widest group: below 15, so that a lopsided group's far levels stay within int8
WIDEST_MULTIPLIER = 12
# levels of every multiplier up to that reach this far within int8; a more lopsided group sets the channel's step
REACH = 120
# elements of one batch of the level search
SEARCH_BUDGET = 1 << 24


@dataclass(frozen=True)
class Int8Grid:
    """Symmetric, one step per output channel: w ~ scale code. scale [N, 1] fp32."""

    scale: Tensor

    def step(self, start: int, count: int) -> Tensor:
        """Width of a level in `count` columns from `start`, broadcastable to [N, count]."""
        return self.scale

    def encode(self, weight: Tensor, start: int) -> Tensor:
        """weight [N, k], columns from `start` -> codes [N, k] int8."""
        return round_clamp(weight / self.scale, -INT8_MAX, INT8_MAX).to(torch.int8)

    def decode(self, codes: Tensor, start: int) -> Tensor:
        """codes [N, k] -> fp32 values."""
        return codes.float() * self.scale


@dataclass(frozen=True)
class Int4Grid:
    """16 levels per group: w ~ scale (code - zero) multiplier.

    scale [N, 1] fp32; multiplier (1 to 15) and zero (0 to 15) [N, G] fp32 integers; group_size columns share both.
    """

    scale: Tensor
    multiplier: Tensor
    zero: Tensor
    group_size: int

    @classmethod
    def unpack(cls, scale: Tensor, levels: Tensor, group_size: int) -> "Int4Grid":
        """From the stored byte per group; see `pack_levels`."""
        multiplier, zero = unpack_levels(levels)
        return cls(scale, multiplier.float(), zero.float(), group_size)

    @property
    def levels(self) -> Tensor:
        """[N, G] uint8, as stored."""
        return pack_levels(self.multiplier.to(torch.uint8), self.zero.to(torch.uint8))

    def _columns(self, table: Tensor, start: int, count: int) -> Tensor:
        index = torch.arange(start, start + count, device=table.device) // self.group_size
        return table[:, index]

    def step(self, start: int, count: int) -> Tensor:
        return self.scale * self._columns(self.multiplier, start, count)

    def encode(self, weight: Tensor, start: int) -> Tensor:
        k = weight.shape[1]
        multiplier, zero = self._columns(self.multiplier, start, k), self._columns(self.zero, start, k)
        return nearest_level(weight / self.scale, multiplier, zero).to(torch.uint8)

    def decode(self, codes: Tensor, start: int) -> Tensor:
        k = codes.shape[1]
        return (codes.float() - self._columns(self.zero, start, k)) * self.step(start, k)


Grid = Int8Grid | Int4Grid


def nearest_level(units: Tensor, multiplier: Tensor, zero: Tensor) -> Tensor:
    """Codes 0..15 as fp32 of `units`, weights in steps of the int8 grid; what they decode to stays within int8."""
    reach = torch.floor(INT8_MAX / multiplier)
    codes = torch.maximum(torch.minimum((units / multiplier + zero).round(), zero + reach), zero - reach)
    return codes.clamp(0, INT4_MAX)


def int8_grid(weight: Tensor) -> Int8Grid:
    return Int8Grid(safe_scale(weight.abs().amax(dim=1, keepdim=True), INT8_MAX))


def channel_step(weight: Tensor, group_size: int, symmetric: bool) -> Tensor:
    """The int8 step [N, 1] of each channel: its widest group takes WIDEST_MULTIPLIER, no weight is beyond REACH."""
    weight = weight.float()
    widest = _needed_step(weight.unflatten(1, (-1, group_size)), symmetric).amax(dim=1, keepdim=True)
    extent = weight.abs().amax(dim=1, keepdim=True)
    return safe_scale(torch.maximum(widest / WIDEST_MULTIPLIER, extent / REACH), 1)


def _needed_step(groups: Tensor, symmetric: bool) -> Tensor:
    """groups [N, G, g] -> step [N, G] whose 16 levels just span the group; 0 is always a level."""
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    return torch.maximum(high / 7, -low / 8) if symmetric else (high - low) / INT4_MAX


def fit_levels(
    groups: Tensor,
    scale: Tensor,
    symmetric: bool,
    importance: Tensor | None = None,
    shrink: tuple[float, ...] = SHRINK,
) -> tuple[Tensor, Tensor]:
    """Searches the levels of each group: groups [N, G, g], scale [N, 1] or [N, G] -> multiplier, zero [N, G] fp32.

    Minimizes the squared rounding error, weighted by importance [G, g] (in GPTQ what a column's error costs),
    over the step sizes next to min-max times each `shrink`, and both nearest zero points.
    """
    batch = max(1, SEARCH_BUDGET // (4 * len(shrink) * groups[:, 0].numel()))
    scale = scale.expand(groups.shape[:2])
    parts = []
    for i in range(0, groups.shape[1], batch):
        part = slice(i, i + batch)
        weights = None if importance is None else importance[part]
        parts.append(_fit_batch(groups[:, part], scale[:, part], symmetric, weights, shrink))
    return torch.cat([m for m, _ in parts], dim=1), torch.cat([z for _, z in parts], dim=1)


def _fit_batch(
    groups: Tensor, scale: Tensor, symmetric: bool, importance: Tensor | None, shrink: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """One batch; C candidates in the first dimension."""
    units = groups.float() / scale[:, :, None]
    wanted = _needed_step(units, symmetric) * torch.tensor(shrink, device=units.device)[:, None, None]
    multiplier = torch.cat([wanted.floor(), wanted.ceil()]).clamp(1, MULTIPLIER_MAX)  # [C, N, G]
    if symmetric:
        zero = torch.full_like(multiplier, 8)
    else:
        centre = (INT4_MAX - (units.amax(dim=2) + units.amin(dim=2)) / multiplier) / 2
        zero = torch.cat([centre.floor(), centre.ceil()]).clamp(0, INT4_MAX)
        multiplier = torch.cat([multiplier, multiplier])
    m, z = multiplier[..., None], zero[..., None]
    error = ((nearest_level(units, m, z) - z) * m - units).square()
    error = (error if importance is None else error * importance).sum(dim=3)
    best = error.argmin(dim=0, keepdim=True)
    return multiplier.gather(0, best)[0], zero.gather(0, best)[0]


def int4_grid(weight: Tensor, group_size: int, symmetric: bool, shrink: tuple[float, ...] = SHRINK) -> Int4Grid:
    """Searched grid of weight [N, K]; K must be a multiple of group_size."""
    scale = channel_step(weight, group_size, symmetric)
    multiplier, zero = fit_levels(weight.float().unflatten(1, (-1, group_size)), scale, symmetric, shrink=shrink)
    return Int4Grid(scale, multiplier, zero, group_size)
