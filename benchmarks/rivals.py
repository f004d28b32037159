"""Other people's quantizers, through their own code: comfy-kitchen's layouts, and SmoothQuant as published."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from dit_quant.demo.experiment import quantizable
from dit_quant.quant_core.calibration import Calibration
from dit_quant.quant_core.convert import install
from dit_quant.quant_core.linear import QuantizedLinear
from dit_quant.quant_core.reparam import fold_linear
from dit_quant.quant_core.rounding import round_weight
from dit_quant.quant_core.schemes import WeightArgs
from torch import Tensor, nn

KITCHEN = {
    "native int8": ("TensorWiseINT8Layout", {"per_channel": True}),
    "native int8 + ConvRot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True, "convrot_groupsize": 256}),
    "native asym_w4a8_int8": ("AsymW4A8Int8Layout", {}),
    "native convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {}),
}


@dataclass(frozen=True)
class Rival:
    """A rounded copy of the model, and its bits per weight of the quantized layers with every table."""

    model: nn.Module
    bits_per_weight: float


class KitchenLinear(nn.Module):
    """A Linear whose weight is comfy-kitchen's own QuantizedTensor; its dispatch runs the product."""

    def __init__(self, linear: nn.Linear, layout: str, options: dict):
        super().__init__()
        from comfy_kitchen.tensor import QuantizedTensor

        self.weight = QuantizedTensor.from_float(linear.weight.detach(), layout, **options)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return torch.nn.functional.linear(rows, self.weight, self.bias).reshape(*x.shape[:-1], -1)

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.weight.state_dict("").values())


def kitchen(model: nn.Module, name: str) -> Rival:
    """The same layers that we round, in one of the host's native formats."""
    layout, options = KITCHEN[name]
    twin = copy.deepcopy(model)
    size = weights = 0
    for path, linear in quantizable(twin)[0].items():
        parent, _, child = path.rpartition(".")
        layer = KitchenLinear(linear, layout, options)
        setattr(twin.get_submodule(parent), child, layer)
        size, weights = size + layer.nbytes(), weights + linear.weight.numel()
    return Rival(twin, 8 * size / weights)


def smoothquant(model: nn.Module, calibration: Calibration, alpha: float = 0.5) -> Rival:
    """SmoothQuant (arXiv 2211.10438): s = max|x|^alpha / max|w|^(1 - alpha), int8 per token and per channel."""
    twin = copy.deepcopy(model)
    layers = {}
    for name, linear in quantizable(twin)[0].items():
        seen, weight = calibration.layers[name], linear.weight.detach()
        reach = torch.maximum(seen.maximum.amax(dim=0).abs(), seen.minimum.amin(dim=0).abs())
        s = (reach.clamp(min=1e-5) ** alpha / weight.abs().amax(dim=0).clamp(min=1e-5) ** (1 - alpha)).float()
        rounded = round_weight(fold_linear(weight, None, s).weight, WeightArgs(8), weight.shape[1], None)
        layers[name] = QuantizedLinear(rounded.qdata, rounded.scale, smooth=s)
    install(twin, layers)
    weights = sum(layer.features[0] * layer.features[1] for layer in layers.values())
    return Rival(twin, 8 * sum(layer.nbytes for layer in layers.values()) / weights)


def rivals() -> dict[str, Callable[[nn.Module, Calibration], Rival]]:
    """Name -> builder."""
    natives = {name: (lambda model, _, name=name: kitchen(model, name)) for name in KITCHEN}
    return {**natives, "SmoothQuant 0.5": smoothquant}
