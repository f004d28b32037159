"""Planted mean drift: inputs whose mean moves with sigma by many standard deviations, while no output changes.

At every modulated input x with its consumer W and a direction `a` over 12 channels, adaLN adds a f to x, where
f = u SiLU(vec) + c reads the noise level off adaLN's own input, and W becomes W - (W a) vᵀ with v a = 1. Then W a = 0,
so that any f leaves the output as it was, and every column keeps its size: neither one static shift nor a channel scale
takes the drift away. The projection loses what W read along `a`; v = C⁻¹ a / (a C⁻¹ a), C the covariance of x, moves
it to the channels that correlate, and loses least of all v.
"""

from collections.abc import Mapping

import numpy as np
import torch
from dit_quant.demo.emoji_dit import EmojiDiT, timestep_embedding
from dit_quant.quant_core.absorb import absorbing_sites
from dit_quant.quant_core.architectures import SD3
from dit_quant.quant_core.architectures.family import Site
from dit_quant.quant_core.covariance import rounding_hessian
from dit_quant.quant_core.observers import LayerStatistics
from dit_quant.quant_core.shift_scale import group_mean
from planted import DRIFTING, OFFSET, in_double, with_tensors
from torch import Tensor
from torch.nn.functional import silu

# of the mean variance: a calibration holds few distinct words, and a smaller one trusts correlations among them alone
RIDGE = 1e-2
LEVELS = 65


def mean_drift(
    model: EmojiDiT, statistics: Mapping[str, LayerStatistics], pooled: Tensor, seed: int = 0
) -> tuple[EmojiDiT, EmojiDiT]:
    """-> the model blind to its drift, and the same function with the drift planted. pooled: see `drifting_mean`."""
    chosen = directions(model, statistics, seed)
    blind = blinded(model, statistics, chosen)
    return blind, drifting_mean(blind, chosen, pooled)


def directions(model: EmojiDiT, statistics: Mapping[str, LayerStatistics], seed: int = 0) -> dict[str, Tensor]:
    """Modulated input -> a [K] float64: 12 channels, 10 to 40 deviations of a channel within a timestep (RMS)."""
    rng = np.random.default_rng(seed)
    found = {}
    for name in modulated(model):
        deviation = within(statistics[name])
        chosen = rng.permutation(len(deviation))[:DRIFTING]
        sizes = rng.uniform(*OFFSET, DRIFTING) * rng.choice((-1.0, 1.0), DRIFTING)
        a = torch.zeros_like(deviation)
        a[chosen] = torch.from_numpy(sizes) * deviation.square().mean().sqrt()
        found[name] = a
    return found


def blinded(model: EmojiDiT, statistics: Mapping[str, LayerStatistics], directions: Mapping[str, Tensor]) -> EmojiDiT:
    """The model whose consumers no longer see `a`."""
    tensors = in_double(model)
    for name, a in directions.items():
        seen = statistics[name]
        everything = [list(range(len(seen.count)))]
        mean = group_mean(seen, everything)
        v = torch.linalg.solve(with_ridge(covariance(seen, everything, mean)), a)
        v = v / (a @ v)
        lost = tensors[f"{name}.weight"] @ a
        tensors[f"{name}.weight"] -= torch.outer(lost, v)
        tensors[f"{name}.bias"] += lost * (mean[0] @ v)
    return with_tensors(model, tensors)


def drifting_mean(model: EmojiDiT, directions: Mapping[str, Tensor], pooled: Tensor) -> EmojiDiT:
    """The model whose adaLN adds a f; pooled [P, 64] are the prompts over which f follows sigma."""
    tensors = in_double(model)
    u, constant = sigma_readout(model, pooled)
    sites = modulated(model)
    for name, a in directions.items():
        linear, chunk, _ = sites[name].modulation
        rows = slice(chunk * len(a), (chunk + 1) * len(a))
        tensors[f"{linear}.weight"][rows] += torch.outer(a, u)
        tensors[f"{linear}.bias"][rows] += a * constant
    return with_tensors(model, tensors)


@torch.inference_mode()
def sigma_readout(model: EmojiDiT, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """u [D] and c with u SiLU(vec) + c = 2 sigma - 1 by ridge least squares over all noise levels and prompts."""
    sigma = torch.linspace(0, 1, LEVELS)
    level, prompt = model.t_embedder(timestep_embedding(1000 * sigma)), model.y_embedder(pooled)
    seen = silu(level[:, None] + prompt).double().flatten(0, 1)  # [LEVELS * P, D]
    target = (2 * sigma.double() - 1).repeat_interleave(len(pooled))
    centred = seen - seen.mean(dim=0)
    u = torch.linalg.solve(with_ridge(centred.T @ centred), centred.T @ target)
    return u, target.mean() - seen.mean(dim=0) @ u


def modulated(model: EmojiDiT) -> dict[str, Site]:
    """The inputs that an adaLN of their own feeds."""
    return {name: site for name, site in absorbing_sites(model.state_dict(), SD3).items() if site.modulation}


def within(statistics: LayerStatistics) -> Tensor:
    """Standard deviation of every channel [K] about its mean at each timestep."""
    steps = [[row] for row in range(len(statistics.count))]
    return covariance(statistics, steps, statistics.mean.double()).diagonal().clamp(min=0).sqrt()


def covariance(statistics: LayerStatistics, groups: list[list[int]], centre: Tensor) -> Tensor:
    """[K, K] about the centre [T, K] of each group. Raises ValueError where calibration kept smaller blocks."""
    moment = rounding_hessian(statistics, groups, centre, None, 1)
    if moment is None or len(moment) > 1:
        raise ValueError("planting a drift needs the whole covariance of a layer's input; raise calibrate's limit")
    return moment[0]


def with_ridge(moment: Tensor) -> Tensor:
    return moment + RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
