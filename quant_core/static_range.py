"""Fixed activation ranges, one per timestep group: what per-token ranges are replaced by."""

import torch
from torch import Tensor

from ..kernels.numerics import INT8_MAX, round_clamp, safe_scale
from ..kernels.quantize_activation.reference import asymmetric_range, transform
from .observers import LayerStatistics

# shares of the largest sampled value that are tried as the end of the range
CLIPS = tuple(share / 40 for share in range(40, 9, -1))
# prompts that were not sampled reach further: 5 % costs little where they do not
HEADROOM = 1.05
# sampled rows that the range of a group is taken from
FEWEST_ROWS = 16


def extreme_range(
    statistics: LayerStatistics, rows: list[list[int]], shift: Tensor | None, scale: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Step [T] and zero [T] (None when symmetric) that span the calibrated (x - z_g) / s of each group (HTG)."""
    lows, highs = [], []
    for g, members in enumerate(rows):
        low, high = statistics.minimum[members].double(), statistics.maximum[members].double()
        if shift is not None:
            low, high = low - shift[g].double(), high - shift[g].double()
        if scale is not None:
            low, high = low / scale, high / scale
        lows.append(low.amin())
        highs.append(high.amax())
    low, high = torch.stack(lows), torch.stack(highs)
    if symmetric:
        return safe_scale(torch.maximum(low.abs(), high.abs()), INT8_MAX), None
    return asymmetric_range(low.float().clamp(max=0), high.float().clamp(min=0))


def sampled_range(
    statistics: LayerStatistics, rows: list[list[int]], shift: Tensor | None, scale: Tensor | None, hadamard: int
) -> Tensor:
    """Symmetric step [T] of ((x - z_g) / s) H: the group's rms, times one clip for the layer.

    The clip minimizes the squared rounding error over all sampled rows, each relative to its group's rms; a clip
    per group would be fitted to a handful of rows. A group of few rows borrows those of the nearest timesteps.
    Raises ValueError when the statistics hold no sample, or hardly any.
    """
    if statistics.rows is None or statistics.row_bin is None:
        raise ValueError("calibrated without row samples, which static ranges need; calibrate again with more memory")
    if len(statistics.rows) < FEWEST_ROWS:
        raise ValueError(
            f"calibrated with {len(statistics.rows)} sampled rows, static ranges need {FEWEST_ROWS}; "
            "calibrate again with more prompts or more memory"
        )
    relative, rms = [], []
    for g, members in enumerate(rows):
        # of every row, how many timesteps it is away from the group
        away = (statistics.row_bin[:, None] - torch.tensor(members)).abs().amin(dim=1)
        sample = statistics.rows[away <= away.kthvalue(FEWEST_ROWS).values]
        index, fraction = torch.tensor([g]), torch.zeros(1)
        x = transform(sample, shift, scale, index, fraction, hadamard)
        rms.append(x.square().mean().sqrt())
        relative.append(x / rms[-1].clamp(min=torch.finfo(torch.float32).tiny))
    x = torch.cat(relative)
    reach = x.abs().amax()
    candidates = [safe_scale(reach * clip, INT8_MAX) for clip in CLIPS]
    errors = [(round_clamp(x / step, -INT8_MAX, INT8_MAX) * step - x).square().sum() for step in candidates]
    best = candidates[int(torch.stack(errors).argmin())]
    return safe_scale(torch.stack(rms) * best * (HEADROOM * INT8_MAX), INT8_MAX)
