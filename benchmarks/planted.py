"""Planted outliers: the same function with activations like those of billion-parameter models.

Every construction is exact: the producer of an input (adaLN, or V of the attention) emits (x - z) / s and the
consuming Linear takes it back, as in re-parameterization but with hostile z and s.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from dit_quant.demo.emoji_dit import EmojiDiT
from dit_quant.quant_core.absorb import absorb, absorbing_sites
from dit_quant.quant_core.architectures import SD3
from dit_quant.quant_core.observers import LayerStatistics
from torch import Tensor

CHANNELS = 6
DRIFTING = 12
GAIN = (8.0, 50.0)
OFFSET = (10.0, 40.0)

Vectors = dict[str, tuple[Tensor, Tensor]]


def plant(model: EmojiDiT, vectors: Vectors) -> EmojiDiT:
    """A model with the same function whose inputs at the named sites are (x - z) / s.

    Raises ValueError when a site could not take its vectors.
    """
    tensors = {name: value.double() for name, value in model.state_dict().items()}
    planted = absorb(tensors, SD3, vectors)
    if planted.refused:
        raise ValueError(f"not planted: {planted.refused}")
    twin = EmojiDiT(model.config)
    twin.load_state_dict({name: value.float() for name, value in planted.tensors.items()})
    return twin.eval().requires_grad_(False)


def mean_and_variance(model: EmojiDiT, seed: int = 0) -> Vectors:
    """At every modulated and attention-fed input: 6 channels 8 to 50 times wider, 6 others off centre by 10 to 40."""
    rng = np.random.default_rng(seed)
    vectors = {}
    for site, width in _sites(model).items():
        z, s = torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
        chosen = rng.permutation(width)[: 2 * CHANNELS]
        s[chosen[:CHANNELS]] = torch.from_numpy(1 / rng.uniform(*GAIN, CHANNELS))
        sign = rng.choice((-1.0, 1.0), CHANNELS)
        z[chosen[CHANNELS:]] = torch.from_numpy(sign * rng.uniform(*OFFSET, CHANNELS))
        vectors[site] = (z, s)
    return vectors


def drifting(model: EmojiDiT, statistics: Mapping[str, LayerStatistics], seed: int = 0) -> Vectors:
    """At every modulated input: the 12 channels whose mean moves most with sigma, 8 to 50 times wider."""
    rng = np.random.default_rng(seed)
    vectors = {}
    for site, width in _sites(model).items():
        seen = statistics[site]
        moves = seen.mean.double().var(dim=0) / (seen.maximum - seen.minimum).double().mean(dim=0).square().clamp(1e-12)
        s = torch.ones(width, dtype=torch.float64)
        s[moves.argsort(descending=True)[:DRIFTING]] = torch.from_numpy(1 / rng.uniform(*GAIN, DRIFTING))
        vectors[site] = (torch.zeros(width, dtype=torch.float64), s)
    return vectors


def _sites(model: EmojiDiT) -> dict[str, int]:
    """Site -> K, for every site whose producer can be rewritten."""
    tensors = model.state_dict()
    return {name: tensors[f"{name}.weight"].shape[1] for name in absorbing_sites(tensors, SD3)}


def function_difference(a: Callable[..., Tensor], b: Callable[..., Tensor], seed: int = 0) -> float:
    """Largest relative L2 difference of two models over a few random inputs and noise levels."""
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for sigma in (0.05, 0.5, 0.95):
        x = torch.randn(4, 16, 16, 16, generator=generator)
        context, pooled = torch.randn(4, 8, 64, generator=generator), torch.randn(4, 64, generator=generator)
        expected = a(x, torch.full((4,), sigma), context, pooled)
        found = b(x, torch.full((4,), sigma), context, pooled)
        worst = max(worst, float((found - expected).norm() / expected.norm()))
    return worst
