"""Which Triton there is."""

import triton

VERSION = triton.__version__
