"""Which Triton there is."""

import triton

VERSION = triton.__version__


def release() -> tuple[int, ...]:
    """(3, 4) of 3.4.1."""
    return tuple(int(part) for part in VERSION.split(".")[:2])
