"""gelu_quantize: GELU and quantize in one read of x."""

from .reference import gelu_quantize

__all__ = ["gelu_quantize"]
