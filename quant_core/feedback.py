"""Error feedback of GPTQ: what rounding one weight did wrong, the weights still to be rounded make up for.

With an error E [N, K] the output of a layer is wrong by E x̃, and the loss by about tr(C E H Eᵀ): H = E[x̃ x̃ᵀ] over
inputs (GPTQ, arXiv 2210.17323) and C = E[g gᵀ] over gradients g of the loss in the layer's output (YAQA, arXiv
2505.22988). C makes later rows answer for earlier ones as H does for columns. Without it every row is on its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Output channels in P blocks of b, the most important first in each.

    order [N]; coupling [P, b, b]: what row i's rounding error asks of a later row j, at [j, i].
    """

    order: Tensor
    coupling: Tensor

    @classmethod
    def alone(cls, count: int, device: torch.device) -> "Rows":
        """`count` rows that do not know of one another."""
        return cls(torch.arange(count, device=device), torch.zeros(count, 1, 1, device=device))

    @classmethod
    def coupled(cls, curvature: Tensor, damp: float) -> "Rows":
        """curvature [P, b, b]: diagonal blocks of C."""
        width = curvature.shape[1]
        orders, couplings = [], []
        for block, C in enumerate(curvature):
            order, U = ordered_factor(C.double(), 1, damp)
            orders.append(block * width + order)
            couplings.append((U / U.diagonal()[:, None]).T.tril(-1))
        return cls(torch.cat(orders), torch.stack(couplings))

    def arranged(self, x: Tensor) -> Tensor:
        """x [N, ...] -> [P, b, ...]."""
        return x[self.order].unflatten(0, self.coupling.shape[:2])

    def restored(self, x: Tensor) -> Tensor:
        """The inverse of `arranged`."""
        found = torch.empty_like(x.flatten(0, 1))
        found[self.order] = x.flatten(0, 1)
        return found


@dataclass(frozen=True)
class Columns:
    """Input channels in G runs of r, the most important run last: runs are rounded from the last to the first.

    order [K]; factor [G, r, K]: the upper U of UᵀU = H⁻¹ transposed, in this order, its columns by runs.
    """

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, hessian: Tensor, run: int, damp: float, together: int = 1) -> "Columns":
        """hessian [K, K]; K must be a multiple of `run`. together: neighbours that the order may not part."""
        order, U = ordered_factor(hessian.double(), together, damp)
        runs = U.unflatten(0, (-1, run)).unflatten(2, (-1, run)).flip(0, 2)  # [G, r, G, r]
        return cls(order.unflatten(0, (-1, run)).flip(0).flatten(), runs.permute(2, 3, 0, 1).flatten(2))

    @property
    def runs(self) -> int:
        return len(self.factor)

    @property
    def within(self) -> Tensor:
        """U inside every run, [G, r, r]."""
        return self.factor.unflatten(2, (self.runs, -1)).diagonal(dim1=0, dim2=2).permute(2, 1, 0)

    @property
    def importance(self) -> Tensor:
        """What an error in a column costs when all that is rounded later has made up for it: [G, r]."""
        return self.within.diagonal(dim1=1, dim2=2).square().reciprocal()


@dataclass(frozen=True)
class Wave:
    """What is rounded at once, A pairs of a row and a run: rows[a] of every block at runs[a].

    Row i takes run h when its earlier runs and the earlier rows of its block at h are done: all pairs on a diagonal.
    """

    rows: slice
    runs: slice
    diagonal: int

    def of(self, x: Tensor) -> Tensor:
        """x [P, b, G, ...] -> view [P, ..., A] of the wave's pairs."""
        return x.diagonal(self.diagonal, 1, 2)


def waves(rows: int, runs: int) -> list[Wave]:
    """All of them in turn, from the first row's last run to the last row's first."""
    found = []
    for t in range(rows + runs - 1):
        first, end = max(0, t - runs + 1), min(rows, t + 1)
        diagonal = runs - 1 - t
        found.append(Wave(slice(first, end), slice(diagonal + first, diagonal + end), diagonal))
    return found


# target [P, A, r] of a wave -> (target [P, A] of one of its columns, corrected -> code and value, both [P, A])
Levels = Callable[[Tensor, Wave], Callable[[Tensor], tuple[Tensor, Tensor]]]


def feed_back(weight: Tensor, columns: Columns, rows: Rows, levels: Levels) -> Tensor:
    """Rounds weight [N, K] -> codes [N, K] fp32, which `levels` chooses for targets that make up for earlier errors."""
    run = columns.factor.shape[1]
    wanted = rows.arranged(weight[:, columns.order].float()).unflatten(2, (-1, run))  # [P, b, G, r]
    found, errors = torch.empty_like(wanted), torch.zeros_like(wanted)
    within = columns.within
    for wave in waves(*wanted.shape[1:3]):
        row_target = wave.of(wanted).transpose(1, 2)  # [P, A, r]
        done = (wave.runs.start + 1) * run
        factor = columns.factor[wave.runs, :, done:].transpose(1, 2)  # [A, K', r]
        spread = errors[:, wave.rows].flatten(2)[..., done:].transpose(0, 1) @ factor
        target = row_target - spread.transpose(0, 1)
        level = levels(target, wave)
        U = within[wave.runs]  # [A, r, r]
        codes, values, costs = [], [], []
        for k, column in enumerate(target.unbind(2)):
            code, value = level(column)
            cost = (column - value) / U[:, k, k]
            target[..., k + 1 :].addcmul_(cost[..., None], U[:, k, k + 1 :], value=-1)
            codes.append(code)
            values.append(value)
            costs.append(cost)
        wave.of(found).copy_(torch.stack(codes, dim=1))
        wave.of(errors).copy_(torch.stack(costs, dim=1))
        missed = row_target - torch.stack(values, dim=2)
        later = slice(wave.rows.start + 1, None)
        wanted[:, later, wave.runs].addcmul_(rows.coupling[:, later, wave.rows, None], missed[:, None], value=-1)
    codes = torch.empty_like(weight, dtype=torch.float32)
    codes[:, columns.order] = rows.restored(found.flatten(2))
    return codes


def largest_divisor(count: int, limit: int) -> int:
    """Of `count`, up to `limit`."""
    return max(size for size in range(1, min(count, limit) + 1) if count % size == 0)


def ordered_factor(H: Tensor, together: int, damp: float) -> tuple[Tensor, Tensor]:
    """Damped H [b, b] -> order of its columns, most important first, and U with UᵀU = H⁻¹ in it."""
    # a column that never varies has the damping alone, and with it little importance
    H = H + torch.diag((-H.diagonal()).clamp(min=0) + damp * H.diagonal().mean().clamp(min=1e-12))
    parts = torch.argsort(H.diagonal().unflatten(0, (-1, together)).mean(dim=1), descending=True)
    order = (parts[:, None] * together + torch.arange(together, device=H.device)).flatten()
    back = order.flip(0)
    upper = _factor(H[back][:, back], damp).flip(0, 1)  # H = upper upperᵀ in order, so that its inverse is U
    one = torch.eye(len(H), dtype=H.dtype, device=H.device)
    return order, torch.linalg.solve_triangular(upper, one, upper=True).float()


def _factor(H: Tensor, damp: float) -> Tensor:
    """Cholesky factor of H; ever more damping where fp32 cancellation (a large mean taken off) left it indefinite."""
    for power in range(12):
        factor, failed = torch.linalg.cholesky_ex(H)
        if not int(failed):
            return factor
        H = H + torch.diag(10**power * damp * H.diagonal().abs().mean().expand(len(H)))
    return torch.linalg.cholesky(H)
