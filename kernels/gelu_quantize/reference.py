"""GELU, then the activation quantizer: the input of the second linear of a feed-forward. The definition of the op."""

import torch.nn.functional as F
from torch import Tensor

from ..quantize_activation.reference import quantize_activation


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
    """x [M, K] float -> codes, scale, zero of gelu(x), as `quantize_activation` has them.

    approximate "tanh" or "none" (erf). gelu(x) stays in fp32: a block that runs op by op would round it to the dtype
    of x in between.
    """
    return quantize_activation(
        F.gelu(x.float(), approximate=approximate),
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )
