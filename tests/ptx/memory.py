"""Memory of a card and of a multiprocessor that knows who may touch it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# of no register and no code
POISON = 0xB5
# where a program's shared memory begins: no address of it is 0
SHARED_BASE = 1024
NOBODY, EVERYBODY = -1, -2


class Fault(Exception):
    """What a card would have done silently."""


@dataclass(frozen=True)
class Buffer:
    """data: the bytes of an operand, at address `start`."""

    start: int
    data: np.ndarray
    name: str


class Global:
    """A launch's operands, all of the memory that it may read or write."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.buffers = list(buffers)

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """addresses [k] -> bytes [k, size]."""
        found = np.empty((len(addresses), size), np.uint8)
        for buffer, chosen, offsets in self._places(addresses, size, "reads"):
            found[chosen] = buffer.data[offsets]
        return found

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Bytes [k, size] to addresses [k]. Of several values for one byte any may stay: they have to be the same."""
        for buffer, chosen, offsets in self._places(addresses, values.shape[1], "writes"):
            buffer.data[offsets] = values[chosen]
            if not np.array_equal(buffer.data[offsets], values[chosen]):
                raise Fault(f"threads write different values to the same bytes of {buffer.name}")

    def _places(self, addresses: np.ndarray, size: int, verb: str):
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise Fault(f"{verb} {size} bytes at an address that is not divisible by {size}")
        left = np.ones(len(addresses), bool)
        for buffer in self.buffers:
            inside = left & (addresses >= buffer.start) & (addresses + size <= buffer.start + len(buffer.data))
            if inside.any():
                left &= ~inside
                yield buffer, inside, (addresses[inside] - buffer.start)[:, None] + np.arange(size)
            if not left.any():
                return
        wrong = int(addresses[left][0])
        near = min(self.buffers, key=lambda buffer: abs(wrong - buffer.start), default=None)
        where = f": {wrong - near.start} bytes from the start of {near.name} of {len(near.data)} bytes" if near else ""
        raise Fault(f"{verb} {size} bytes outside of every operand{where}")


class Shared:
    """A program's shared memory. Per byte: the warp that wrote it last and the barriers passed until then, the warps
    that have read it since the last barrier, and whether a copy is under way to it."""

    def __init__(self, size: int) -> None:
        self.data = np.full(size, POISON, np.uint8)
        self.writer = np.full(size, NOBODY, np.int16)
        self.written = np.full(size, -1, np.int64)
        self.readers = np.zeros(size, np.uint64)
        self.copying = np.zeros(size, np.int16)
        # stored, not yet visible to the copy engine and the tensor cores. Copies (cp.async) do not count: the manual
        # wants a fence behind them too, but NVIDIA's kernels do without, as Triton did until 3.6
        self.unfenced = np.zeros(size, bool)
        self.barriers = 0

    def barrier(self) -> None:
        self.barriers += 1
        self.readers[:] = 0

    def fence(self) -> None:
        self.unfenced[:] = False

    def offsets(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """addresses [k] -> where their bytes are [k, size]."""
        start = addresses.astype(np.int64) - SHARED_BASE
        if (start % min(size, 16)).any():
            raise Fault(f"{size} bytes of shared memory at an address that is not divisible by {min(size, 16)}")
        if (start < 0).any() or (start + size > len(self.data)).any():
            raise Fault(f"shared memory of {len(self.data)} bytes has no byte {int(start.max()) + size - 1}")
        return start[:, None] + np.arange(size)

    def load(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        """addresses [k], of threads of warps [k] -> bytes [k, size]."""
        places = self.offsets(addresses, size)
        self._readable(places)
        foreign = (self.written[places] == self.barriers) & (self.writer[places] != warps[:, None])
        if (foreign & (self.writer[places] != EVERYBODY)).any():
            raise Fault("reads shared memory that another warp wrote since the last barrier")
        marks = np.broadcast_to((np.uint64(1) << warps.astype(np.uint64))[:, None], places.shape)
        np.bitwise_or.at(self.readers, places, marks)
        return self.data[places]

    def peek(self, places: np.ndarray) -> np.ndarray:
        """What the copy engine or a tensor core reads. By the manual that wants a fence behind other writes."""
        self._readable(places)
        if self.unfenced[places].any():
            raise Fault("the asynchronous proxy reads shared memory that was written without a fence since")
        return self.data[places]

    def _readable(self, places: np.ndarray) -> None:
        if self.copying[places].any():
            raise Fault("reads shared memory while a copy to it is under way")
        if (self.written[places] < 0).any():
            raise Fault("reads shared memory that nobody wrote")

    def store(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray) -> None:
        """Bytes [k, size] to addresses [k]."""
        places = self.offsets(addresses, values.shape[1])
        self.claim(places, warps[:, None], values)
        self.data[places] = values
        if not np.array_equal(self.data[places], values):
            raise Fault("threads write different values to the same bytes of shared memory")
        self.writer[places] = warps[:, None]
        self.written[places] = self.barriers
        self.unfenced[places] = True

    def claim(self, places: np.ndarray, warps: np.ndarray, values: np.ndarray | None = None) -> None:
        """Nobody else may have touched these bytes since the last barrier, except by writing the same."""
        if self.copying[places].any():
            raise Fault("writes shared memory while a copy to it is under way")
        others = self.readers[places] & ~(np.uint64(1) << np.broadcast_to(warps, places.shape).astype(np.uint64))
        if others.any():
            raise Fault("writes shared memory that another warp read since the last barrier")
        foreign = (self.written[places] == self.barriers) & (self.writer[places] != warps)
        foreign &= self.writer[places] != EVERYBODY
        if values is not None:
            foreign &= self.data[places] != values
        if foreign.any():
            raise Fault("writes shared memory that another warp wrote since the last barrier")

    def begin_copy(self, places: np.ndarray, warps: np.ndarray) -> None:
        self.claim(places, warps)
        self.data[places] = POISON
        np.add.at(self.copying, places, 1)

    def end_copy(self, places: np.ndarray, values: np.ndarray, warps: np.ndarray | int) -> None:
        np.add.at(self.copying, places, -1)
        self.data[places] = values
        self.writer[places] = warps
        self.written[places] = self.barriers
        self.unfenced[places] = False


def unchanged(read: Callable[[], np.ndarray], before: np.ndarray, what: str) -> None:
    if not np.array_equal(read(), before):
        raise Fault(f"shared memory changed while {what} was still reading it")
