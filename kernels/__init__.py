"""Integer operators. Each op is a folder: reference.py is its definition, the others are its backends."""

# the folders first: one that is imported later would take the place of its function
from . import int4_linear as _int4_folder  # noqa: F401
from . import quantize_activation as _quantizer_folder  # noqa: F401
from .int8_linear import int8_matmul
from .ops import int4_linear, int8_linear, quantize_activation

__all__ = ["int4_linear", "int8_linear", "int8_matmul", "quantize_activation"]
