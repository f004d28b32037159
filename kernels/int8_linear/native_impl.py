"""int8 x int8 product in C: AVX-512 VNNI or AMX, its epilogue on the accumulators while they are near."""

import torch
from torch import Tensor

from ..directions import check
from ..native import library
from ..native.arguments import address, check_group, group_of, table, vector
from ..native.scratch import scratch
from ..native.structs import DTYPES, Weight


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why the op does not run."""
    return library.refusal(device, dtype)


def int8_linear(
    a: Tensor,
    w: Tensor,
    *,
    row_scale: Tensor,
    column_scale: Tensor,
    index: Tensor,
    fraction: Tensor,
    row_zero: Tensor | None = None,
    column_sum: Tensor | None = None,
    bias: Tensor | None = None,
    correction: Tensor | None = None,
    coordinates: Tensor | None = None,
    responses: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    levels: Tensor | None = None,
    codebook: Tensor | None = None,
) -> Tensor:
    """As the reference, and bit-equal to it. levels [N, G], codebook [16]: w is packed, [N, K / 2], see int4_linear."""
    native = library.required()
    (M, K), N = a.shape, len(w)
    if a.dtype is not torch.int8:
        raise ValueError(f"codes are int8, got {a.dtype}")
    if row_zero is not None and column_sum is None:
        raise ValueError("an asymmetric activation needs the weight's column sums")
    weight = weight_of(w, K, levels, codebook, column_scale, column_sum, bias, correction, responses)
    check(coordinates, responses, M, N)
    a, p = a.contiguous(), None if coordinates is None else coordinates.contiguous()
    row_scale_, row_zero = (
        vector(name, values, M, torch.float32) for name, values in (("row_scale", row_scale), ("row_zero", row_zero))
    )
    y = torch.empty(M, N, dtype=dtype, device=a.device)
    found = native.linear(
        address(a),
        M,
        K,
        address(row_scale_),
        address(row_zero),
        address(p),
        weight,
        group_of(index, fraction),
        address(y),
        DTYPES[dtype],
        scratch(native.linear_buffer(M, N, K, weight.rank, torch.get_num_threads())),
    )
    check_group(found, index, correction=correction)
    return y


def weight_of(
    w: Tensor,
    K: int,
    levels: Tensor | None,
    codebook: Tensor | None,
    column_scale: Tensor,
    column_sum: Tensor | None,
    bias: Tensor | None,
    correction: Tensor | None,
    responses: Tensor | None,
) -> Weight:
    """codebook: the 16 levels of a 4-bit weight. Raises ValueError where C would read past the end of a tensor."""
    N, stored = w.shape
    if w.dtype is not (torch.int8 if levels is None else torch.uint8):
        raise ValueError(f"codes and weights int8, or weights uint8 when packed: got weights {w.dtype}")
    if stored != (K if levels is None else K // 2):
        raise ValueError(f"a weight of {stored} bytes a row does not fit tokens of K={K}")
    if levels is not None and (K % 2 or levels.dtype is not torch.uint8 or len(levels) != N or K % levels.shape[1]):
        raise ValueError(f"levels {tuple(levels.shape)} {levels.dtype} do not fit a weight of N={N}, K={K}")
    codes, groups, along = (None if t is None else t.contiguous() for t in (w, levels, responses))
    values, sums = vector("table", codebook, 16, torch.int8), vector("column_sum", column_sum, N, torch.int32)
    scale, added = table("column_scale", column_scale, N), table("bias", bias, N)
    moving = table("correction", correction, N, timesteps=True)
    weight = Weight(
        w=address(codes),
        levels=address(groups),
        table=address(values),
        N=N,
        G=0 if levels is None else levels.shape[1],
        rank=0 if along is None else along.shape[0],
        column_scale=scale,
        bias=added,
        correction=moving,
        column_sum=address(sums),
        responses=address(along),
    )
    weight.kept = codes, groups, values, scale, added, moving, sums, along
    return weight
