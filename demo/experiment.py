"""Calibrate, quantize and compare the emoji DiT: the steps that the demo, tests and benchmarks share."""

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..quant_core.architectures import FAMILIES, family_of, select_layers
from ..quant_core.calibration import Calibration, finish
from ..quant_core.collector import MAX_BINS, Collector
from ..quant_core.convert import CannotQuantize, install, quantize_model
from ..quant_core.curvature import CurvatureCollector
from ..quant_core.fingerprint import tensor_fingerprint
from ..quant_core.metrics import relative_l2
from ..quant_core.report import QuantReport
from ..quant_core.schemes import QuantScheme
from ..quant_core.timesteps import TimestepState
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
    """Encoded prompts and one noise per prompt; `empty` is the encoded empty prompt."""

    names: tuple[str, ...]
    context: Tensor
    pooled: Tensor
    noise: Tensor
    empty: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Probe:
    """A point of the full-precision trajectory: noise level, x [B, 16, h, w], and the guided velocity there."""

    sigma: float
    x: Tensor
    velocity: Tensor


def prepare(table: PromptTable, names: list[str], first_seed: int, dtype: torch.dtype = torch.float32) -> Prompts:
    """Prompt i starts from the noise of seed `first_seed + i`."""
    context, pooled = table.encode(names)
    empty_context, empty_pooled = table.encode([""])
    noise = seeded_noise(list(range(first_seed, first_seed + len(names))))
    empty = (empty_context.to(dtype), empty_pooled.to(dtype))
    return Prompts(tuple(names), context.to(dtype), pooled.to(dtype), noise.to(dtype), empty)


def split_prompts(table: PromptTable, calibration: int, evaluation: int) -> tuple[list[str], list[str]]:
    """Disjoint, evenly spread over the trained prompts: calibration takes even positions, evaluation odd ones.

    Raises ValueError when the table has fewer than asked for.
    """
    trained = list(dict.fromkeys(table.prompts))
    return spread(trained[0::2], calibration, "calibration"), spread(trained[1::2], evaluation, "evaluation")


