"""Collects the statistics of many layers while the model is sampled, keyed by the value of sigma."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .observers import LayerObserver, LayerStatistics, covariance_block
from .timesteps import log_snr

MAX_BINS = 64


class Collector:
    """Observers of all layers over one common list of sigma bins.

    covariance: widest covariance block to keep (see `covariance_block`), or None for none.
    """

    def __init__(self, features: Mapping[str, int], *, flow: bool, covariance: int | None, max_bins: int = MAX_BINS):
        self.flow, self.max_bins = flow, max_bins
        self.sigmas: list[float] = []
        self.sigma: float | None = None
        self.observers = {
            name: LayerObserver(name, K, None if covariance is None else covariance_block(K, covariance))
            for name, K in features.items()
        }

    def at(self, sigma: float) -> None:
        """Announces the noise level of the coming model call; opens a bin for a new one."""
        self.sigma = sigma
        if self._row(sigma) is None:
            self.sigmas.append(sigma)
            if len(self.sigmas) > self.max_bins:
                self._merge_closest()

    def _row(self, sigma: float) -> int | None:
        """Bins are equal to five digits: the same schedule gives the same bin on every device."""
        return next((i for i, s in enumerate(self.sigmas) if abs(s - sigma) <= 1e-5 * max(abs(s), 1e-6)), None)

    def _nearest(self, sigma: float) -> int:
        position = log_snr(sigma, self.flow)
        return min(range(len(self.sigmas)), key=lambda i: abs(log_snr(self.sigmas[i], self.flow) - position))

    def _merge_closest(self) -> None:
        """Joins the two bins that are closest in log-SNR; statistics add up, so nothing is lost."""
        order = sorted(range(len(self.sigmas)), key=lambda i: -self.sigmas[i])
        positions = [log_snr(self.sigmas[i], self.flow) for i in order]
        at = min(range(len(order) - 1), key=lambda i: positions[i + 1] - positions[i])
        keep, drop = sorted((order[at], order[at + 1]))
        for observer in self.observers.values():
            if len(observer.count) > keep:
                observer.reserve(len(self.sigmas), observer.count.device)
                observer.merge_rows(keep, drop)
        self.sigmas.pop(drop)

    def record(self, name: str, x: Tensor) -> None:
        """x [..., K], the input of layer `name` at the announced sigma."""
        if self.sigma is None:
            raise RuntimeError("Collector.at(sigma) must be called before the model")
        row = self._row(self.sigma)
        self.observers[name].update(x, self._nearest(self.sigma) if row is None else row, self.sigma)

    @contextmanager
    def attached(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hooks the layers' inputs; the hooks are gone afterwards, whatever happens."""

        def hook(name: str):
            def before(module: nn.Module, args: tuple) -> None:
                self.record(name, args[0])

            return before

        handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def order(self) -> list[int]:
        """Rows from the noisiest sigma to the cleanest."""
        return sorted(range(len(self.sigmas)), key=lambda i: -self.sigmas[i])

    def results(self) -> tuple[tuple[float, ...], dict[str, LayerStatistics], dict[str, str]]:
        """-> sigmas (strictly decreasing), statistics of the layers that ran, reasons for those that did not."""
        order, done, silent = self.order(), {}, {}
        for name, observer in self.observers.items():
            if len(observer.count) == 0 or float(observer.count.sum()) == 0:
                silent[name] = "never ran during calibration"
                continue
            observer.reserve(len(self.sigmas), torch.device("cpu"))
            done[name] = observer.statistics(order)
        return tuple(self.sigmas[row] for row in order), done, silent
