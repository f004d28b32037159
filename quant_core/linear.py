"""A quantized Linear: what is stored, its integer forward, and the weight that it stands for."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import int4_linear, int8_linear, quantize_activation, quantize_along, whole_layer
from ..kernels.backends import AUTO, BACKENDS
from ..kernels.numerics import decode_int4, rotate
from .timesteps import SINGLE_GROUP, TimestepGroups, TimestepState

# what a MODEL may ask to be multiplied by
BACKEND_NAMES = (AUTO, *BACKENDS)
HALF_MAX = 6.0e4


@dataclass(frozen=True)
class QuantizedLinear:
    """Everything a layer needs at run time but its bias. Tensors that a scheme does not use are None.

    qdata int8 [N, K] or uint8 [N, K / 2]; scale [N, 1] fp32; levels [N, G] uint8 (4 bits only: multiplier and
    zero of each weight group); column_sum [N] int32 (asymmetric activations); smooth [K], shift [T, K] and
    correction [T, N] fp16 or fp32; directions V [R, K] and responses W V [R, N] fp16 (what stays in 16 bits);
    static_scale, static_zero [T] fp32 (fixed activation ranges).
    """

    qdata: Tensor
    scale: Tensor
    levels: Tensor | None = None
    column_sum: Tensor | None = None
    smooth: Tensor | None = None
    shift: Tensor | None = None
    correction: Tensor | None = None
    directions: Tensor | None = None
    responses: Tensor | None = None
    static_scale: Tensor | None = None
    static_zero: Tensor | None = None
    hadamard: int = 1
    symmetric: bool = True
    groups: TimestepGroups = SINGLE_GROUP

    @property
    def bits(self) -> int:
        return 8 if self.levels is None else 4

    @property
    def features(self) -> tuple[int, int]:
        """(N, K)."""
        N, columns = self.qdata.shape
        return N, columns if self.bits == 8 else 2 * columns

    @property
    def group_size(self) -> int:
        """Columns per weight group; K for 8 bits."""
        return self.features[1] if self.levels is None else self.features[1] // self.levels.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors in use, by field name."""
        return {name: value for name in TENSOR_FIELDS if (value := getattr(self, name)) is not None}

    def map(self, fn) -> "QuantizedLinear":
        """The same layer with `fn` applied to every tensor in use."""
        return replace(self, **{name: fn(value) for name, value in self.tensors().items()})

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.tensors().values())


TENSOR_FIELDS = (
    "qdata",
    "scale",
    "levels",
    "column_sum",
    "smooth",
    "shift",
    "correction",
    "directions",
    "responses",
    "static_scale",
    "static_zero",
)


def half_if_it_fits(table: Tensor) -> Tensor:
    """fp16 (11 bits of mantissa) unless a value would overflow; then fp32."""
    return table.half() if float(table.abs().amax()) < HALF_MAX else table.float()


def half_if_exact(table: Tensor) -> Tensor:
    """fp16 where that changes nothing, else the table as it is."""
    half = table.half()
    return half if torch.equal(half.to(table.dtype), table) else table


