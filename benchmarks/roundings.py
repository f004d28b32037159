"""Ways to round a folded weight that the package does not use: code tables, a low-rank branch, coordinate descent.

Shapes as in quant_core/rounding.py: weight [N, K], hessian [B, b, b] diagonal blocks of E[x̃ x̃ᵀ].
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from dit_quant.kernels.numerics import INT8_MAX, round_clamp, safe_scale

# the column order and the feedback of our own GPTQ, so that a table differs from a grid in its levels alone
from dit_quant.quant_core.feedback import Columns, Rows, Wave, feed_back
from dit_quant.quant_core.rounding import GPTQ_DAMP, gptq_int4
from torch import Tensor

Rounder = Callable[[Tensor, Tensor], Tensor]  # weight [N, K], hessian [B, b, b] -> rounded weight [N, K] fp32

# NormalFloat4 (QLoRA, arXiv 2305.14314, appendix E)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# scales tried around a group's largest weight, with either sign: about as many as our own level search tries
STRETCH = tuple(i / 20 for i in range(14, 25))
# code of the widest group's scale: 1.2 times as much is still int8
WIDEST = 105


@lru_cache
def lloyd_max(group_size: int = 16, levels: int = 16, sweeps: int = 100) -> Tensor:
    """Levels [16] of least squared error for Gaussian groups, each divided by its largest value (Lloyd 1982)."""
    groups = torch.randn(1 << 15, group_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (groups / groups.abs().amax(dim=1, keepdim=True)).flatten()
    table = torch.linspace(-1, 1, levels, dtype=torch.float64)
    for _ in range(sweeps):
        cell = torch.bucketize(x, (table[1:] + table[:-1]) / 2)
        table = torch.bincount(cell, x, minlength=levels) / torch.bincount(cell, minlength=levels)
    return table.float()


def nearest_in_table(x: Tensor, table: Tensor) -> Tensor:
    """The entry of the ascending table [16] next to each x."""
    return table[torch.bucketize(x, (table[1:] + table[:-1]) / 2)]


def fit_scale(group: Tensor, step: Tensor, table: Tensor, importance: Tensor) -> Tensor:
    """group [N, g], step [N, 1] of the channel's scales -> signed scale [N, 1], an int8 code times the step.

    The search of the package's `fit_levels`: least squared error, weighted by importance [g].
    """
    stretch = torch.tensor(STRETCH)[:, None, None]
    code = round_clamp(stretch * group.abs().amax(dim=1, keepdim=True) / step, 1, INT8_MAX)
    scale = torch.cat([code, -code]) * step  # [C, N, 1]
    error = (nearest_in_table(group / scale, table) * scale - group).square() @ importance  # [C, N]
    return scale.gather(0, error.argmin(dim=0)[None, :, None])[0]


def gptq_table(weight: Tensor, hessian: Tensor, group_size: int, table: Tensor) -> Tensor:
    """GPTQ with 16 freely placed levels, a table times the group's 8-bit scale -> rounded weight [N, K].

    As large as our grid of one byte per group; the levels are floats, which no integer product could use.
    """
    rounded = torch.empty_like(weight, dtype=torch.float32)
    widest = weight.float().unflatten(1, (-1, group_size)).abs().amax(dim=(1, 2))
    step = safe_scale(widest[:, None], WIDEST)
    width = hessian.shape[1]
    rows = Rows.alone(len(weight), weight.device)
    for block, H in enumerate(hessian):
        part = slice(block * width, (block + 1) * width)
        columns = Columns.of(H, group_size, GPTQ_DAMP, together=group_size)
        importance = columns.importance / columns.importance.mean(dim=1, keepdim=True)

        def levels(target: Tensor, wave: Wave, importance=importance):
            # one run of all rows at a time: target [N, 1, g]
            scale = fit_scale(target[:, 0], step, table, importance[wave.runs][0])

            def level(value: Tensor) -> tuple[Tensor, Tensor]:
                nearest = nearest_in_table(value / scale, table) * scale
                return nearest, nearest

            return level

        rounded[:, part] = feed_back(weight[:, part], columns, rows, levels)
    return rounded


def gptq_decoded(weight: Tensor, hessian: Tensor, group_size: int, damp: float = GPTQ_DAMP) -> Tensor:
    """What the W4A8 preset with plain GPTQ makes of a weight, the baseline of every rounding here."""
    codes, grid = gptq_int4(weight, hessian, group_size, symmetric=False, damp=damp)
    return grid.decode(codes, 0)


def hessian_loss(error: Tensor, hessian: Tensor) -> float:
    """sum_n e_n H e_nᵀ of error [N, K]: the squared output error that it makes on average, float64."""
    blocks = error.double().unflatten(1, (len(hessian), -1)).transpose(0, 1)  # [B, N, b]
    return float((blocks @ hessian.double() * blocks).sum())


def low_rank_branch(error: Tensor, hessian: Tensor, rank: int) -> Tensor:
    """Best approximation of rank r to error [N, K] under the Hessian, its two factors in fp16 (QERA, arXiv 2410.06040).

    With U the leading left singular vectors of E H^(1/2), that is the eigenvectors of E H Eᵀ, it is U (Uᵀ E).
    """
    E = error.double()
    blocks = E.unflatten(1, (len(hessian), -1)).transpose(0, 1)
    power = (blocks @ hessian.double() @ blocks.transpose(1, 2)).sum(dim=0)  # [N, N]
    left = torch.linalg.eigh(power).eigenvectors[:, -rank:]
    return left.half().float() @ (left.T @ E).half().float()


def gptq_with_branch(weight: Tensor, hessian: Tensor, group_size: int, rank: int) -> Tensor:
    """The preset's rounding plus a 16-bit branch on what it lost -> their sum [N, K]."""
    rounded = gptq_decoded(weight, hessian, group_size)
    return rounded + low_rank_branch(weight - rounded, hessian, rank)


