"""Channel scales that the package does not use: a strength searched per layer, and a scale from the maxima."""

from dataclasses import replace

import torch
from dit_quant.quant_core.linear import QuantizedLinear, QuantLinear, half_if_exact
from dit_quant.quant_core.observers import LayerStatistics
from dit_quant.quant_core.shift_scale import balanced_scale, input_power, shifted_maximum
from dit_quant.quant_core.timesteps import TimestepState
from fake_linear import FakeLinear, Layer
from roundings import Rounder, hessian_loss
from torch import Tensor

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CRITERIA = ("output error", "Hessian loss")


def scaled(layer: Layer, scale: Tensor) -> Layer:
    """The layer with another channel scale [K], stored as the package stores its own."""
    return replace(layer, like=replace(layer.like, smooth=half_if_exact(scale.float())))


def exact_shift(layer: Layer) -> Tensor | None:
    """z [T, K] float64."""
    return None if layer.like.shift is None else layer.like.shift.double()


def search_strength(
    layer: Layer, sigmas: tuple[float, ...], rounder: Rounder, strengths: tuple[float, ...] = STRENGTHS
) -> dict[str, tuple[QuantizedLinear, Tensor]]:
    """By each of CRITERIA: the layer with the strength of least loss, and its rounded weight [N, K].

    AWQ's search (arXiv 2306.00978) over the balanced scale, within its cap.
    """
    power = input_power(layer.statistics, layer.rows, exact_shift(layer))
    least = dict.fromkeys(CRITERIA, float("inf"))
    best = {}
    for strength in strengths:
        tried = scaled(layer, balanced_scale(power, layer.weight, strength))
        weight, hessian = tried.folded(), tried.hessian()
        values = rounder(weight, hessian)
        losses = (output_error(tried, values, sigmas), hessian_loss(weight - values, hessian))
        for criterion, loss in zip(CRITERIA, losses, strict=True):
            if loss < least[criterion]:
                least[criterion], best[criterion] = loss, (tried.like, values)
    return best


def output_error(layer: Layer, values: Tensor, sigmas: tuple[float, ...]) -> float:
    """Squared error that rounding activations and weights makes on the layer's row sample, summed."""
    seen: LayerStatistics = layer.statistics
    if seen.rows is None:
        raise ValueError("the calibration kept no row sample")
    state = TimestepState([layer.like.groups])
    fake = FakeLinear(QuantLinear(layer.like, None, state, 0), values)
    total = 0.0
    for t, sigma in enumerate(sigmas):
        x = seen.rows[seen.row_bin == t].float()
        state.update(torch.tensor([sigma]))
        total += float((fake(x) - x @ layer.weight.T).square().sum())
    return total


def by_maxima(layer: Layer, strength: float) -> Layer:
    """s = (max |x - z| / max |W|)^(strength / 2): SmoothQuant 0.5 (arXiv 2211.10438) at strength 1."""
    reach = shifted_maximum(layer.statistics, layer.rows, exact_shift(layer)).amax(dim=0)
    largest = layer.weight.abs().amax(dim=0, keepdim=True)
    # balanced_scale takes the root of a power and the norm of a column: here of one number each
    return scaled(layer, balanced_scale(reach.square(), largest, strength))
