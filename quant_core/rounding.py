"""Weights to integers: round to nearest, and GPTQ."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.numerics import INT8_MAX, decode_int4, pack_int4, round_clamp
from .grid import SHRINK, Grid, Int4Grid, Int8Grid, channel_step, fit_levels, int4_grid, int8_grid, nearest_level
from .schemes import Rounding, WeightArgs

GPTQ_DAMP = 0.05
# columns per batch: small enough that a rank-one update runs on one thread
GPTQ_BLOCK = 32


def round_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """weight [N, K] -> codes [N, K]."""
    return grid.encode(weight.float(), 0)


def gptq_int8(weight: Tensor, hessian: Tensor, grid: Int8Grid, damp: float = GPTQ_DAMP) -> Tensor:
    """weight [N, K], hessian [B, b, b] diagonal blocks of E[x̃ x̃ᵀ] -> codes [N, K] int8.

    GPTQ (arXiv 2210.17323): columns are rounded one by one, the error of each is spread over the
    later ones through the inverse Hessian; most important column first.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    width = hessian.shape[1]
    step = grid.scale[:, 0]
    for block, H in enumerate(hessian):
        W = weight[:, block * width : (block + 1) * width].float()
        order, U = _ordered_factor(H.to(weight.device).double(), 1, damp)

        def quantize(columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
            code = round_clamp(columns[k] / step, -INT8_MAX, INT8_MAX)
            return code, code * step

        found = _feed_back(W[:, order], U, GPTQ_BLOCK, quantize)
        codes[:, block * width + order] = found.to(torch.int8)
    return codes


def gptq_int4(
    weight: Tensor,
    hessian: Tensor,
    group_size: int,
    symmetric: bool,
    shrink: tuple[float, ...] = SHRINK,
    damp: float = GPTQ_DAMP,
) -> tuple[Tensor, Int4Grid]:
    """As `gptq_int8` -> codes [N, K] uint8 and their grid.

    The levels of a group are searched when its turn comes, on the weights as corrected by then, each column
    weighted by what its error costs after later columns made up for it. Most important group first.
    """
    N, K = weight.shape
    codes = torch.empty(N, K, dtype=torch.uint8, device=weight.device)
    scale = channel_step(weight, group_size, symmetric)
    step = scale[:, 0]
    multiplier = torch.empty(N, K // group_size, device=weight.device)
    zero = torch.empty_like(multiplier)
    width = hessian.shape[1]
    for block, H in enumerate(hessian):
        start = block * width
        W = weight[:, start : start + width].float()
        order, U = _ordered_factor(H.to(weight.device).double(), group_size, damp)
        importance = U.diagonal().square().reciprocal()

        def quantize(columns: Tensor, k: int, order=order, importance=importance, start=start) -> tuple[Tensor, Tensor]:
            g = (start + int(order[k])) // group_size
            if k % group_size == 0:
                weights = importance[k : k + group_size]
                group = columns[k : k + group_size].T[:, None]
                m, z = fit_levels(group, scale, symmetric, (weights / weights.mean())[None], shrink)
                multiplier[:, g], zero[:, g] = m[:, 0], z[:, 0]
            code = nearest_level(columns[k] / step, multiplier[:, g], zero[:, g])
            return code, (code - zero[:, g]) * multiplier[:, g] * step

        found = _feed_back(W[:, order], U, group_size, quantize)
        codes[:, start + order] = found.to(torch.uint8)
    return codes, Int4Grid(scale, multiplier, zero, group_size)


def _ordered_factor(H: Tensor, run: int, damp: float) -> tuple[Tensor, Tensor]:
    """Damped H [b, b] -> order of its columns, most important first in whole runs, and U with UᵀU = H⁻¹ in it."""
    dead = H.diagonal() <= 0
    H = H + torch.diag(dead.double() + damp * H.diagonal().mean().clamp(min=1e-12))
    runs = torch.argsort(H.diagonal().unflatten(0, (-1, run)).mean(dim=1), descending=True)
    order = (runs[:, None] * run + torch.arange(run, device=H.device)).flatten()
    H = H[order][:, order]
    return order, torch.linalg.cholesky(torch.cholesky_inverse(_factor(H, damp)), upper=True).float()


def _feed_back(W: Tensor, U: Tensor, batch: int, quantize) -> Tensor:
    """Rounds W [N, b] column by column, spreading each error over later columns -> codes [N, b] fp32.

    quantize(columns [b, N], k) -> codes and values [N] of column k, given all columns as corrected so far.
    """
    rest = W.T.contiguous()  # [b, N]: a column is contiguous
    codes, errors = torch.empty_like(rest), torch.empty_like(rest)
    K = len(rest)
    for start in range(0, K, batch):
        end = min(start + batch, K)
        for k in range(start, end):
            codes[k], value = quantize(rest, k)
            errors[k] = (rest[k] - value) / U[k, k]
            rest[k:end].addr_(U[k, k:end], errors[k], alpha=-1)
        rest[end:] -= U[start:end, end:].T @ errors[start:end]
    return codes.T


def _factor(H: Tensor, damp: float) -> Tensor:
    """Cholesky factor of H; ever more damping where fp32 cancellation (a large mean taken off) left it indefinite."""
    for power in range(12):
        factor, failed = torch.linalg.cholesky_ex(H)
        if not int(failed):
            return factor
        H = H + torch.diag(10**power * damp * H.diagonal().abs().mean().expand(len(H)))
    return torch.linalg.cholesky(H)


@dataclass(frozen=True)
class RoundedWeight:
    """Codes as stored: int8 [N, K], or packed uint8 [N, K / 2] with `levels` [N, G] uint8."""

    qdata: Tensor
    scale: Tensor
    levels: Tensor | None = None

    def int8(self) -> Tensor:
        """The int8 codes that the matrix product sees, [N, K]."""
        return self.qdata if self.levels is None else decode_int4(self.qdata, self.levels)


def round_weight(weight: Tensor, args: WeightArgs, group_size: int, hessian: Tensor | None) -> RoundedWeight:
    """Folded weight [N, K] -> RoundedWeight. `hessian` is needed for GPTQ only; without it, round to nearest."""
    weight = weight.float()
    curvature = hessian if args.rounding is Rounding.GPTQ else None
    if args.bits == 8:
        grid = int8_grid(weight)
        codes = round_nearest(weight, grid) if curvature is None else gptq_int8(weight, curvature, grid)
        return RoundedWeight(codes, grid.scale)
    shrink = SHRINK if args.search else SHRINK[:1]
    if curvature is None:
        grid4 = int4_grid(weight, group_size, args.symmetric, shrink)
        codes = round_nearest(weight, grid4)
    else:
        codes, grid4 = gptq_int4(weight, curvature, group_size, args.symmetric, shrink)
    return RoundedWeight(pack_int4(codes), grid4.scale, grid4.levels)
