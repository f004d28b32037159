"""The vectors z (per timestep group) and s (per channel) of a layer, from its statistics."""

import torch
from torch import Tensor

from .grouping import step_shift
from .observers import LayerStatistics
from .schemes import Scale, Shift

PAPER_ALPHA = 0.99


def group_shift(statistics: LayerStatistics, rows: list[list[int]], kind: Shift) -> Tensor | None:
    """z [T, K] float64 of each group, or None.

    MIDRANGE is HTG eq. 4, the plain mean of the members' mid-ranges; MEAN weighs timesteps by tokens.
    """
    if kind is Shift.NONE:
        return None
    z = torch.from_numpy(step_shift(statistics, kind))
    if kind is Shift.MIDRANGE:
        return torch.stack([z[members].mean(dim=0) for members in rows])
    return torch.stack([_weighted_mean(z[members], statistics.count[members]) for members in rows])


def group_mean(statistics: LayerStatistics, rows: list[list[int]]) -> Tensor:
    """mu [T, K] float64: the mean input of each group, the centre of its bias correction."""
    mean = statistics.mean.double()
    return torch.stack([_weighted_mean(mean[members], statistics.count[members]) for members in rows])


def _weighted_mean(rows: Tensor, weight: Tensor) -> Tensor:
    weight = weight.double().clamp(min=1)
    return (rows * weight[:, None]).sum(dim=0) / weight.sum()


def shifted_maximum(statistics: LayerStatistics, rows: list[list[int]], shift: Tensor | None) -> Tensor:
    """max |x - z_g(t)| per timestep and channel [T_calibrated, K] float64; timesteps in no group use group 0."""
    low, high = statistics.minimum.double(), statistics.maximum.double()
    if shift is None:
        return torch.maximum(high.abs(), low.abs())
    z = torch.zeros_like(low)
    for g, members in enumerate(rows):
        z[members] = shift[g]
    return torch.maximum((high - z).abs(), (low - z).abs())


def channel_scale(
    statistics: LayerStatistics, rows: list[list[int]], shift: Tensor | None, weight: Tensor, kind: Scale
):
    """s [K] float64, strictly positive, or None for none.

    PAPER: s_k = sqrt(m_k / max_n |W_nk|), m the exponential average (alpha = 0.99) of the shifted maxima
    from the noisiest timestep on (HTG eq. 7). Channels without range or weight keep s = 1.
    """
    if kind is Scale.NONE:
        return None
    maxima = shifted_maximum(statistics, rows, shift)
    average = maxima[0].clone()
    for row in maxima[1:]:
        average = PAPER_ALPHA * average + (1 - PAPER_ALPHA) * row
    reach = weight.double().abs().amax(dim=0)
    usable = (average > 0) & (reach > 0)
    return torch.where(usable, (average / reach.clamp(min=1e-300)).sqrt(), torch.ones_like(average))


def static_range(statistics: LayerStatistics, rows: list[list[int]], shift: Tensor | None, scale: Tensor | None):
    """Lowest and highest (x - z) / s of each group over all channels: two [T] float64 tensors."""
    lows, highs = [], []
    for g, members in enumerate(rows):
        low, high = statistics.minimum[members].double(), statistics.maximum[members].double()
        if shift is not None:
            low, high = low - shift[g], high - shift[g]
        if scale is not None:
            low, high = low / scale, high / scale
        lows.append(low.amin())
        highs.append(high.amax())
    return torch.stack(lows), torch.stack(highs)
