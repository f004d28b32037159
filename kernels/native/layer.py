"""A whole layer in C: a tile of tokens at a time is quantized and packed for the product, which then runs."""

import torch
from torch import Tensor

from ..directions import check
from ..int8_linear.native_impl import weight_of
from ..quantize_activation.native_impl import tokens_of
from ..quantizer_op import has_zero
from . import library
from .arguments import address
from .scratch import scratch


def layer(
    x: Tensor,
    w: Tensor,
    *,
    index: Tensor,
    fraction: Tensor,
    shift: Tensor | None,
    smooth: Tensor | None,
    directions: Tensor | None,
    hadamard: int,
    symmetric: bool,
    static_scale: Tensor | None,
    static_zero: Tensor | None,
    column_scale: Tensor,
    levels: Tensor | None,
    column_sum: Tensor | None,
    bias: Tensor | None,
    correction: Tensor | None,
    responses: Tensor | None,
) -> Tensor:
    """The bits of the two native ops one after the other: x [M, K] float -> [M, N] in its type."""
    native = library.required()
    (M, K), N = x.shape, len(w)
    tokens = tokens_of(x, index, fraction, shift, smooth, directions, hadamard, static_scale, static_zero)
    weight = weight_of(w, K, index, fraction, levels, None, column_scale, column_sum, bias, correction, responses)
    if has_zero(symmetric, static_scale, static_zero) and weight.sums is None:
        raise ValueError("an asymmetric activation needs the weight's column sums")
    # coordinates are found in C: only the tables can be wrong
    p = None if directions is None else torch.empty(M, tokens.rank, dtype=torch.bfloat16, device="meta")
    check(p, directions, M, K)
    check(p, responses, M, N)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    native.layer(
        address(tokens.x),
        library.DTYPES[x.dtype],
        M,
        K,
        tokens.x.stride(0),
        address(tokens.shift),
        address(tokens.smooth),
        tokens.rank,
        address(tokens.directions),
        hadamard,
        int(symmetric),
        address(tokens.fixed_scale),
        address(tokens.fixed_zero),
        address(weight.w),
        address(weight.levels),
        N,
        weight.groups,
        address(weight.scale),
        address(weight.sums),
        address(weight.bias),
        address(weight.correction),
        address(weight.responses),
        address(y),
        scratch(native.layer_buffer(M, N, K, tokens.rank, torch.get_num_threads())),
    )
    return y
