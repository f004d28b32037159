"""Memory on the card for what is on its way."""

import torch

CHUNK = 16 * 2**20


class VRAMBuffer:
    def __init__(self, max_size, device):
        self.max_size, self.device = max_size, device
        # an address that was given stays good: whatever was outgrown is kept
        self.buffers: list[torch.Tensor] = []

    def size(self):
        return self.buffers[-1].numel() if self.buffers else 0

    def get(self, size, offset=0):
        needed = int(size) + int(offset)
        if needed > self.size():
            with torch.inference_mode(False):
                larger = torch.full((-(-needed // CHUNK) * CHUNK,), 0xFF, dtype=torch.uint8, device="cuda:0")
                if self.buffers:
                    larger[: self.size()] = self.buffers[-1]
            self.buffers.append(larger)
        return self, int(offset), int(size)
