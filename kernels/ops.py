"""The ops as torch sees them: registered with shapes and strides, so that torch.compile traces through them.

Eager calls go to the dispatcher directly: an op's way through torch's own dispatcher costs about 3 us (5 to 11 us
by `torch.library.custom_op`), which a layer would pay twice.
"""

import torch
from torch import Tensor

from .backends import AUTO
from .dispatch import bucket, run

NAMESPACE = "dit_quant"
# argument -> type, in the order of the schema; every op takes the backend last
QUANTIZER = {
    "index": "Tensor",
    "fraction": "Tensor",
    "shift": "Tensor?",
    "smooth": "Tensor?",
    "hadamard": "int",
    "symmetric": "bool",
    "static_scale": "Tensor?",
    "static_zero": "Tensor?",
    "backend": "str",
}
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


def _schema(first: str, arguments: dict[str, str], results: str) -> str:
    return f"({first}, {', '.join(f'{kind} {name}' for name, kind in arguments.items())}) -> {results}"


SCHEMAS = {
    # a schema has no optional result: an empty zero stands for none, [1, 1] for one value for all tokens
    "quantize_activation": _schema("Tensor x", QUANTIZER, "(Tensor, Tensor, Tensor)"),
    "int8_linear": _schema("Tensor a, Tensor w", EPILOGUE, "Tensor"),
    "int4_linear": _schema("Tensor a, Tensor packed, Tensor levels, Tensor? table", EPILOGUE, "Tensor"),
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
        codes, scale, zero = torch.ops.dit_quant.quantize_activation(
            x, index, fraction, shift, smooth, hadamard, symmetric, static_scale, static_zero, backend
        )
        M = x.shape[0]
        if _has_zero(symmetric, static_scale, static_zero):
            return codes, scale.expand(M, 1), zero.expand(M, 1)
        return codes, scale.expand(M, 1), None
    M, K = x.shape
    static = static_scale is not None
    zeroless = not _has_zero(symmetric, static_scale, static_zero)
    return run(
        ("quantize_activation", x.device, x.dtype, bucket(M), K, None, None, hadamard, zeroless, static, backend),
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


def _has_zero(symmetric: bool, static_scale: Tensor | None, static_zero: Tensor | None) -> bool:
    return not symmetric if static_scale is None else static_zero is not None


def _run_quantize(x, *given):
    named = dict(zip(QUANTIZER, given, strict=True))
    codes, scale, zero = quantize_activation(x, **named)
    if named["static_scale"] is not None:
        # one value for all tokens, whichever strides the backend gave its [M, 1]
        scale, zero = scale[0].reshape(1, 1), None if zero is None else zero[0].reshape(1, 1)
    # torch ops keep the strides of a transposed x
    return codes.contiguous(), scale, scale.new_empty(0) if zero is None else zero


def _fake_quantize(x, *given):
    named = dict(zip(QUANTIZER, given, strict=True))
    rows = 1 if named["static_scale"] is not None else x.shape[0]
    scale = x.new_empty((rows, 1), dtype=torch.float32)
    has_zero = _has_zero(named["symmetric"], named["static_scale"], named["static_zero"])
    return x.new_empty(x.shape, dtype=torch.int8), scale, scale.new_empty((rows, 1) if has_zero else 0)


def _run_int8(a, w, *given):
    return int8_linear(a, w, **dict(zip(EPILOGUE, given, strict=True)))


def _run_int4(a, packed, levels, table, *given):
    return int4_linear(a, packed, levels=levels, table=table, **dict(zip(EPILOGUE, given, strict=True)))


def _fake_product(a, w, *given):
    return a.new_empty((a.shape[0], w.shape[0]), dtype=given[-2])


def _register() -> torch.library.Library | None:
    """Defines the ops once a process: the host and a test may import this package under two names, and the first
    one's dispatcher then serves both. The library must outlive its ops."""
    if hasattr(torch.ops.dit_quant, "int4_linear"):
        return None
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    functions = {
        "quantize_activation": (_run_quantize, _fake_quantize),
        "int8_linear": (_run_int8, _fake_product),
        "int4_linear": (_run_int4, _fake_product),
    }
    for name, (function, fake) in functions.items():
        library.define(f"{name}{SCHEMAS[name]}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return library


_library = _register()
