"""What the copy engine of Hopper and later (TMA) needs to know of an operand. Imports triton."""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import Tile


def stores(tile: Tile, y: Tensor) -> bool:
    """Whether the copy engine writes y [M, N], whose rows it wants 16 bytes apart."""
    return tile.store and y.shape[1] * y.element_size() % 16 == 0


def described(operand: Tensor, rows: int, columns: int, wanted: bool):
    """A contiguous [*, K] operand that is read or written in blocks of [rows, columns]; as it is where not `wanted`."""
    # not operand.stride(): that of a single row may be anything
    shape = list(operand.shape)
    return TensorDescriptor(operand, shape, [shape[1], 1], [rows, columns]) if wanted else operand
