"""A whole layer in C: a tile of tokens at a time is quantized and packed for the product, which then runs."""

import torch
from torch import Tensor

from ..directions import check_tables
from ..int8_linear.native_impl import weight_of
from ..quantize_activation.native_impl import tokens_of
from ..quantizer_op import has_zero
from . import library
from .arguments import address, check_group, group_of
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
    """The bits of the two native ops one after the other: x [..., K] float -> [..., N] in its type."""
    native = library.required()
    K, (N, *_) = x.shape[-1], w.shape
    rows = x if x.is_contiguous() else x.reshape(-1, K)
    tokens = tokens_of(rows, shift, smooth, directions, hadamard, symmetric, static_scale, static_zero)
    weight = weight_of(w, K, levels, None, column_scale, column_sum, bias, correction, responses)
    if has_zero(symmetric, static_scale, static_zero) and column_sum is None:
        raise ValueError("an asymmetric activation needs the weight's column sums")
    check_tables(directions, responses, K, N)
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device="cpu")
    group, buffer = group_of(index, fraction), native.layer_buffer(tokens.M, N, K, tokens.rank, torch.get_num_threads())
    found = native.layer(tokens, weight, group, address(y), scratch(buffer))
    check_group(found, index, shift=shift, static_scale=static_scale, static_zero=static_zero, correction=correction)
    return y
