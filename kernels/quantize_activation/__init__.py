"""quantize_activation: one read of x, int8 codes and row scales out."""

from .reference import quantize_activation

__all__ = ["quantize_activation"]
