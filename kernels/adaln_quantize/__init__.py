"""adaln_quantize: norm, modulate and quantize in one read of x."""

from .reference import adaln_quantize

__all__ = ["adaln_quantize"]
