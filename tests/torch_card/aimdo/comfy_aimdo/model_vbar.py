"""Weights on the card. An allocation is one page: there while DIT_QUANT_VBAR_MB allow it; every DIT_QUANT_VBAR_LOSE'th
request first loses all that nobody is using."""

import ctypes
import os
import threading

import torch

ROOM = int(float(os.environ.get("DIT_QUANT_VBAR_MB", "1e6")) * 2**20)
LOSE = int(os.environ.get("DIT_QUANT_VBAR_LOSE", "0"))
PAGE = 32 * 2**20
_lock = threading.RLock()
_requests = 0


class ModelVBAR:
    def __init__(self, size, device):
        self.max_size, self.device, self.offset = size, device, 0
        self.pages: dict[int, torch.Tensor] = {}
        self.generations: dict[int, int] = {}
        self.in_use: set[int] = set()

    def prioritize(self, *_):
        pass

    def deprioritize(self):
        pass

    def alloc(self, size):
        begin = (self.offset + 511) & ~511
        self.offset = begin + size
        return self, begin, size

    def fault(self, begin, size):
        """A signature by which the caller sees whether its weight is still there, or None: no room."""
        global _requests
        with _lock:
            _requests += 1
            if LOSE and _requests % LOSE == 0:
                self.free_memory(float("inf"))
            if begin not in self.pages:
                if self.loaded_size() + size > ROOM:
                    return None
                with torch.inference_mode(False):
                    self.pages[begin] = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda:0")
                self.generations[begin] = self.generations.get(begin, 0) + 1
            self.in_use.add(begin)
            count = size // PAGE + 2
            return (ctypes.c_uint32 * count)(*[self.generations[begin]] * count)

    def unpin(self, begin, size):
        self.in_use.discard(begin)

    def loaded_size(self):
        return sum(page.numel() for page in self.pages.values())

    def free_memory(self, size):
        freed = 0
        with _lock, torch.inference_mode():
            for begin in [begin for begin in self.pages if begin not in self.in_use]:
                if freed >= size:
                    break
                # who still reads it reads NaN
                freed += self.pages.pop(begin).fill_(0xFF).numel()
        return freed

    def set_watermark_limit(self, size):
        pass

    def set_watermark(self, size):
        pass


def vbar_fault(allocation):
    owner, begin, size = allocation
    return owner.fault(begin, size)


def vbar_unpin(allocation):
    if allocation is not None:
        owner, begin, size = allocation
        owner.unpin(begin, size)


def vbar_signature_compare(a, b):
    return a is not None and b is not None and memoryview(a) == memoryview(b)


def vbars_reset_watermark_limits():
    pass


def vbars_analyze(device=None):
    return 0
