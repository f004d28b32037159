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
    size, start, _ = getattr(_kept, "memory", (0, 0, None))
    if size < nbytes:
        buffer = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device="cpu")
        start = -(-buffer.data_ptr() // ALIGNMENT) * ALIGNMENT
        # its address beside it: to ask torch again takes longer than everything else here
        _kept.memory = nbytes, start, buffer
    return start
