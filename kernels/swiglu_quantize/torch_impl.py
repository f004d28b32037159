"""swiglu_quantize in torch ops."""

import torch.nn.functional as F
from torch import Tensor

from ..quantize_activation.torch_impl import refusal
from ..quantize_blocks import quantize_blocks
from .reference import halves

__all__ = ["refusal", "swiglu_quantize"]


def swiglu_quantize(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    gate_first: bool = True,
    index: Tensor,
    fraction: Tensor,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    hadamard: int = 1,
    symmetric: bool = True,
    static_scale: Tensor | None = None,
    static_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the reference, but for what `quantize_activation` in torch ops does otherwise."""
    if up is None:
        gate, up = halves(gate, gate_first)
    return quantize_blocks(
        lambda rows: F.silu(gate[rows].float()).mul_(up[rows]),
        gate.shape,
        gate.device,
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )
