"""int4_linear: W4A8 product, codes on a per-channel int8 grid."""

from .reference import int4_linear

__all__ = ["int4_linear"]