def quant_linear(
    x: Tensor, w: QuantizedLinear, bias: Tensor | None, index: Tensor, fraction: Tensor, backend: str = AUTO
) -> Tensor:
    """x [..., K] -> [..., N] in the dtype of x: y = Q_a((x - z - p V) / s H) Q_wᵀ + p (W V) + b + c.

    Products of K in integers; p, the coordinates of a token along the layer's directions V, where it has any. Where x
    wants a gradient it gets that of the rounded weight.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return StraightThrough.apply(x, w, bias, index, fraction, backend)
    group = {"index": index, "fraction": fraction, "backend": backend}
    y = whole_layer(x, w.qdata, **quantizer(w), directions=w.directions, **product(w, bias), **group)
    if y is not None:
        return y
    rows = x.reshape(-1, x.shape[-1])
    if w.directions is None:
        quantized, p = quantize_activation(rows, **quantizer(w), **group), None
    else:
        tables = {"shift": w.shift, "smooth": w.smooth, "hadamard": w.hadamard, "symmetric": w.symmetric}
        codes, scale, zero, p = quantize_along(rows, directions=w.directions, **tables, **group)
        quantized = codes, scale, zero
    y = multiply(quantized, w, bias, index, fraction, x.dtype, backend, p)
    return y.reshape(*x.shape[:-1], w.features[0])


class StraightThrough(torch.autograd.Function):
    """`quant_linear` for an x that wants a gradient, as in guidance by gradients and in the training of a LoRA beside
    the layer: rounding x passes it on as it is (Bengio et al., arXiv 1308.3432, section 4). Nothing else gets one."""

    @staticmethod
    def forward(ctx, x, w, bias, index, fraction, backend):
        ctx.w = w
        return quant_linear(x, w, bias, index, fraction, backend)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        return (grad @ dequantize(ctx.w).to(grad.dtype), *[None] * 5)


def quantizer(w: QuantizedLinear) -> dict[str, Any]:
    """What the quantizers of the layer's input take from it, by keyword, but its directions."""
    return {
        "shift": w.shift,
        "smooth": w.smooth,
        "hadamard": w.hadamard,
        "symmetric": w.symmetric,
        "static_scale": w.static_scale,
        "static_zero": w.static_zero,
    }


def product(w: QuantizedLinear, bias: Tensor | None) -> dict[str, Tensor | None]:
    """What the products take from it, by keyword, but its codes; levels with 4 bits only."""
    levels = {} if w.levels is None else {"levels": w.levels}
    return {
        "column_scale": w.scale,
        "column_sum": w.column_sum,
        "bias": bias,
        "correction": w.correction,
        "responses": w.responses,
    } | levels


def multiply(
    quantized: tuple[Tensor, Tensor, Tensor | None],
    w: QuantizedLinear,
    bias: Tensor | None,
    index: Tensor,
    fraction: Tensor,
    dtype: torch.dtype,
    backend: str = AUTO,
    p: Tensor | None = None,
) -> Tensor:
    """codes [M, K], scale, zero of a quantizer, and the coordinates p [M, R] that it left out -> [M, N] dtype."""
    codes, row_scale, row_zero = quantized
    linear = int8_linear if w.levels is None else int4_linear
    tokens = {"row_scale": row_scale, "row_zero": row_zero, "coordinates": p}
    group = {"index": index, "fraction": fraction, "backend": backend}
    return linear(codes, w.qdata, **tokens, **product(w, bias), **group, dtype=dtype)


def codes_of(w: QuantizedLinear) -> Tensor:
    """int8 codes [N, K] that the product sees."""
    return w.qdata if w.levels is None else decode_int4(w.qdata, w.levels)


def folded_weight(w: QuantizedLinear) -> Tensor:
    """The rounded W̃ [N, K] in the basis of the product, fp32."""
    return codes_of(w).float() * w.scale


def dequantize(w: QuantizedLinear) -> Tensor:
    """The rounded weight in the original basis [N, K], fp32: rotation and scale undone."""
    weight = rotate(folded_weight(w), w.hadamard)
    return weight if w.smooth is None else weight / w.smooth


def column_sum(codes: Tensor) -> Tensor:
    """Sum over K of the int8 codes, [N] int32: what an activation zero point multiplies."""
    return codes.sum(dim=1, dtype=torch.int32)


class QuantLinear(nn.Module):
    """In place of an nn.Linear outside the host; its tables stay on their device, and out of `state_dict`. `state` and
    `slot` say where the active group is kept."""

    def __init__(
        self, weight: QuantizedLinear, bias: Tensor | None, state: TimestepState, slot: int, backend: str = AUTO
    ):
        super().__init__()
        self.out_features, self.in_features = weight.features
        self.weight, self.bias, self.state, self.slot, self.backend = weight, bias, state, slot, backend

    def forward(self, x: Tensor) -> Tensor:
        return quant_linear(x, self.weight, self.bias, *self.state.select(self.slot), self.backend)
