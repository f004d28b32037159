"""A Hessian in which the timesteps count unequally: second moments collected with a weight per step."""

from collections.abc import Iterable
from dataclasses import replace

from dit_quant.demo.experiment import Prompts, Sampling, draw
from dit_quant.demo.sampler import shifted_sigmas
from dit_quant.quant_core.observers import LayerStatistics, covariance_block
from torch import Tensor, nn


def step_lengths(sampling: Sampling, power: float) -> Tensor:
    """(sigma_t - sigma_(t+1))^p, mean 1: [T] float64. An error in step t moves the final latent by sigma's step."""
    lengths = -shifted_sigmas(sampling.steps, sampling.shift).double().diff()
    weights = lengths**power
    return weights / weights.mean()


def weighted_moments(
    model: nn.Module, prompts: Prompts, sampling: Sampling, names: Iterable[str], weights: Tensor, limit: int
) -> dict[str, Tensor]:
    """sum_t w_t x xᵀ / sum_t w_t over the tokens of a sampling run, for each row of weights [P, T].

    -> [P, B, b, b] float64 by layer, in the blocks that calibration keeps with covariance `limit`.
    """
    sigmas = shifted_sigmas(sampling.steps, sampling.shift).tolist()
    totals: dict[str, Tensor] = {}
    mass: dict[str, Tensor] = {}
    now = weights[:, 0]

    def at(sigma: float) -> None:
        nonlocal now
        now = weights[:, sigmas.index(sigma)]

    def hook(name: str):
        def before(module: nn.Linear, args: tuple) -> None:
            width = covariance_block(module.in_features, limit)
            blocks = args[0].reshape(-1, module.in_features).unflatten(1, (-1, width)).transpose(0, 1)  # [B, M, b]
            outer = (blocks.transpose(1, 2) @ blocks).double()
            totals[name] = totals.get(name, 0) + now[:, None, None, None] * outer
            mass[name] = mass.get(name, 0) + now * blocks.shape[1]

        return before

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        draw(model, prompts, sampling, before_step=at)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / mass[name][:, None, None, None]).clone() for name, total in totals.items()}


def weighted_statistics(statistics: LayerStatistics, moment: Tensor, weights: Tensor) -> LayerStatistics:
    """Tokens of timestep t count weights[t] times; moment [B, b, b] is weighted already."""
    return replace(statistics, count=statistics.count * weights, second_moment=moment)
