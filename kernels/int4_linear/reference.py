"""4-bit weights decoded to int8, then the int8 product. The definition of the op."""

from torch import Tensor

from ..int8_linear.reference import int8_linear
from ..numerics import decode_int4


def int4_linear(a: Tensor, packed: Tensor, *, levels: Tensor, table: Tensor | None = None, **epilogue) -> Tensor:
    """a [M, K] int8, packed [N, K / 2] uint8, levels [N, G] uint8 (`pack_levels`) -> [M, N].

    table [16] int8: its entries take the place of code4 - zero, and the zeros of `levels` are not read.
    The remaining keywords are those of int8_linear; accumulation stays int32 over all of K.
    """
    return int8_linear(a, decode_int4(packed, levels, table), **epilogue)
