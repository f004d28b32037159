"""Collects the statistics of many layers while the model is sampled, keyed by the value of sigma."""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .observers import Extent, LayerObserver, LayerStatistics, Observation, covariance_block, extent_of, tokens
from .row_sample import ROWS
from .timesteps import log_snr

MAX_BINS = 64


@dataclass(frozen=True)
class Shared:
    """An input that several layers of one observer may read: observed once, counted in when all have been asked."""

    observer: LayerObserver
    row: int
    source: weakref.ref
    version: int | None
    seen: Observation
    readers: list[str]

    def is_read_again(self, x: Tensor, extent: Extent) -> bool:
        """Whether x is the same tensor, unchanged. Inference tensors have no version: a change shows in the extent."""
        return self.source() is x and version_of(x) == self.version and extent.same_as(self.seen.extent)


def version_of(x: Tensor) -> int | None:
    """torch's count of in-place changes, where it keeps one."""
    return None if x.is_inference() else x._version


# nothing here is made in inference mode, for the statistics outlive it and such tensors cannot be changed outside
class Collector:
    """Observers of all layers over one common list of sigma bins.

    Layers share an observer for as long as they have read the same inputs (q, k and v, mostly); until a layer
    runs it shares the empty one. covariance: widest covariance block to keep (see `covariance_block`), or None
    for none; rows: size of the row sample per bin; sigmas: bins of an earlier pass, which then are fixed.
    """

    def __init__(
        self,
        features: Mapping[str, int],
        *,
        flow: bool,
        covariance: int | None,
        max_bins: int = MAX_BINS,
        rows: int = ROWS,
        sigmas: Sequence[float] = (),
    ):
        self.flow, self.max_bins = flow, len(sigmas) or max_bins
        self.sigmas: list[float] = list(sigmas)
        self.fixed = len(sigmas) > 0
        self.sigma: float | None = None
        blocks = {K: None if covariance is None else covariance_block(K, covariance) for K in features.values()}
        empty: dict[int, LayerObserver] = {}
        for name, K in features.items():
            empty.setdefault(K, LayerObserver(name, K, blocks[K], rows))
        self.observers = {name: empty[K] for name, K in features.items()}
        self._users = Counter(self.observers.values())
        self._shared: Shared | None = None
        self._paused = False

    @torch.inference_mode(False)
    def at(self, sigma: float | None) -> None:
        """Announces the noise level of the coming model call; opens a bin for a new one. None: layers that run now, for
        instance once per prompt, belong to no call and are not recorded."""
        self.settle()
        self.sigma = sigma
        if sigma is None or self.fixed or self._row(sigma) is not None:
            return
        if len(self.sigmas) < self.max_bins:
            self.sigmas.append(sigma)
        else:
            self._make_room(sigma)

    def _row(self, sigma: float) -> int | None:
        """Bins are equal to five digits: the same schedule gives the same bin on every device."""
        return next((i for i, s in enumerate(self.sigmas) if abs(s - sigma) <= 1e-5 * max(abs(s), 1e-6)), None)

    def _nearest(self, sigma: float) -> int:
        position = log_snr(sigma, self.flow)
        return min(range(len(self.sigmas)), key=lambda i: abs(log_snr(self.sigmas[i], self.flow) - position))

    def _make_room(self, sigma: float) -> None:
        """Joins the two bins that are closest in log-SNR; statistics add up, so nothing is lost.

        Where sigma itself is one of the two it gets no bin: what is recorded there goes to the other one.
        """
        sigmas = [*self.sigmas, sigma]
        order = sorted(range(len(sigmas)), key=lambda i: -sigmas[i])
        positions = [log_snr(sigmas[i], self.flow) for i in order]
        at = min(range(len(order) - 1), key=lambda i: positions[i + 1] - positions[i])
        keep, drop = sorted((order[at], order[at + 1]))
        if drop == len(self.sigmas):
            return
        for observer in self._users:
            if observer.ran:
                observer.merge_rows(keep, drop)
        self.sigmas[drop] = sigma

    @torch.inference_mode(False)
    def record(self, name: str, x: Tensor) -> None:
        """x [..., K], the input of layer `name` at the announced sigma. Raises NonFiniteActivation."""
        if self.sigma is None:
            raise RuntimeError("Collector.at(sigma) must be called before the model")
        if x.numel() == 0:
            return
        row = self._row(self.sigma)
        row = self._nearest(self.sigma) if row is None else row
        flat = tokens(x, self.observers[name].features)
        extent = extent_of(flat, name, self.sigma)
        shared = self._shared
        if (
            shared is not None
            and self.observers[name] is shared.observer
            and name not in shared.readers  # a layer that runs twice counts twice
            and shared.is_read_again(x, extent)
        ):
            shared.readers.append(name)
            return
        if self._users[self.observers[name]] > 1:
            self.settle()
        observer = self.observers[name]
        seen = observer.observe(flat, row, self.sigma, extent)
        if self._users[observer] == 1:
            self._add(observer, seen, row)
        else:
            self._shared = Shared(observer, row, weakref.ref(x), version_of(x), seen, [name])

    @torch.inference_mode(False)
    def settle(self) -> None:
        """Counts the shared input in. Layers of its observer that did not read it keep the observer as it was."""
        shared, self._shared = self._shared, None
        if shared is None:
            return
        observer = shared.observer
        if len(shared.readers) < self._users[observer]:
            self._users[observer] -= len(shared.readers)
            observer = observer.copy(shared.readers[0])
            self._users[observer] = len(shared.readers)
            self.observers |= dict.fromkeys(shared.readers, observer)
        self._add(observer, shared.seen, shared.row)

    def _add(self, observer: LayerObserver, seen: Observation, row: int) -> None:
        observer.reserve(self.max_bins)
        observer.add(seen, row)

    def groups(self) -> dict[LayerObserver, list[str]]:
        """The layers of every observer, both in the model's order."""
        self.settle()
        found: dict[LayerObserver, list[str]] = {}
        for name, observer in self.observers.items():
            found.setdefault(observer, []).append(name)
        return found

    def adopt(self, sigmas: Sequence[float], observers: Mapping[str, LayerObserver]) -> None:
        """Takes over bins and observers, one for every layer, from a file."""
        self._shared = None
        self.sigmas, self.observers = list(sigmas), dict(observers)
        self._users = Counter(self.observers.values())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is recorded inside: a call is repeated for another purpose."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @contextmanager
    def attached(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hooks the layers' inputs; the hooks are gone afterwards, whatever happens."""

        def hook(name: str):
            def before(module: nn.Module, args: tuple) -> None:
                # sparse voxels come in a class of their own
                if not self._paused and self.sigma is not None and isinstance(args[0], Tensor):
                    self.record(name, args[0])

            return before

        handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def nbytes(self) -> int:
        """Memory of all statistics."""
        return sum(observer.nbytes for observer in self.groups())

    def order(self) -> list[int]:
        """Rows from the noisiest sigma to the cleanest."""
        return sorted(range(len(self.sigmas)), key=lambda i: -self.sigmas[i])

    @torch.inference_mode(False)
    def results(self) -> tuple[tuple[float, ...], dict[str, LayerStatistics], dict[str, str]]:
        """-> sigmas (strictly decreasing), statistics of the layers that ran, reasons for those that did not.

        Layers that read the same inputs get the same object. Hands over and forgets one observer at a time:
        sums and statistics of a large model would not fit beside each other.
        """
        order, done, silent = self.order(), {}, {}
        groups, names = self.groups(), list(self.observers)
        self.observers, self._users = {}, Counter()
        while groups:
            observer = next(iter(groups))
            readers = groups.pop(observer)
            if observer.ran:
                observer.reserve(len(self.sigmas))
                done |= dict.fromkeys(readers, observer.statistics(order))
            else:
                silent |= dict.fromkeys(readers, "never ran during calibration")
            del observer
        return tuple(self.sigmas[row] for row in order), {n: done[n] for n in names if n in done}, silent
