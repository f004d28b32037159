"""A uniform sample of a stream's rows per bin, by priority sampling: the rows with the smallest random keys stay."""

import struct

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROWS = 64
EMPTY = torch.iinfo(torch.int64).max


def priority_keys(sigma: float, start: int, count: int) -> NDArray[np.int64]:
    """Keys of the rows start .. start + count - 1 seen at sigma (splitmix64, Steele et al. 2014).

    A function of sigma and position alone: however the rows are cut into calls, each keeps its key.
    """
    (bits,) = struct.unpack("<Q", struct.pack("<d", sigma))
    seed = _mixed(np.array([bits], dtype=np.uint64))
    steps = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    # two bits less than drawn, so that EMPTY is above every key
    return (_mixed(seed + steps * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(2)).astype(np.int64)


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class RowSample:
    """Up to `size` rows of every bin: keys [T, R] int64, ascending, EMPTY where no row is; values [T, R, K] fp16.

    A value beyond fp16 turns the values to fp32 and halves R, so the sample never outgrows its memory.
    """

    def __init__(self, features: int, size: int = ROWS):
        self.keys = torch.zeros(0, size, dtype=torch.int64)
        self.values = torch.zeros(0, size, features, dtype=torch.float16)

    @property
    def size(self) -> int:
        return self.keys.shape[1]

    def reserve(self, bins: int) -> None:
        """Grows to `bins` bins; new ones are empty."""
        missing = bins - len(self.keys)
        if missing > 0:
            self.keys = torch.cat([self.keys, self.keys.new_full((missing, self.size), EMPTY)])
            self.values = torch.cat([self.values, self.values.new_zeros(missing, *self.values.shape[1:])])

    def candidates(self, x: Tensor, row: int, start: int, sigma: float) -> tuple[Tensor, Tensor]:
        """The rows of x [M, K] that would enter bin `row`, which has seen `start` rows: keys [C], values [C, K].

        Only these leave the device of x. Has no effect.
        """
        keys = priority_keys(sigma, start, len(x)) if self.size else np.zeros(0, np.int64)
        chosen = np.flatnonzero(keys < (int(self.keys[row, -1]) if row < len(self.keys) and self.size else EMPTY))
        if len(chosen) > self.size:
            chosen = chosen[np.argpartition(keys[chosen], self.size - 1)[: self.size]]
        # most calls have none once a bin is full: then the device is left alone
        rows = x[torch.from_numpy(chosen).to(x.device)].cpu() if len(chosen) else self.values.new_zeros(0, x.shape[1])
        return torch.from_numpy(keys[chosen]), rows

    def add(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Rows compete for bin `row`: keys [C] int64, values [C, K] float."""
        if len(keys) == 0 or self.size == 0:
            return
        stored = values.to(self.values.dtype)
        if not bool(torch.isfinite(stored).all()):
            self._widen()
            stored = values.float()
        keys = torch.cat([self.keys[row], keys])
        order = keys.argsort()[: self.size]
        self.keys[row] = keys[order]
        self.values[row] = torch.cat([self.values[row], stored])[order]

    def _widen(self) -> None:
        """To fp32, with half the rows: those of the smallest keys are a uniform sample too."""
        half = self.size // 2
        self.keys, self.values = self.keys[:, :half].clone(), self.values[:, :half].float()

    def merge(self, keep: int, drop: int) -> None:
        """Bin `drop` joins `keep` and is empty afterwards."""
        self.add(keep, self.keys[drop], self.values[drop])
        self.keys[drop] = EMPTY

    def rows(self, order: list[int]) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """values [S, K] of the bins in `order`, and their position in it [S] int64; None when there are none."""
        counts = (self.keys[order] < EMPTY).sum(dim=1)
        if int(counts.sum()) == 0:
            return None, None
        values = torch.cat([self.values[row, :n] for row, n in zip(order, counts.tolist(), strict=True)])
        return values, torch.arange(len(order)).repeat_interleave(counts)

    def copy(self) -> "RowSample":
        """An independent sample in the same state."""
        twin = RowSample(self.values.shape[2], self.size)
        twin.keys, twin.values = self.keys.clone(), self.values.clone()
        return twin
