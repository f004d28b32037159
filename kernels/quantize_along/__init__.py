"""quantize_along: each token's coordinates along a layer's directions, and the rest of it quantized."""

from .reference import quantize_along

__all__ = ["quantize_along"]
