"""int8_linear: W8A8 product with row scale x column scale + bias + c(sigma)."""

from .matmul import int8_matmul
from .reference import int8_linear

__all__ = ["int8_linear", "int8_matmul"]
