"""Integer operators. Each op is a folder: reference.py is its definition, the others are its backends."""

# the folders first: one that is imported later would take the place of its function
from . import adaln_quantize as _adaln_folder  # noqa: F401
from . import gelu_quantize as _gelu_folder  # noqa: F401
from . import int4_linear as _int4_folder  # noqa: F401
from . import quantize_activation as _quantizer_folder  # noqa: F401
from . import quantize_along as _along_folder  # noqa: F401
from . import swiglu_quantize as _swiglu_folder  # noqa: F401
from .fused_ops import adaln_quantize, gelu_quantize, swiglu_quantize
from .int8_linear import int8_matmul
from .layer import whole_layer
from .ops import int4_linear, int8_linear, quantize_activation, quantize_along

__all__ = [
    "adaln_quantize",
    "gelu_quantize",
    "int4_linear",
    "int8_linear",
    "int8_matmul",
    "quantize_activation",
    "quantize_along",
    "swiglu_quantize",
    "whole_layer",
]
