"""Streaming activation statistics of one layer over sigma."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .schemes import hadamard_for


class NonFiniteActivation(ValueError):
    """A layer's input held NaN or infinity during calibration."""


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration keeps of a layer's input, noisiest sigma first.

    count [T] float64 tokens; mean, minimum, maximum [T, K] fp32; second_moment [B, b, b] fp32 holds
    the mean of x xᵀ over all tokens, in B diagonal blocks of width b = K / B, or is None.
    """

    count: Tensor
    mean: Tensor
    minimum: Tensor
    maximum: Tensor
    second_moment: Tensor | None = None

    @property
    def features(self) -> int:
        return self.mean.shape[1]


def covariance_block(features: int, limit: int) -> int:
    """Width of the diagonal blocks: all of K up to `limit`, else its largest divisor that holds whole rotations."""
    unit = hadamard_for(features, 256)
    fitting = [size for size in range(unit, min(features, limit) + 1, unit) if features % size == 0]
    return max(fitting, default=unit)


class LayerObserver:
    """Accumulates LayerStatistics, one row per sigma bin. The only mutable state of calibration."""

    def __init__(self, name: str, features: int, block: int | None):
        self.name, self.features, self.block = name, features, block
        self.count = torch.zeros(0, dtype=torch.float64)
        self.total = torch.zeros(0, features, dtype=torch.float64)
        self.minimum = torch.zeros(0, features)
        self.maximum = torch.zeros(0, features)
        self.moment: Tensor | None = None

    def reserve(self, bins: int, device: torch.device) -> None:
        """Grows to `bins` rows on `device`; new rows are empty."""
        missing = bins - len(self.count)
        for name, fill in (("count", 0.0), ("total", 0.0), ("minimum", torch.inf), ("maximum", -torch.inf)):
            rows = getattr(self, name).to(device)
            if missing > 0:
                rows = torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), fill)])
            setattr(self, name, rows)

    def update(self, x: Tensor, row: int, sigma: float) -> None:
        """x [..., K] of a call at bin `row`. Raises NonFiniteActivation naming the layer and sigma."""
        x = x.detach().reshape(-1, self.features).float()
        self.reserve(max(row + 1, len(self.count)), x.device)
        low, high = x.amin(dim=0), x.amax(dim=0)
        if not bool(torch.isfinite(low + high).all()):
            raise NonFiniteActivation(
                f"{self.name}: the input holds NaN or infinity at sigma {sigma:.4g}; "
                "the full-precision model is already broken there, check its dtype or the LoRAs on it"
            )
        self.count[row] += x.shape[0]
        self.total[row] += x.sum(dim=0, dtype=torch.float64)
        self.minimum[row] = torch.minimum(self.minimum[row], low)
        self.maximum[row] = torch.maximum(self.maximum[row], high)
        if self.block is not None:
            blocks = x.unflatten(1, (-1, self.block)).permute(1, 0, 2)  # [B, M, b]
            product = blocks.transpose(1, 2) @ blocks
            # kept off the GPU: artists need its memory for sampling
            self.moment = product.cpu() if self.moment is None else self.moment.add_(product.cpu())

    def merge_rows(self, keep: int, drop: int) -> None:
        """Joins two sigma bins into row `keep`; later rows move up."""
        self.count[keep] += self.count[drop]
        self.total[keep] += self.total[drop]
        self.minimum[keep] = torch.minimum(self.minimum[keep], self.minimum[drop])
        self.maximum[keep] = torch.maximum(self.maximum[keep], self.maximum[drop])
        rest = [row for row in range(len(self.count)) if row != drop]
        for name in ("count", "total", "minimum", "maximum"):
            setattr(self, name, getattr(self, name)[rest])

    def tensors(self) -> dict[str, Tensor]:
        """Raw sums, for a resumable file."""
        state = {"count": self.count, "total": self.total, "minimum": self.minimum, "maximum": self.maximum}
        if self.moment is not None:
            state["moment"] = self.moment
        return {name: value.cpu().contiguous() for name, value in state.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`; shapes were checked by the reader."""
        self.count, self.total = tensors["count"], tensors["total"]
        self.minimum, self.maximum = tensors["minimum"], tensors["maximum"]
        self.moment = tensors.get("moment")

    def statistics(self, order: list[int]) -> LayerStatistics:
        """Rows in `order` (noisiest first). Has no effect on the observer. Raises ValueError if never called."""
        count = self.count.cpu()
        if len(count) == 0 or float(count.sum()) == 0:
            raise ValueError(f"{self.name}: never ran during calibration")
        total, low, high = self.total.cpu(), self.minimum.cpu(), self.maximum.cpu()
        # a layer skipped at some sigma takes that row from the nearest sigma at which it ran
        rank = {row: i for i, row in enumerate(order)}
        seen = [row for row in order if count[row] > 0]
        source = [min(seen, key=lambda s: abs(rank[s] - rank[row])) for row in order]
        moment = None if self.moment is None else self.moment.cpu() / float(count.sum())
        return LayerStatistics(
            count=count[order],
            mean=(total[source] / count[source][:, None]).float(),
            minimum=low[source],
            maximum=high[source],
            second_moment=moment,
        )
