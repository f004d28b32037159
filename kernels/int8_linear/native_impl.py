"""int8 x int8 product in C: AVX-512 VNNI, its epilogue on the accumulators while they are in registers."""

import torch
from torch import Tensor

from ..directions import check
from ..native import library
from ..native.arguments import address, table_row, vector
from ..native.scratch import scratch


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
    table: Tensor | None = None,
) -> Tensor:
    """As the reference, and bit-equal to it. levels [N, G], table [16]: w is packed, [N, K / 2], see int4_linear."""
    native = library.library()
    if isinstance(native, str):
        raise RuntimeError(native)
    (M, K), N = a.shape, len(w)
    check_codes(a, w, levels)
    if row_zero is not None and column_sum is None:
        raise ValueError("an asymmetric activation needs the weight's column sums")
    c = None if correction is None else table_row(correction, index, fraction)
    a, w = a.contiguous(), w.contiguous()
    levels = None if levels is None else levels.contiguous()
    table = vector("table", table, 16, torch.int8)
    row_scale_, row_zero = (
        vector(name, values, M, torch.float32) for name, values in (("row_scale", row_scale), ("row_zero", row_zero))
    )
    scale_, bias, c = (
        vector(name, values, N, torch.float32)
        for name, values in (("column_scale", column_scale), ("bias", bias), ("correction", c))
    )
    column_sum = vector("column_sum", column_sum, N, torch.int32)
    check(coordinates, responses, M, N)
    p, B = (None if v is None else v.contiguous() for v in (coordinates, responses))
    y = torch.empty(M, N, dtype=dtype)
    native.linear(
        address(a),
        address(w),
        address(levels),
        address(table),
        M,
        N,
        K,
        0 if levels is None else levels.shape[1],
        address(row_scale_),
        address(row_zero),
        address(scale_),
        address(column_sum),
        address(bias),
        address(c),
        0 if p is None else p.shape[1],
        address(p),
        address(B),
        address(y),
        library.DTYPES[dtype],
        scratch(native.linear_buffer(M, N, K, 0 if p is None else p.shape[1], torch.get_num_threads())),
    )
    return y


def check_codes(a: Tensor, w: Tensor, levels: Tensor | None) -> None:
    """Raises ValueError where C would read past the end of a weight."""
    K, (N, stored) = a.shape[1], w.shape
    if a.dtype is not torch.int8 or w.dtype is not (torch.int8 if levels is None else torch.uint8):
        raise ValueError(f"codes are int8 and weights int8, or uint8 when packed; got {a.dtype} and {w.dtype}")
    if stored != (K if levels is None else K // 2):
        raise ValueError(f"a weight of {stored} bytes a row does not fit tokens of K={K}")
    if levels is not None and (K % 2 or levels.dtype is not torch.uint8 or len(levels) != N or K % levels.shape[1]):
        raise ValueError(f"levels {tuple(levels.shape)} {levels.dtype} do not fit a weight of N={N}, K={K}")
