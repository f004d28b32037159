"""swiglu_quantize: silu(gate) * up and quantize in one read of both."""

from .reference import swiglu_quantize

__all__ = ["swiglu_quantize"]
