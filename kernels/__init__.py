"""Integer operators. Each op is a folder: reference.py is its definition."""

from .int4_linear import int4_linear
from .int8_linear import int8_linear, int8_matmul
from .quantize_activation import quantize_activation

__all__ = ["int4_linear", "int8_linear", "int8_matmul", "quantize_activation"]
