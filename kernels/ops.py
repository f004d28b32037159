"""The ops as torch sees them: registered with shapes and strides, so that torch.compile traces through them.

Eager calls go to the dispatcher directly: an op's way through torch's own dispatcher costs about 3 us (5 to 11 us
by `torch.library.custom_op`), which a layer would pay twice.
"""

import torch
from torch import Tensor

from .backends import AUTO
from .dispatch import bucket, run
from .quantizer_op import QuantizerOp
from .registration import register, schema

QUANTIZE_ACTIVATION = QuantizerOp("quantize_activation", {"x": "Tensor"}, lambda x: x.shape, {})
# argument -> type, in the order of the schema; every op takes the backend last
EPILOGUE = {
    "row_scale": "Tensor",
    "column_scale": "Tensor",
    "index": "Tensor",
    "fraction": "Tensor",
    "row_zero": "Tensor?",
    "column_sum": "Tensor?",
    "bias": "Tensor?",
    "correction": "Tensor?",
    "dtype": "ScalarType",
    "backend": "str",
}


def quantize_activation(
    x: Tensor,
    *,
    index: Tensor,
    fraction: Tensor,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    hadamard: int = 1,
    symmetric: bool = True,
    static_scale: Tensor | None = None,
    static_zero: Tensor | None = None,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [M, K] float -> codes [M, K] int8, scale [M, 1] fp32, zero [M, 1] fp32 or None. See the reference."""
    if torch.compiler.is_compiling():
        return QUANTIZE_ACTIVATION.traced(
            x, index, fraction, shift, smooth, hadamard, symmetric, static_scale, static_zero, backend
        )
    return run(
        QUANTIZE_ACTIVATION.key(x, x.shape, hadamard, symmetric, static_scale, static_zero, backend),
        x,
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )


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
    dtype: torch.dtype = torch.float32,
    backend: str = AUTO,
) -> Tensor:
    """a [M, K] int8, w [N, K] int8 -> [M, N] dtype. See the reference."""
    if torch.compiler.is_compiling():
        return torch.ops.dit_quant.int8_linear(
            a, w, row_scale, column_scale, index, fraction, row_zero, column_sum, bias, correction, dtype, backend
        )
    (M, K), N = a.shape, w.shape[0]
    return run(
        ("int8_linear", a.device, dtype, bucket(M), K, N, None, 1, row_zero is None, False, backend),
        a,
        w,
        row_scale=row_scale,
        column_scale=column_scale,
        index=index,
        fraction=fraction,
        row_zero=row_zero,
        column_sum=column_sum,
        bias=bias,
        correction=correction,
        dtype=dtype,
    )


def int4_linear(
    a: Tensor,
    packed: Tensor,
    *,
    levels: Tensor,
    table: Tensor | None = None,
    row_scale: Tensor,
    column_scale: Tensor,
    index: Tensor,
    fraction: Tensor,
    row_zero: Tensor | None = None,
    column_sum: Tensor | None = None,
    bias: Tensor | None = None,
    correction: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = AUTO,
) -> Tensor:
    """a [M, K] int8, packed [N, K / 2] uint8, levels [N, G] uint8 -> [M, N] dtype. See the reference."""
    if torch.compiler.is_compiling():
        return torch.ops.dit_quant.int4_linear(
            a, packed, levels, table, row_scale, column_scale, index, fraction, row_zero, column_sum, bias, correction,
            dtype, backend,
        )  # fmt: skip
    (M, K), (N, G) = a.shape, levels.shape
    return run(
        ("int4_linear", a.device, dtype, bucket(M), K, N, K // G, 1, row_zero is None, False, backend),
        a,
        packed,
        levels=levels,
        table=table,
        row_scale=row_scale,
        column_scale=column_scale,
        index=index,
        fraction=fraction,
        row_zero=row_zero,
        column_sum=column_sum,
        bias=bias,
        correction=correction,
        dtype=dtype,
    )


def _run_int8(a, w, *given):
    return int8_linear(a, w, **dict(zip(EPILOGUE, given, strict=True)))


def _run_int4(a, packed, levels, table, *given):
    return int4_linear(a, packed, levels=levels, table=table, **dict(zip(EPILOGUE, given, strict=True)))


def _fake_product(a, w, *given):
    return a.new_empty((a.shape[0], w.shape[0]), dtype=given[-2])


INT8 = {"a": "Tensor", "w": "Tensor", **EPILOGUE}
INT4 = {"a": "Tensor", "packed": "Tensor", "levels": "Tensor", "table": "Tensor?", **EPILOGUE}
OPS = {
    "quantize_activation": QUANTIZE_ACTIVATION.registered(quantize_activation),
    "int8_linear": (schema(INT8, "Tensor"), _run_int8, _fake_product),
    "int4_linear": (schema(INT4, "Tensor"), _run_int4, _fake_product),
}
_library = register(OPS)
