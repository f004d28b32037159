"""What rounding a layer costs the final latent: gain of the layer x error at its output.

The gain is measured on the running model, once per layer and for every format: noise on the layer's weight, and how
far it moves the final latent of a short sampling. The error of a format is measured on the calibration's row samples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor, nn

from .linear import QuantizedLinear, quant_linear
from .observers import LayerStatistics

# above what bf16 loses along the way, and small enough for its effect to be linear
STRENGTH = 0.3
TINY = 1e-3
# sampling steps and prompts on which gains are measured: more of either did not order the layers better
GAIN_STEPS, GAIN_PROMPTS = 6, 2


def weight_noise(weight: Tensor, strength: float = STRENGTH) -> Tensor:
    """Gaussian noise [N, K] fp32 of `strength` times the rms of each output channel; always the same."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return noise * (strength * weight.float().square().mean(dim=1, keepdim=True).sqrt())


@dataclass
class Disturbance:
    """The noise that a layer's output was given: mean square of every call."""

    calls: list[float] = field(default_factory=list)

    @property
    def energy(self) -> float:
        """Mean square over all calls; 0 where the layer never ran."""
        return sum(self.calls) / max(len(self.calls), 1)


def inverse_scale(columns: Tensor, rms: Tensor) -> Tensor:
    """1 / s [K] of the balanced scale, from the norms of weight columns and the rms of inputs [K].

    Such that noise behind it has as much energy as noise on the unscaled weight.
    """
    tiny = torch.finfo(torch.float32).tiny
    factor = (columns / torch.maximum(rms, 1e-6 * rms.amax()).clamp(min=1e-20)).sqrt()
    energy = (columns * rms).norm() / columns.norm().clamp(min=tiny) * len(columns) ** 0.5
    return factor * (energy / (factor * rms).norm().clamp(min=tiny))


@contextmanager
def disturbed(layer: nn.Module, weight: Tensor, strength: float = STRENGTH) -> Iterator[Disturbance]:
    """Adds ((x - mean of x) / s) noiseᵀ to the output of a Linear with this weight [N, K]: what rounding to a grid does
    once shift and balanced scale are taken off. s is that of the call.

    Noise that is independent per token predicts the final latent's error worse, and so does noise without s where a
    few channels are wide.
    """
    seen, tables = Disturbance(), (weight_noise(weight, strength), weight.float().norm(dim=0))

    def after(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        nonlocal tables
        x = args[0]
        tables = (tables[0].to(device=x.device, dtype=x.dtype), tables[1].to(x.device))
        noise, columns = tables
        centred = x - x.flatten(0, -2).mean(dim=0)
        rms = centred.flatten(0, -2).float().square().mean(dim=0).sqrt()
        change = (centred * inverse_scale(columns, rms).to(x.dtype)) @ noise.T
        seen.calls.append(float(change.float().square().mean()))
        return y + change

    handle = layer.register_forward_hook(after)
    try:
        yield seen
    finally:
        handle.remove()


def relative_energy(changed: Tensor, reference: Tensor) -> float:
    """|changed - reference|² / |reference|² of latents [B, ...], mean over the first index."""
    reference = reference.double().flatten(1)
    return float(((changed.double().flatten(1) - reference).square().sum(1) / reference.square().sum(1)).mean())


def measure_gains(
    layers: Mapping[str, nn.Module],
    weights: Mapping[str, Callable[[], Tensor]],
    sample: Callable[[], Tensor],
    known: Mapping[str, float],
) -> Iterator[tuple[str, float]]:
    """Gain of every layer that is not `known`: energy of the final latent's relative error per unit of mean square
    at the layer's output. Deterministic. A layer without one never ran, on no more than a token at a time, or moved the
    latent out of its numbers.

    sample: () -> final latents [B, ...] of a few steps on a few prompts, always the same; called once per layer and
    twice more. weights: layer name -> loader of its [N, K] weight.
    """
    todo = [name for name in layers if name not in known]
    if not todo:
        return
    reference = sample()
    # what any change, however small, moves the latent by: the rounding of a model that runs in 16 bits
    first = next(iter(layers))
    with disturbed(layers[first], weights[first](), TINY):
        floor = relative_energy(sample(), reference)
    for name in todo:
        with disturbed(layers[name], weights[name]()) as disturbance:
            moved = relative_energy(sample(), reference)
        # one token alone has nothing that differs from the mean: it was not disturbed
        if disturbance.energy > 0 and isfinite(moved):
            yield name, max(moved - floor, 0.0) / disturbance.energy


def output_error(weight: Tensor, layer: QuantizedLinear, statistics: LayerStatistics, sigmas: Sequence[float]) -> float:
    """Mean squared error of the layer's output on the row samples, every sigma counted alike.

    weight [N, K]; layer: the same weight, rounded. Raises ValueError when the statistics hold no sample.
    """
    rows, row_bin = statistics.rows, statistics.row_bin
    if rows is None or row_bin is None:
        raise ValueError("calibrated without row samples, which fitting to a size needs; calibrate with more memory")
    errors = []
    for t, sigma in enumerate(sigmas):
        x = rows[row_bin == t].float()
        if len(x) > 0:
            index, fraction = layer.groups.locate(sigma)
            y = quant_linear(x, layer, None, torch.tensor([index]), torch.tensor([fraction]))
            errors.append(float((y - x @ weight.float().T).square().mean()))
    return sum(errors) / len(errors)
