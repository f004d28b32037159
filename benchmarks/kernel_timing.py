"""Interleaved timing, and what the machine itself can do: copies and plain matrix products."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, isfinite, nan

import torch
from torch import Tensor

# written between calls on a GPU: no call finds its input in the cache
FLUSH_BYTES = 2**28
# and as often as this takes: the host gets ahead of the device, whatever a call's launches cost it
AHEAD = 1e-3
# rounds that even a slow contender takes part in
FEWEST = 3
GB, TERA = 1e9, 1e12


class Clock:
    """Seconds of one call: on CPU by the host's clock, the second call of two; on CUDA by events around it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
        self.flushes = 0
        if self.flush is not None:
            self.flush.zero_()
            self.flushes = ceil(AHEAD / min(self.time(self.flush.zero_) for _ in range(5)))

    def time(self, run: Callable[[], object]) -> float:
        if self.flush is None:
            run()  # a hypervisor takes idle freed memory back within a second: the first call after it pays for that
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        for _ in range(self.flushes):
            self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def race(
    clock: Clock, contenders: dict[str, Callable[[], object]], rounds: int, budget: float
) -> dict[str, list[float]]:
    """Seconds of every contender in every round; NaN where a contender sat out because it had used `budget` seconds.

    Each round in another order: what a contender leaves behind, such as freed memory that the system takes back, must
    not always fall to the same one.
    """
    for run in contenders.values():
        run()
        clock.time(run)
    found: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for turn in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            spent = sum(s for s in found[name] if isfinite(s))
            out = turn >= FEWEST and spent > budget
            found[name].append(nan if out else clock.time(contenders[name]))
    return found


def quartiles(values: list[float]) -> list[float]:
    """[median, lower quartile, upper quartile] of the finite values."""
    known = sorted(v for v in values if isfinite(v))
    if len(known) < 2:
        return [known[0]] * 3
    low, middle, high = statistics.quantiles(known, n=4, method="inclusive")
    return [middle, low, high]


def ratio(baseline: list[float], values: list[float]) -> list[float]:
    """Quartiles of baseline / values, round by round: both saw the same state of the machine."""
    return quartiles([b / v for b, v in zip(baseline, values, strict=True)])


@dataclass(frozen=True)
class Roofline:
    """Bytes per second of a copy (read + write), operations (2 per multiply-add) per second of matrix products."""

    copy: float
    int8: float
    bf16: float

    def seconds(self, nbytes: float, operations: float = 0.0, rate: float = 1.0) -> float:
        """The least time for this traffic and these operations at that rate."""
        return max(nbytes / self.copy, operations / rate)

    def published(self) -> dict[str, float]:
        return {
            "copy_gb_per_s": round(self.copy / GB, 1),
            "int8_tops": round(self.int8 / TERA, 3),
            "bf16_tflops": round(self.bf16 / TERA, 3),
        }


def measure_roofline(clock: Clock, quick: bool = False) -> Roofline:
    """Large copies; torch._int_mm and bf16 F.linear at sizes that suit them, the best of each."""
    device, on_gpu = clock.device, clock.device.type == "cuda"
    source = torch.zeros((2**30 if on_gpu else 2**28) // (16 if quick else 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rounds = 5 if quick else 15
    copy = min(race(clock, {"copy": lambda: target.copy_(source)}, rounds, 10)["copy"])
    sides = (4096, 8192) if on_gpu else (1024,) if quick else (1024, 2048)

    def best(multiply: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> float:
        rates = []
        for n in sides:
            # random bits: a card runs faster on ones
            a, b = (torch.randint(-127, 128, (n, n), device=device).to(dtype) for _ in range(2))
            seconds = min(race(clock, {"product": lambda a=a, b=b: multiply(a, b)}, rounds, 10)["product"])
            rates.append(2 * n**3 / seconds)
        return max(rates)

    int8 = best(lambda a, b: torch._int_mm(a, b.t()), torch.int8)
    return Roofline(2 * source.nbytes / copy, int8, best(torch.nn.functional.linear, torch.bfloat16))