def branch_bytes(features: tuple[int, int], rank: int) -> int:
    """Of the two fp16 factors of a layer (N, K)."""
    return 2 * rank * sum(features)


def coordinate_descent(weight: Tensor, codes: Tensor, grid, hessian: Tensor, sweeps: int) -> Tensor:
    """Codes [N, K] on an Int4Grid -> better ones as values [N, K] fp32 (QuantEase, arXiv 2309.01885).

    Each column in turn moves to the level that is best given all others, so the Hessian loss never rises.
    """
    rounded = grid.decode(codes, 0)
    width = hessian.shape[1]
    for block, H in enumerate(hessian.float()):
        start = block * width
        W, Q = (matrix[:, start : start + width].T.contiguous() for matrix in (weight.float(), rounded))  # [b, N]
        residual = H @ (W - Q)
        for k in [*range(width)] * sweeps:
            wanted = (Q[k] + residual[k] / H[k, k])[:, None]
            change = grid.decode(grid.encode(wanted, start + k), start + k)[:, 0] - Q[k]
            residual.addr_(H[k], change, alpha=-1)
            Q[k] += change
        rounded[:, start : start + width] = Q.T
    return rounded


def damped(hessian: Tensor, share: float) -> Tensor:
    """[B, b, b] with `share` of each block's mean diagonal added to it."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-12)
    return hessian + share * mean[:, None, None] * torch.eye(hessian.shape[1], dtype=hessian.dtype)


def gptq_then_descent(weight: Tensor, hessian: Tensor, group_size: int, sweeps: int = 2) -> Tensor:
    """Descent needs less damping than GPTQ: it inverts nothing but a diagonal."""
    codes, grid = gptq_int4(weight, hessian, group_size, symmetric=False)
    return coordinate_descent(weight, codes, grid, damped(hessian, 0.01), sweeps)
