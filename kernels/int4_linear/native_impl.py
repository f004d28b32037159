"""4-bit product in C: codes are decoded, a cache's worth at a time, on their way into the int8 product."""

from torch import Tensor

from ..int8_linear.native_impl import int8_linear, refusal

__all__ = ["int4_linear", "refusal"]


def int4_linear(a: Tensor, packed: Tensor, *, levels: Tensor, table: Tensor | None = None, **epilogue) -> Tensor:
    """As the reference, and bit-equal to it."""
    return int8_linear(a, packed, levels=levels, codebook=table, **epilogue)
