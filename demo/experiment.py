"""Calibrate, quantize and compare the emoji DiT: the steps that the demo, tests and benchmarks share."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..quant_core.architectures import FAMILIES, family_of
from ..quant_core.calibration import Calibration, finish
from ..quant_core.collector import Collector
from ..quant_core.convert import install, quantize_model
from ..quant_core.fingerprint import tensor_fingerprint
from ..quant_core.report import QuantReport
from ..quant_core.schemes import QuantScheme
from ..quant_core.timesteps import TimestepState
from .emoji_dit import EmojiDiT
from .prompts import PromptTable
from .sampler import guided_velocity, sample, seeded_noise, shifted_sigmas

COVARIANCE_LIMIT = 1024


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; the same in calibration and evaluation but for prompts and seeds."""

    steps: int = 28
    cfg: float = 3.0
    shift: float = 3.0
    batch: int = 8


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts and one noise per prompt."""

    names: tuple[str, ...]
    context: Tensor
    pooled: Tensor
    noise: Tensor
    empty: tuple[Tensor, Tensor]


def prepare(table: PromptTable, names: list[str], first_seed: int, dtype: torch.dtype = torch.float32) -> Prompts:
    context, pooled = table.encode(names)
    empty = tuple(part.to(dtype) for part in table.encode([""]))
    noise = seeded_noise(list(range(first_seed, first_seed + len(names))))
    return Prompts(tuple(names), context.to(dtype), pooled.to(dtype), noise.to(dtype), empty)  # type: ignore[arg-type]


def split_prompts(table: PromptTable, calibration: int, evaluation: int) -> tuple[list[str], list[str]]:
    """Disjoint, evenly spread over the trained prompts: calibration takes even positions, evaluation odd ones."""
    even, odd = table.prompts[0::2], table.prompts[1::2]
    pick = lambda names, n: [names[i * len(names) // n] for i in range(n)]  # noqa: E731
    return pick(even, calibration), pick(odd, evaluation)


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every Linear of the model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def draw(
    model: EmojiDiT, prompts: Prompts, sampling: Sampling, before_step: Callable[[float], None] | None = None
) -> Tensor:
    """Final latents [B, 16, h, w], in batches."""
    latents = []
    for i in range(0, len(prompts.names), sampling.batch):
        part = slice(i, i + sampling.batch)
        condition = (prompts.context[part], prompts.pooled[part])
        latents.append(
            sample(
                model,
                prompts.noise[part],
                condition,
                prompts.empty,
                steps=sampling.steps,
                cfg=sampling.cfg,
                shift=sampling.shift,
                before_step=before_step,
            )
        )
    return torch.cat(latents)


def calibrate(model: EmojiDiT, prompts: Prompts, sampling: Sampling, covariance: int | None = COVARIANCE_LIMIT):
    """Samples the prompts with hooked layers -> (Calibration, latents)."""
    layers = quantizable(model)[0]
    collector = Collector({n: m.in_features for n, m in layers.items()}, flow=True, covariance=covariance)
    with collector.attached(layers):
        latents = draw(model, prompts, sampling, before_step=collector.at)
    fingerprints = {name: tensor_fingerprint(module.weight) for name, module in layers.items()}
    return finish(collector, fingerprints, {"prompts": list(prompts.names), "steps": sampling.steps}), latents


def quantizable(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Linears to round, and those to keep with the reason."""
    family = family_of(model.state_dict(), FAMILIES)
    assert family is not None
    found, kept = {}, {}
    for name, module in block_linears(model).items():
        reason = family.reason_to_keep(name)
        if reason is None:
            found[name] = module
        else:
            kept[name] = reason
    return found, kept


def quantized_copy(
    model: EmojiDiT, calibration: Calibration | None, scheme: QuantScheme
) -> tuple[EmojiDiT, TimestepState, QuantReport]:
    """A rounded copy of the model, the state that selects its groups, and the report."""
    layers, kept = quantizable(model)
    weights = {name: (lambda module=module: module.weight.detach()) for name, module in layers.items()}
    family = family_of(model.state_dict(), FAMILIES)
    rounded, report = quantize_model(weights, scheme=scheme, calibration=calibration, family=family, skip=kept)
    twin = copy.deepcopy(model)
    return twin, install(twin, rounded), report


def update_with(state: TimestepState) -> Callable[[float], None]:
    return lambda sigma: state.update(torch.tensor([sigma]))


@torch.inference_mode()
def reference_velocities(model: EmojiDiT, prompts: Prompts, sampling: Sampling, probes: int = 6) -> list[tuple]:
    """(sigma, x, guided velocity) at evenly spread steps of the full-precision trajectory."""
    x, found = prompts.noise, []
    sigmas = shifted_sigmas(sampling.steps, sampling.shift).tolist()
    chosen = {round(i * (sampling.steps - 1) / (probes - 1)) for i in range(probes)}
    condition = (prompts.context, prompts.pooled)
    for step, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        velocity = guided_velocity(model, x, sigma, condition, prompts.empty, sampling.cfg)
        if step in chosen:
            found.append((sigma, x, velocity))
        x = x + (following - sigma) * velocity
    return found


@torch.inference_mode()
def velocity_error(
    model: EmojiDiT, state: TimestepState | None, prompts: Prompts, sampling: Sampling, reference
) -> float:
    """Relative L2 of the guided velocity on the full-precision trajectory, mean over the probed steps."""
    errors = []
    for sigma, x, expected in reference:
        if state is not None:
            state.update(torch.tensor([sigma]))
        velocity = guided_velocity(model, x, sigma, (prompts.context, prompts.pooled), prompts.empty, sampling.cfg)
        errors.append(float((velocity - expected).norm() / expected.norm()))
    return sum(errors) / len(errors)
