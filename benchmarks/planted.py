"""Planted outliers: the same function with activations like those of billion-parameter models.

Every construction is exact: the producer of an input (adaLN, V of the attention, in Wan also a norm and the text
embedding) emits (x - z) / s and the consuming Linear takes it back, as in re-parameterization but with hostile z and s.
Only the second Linear of the feed-forward stays as it is: GELU passes neither a scale nor an offset on.
"""

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
from dit_quant.demo.emoji_dit import EmojiDiT
from dit_quant.quant_core.absorb import absorb, absorbing_sites
from dit_quant.quant_core.architectures import SD3
from dit_quant.quant_core.observers import LayerStatistics
from dit_quant.quant_core.reparam import fold_consumer
from emoji_wan import EmojiWan
from torch import Tensor, nn

CHANNELS = 6
DRIFTING = 12
GAIN = (8.0, 50.0)
OFFSET = (10.0, 40.0)
WAN_PAIRS = (("norm3", "cross_attn.q"), ("self_attn.v", "self_attn.o"), ("cross_attn.v", "cross_attn.o"))

Vectors = dict[str, tuple[Tensor, Tensor]]
Model = TypeVar("Model", bound=nn.Module)


def plant(model: EmojiDiT, vectors: Vectors) -> EmojiDiT:
    """A model with the same function whose inputs at the named sites are (x - z) / s.

    Raises ValueError when a site could not take its vectors.
    """
    tensors = in_double(model)
    planted = absorb(tensors, SD3, vectors)
    if planted.refused:
        raise ValueError(f"not planted: {planted.refused}")
    return with_tensors(model, planted.tensors)


def in_double(model: nn.Module) -> dict[str, Tensor]:
    """A float64 copy of every parameter."""
    return {name: value.to(torch.float64, copy=True) for name, value in model.state_dict().items()}


def with_tensors(model: Model, tensors: Mapping[str, Tensor]) -> Model:
    """A copy of the model with these parameters, in fp32."""
    twin = copy.deepcopy(model)
    twin.load_state_dict({name: value.float() for name, value in tensors.items()})
    return twin.eval().requires_grad_(False)


def mean_and_variance(model: EmojiDiT, seed: int = 0) -> Vectors:
    """At every modulated and attention-fed input: 6 channels 8 to 50 times wider, 6 others off centre by 10 to 40."""
    rng = np.random.default_rng(seed)
    return {site: _outliers(rng, width) for site, width in _sites(model).items()}


def _outliers(rng: np.random.Generator, width: int) -> tuple[Tensor, Tensor]:
    z, s = torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
    chosen = rng.permutation(width)[: 2 * CHANNELS]
    s[chosen[:CHANNELS]] = torch.from_numpy(1 / rng.uniform(*GAIN, CHANNELS))
    sign = rng.choice((-1.0, 1.0), CHANNELS)
    z[chosen[CHANNELS:]] = torch.from_numpy(sign * rng.uniform(*OFFSET, CHANNELS))
    return z, s


def plant_wan(model: EmojiWan, seed: int = 0) -> EmojiWan:
    """As `mean_and_variance`, at every input of the blocks but ffn.2.

    All blocks share adaLN's Linear and the text embedding, so at the inputs these feed they share the wide channels;
    off centre are the channels of each block's own table.
    """
    rng, D = np.random.default_rng(seed), model.config.dim
    tensors = in_double(model)
    blocks = [f"blocks.{i}" for i in range(model.config.depth)]

    def emit(producer: str, z: Tensor, s: Tensor) -> None:
        weight, bias = f"{producer}.weight", f"{producer}.bias"
        tensors[weight] = tensors[weight] / (s if tensors[weight].ndim == 1 else s[:, None])
        tensors[bias] = (tensors[bias] - z) / s

    def consume(names: list[str], z: Tensor, s: Tensor) -> None:
        for weight, bias in ((f"{name}.weight", f"{name}.bias") for name in names):
            tensors[weight], tensors[bias] = fold_consumer(tensors[weight], tensors[bias], z, s)

    for layers, shift, scale in ((("self_attn.q", "self_attn.k", "self_attn.v"), 0, 1), (("ffn.0",), 3, 4)):
        _, s = _outliers(rng, D)
        for chunk in (shift, scale):
            rows = slice(chunk * D, (chunk + 1) * D)
            tensors["time_projection.1.weight"][rows] /= s[:, None]
            tensors["time_projection.1.bias"][rows] /= s
        for block in blocks:
            # a channel both wide and off centre would be off by the product
            z = _outliers(rng, D)[0] * (s == 1)
            table = tensors[f"{block}.modulation"][0]
            table[shift], table[scale] = (table[shift] - z) / s, (1 + table[scale]) / s - 1
            consume([f"{block}.{name}" for name in layers], z, s)
    z, s = _outliers(rng, D)
    emit("text_embedding.2", z, s)
    consume([f"{block}.cross_attn.{name}" for block in blocks for name in "kv"], z, s)
    for block in blocks:
        for producer, consumer in WAN_PAIRS:
            z, s = _outliers(rng, D)
            emit(f"{block}.{producer}", z, s)
            consume([f"{block}.{consumer}"], z, s)
    return with_tensors(model, tensors)


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
