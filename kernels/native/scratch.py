"""Working memory that stays: fresh memory is mapped page by page, for a twentieth of a product."""

import threading

import torch

# of a cache line
ALIGNMENT = 64
_kept = threading.local()


def scratch(nbytes: int) -> int:
    """Address of at least `nbytes` of this thread's own memory, aligned; good until its next call.

    Grows to what the largest layer needs: a few MiB and less than one more per thread, see CHUNK_BYTES in product.c.
    """
    buffer = getattr(_kept, "buffer", None)
    if buffer is None or len(buffer) < nbytes + ALIGNMENT:
        buffer = _kept.buffer = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device="cpu")
    return -(-buffer.data_ptr() // ALIGNMENT) * ALIGNMENT
