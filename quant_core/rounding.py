"""Weights to integers: round to nearest, and GPTQ."""

from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

from ..kernels.numerics import INT8_MAX, decode_int4, pack_int4, round_clamp
from .feedback import Columns, Rows, Wave, feed_back, largest_divisor
from .grid import SHRINK, Grid, Int4Grid, Int8Grid, channel_step, fit_levels, int4_grid, int8_grid, nearest_level
from .schemes import Rounding, WeightArgs

GPTQ_DAMP = 0.05
# a curvature comes from few probes; its small eigenvalues are the least known
CURVATURE_DAMP = 0.2
# columns per step where no group decides: many for rows that are on their own, few where rows wait for one another
ALONE, COUPLED = 32, 4


def round_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """weight [N, K] -> codes [N, K]."""
    return grid.encode(weight.float(), 0)


def gptq_int8(
    weight: Tensor, hessian: Tensor, grid: Int8Grid, curvature: Tensor | None = None, damp: float = GPTQ_DAMP
) -> Tensor:
    """weight [N, K], hessian [B, b, b] diagonal blocks of E[x̃ x̃ᵀ] -> codes [N, K] int8.

    GPTQ (arXiv 2210.17323): columns are rounded one by one, the error of each is spread over the
    later ones through the inverse Hessian; most important column first. With a curvature, diagonal blocks
    [P, c, c] of E[g gᵀ] over gradients in the output, over later rows of its block too.
    """
    rows = _rows(weight, curvature)
    step = rows.arranged(grid.scale)[..., 0]  # [P, c]

    def levels(target: Tensor, wave: Wave):
        own = step[:, wave.rows]

        def level(value: Tensor) -> tuple[Tensor, Tensor]:
            code = round_clamp(value / own, -INT8_MAX, INT8_MAX)
            return code, code * own

        return level

    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    width = hessian.shape[1]
    run = largest_divisor(width, ALONE if curvature is None else COUPLED)
    for block, H in enumerate(hessian):
        columns = slice(block * width, (block + 1) * width)
        order = Columns.of(H.to(weight.device), run, damp)
        codes[:, columns] = feed_back(weight[:, columns], order, rows, levels).to(torch.int8)
    return codes


def gptq_int4(
    weight: Tensor,
    hessian: Tensor,
    group_size: int,
    symmetric: bool,
    shrink: tuple[float, ...] = SHRINK,
    curvature: Tensor | None = None,
    damp: float = GPTQ_DAMP,
) -> tuple[Tensor, Int4Grid]:
    """As `gptq_int8` -> codes [N, K] uint8 and their grid.

    The levels of a group are searched when its turn comes, on the weights as corrected by then, each column
    weighted by what its error costs after later columns made up for it. Most important group first.
    """
    N, K = weight.shape
    rows = _rows(weight, curvature)
    scale = channel_step(weight, group_size, symmetric)
    step = rows.arranged(scale)[..., 0]  # [P, c]
    hessian = whole_groups(hessian, group_size)
    codes = torch.empty(N, K, dtype=torch.uint8, device=weight.device)
    multiplier = torch.empty(N, K // group_size, device=weight.device)
    zero = torch.empty_like(multiplier)
    width = hessian.shape[1]
    for block, H in enumerate(hessian):
        columns = slice(block * width, (block + 1) * width)
        order = Columns.of(H.to(weight.device), group_size, damp, together=group_size)
        importance = order.importance / order.importance.mean(dim=1, keepdim=True)
        chosen = torch.empty(2, *step.shape, order.runs, device=weight.device)

        def levels(target: Tensor, wave: Wave, importance=importance, chosen=chosen):
            own = step[:, wave.rows]
            m, z = fit_levels(target, own, symmetric, importance[wave.runs], shrink)
            wave.of(chosen[0]).copy_(m)
            wave.of(chosen[1]).copy_(z)

            def level(value: Tensor) -> tuple[Tensor, Tensor]:
                code = nearest_level(value / own, m, z)
                return code, (code - z) * m * own

            return level

        codes[:, columns] = feed_back(weight[:, columns], order, rows, levels).to(torch.uint8)
        group = torch.div(columns.start + order.order[::group_size], group_size, rounding_mode="floor")
        multiplier[:, group], zero[:, group] = rows.restored(chosen[0]), rows.restored(chosen[1])
    return codes, Int4Grid(scale, multiplier, zero, group_size)


def whole_groups(hessian: Tensor, group_size: int) -> Tensor:
    """Diagonal blocks [B, b, b] of K columns -> the same matrix in blocks of whole groups; the group size divides K."""
    b = hessian.shape[1]
    together = lcm(b, group_size) // b
    return hessian if together == 1 else torch.stack([torch.block_diag(*part) for part in hessian.split(together)])


def _rows(weight: Tensor, curvature: Tensor | None) -> Rows:
    if curvature is None:
        return Rows.alone(len(weight), weight.device)
    return Rows.coupled(curvature.to(weight.device), CURVATURE_DAMP)


@dataclass(frozen=True)
class RoundedWeight:
    """Codes as stored: int8 [N, K], or packed uint8 [N, K / 2] with `levels` [N, G] uint8."""

    qdata: Tensor
    scale: Tensor
    levels: Tensor | None = None

    def int8(self) -> Tensor:
        """The int8 codes that the matrix product sees, [N, K]."""
        return self.qdata if self.levels is None else decode_int4(self.qdata, self.levels)


def round_weight(
    weight: Tensor, args: WeightArgs, group_size: int, hessian: Tensor | None, curvature: Tensor | None = None
) -> RoundedWeight:
    """Folded weight [N, K] -> RoundedWeight. GPTQ takes a Hessian and, if there is one, a curvature; without a
    Hessian, round to nearest."""
    weight = weight.float()
    calibrated = hessian if args.rounding is not Rounding.NEAREST else None
    if args.bits == 8:
        grid = int8_grid(weight)
        codes = round_nearest(weight, grid) if calibrated is None else gptq_int8(weight, calibrated, grid, curvature)
        return RoundedWeight(codes, grid.scale)
    shrink = SHRINK if args.search else SHRINK[:1]
    if calibrated is None:
        grid4 = int4_grid(weight, group_size, args.symmetric, shrink)
        codes = round_nearest(weight, grid4)
    else:
        codes, grid4 = gptq_int4(weight, calibrated, group_size, args.symmetric, shrink, curvature)
    return RoundedWeight(pack_int4(codes), grid4.scale, grid4.levels)
