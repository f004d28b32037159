"""A layer's quantizer and product in one call, where both would run in C: the codes never leave a cache."""

import torch
from torch import Tensor

from .backends import AUTO
from .dispatch import backend_of, cannot_launch
from .native.layer import layer
from .ops import QUANTIZE_ACTIVATION, along_key, product_key
from .quantizer_op import has_zero


def whole_layer(
    x: Tensor,
    w: Tensor,
    *,
    index: Tensor,
    fraction: Tensor,
    column_scale: Tensor,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    directions: Tensor | None = None,
    hadamard: int = 1,
    symmetric: bool = True,
    static_scale: Tensor | None = None,
    static_zero: Tensor | None = None,
    levels: Tensor | None = None,
    column_sum: Tensor | None = None,
    bias: Tensor | None = None,
    correction: Tensor | None = None,
    responses: Tensor | None = None,
    backend: str = AUTO,
) -> Tensor | None:
    """x [..., K] float, w [N, K] int8 or packed [N, K / 2] -> y [..., N] in the type of x, the bits of the two ops.

    None where these must be called one after the other: another backend runs one of them, or torch.compile looks on.
    Their keywords are those of `quantize_activation`, `quantize_along`, `int8_linear` and `int4_linear`.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    K = x.shape[-1]
    shape = x.numel() // K, K
    if directions is None:
        first = QUANTIZE_ACTIVATION.key(x, shape, hadamard, symmetric, static_scale, static_zero, backend)
    else:
        first = along_key(x, shape, hadamard, symmetric, backend)
    second = product_key(w, shape, levels, x.dtype, not has_zero(symmetric, static_scale, static_zero), backend)
    if backend_of(first) != "native" or backend_of(second) != "native":
        return None
    try:
        return layer(
            x,
            w,
            index=index,
            fraction=fraction,
            shift=shift,
            smooth=smooth,
            directions=directions,
            hadamard=hadamard,
            symmetric=symmetric,
            static_scale=static_scale,
            static_zero=static_zero,
            column_scale=column_scale,
            levels=levels,
            column_sum=column_sum,
            bias=bias,
            correction=correction,
            responses=responses,
        )
    except Exception as error:
        if not cannot_launch(error):
            raise
        # apart, so that the dispatcher can say which of the two it was
        return None
