"""The fused quantizers as torch and the dispatcher see them, in the manner of ops.py."""

from math import prod

import torch
from torch import Tensor

from .backends import AUTO
from .dispatch import run
from .quantizer_op import QuantizerOp
from .registration import register

ADALN = QuantizerOp(
    "adaln_quantize",
    {"x": "Tensor"},
    lambda x: (prod(x.shape[:-1]), x.shape[-1]),
    {
        "kind": "str",
        "eps": "float",
        "weight": "Tensor?",
        "bias": "Tensor?",
        "modulation_scale": "Tensor?",
        "modulation_shift": "Tensor?",
    },
)
GELU = QuantizerOp("gelu_quantize", {"x": "Tensor"}, lambda x: x.shape, {"approximate": "str"})
SWIGLU = QuantizerOp(
    "swiglu_quantize",
    {"gate": "Tensor", "up": "Tensor?"},
    lambda gate, up: gate.shape if up is not None else (gate.shape[0], gate.shape[1] // 2),
    {"gate_first": "bool"},
)


def adaln_quantize(
    x: Tensor,
    *,
    kind: str = "layer",
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    modulation_scale: Tensor | None = None,
    modulation_shift: Tensor | None = None,
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
    """x [M, K] or [B, L, K] float -> codes, scale, zero of norm(x) (1 + modulation_scale) + modulation_shift."""
    if torch.compiler.is_compiling():
        return ADALN.traced(
            x,
            kind,
            eps,
            weight,
            bias,
            modulation_scale,
            modulation_shift,
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
        ADALN.key(x, ADALN.shape(x), hadamard, symmetric, static_scale, static_zero, backend),
        x,
        kind=kind,
        eps=eps,
        weight=weight,
        bias=bias,
        modulation_scale=modulation_scale,
        modulation_shift=modulation_shift,
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )


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
    backend: str = AUTO,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [M, K] float -> codes, scale, zero of gelu(x). See the reference."""
    if torch.compiler.is_compiling():
        return GELU.traced(
            x, approximate, index, fraction, shift, smooth, hadamard, symmetric, static_scale, static_zero, backend
        )
    return run(
        GELU.key(x, x.shape, hadamard, symmetric, static_scale, static_zero, backend),
        x,
        approximate=approximate,
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )


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
    backend: str = AUTO,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """gate, up [M, K] float, or both in gate [M, 2K] -> codes, scale, zero of silu(gate) * up. See the reference."""
    if torch.compiler.is_compiling():
        return SWIGLU.traced(
            gate,
            up,
            gate_first,
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
        SWIGLU.key(gate, SWIGLU.shape(gate, up), hadamard, symmetric, static_scale, static_zero, backend),
        gate,
        up,
        gate_first=gate_first,
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )


OPS = {
    "adaln_quantize": ADALN.registered(adaln_quantize),
    "gelu_quantize": GELU.registered(gelu_quantize),
    "swiglu_quantize": SWIGLU.registered(swiglu_quantize),
}
_library = register(OPS)
