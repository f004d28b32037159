"""A quantized Linear: what is stored, its integer forward, and its way back to the original weight."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..kernels import int4_linear, int8_linear, quantize_activation
from ..kernels.numerics import decode_int4, rotate
from .reparam import fold_linear
from .rounding import round_weight
from .schemes import WeightArgs
from .timesteps import SINGLE_GROUP, TimestepGroups, TimestepState

HALF_MAX = 6.0e4


@dataclass(frozen=True)
class QuantizedLinear:
    """Everything a layer needs at run time but its bias. Tensors that a scheme does not use are None.

    qdata int8 [N, K] or uint8 [N, K / 2]; scale [N, 1] fp32; multiplier, zero [N, G] uint8 (4 bits only);
    column_sum [N] int32 (asymmetric activations); smooth [K] fp32; shift [T, K] and correction [T, N] fp16 or
    fp32; static_scale, static_zero [T] fp32 (fixed activation ranges).
    """

    qdata: Tensor
    scale: Tensor
    multiplier: Tensor | None = None
    zero: Tensor | None = None
    column_sum: Tensor | None = None
    smooth: Tensor | None = None
    shift: Tensor | None = None
    correction: Tensor | None = None
    static_scale: Tensor | None = None
    static_zero: Tensor | None = None
    hadamard: int = 1
    symmetric: bool = True
    groups: TimestepGroups = SINGLE_GROUP

    @property
    def bits(self) -> int:
        return 8 if self.multiplier is None else 4

    @property
    def features(self) -> tuple[int, int]:
        """(N, K)."""
        N, columns = self.qdata.shape
        return N, columns if self.bits == 8 else 2 * columns

    @property
    def group_size(self) -> int:
        """Columns per weight group; K for 8 bits."""
        return self.features[1] if self.multiplier is None else self.features[1] // self.multiplier.shape[1]

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
    "multiplier",
    "zero",
    "column_sum",
    "smooth",
    "shift",
    "correction",
    "static_scale",
    "static_zero",
)


def half_if_it_fits(table: Tensor) -> Tensor:
    """fp16 (11 bits of mantissa) unless a value would overflow; then fp32."""
    return table.half() if float(table.abs().amax()) < HALF_MAX else table.float()


def quant_linear(x: Tensor, w: QuantizedLinear, bias: Tensor | None, index: Tensor, fraction: Tensor) -> Tensor:
    """x [..., K] -> [..., N] in the dtype of x: y = Q_a((x - z) / s H) Q_wᵀ + b + c, all products in integers."""
    codes, row_scale, row_zero = quantize_activation(
        x.reshape(-1, x.shape[-1]),
        index=index,
        fraction=fraction,
        shift=w.shift,
        smooth=w.smooth,
        hadamard=w.hadamard,
        symmetric=w.symmetric,
        static_scale=w.static_scale,
        static_zero=w.static_zero,
    )
    epilogue = {
        "row_scale": row_scale,
        "column_scale": w.scale,
        "row_zero": row_zero,
        "column_sum": w.column_sum,
        "bias": bias,
        "correction": w.correction,
        "index": index,
        "fraction": fraction,
        "dtype": x.dtype,
    }
    if w.multiplier is None:
        y = int8_linear(codes, w.qdata, **epilogue)
    else:
        y = int4_linear(codes, w.qdata, multiplier=w.multiplier, zero=w.zero, **epilogue)
    return y.reshape(*x.shape[:-1], -1)


def codes_of(w: QuantizedLinear) -> Tensor:
    """int8 codes [N, K] that the product sees."""
    return w.qdata if w.multiplier is None else decode_int4(w.qdata, w.multiplier, w.zero)


def folded_weight(w: QuantizedLinear) -> Tensor:
    """The rounded W̃ [N, K] in the basis of the product, fp32."""
    return codes_of(w).float() * w.scale


def dequantize(w: QuantizedLinear) -> Tensor:
    """The rounded weight in the original basis [N, K], fp32: rotation and scale undone."""
    weight = rotate(folded_weight(w), w.hadamard)
    return weight if w.smooth is None else weight / w.smooth


def requantize(weight: Tensor, like: QuantizedLinear) -> QuantizedLinear:
    """A new weight [N, K] (say, after a LoRA) with the shift, scale, rotation and ranges of `like`.

    Rounds to nearest on fresh grids, and rebuilds c = W z from the unrounded weight.
    """
    shift = None if like.shift is None else like.shift.double()
    scale = None if like.smooth is None else like.smooth.double()
    folded = fold_linear(weight, shift, scale, like.hadamard)
    args = WeightArgs(bits=8) if like.bits == 8 else WeightArgs(4, like.group_size, symmetric=like.zero is None)
    rounded = round_weight(folded.weight, args, like.group_size, None)
    return replace(
        like,
        qdata=rounded.qdata,
        scale=rounded.scale,
        multiplier=rounded.multiplier,
        zero=rounded.zero,
        column_sum=None if like.column_sum is None else column_sum(rounded.int8()),
        correction=None if folded.correction is None else half_if_it_fits(folded.correction),
    )


def column_sum(codes: Tensor) -> Tensor:
    """Sum over K of the int8 codes, [N] int32: what an activation zero point multiplies."""
    return codes.sum(dim=1, dtype=torch.int32)


class QuantLinear(nn.Module):
    """Drop-in for nn.Linear outside the host. `state` and `slot` say where the active group is kept."""

    def __init__(self, weight: QuantizedLinear, bias: Tensor | None, state: TimestepState, slot: int):
        super().__init__()
        self.out_features, self.in_features = weight.features
        self.weight, self.bias, self.state, self.slot = weight, bias, state, slot

    def forward(self, x: Tensor) -> Tensor:
        return quant_linear(x, self.weight, self.bias, *self.state.select(self.slot))
