"""`quant_linear` with what stands before the layer in the same kernel as its quantizer.

The values in between stay in fp32. Nothing calls these yet: on a CPU the host's own ops followed by `quant_linear` are
faster (benchmarks/fused.py), and no architecture uses them before a GPU has shown the opposite there. A layer with
directions reads its input twice, so that there is nothing to fuse: what stands before it is computed in fp32.
"""

import torch.nn.functional as F
from torch import Tensor

from ..kernels import adaln_quantize, gelu_quantize, swiglu_quantize
from ..kernels.adaln_quantize.reference import adaln
from ..kernels.backends import AUTO
from ..kernels.swiglu_quantize.reference import halves
from .linear import QuantizedLinear, multiply, quant_linear, quantizer


def quant_gelu_linear(
    x: Tensor,
    w: QuantizedLinear,
    bias: Tensor | None,
    index: Tensor,
    fraction: Tensor,
    approximate: str = "tanh",
    backend: str = AUTO,
) -> Tensor:
    """quant_linear(gelu(x)): x [..., K] -> [..., N]. approximate "tanh" or "none", as in F.gelu."""
    if w.directions is not None:
        y = quant_linear(F.gelu(x.float(), approximate=approximate), w, bias, index, fraction, backend)
        return y.to(x.dtype)
    quantized = gelu_quantize(
        x.reshape(-1, x.shape[-1]),
        approximate=approximate,
        index=index,
        fraction=fraction,
        backend=backend,
        **quantizer(w),
    )
    return multiply(quantized, w, bias, index, fraction, x.dtype, backend).reshape(*x.shape[:-1], w.features[0])


def quant_swiglu_linear(
    gate: Tensor,
    up: Tensor | None,
    w: QuantizedLinear,
    bias: Tensor | None,
    index: Tensor,
    fraction: Tensor,
    gate_first: bool = True,
    backend: str = AUTO,
) -> Tensor:
    """quant_linear(silu(gate) up): gate, up [..., K] -> [..., N]. Without `up`, gate [..., 2K] holds both, the gate's
    columns first unless `gate_first` is False."""
    if w.directions is not None:
        first, second = halves(gate, gate_first) if up is None else (gate, up)
        return quant_linear(F.silu(first.float()) * second.float(), w, bias, index, fraction, backend).to(gate.dtype)
    quantized = swiglu_quantize(
        gate.reshape(-1, gate.shape[-1]),
        None if up is None else up.reshape(-1, up.shape[-1]),
        gate_first=gate_first,
        index=index,
        fraction=fraction,
        backend=backend,
        **quantizer(w),
    )
    return multiply(quantized, w, bias, index, fraction, gate.dtype, backend).reshape(*gate.shape[:-1], w.features[0])


def quant_adaln_linear(
    x: Tensor,
    w: QuantizedLinear,
    bias: Tensor | None,
    index: Tensor,
    fraction: Tensor,
    *,
    kind: str = "layer",
    eps: float = 1e-6,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    modulation_scale: Tensor | None = None,
    modulation_shift: Tensor | None = None,
    backend: str = AUTO,
) -> Tensor:
    """quant_linear(norm(x) (1 + modulation_scale) + modulation_shift): x [B, ..., K] -> [B, ..., N].

    kind "layer" or "rms"; norm_weight, norm_bias [K]; modulation_scale, modulation_shift [B, K] or [1, K].
    """
    if w.directions is not None:
        rows = x.reshape(-1, x.shape[-1])
        modulated = adaln(rows, kind, eps, norm_weight, norm_bias, modulation_scale, modulation_shift)
        y = quant_linear(modulated, w, bias, index, fraction, backend)
        return y.reshape(*x.shape[:-1], w.features[0]).to(x.dtype)
    quantized = adaln_quantize(
        x,
        kind=kind,
        eps=eps,
        weight=norm_weight,
        bias=norm_bias,
        modulation_scale=modulation_scale,
        modulation_shift=modulation_shift,
        index=index,
        fraction=fraction,
        backend=backend,
        **quantizer(w),
    )
    return multiply(quantized, w, bias, index, fraction, x.dtype, backend).reshape(*x.shape[:-1], w.features[0])