def spread(names: list[str], count: int, use: str) -> list[str]:
    """`count` names at even distances. Raises ValueError, naming the use, when there are fewer."""
    if not 0 <= count <= len(names):
        raise ValueError(f"{count} {use} prompts were asked for, the word table has {len(names)} for that use")
    return [names[i * len(names) // count] for i in range(count)]


def every_linear(model: nn.Module) -> dict[str, nn.Linear]:
    """Every Linear of the model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def draw(
    model: Callable[..., Tensor],
    prompts: Prompts,
    sampling: Sampling,
    before_step: Callable[[float], None] | None = None,
) -> Tensor:
    """Final latents [B, 16, h, w], in batches."""
    latents = []
    for i in range(0, len(prompts.names), sampling.batch):
        part = slice(i, i + sampling.batch)
        latents.append(
            sample(
                model,
                prompts.noise[part],
                (prompts.context[part], prompts.pooled[part]),
                prompts.empty,
                steps=sampling.steps,
                cfg=sampling.cfg,
                shift=sampling.shift,
                before_step=before_step,
            )
        )
    return torch.cat(latents)


def timed_draw(
    model: nn.Module, prompts: Prompts, sampling: Sampling, before_step: Callable[[float], None] | None = None
) -> tuple[Tensor, float]:
    """As `draw`, and the median seconds of one sampling step of one batch."""
    marks: list[float] = []

    def mark(sigma: float) -> None:
        marks.append(time.perf_counter())
        if before_step is not None:
            before_step(sigma)

    latents = draw(model, prompts, sampling, mark)
    marks.append(time.perf_counter())
    return latents, statistics.median(after - before for before, after in itertools.pairwise(marks))


def calibrate(
    model: nn.Module, prompts: Prompts, sampling: Sampling, covariance: int | None = COVARIANCE_LIMIT
) -> tuple[Calibration, Tensor]:
    """Samples the prompts with hooked layers -> (Calibration, latents)."""
    layers, _ = quantizable(model)
    bins = min(sampling.steps, MAX_BINS)
    inputs = Collector({n: m.in_features for n, m in layers.items()}, flow=True, covariance=covariance, max_bins=bins)
    outputs = CurvatureCollector({n: m.out_features for n, m in layers.items()})
    with inputs.attached(layers), outputs.attached(layers):
        latents = draw(model if covariance is None else probed(model, outputs), prompts, sampling, inputs.at)
    fingerprints = {name: tensor_fingerprint(module.weight) for name, module in layers.items()}
    nbytes = inputs.nbytes + outputs.nbytes
    settings = {"prompts": list(prompts.names), "steps": sampling.steps, "statistics_bytes": nbytes}
    return finish(inputs, fingerprints, settings, curvature=outputs.moments), latents


def probed(model: Callable[..., Tensor], curvature: CurvatureCollector) -> Callable[..., Tensor]:
    """The model, some of whose calls also measure the curvature at its layers."""

    def call(*args: Tensor) -> Tensor:
        if not curvature.due():
            return model(*args)
        # clones made outside inference mode are ordinary tensors
        return curvature.probe(lambda: model(*[value.clone() for value in args]))

    return call


def quantizable(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Linears to round, and those to keep with the reason. Raises CannotQuantize for an unknown family."""
    family = family_of(model.state_dict(), FAMILIES)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise CannotQuantize(f"{type(model).__name__} belongs to no known DiT family; the pack knows {known}")
    linears = every_linear(model)
    features = {name: (module.out_features, module.in_features) for name, module in linears.items()}
    chosen, kept, _ = select_layers(features, model.state_dict())
    return {name: linears[name] for name in chosen}, kept


def quantized_copy(
    model: nn.Module, calibration: Calibration | None, scheme: QuantScheme
) -> tuple[nn.Module, TimestepState, QuantReport]:
    """A rounded copy of the model, the state that selects its groups, and the report."""
    layers, kept = quantizable(model)
    weights = {name: module.weight.detach for name, module in layers.items()}
    family = family_of(model.state_dict(), FAMILIES)
    rounded, report = quantize_model(weights, scheme=scheme, calibration=calibration, family=family, skip=kept)
    twin = copy.deepcopy(model)
    return twin, install(twin, rounded), report


def update_with(state: TimestepState) -> Callable[[float], None]:
    """The `before_step` of a quantized model: selects its groups by the value of sigma."""

    def select(sigma: float) -> None:
        state.update(torch.tensor([sigma]))

    return select


@torch.inference_mode()
def reference_velocities(model: nn.Module, prompts: Prompts, sampling: Sampling, probes: int = 6) -> list[Probe]:
    """The full-precision trajectory at evenly spread steps, the first and the last included."""
    if probes < 2:
        raise ValueError(f"{probes} probes cannot hold the first and the last step; ask for 2 or more")
    chosen = {round(i * (sampling.steps - 1) / (probes - 1)) for i in range(probes)}
    condition = (prompts.context, prompts.pooled)
    x, found = prompts.noise, []
    for step, (sigma, following) in enumerate(
        itertools.pairwise(shifted_sigmas(sampling.steps, sampling.shift).tolist())
    ):
        velocity = guided_velocity(model, x, sigma, condition, prompts.empty, sampling.cfg)
        if step in chosen:
            found.append(Probe(sigma, x, velocity))
        x = x + (following - sigma) * velocity
    return found


@torch.inference_mode()
def velocity_error(
    model: nn.Module, state: TimestepState | None, prompts: Prompts, sampling: Sampling, reference: list[Probe]
) -> float:
    """Relative L2 of the guided velocity on the full-precision trajectory, mean over the probed steps."""
    errors = []
    for probe in reference:
        if state is not None:
            state.update(torch.tensor([probe.sigma]))
        condition = (prompts.context, prompts.pooled)
        velocity = guided_velocity(model, probe.x, probe.sigma, condition, prompts.empty, sampling.cfg)
        errors.append(relative_l2(velocity, probe.velocity))
    return sum(errors) / len(errors)
