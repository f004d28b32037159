"""gelu_quantize in torch ops."""

import torch.nn.functional as F
from torch import Tensor

from ..quantize_activation.torch_impl import refusal
from ..quantize_blocks import quantize_blocks

__all__ = ["gelu_quantize", "refusal"]


def gelu_quantize(
    x: Tensor,
    *,
    approximate: str = "tanh",
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
    return quantize_blocks(
        lambda rows: F.gelu(x[rows].float(), approximate=approximate),
        x.shape,
        x.device,
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )
