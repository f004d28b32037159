"""int8_linear: W8A8 product with row scale x column scale + bias + c(sigma)."""

from .reference import int8_linear, int8_matmul

__all__ = ["int8_linear", "int8_matmul"]
