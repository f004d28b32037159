"""Raw activations whose channels drift over sigma, their statistics, and calibrations made of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drift:
    """samples[t] [M_t, K] fp32 is a layer's whole input at sigmas[t], noisiest first."""

    sigmas: tuple[float, ...]
    samples: tuple[Tensor, ...]

    def statistics(self, block: int | None = None):
        from dit_quant.quant_core.observers import LayerObserver

        observer = LayerObserver("layer", self.samples[0].shape[1], block)
        for row, (sigma, x) in enumerate(zip(self.sigmas, self.samples, strict=True)):
            observer.update(x, row, sigma)
        return observer.statistics(list(range(len(self.sigmas))))


def drift(features: int, timesteps: int = 6, seed: int = 0) -> Drift:
    """Correlated, off-centre, heavy-tailed channels; a different number of tokens at every timestep."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=random) / features**0.5
    start, slope = torch.randn(2, features, generator=random)
    spread = torch.randn(features, generator=random).exp()
    samples = []
    for t in range(timesteps):
        x = torch.randn(17 + 5 * t, features, generator=random)
        samples.append((x @ mix + 0.1 * x**3) * spread + 2 * start + slope * t)
    sigmas = tuple((timesteps - t) / timesteps for t in range(timesteps))
    return Drift(sigmas, tuple(samples))


def calibration_of(weights: Mapping[str, Tensor], *, timesteps: int = 6, covariance: int | None = None, grouping=None):
    """A Calibration of layers with these weights [N, K], every one fed by its own drift (seed: its position)."""
    from dit_quant.quant_core.calibration import Calibration
    from dit_quant.quant_core.fingerprint import tensor_fingerprint
    from dit_quant.quant_core.observers import covariance_block

    inputs = {name: drift(weight.shape[1], timesteps, seed) for seed, (name, weight) in enumerate(weights.items())}
    blocks = {name: covariance and covariance_block(weight.shape[1], covariance) for name, weight in weights.items()}
    return Calibration(
        sigmas=next(iter(inputs.values())).sigmas,
        layers={name: found.statistics(blocks[name]) for name, found in inputs.items()},
        fingerprints={name: tensor_fingerprint(weight) for name, weight in weights.items()},
        silent={},
        flow=True,
        settings={},
        grouping=grouping,
    )
