"""Which Triton there is."""

import triton

VERSION = triton.__version__
RELEASE = tuple(int(part) for part in VERSION.split(".")[:2])
