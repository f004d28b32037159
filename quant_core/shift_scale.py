"""The vectors z (per timestep group) and s (per channel) of a layer, from its statistics."""

import torch
from torch import Tensor

from .grouping import step_shift
from .observers import LayerStatistics
from .schemes import QuantScheme, Scale, Shift

PAPER_ALPHA = 0.99
# a channel further off is an artefact of too few prompts more often than an outlier
BALANCED_CAP = 64.0


def group_shift(statistics: LayerStatistics, rows: list[list[int]], kind: Shift) -> Tensor | None:
    """z [T, K] float64 of each group, or None.

    MIDRANGE is HTG eq. 4, the plain mean of the members' mid-ranges; MEAN weighs timesteps by tokens.
    """
    if kind is Shift.NONE:
        return None
    if kind is Shift.MEAN:
        return group_mean(statistics, rows)
    z = torch.from_numpy(step_shift(statistics, kind))
    return torch.stack([z[members].mean(dim=0) for members in rows])


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
    statistics: LayerStatistics, rows: list[list[int]], shift: Tensor | None, weight: Tensor, scheme: QuantScheme
) -> Tensor | None:
    """s [K] float64, strictly positive, or None for none. Channels without range keep s = 1; without weight, too, but
    for the balanced scale."""
    if scheme.scale is Scale.NONE:
        return None
    if scheme.scale is Scale.PAPER:
        return paper_scale(statistics, rows, shift, weight)
    return balanced_scale(input_power(statistics, rows, shift), weight, scheme.scale_strength)


def paper_scale(statistics: LayerStatistics, rows: list[list[int]], shift: Tensor | None, weight: Tensor) -> Tensor:
    """s_k = sqrt(m_k / max_n |W_nk|), m the exponential average (alpha = 0.99) of the shifted maxima from the
    noisiest timestep on (HTG eq. 7)."""
    maxima = shifted_maximum(statistics, rows, shift)
    average = maxima[0].clone()
    for row in maxima[1:]:
        average = PAPER_ALPHA * average + (1 - PAPER_ALPHA) * row
    return _root_of_ratio(average, weight.double().abs().amax(dim=0))


def balanced_scale(power: Tensor, weight: Tensor, strength: float) -> Tensor:
    """s_k = (sqrt(E[(x_k - z_k)^2]) / |W_:k|)^(strength / 2), median 1, within BALANCED_CAP of it.

    After a rotation the rounding errors of x and of W spread evenly over the channels, and both are
    proportional to |x̃|^2 |W̃|^2 = (sum_k p_k / s_k^2) (sum_k s_k^2 |W_:k|^2); by Cauchy-Schwarz strength 1
    minimizes it. Rounding with feedback (GPTQ) at 4 bits prefers less. A channel that no weight reads must not widen
    the range of the others: it is scaled down as far as any. Rounded to fp16, as it is stored.
    """
    column = weight.double().square().sum(dim=0)
    usable = (power > 0) & (column > 0)
    if not bool(usable.any()):
        return torch.ones_like(power)
    scale = _root_of_ratio(power.sqrt(), column.sqrt())
    scale = (scale / scale[usable].median()).clamp(1 / BALANCED_CAP, BALANCED_CAP)
    scale[(power > 0) & (column == 0)] = BALANCED_CAP
    return torch.where(power > 0, scale**strength, torch.ones_like(scale)).half().double()


def _root_of_ratio(reach: Tensor, weight: Tensor) -> Tensor:
    usable = (reach > 0) & (weight > 0)
    return torch.where(usable, (reach / weight.clamp(min=1e-300)).sqrt(), torch.ones_like(reach))


def input_power(statistics: LayerStatistics, rows: list[list[int]], shift: Tensor | None) -> Tensor:
    """E[(x - z)^2] per channel [K] float64; from the ranges (3 standard deviations) where no second moment is kept."""
    share = statistics.count.double() / statistics.count.double().sum()
    if statistics.second_moment is None:
        return share @ (shifted_maximum(statistics, rows, shift) / 3).square()
    power = statistics.second_moment.double().diagonal(dim1=1, dim2=2).reshape(-1)
    if shift is not None:
        for z, members in zip(shift.double(), rows, strict=True):
            power = power - share[members] @ (2 * statistics.mean[members].double() * z - z.square())
    return power.clamp(min=0)
