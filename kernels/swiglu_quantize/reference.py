"""silu(gate) * up, then the activation quantizer: the input of the last linear of a gated feed-forward.

The definition of the op.
"""

import torch.nn.functional as F
from torch import Tensor

from ..quantize_activation.reference import quantize_activation


def halves(x: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """x [M, 2K] -> gate, up [M, K], views of x."""
    if x.shape[-1] % 2:
        raise ValueError(f"{x.shape[-1]} columns cannot hold a gate and an up half; pass the two as tensors")
    first, second = x.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


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
    """gate, up [M, K] float -> codes, scale, zero of silu(gate) * up, as `quantize_activation` has them.

    Without `up`, `gate` is [M, 2K] and holds both: the gate's columns first, or last if not `gate_first`. The product
    stays in fp32.
    """
    if up is None:
        gate, up = halves(gate, gate_first)
    return quantize_activation(
        F.silu(gate.float()) * up.float(),
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )
