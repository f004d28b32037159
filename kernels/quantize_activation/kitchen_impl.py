"""comfy-kitchen has quantizers, but none that gives the codes of the reference: always refused, with the reason."""

import torch

from ..kitchen import device_refusal
from .reference import quantize_activation

__all__ = ["quantize_activation", "refusal"]


def refusal(device: torch.device, *, K: int, symmetric: bool = True, static: bool = False) -> str | None:
    """Its int8 quantizers are symmetric, per token, without shift and scale; they round scale and quotient to the
    type of x before the integer (int8_linear.cu, `quant_div_to_float`), which costs 6 % of accuracy in bf16."""
    reason = device_refusal(device)
    if reason is not None:
        return reason
    if static:
        return "its quantizers have no fixed ranges"
    if not symmetric:
        return "its quantizers have no zero point"
    return "its quantizers round the scale and the quotient to the type of x, and take no shift"
