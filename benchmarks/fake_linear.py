"""Linears with our activation quantizer and weights of any values: judges a rounding before it has a format."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from dit_quant.demo.experiment import quantized_copy
from dit_quant.kernels.numerics import lerp_rows
from dit_quant.kernels.quantize_activation import quantize_activation
from dit_quant.quant_core.calibration import Calibration
from dit_quant.quant_core.convert import install
from dit_quant.quant_core.covariance import rounding_hessian
from dit_quant.quant_core.grouping import members
from dit_quant.quant_core.linear import QuantizedLinear, QuantLinear
from dit_quant.quant_core.observers import LayerStatistics
from dit_quant.quant_core.reparam import fold_linear
from dit_quant.quant_core.schemes import QuantScheme, Rounding
from dit_quant.quant_core.timesteps import TimestepState
from torch import Tensor, nn


class FakeLinear(QuantLinear):
    """A QuantLinear that multiplies its int8 activations by `values` [N, K] fp32 in place of its own codes."""

    def __init__(self, like: QuantLinear, values: Tensor):
        super().__init__(like.weight, like.bias, like.state, like.slot)
        self.values = values.float()

    def forward(self, x: Tensor) -> Tensor:
        w, (index, fraction) = self.weight, self.state.select(self.slot)
        codes, scale, zero = quantize_activation(
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
        seen = codes.float() if zero is None else codes.float() - zero
        y = (seen * scale) @ self.values.T
        if self.bias is not None:
            y = y + self.bias
        if w.correction is not None:
            y = y + lerp_rows(w.correction, index, fraction)
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)


@dataclass(frozen=True)
class Layer:
    """A Linear whose weight [N, K] is still to be rounded: everything else of `like` is decided.

    rows: the calibrated timesteps of each group.
    """

    weight: Tensor
    statistics: LayerStatistics
    rows: list[list[int]]
    like: QuantizedLinear

    def folded(self) -> Tensor:
        """W̃ = W diag(s) H [N, K] fp32, what a rounder gets."""
        return fold_linear(self.weight, None, self.like.smooth, self.like.hadamard).weight.float()

    def hessian(self) -> Tensor:
        """Of the rounding error, in diagonal blocks [B, b, b]."""
        shift = None if self.like.shift is None else self.like.shift.double()
        found = rounding_hessian(self.statistics, self.rows, shift, self.like.smooth, self.like.hadamard)
        if found is None:
            raise ValueError("the calibration kept no second moment; collect it with a covariance limit")
        return found


def unrounded(model: nn.Module, calibration: Calibration, scheme: QuantScheme) -> dict[str, Layer]:
    """The layers that a scheme rounds, by name, up to where it rounds them."""
    rough = scheme.weights.with_options(rounding=Rounding.NEAREST, search=False)
    twin, _, report = quantized_copy(model, calibration, scheme.with_options(weights=rough))
    layers = {}
    for name in (layer.name for layer in report.layers):
        like, weight = twin.get_submodule(name).weight, model.get_submodule(name).weight.detach()
        layers[name] = Layer(weight, calibration.layers[name], members(calibration.sigmas, like.groups), like)
    return layers


def fake_copy(
    model: nn.Module, layers: Mapping[str, QuantizedLinear], values: Mapping[str, Tensor]
) -> tuple[nn.Module, TimestepState]:
    """A copy of the model with a FakeLinear for every layer, and the state that selects its groups."""
    twin = copy.deepcopy(model)
    state = install(twin, layers)
    for name in layers:
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, FakeLinear(twin.get_submodule(name), values[name]))
    return twin, state
