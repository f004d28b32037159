"""The ops as torch sees them: registered with shapes and strides, so that torch.compile traces through them.

Eager calls go to the dispatcher directly: an op's way through torch's own dispatcher costs about 3 us (5 to 11 us
by `torch.library.custom_op`), which a layer would pay twice.
"""

import torch
from torch import Tensor

from .backends import AUTO
from .dispatch import Key, bucket, run
from .quantizer_op import QuantizerOp
from .registration import register, schema

QUANTIZE_ACTIVATION = QuantizerOp(
    "quantize_activation",
    {"x": "Tensor"},
    lambda x: x.shape,
    {"directions": "Tensor?", "coordinates": "Tensor?"},
)
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
    "coordinates": "Tensor?",
    "responses": "Tensor?",
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
    directions: Tensor | None = None,
    coordinates: Tensor | None = None,
    hadamard: int = 1,
    symmetric: bool = True,
    static_scale: Tensor | None = None,
    static_zero: Tensor | None = None,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [M, K] float -> codes [M, K] int8, scale [M, 1] fp32, zero [M, 1] fp32 or None. See the reference."""
    if torch.compiler.is_compiling():
        return QUANTIZE_ACTIVATION.traced(
            x,
            directions,
            coordinates,
            index,
            fraction,
            shift,
            smooth,
            hadamard,
            symmetric,
            static_scale,
            static_zero,
            backend,
        )
    return run(
        QUANTIZE_ACTIVATION.key(x, x.shape, hadamard, symmetric, static_scale, static_zero, backend),
        x,
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        directions=directions,
        coordinates=coordinates,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )


def along_key(x: Tensor, shape: tuple[int, ...], hadamard: int, symmetric: bool, backend: str) -> Key:
    """What the dispatcher chooses quantize_along by; shape: (M, K)."""
    M, K = shape
    return "quantize_along", x.device, x.dtype, bucket(M), K, None, None, hadamard, symmetric, False, backend


def product_key(
    w: Tensor, shape: tuple[int, ...], levels: Tensor | None, dtype: torch.dtype, zeroless: bool, backend: str
) -> Key:
    """What the dispatcher chooses int8_linear by, or with levels int4_linear; shape: (M, K) of the codes."""
    (M, K), N = shape, w.shape[0]
    op, group_size = ("int8_linear", None) if levels is None else ("int4_linear", K // levels.shape[1])
    return op, w.device, dtype, bucket(M), K, N, group_size, 1, zeroless, False, backend


def quantize_along(
    x: Tensor,
    *,
    directions: Tensor,
    index: Tensor,
    fraction: Tensor,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    hadamard: int = 1,
    symmetric: bool = True,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x [M, K] float, directions [R, K] fp16 -> codes, scale, zero or None, p [M, R] bf16. See the reference."""
    if torch.compiler.is_compiling():
        codes, scale, zero, p = torch.ops.dit_quant.quantize_along(
            x, directions, index, fraction, shift, smooth, hadamard, symmetric, backend
        )
        return codes, scale, None if symmetric else zero, p
    return run(
        along_key(x, x.shape, hadamard, symmetric, backend),
        x,
        directions=directions,
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        hadamard=hadamard,
        symmetric=symmetric,
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
    coordinates: Tensor | None = None,
    responses: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = AUTO,
) -> Tensor:
    """a [M, K] int8, w [N, K] int8 -> [M, N] dtype. See the reference."""
    if torch.compiler.is_compiling():
        return torch.ops.dit_quant.int8_linear(
            a, w, row_scale, column_scale, index, fraction, row_zero, column_sum, bias, correction, coordinates,
            responses, dtype, backend,
        )  # fmt: skip
    return run(
        product_key(w, a.shape, None, dtype, row_zero is None, backend),
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
        coordinates=coordinates,
        responses=responses,
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
    coordinates: Tensor | None = None,
    responses: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = AUTO,
) -> Tensor:
    """a [M, K] int8, packed [N, K / 2] uint8, levels [N, G] uint8 -> [M, N] dtype. See the reference."""
    if torch.compiler.is_compiling():
        return torch.ops.dit_quant.int4_linear(
            a, packed, levels, table, row_scale, column_scale, index, fraction, row_zero, column_sum, bias, correction,
            coordinates, responses, dtype, backend,
        )  # fmt: skip
    return run(
        product_key(packed, a.shape, levels, dtype, row_zero is None, backend),
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
        coordinates=coordinates,
        responses=responses,
        dtype=dtype,
    )


def _run_along(x, *given):
    codes, scale, zero, p = quantize_along(x, **dict(zip(tuple(ALONG)[1:], given, strict=True)))
    # a schema has no optional result, and torch ops keep the strides of a transposed x
    return codes.contiguous(), scale, scale.new_empty(0) if zero is None else zero, p


def _fake_along(x, directions, *given):
    M, symmetric = x.shape[0], given[-2]
    scale = x.new_empty((M, 1), dtype=torch.float32)
    p = x.new_empty((M, directions.shape[0]), dtype=torch.bfloat16)
    return x.new_empty(x.shape, dtype=torch.int8), scale, scale.new_empty(0 if symmetric else (M, 1)), p


def _run_int8(a, w, *given):
    return int8_linear(a, w, **dict(zip(EPILOGUE, given, strict=True)))


def _run_int4(a, packed, levels, table, *given):
    return int4_linear(a, packed, levels=levels, table=table, **dict(zip(EPILOGUE, given, strict=True)))


def _fake_product(a, w, *given):
    return a.new_empty((a.shape[0], w.shape[0]), dtype=given[-2])


ALONG = {
    "x": "Tensor",
    "directions": "Tensor",
    "index": "Tensor",
    "fraction": "Tensor",
    "shift": "Tensor?",
    "smooth": "Tensor?",
    "hadamard": "int",
    "symmetric": "bool",
    "backend": "str",
}
INT8 = {"a": "Tensor", "w": "Tensor", **EPILOGUE}
INT4 = {"a": "Tensor", "packed": "Tensor", "levels": "Tensor", "table": "Tensor?", **EPILOGUE}
OPS = {
    "quantize_activation": QUANTIZE_ACTIVATION.registered(quantize_activation),
    "quantize_along": (schema(ALONG, "(Tensor, Tensor, Tensor, Tensor)"), _run_along, _fake_along),
    "int8_linear": (schema(INT8, "Tensor"), _run_int8, _fake_product),
    "int4_linear": (schema(INT4, "Tensor"), _run_int4, _fake_product),
}
_library = register(OPS)
