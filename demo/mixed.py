"""Mixed precision on the emoji DiT: gains of its layers, and a copy that fits a number of bytes."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from ..quant_core import sensitivity
from ..quant_core.architectures import FAMILIES, family_of
from ..quant_core.calibration import Calibration
from ..quant_core.convert import install, quantize_model
from ..quant_core.mixed import plan_formats
from ..quant_core.report import QuantReport
from ..quant_core.schemes import PRESETS
from ..quant_core.sensitivity import GAIN_PROMPTS, GAIN_STEPS
from ..quant_core.timesteps import TimestepState
from .experiment import Prompts, Sampling, draw, quantizable


@torch.inference_mode()
def measure_gains(model: nn.Module, prompts: Prompts, sampling: Sampling) -> dict[str, float]:
    """Gain of every quantizable layer, on a few steps of the first prompts."""
    first = slice(GAIN_PROMPTS)
    prompts = replace(
        prompts,
        names=prompts.names[first],
        context=prompts.context[first],
        pooled=prompts.pooled[first],
        noise=prompts.noise[first],
    )
    sampling = replace(sampling, steps=min(GAIN_STEPS, sampling.steps))
    layers, _ = quantizable(model)
    weights = {name: module.weight.detach for name, module in layers.items()}
    return dict(sensitivity.measure_gains(layers, weights, lambda: draw(model, prompts, sampling), {}))


def mixed_copy(
    model: nn.Module, calibration: Calibration, gains: Mapping[str, float], budget: int, name: str = "mixed"
) -> tuple[nn.Module, TimestepState, QuantReport]:
    """As `quantized_copy`, within `budget` bytes for the quantizable layers, tables counted. Raises OverBudget."""
    calibration = replace(calibration, gains=gains)
    layers, kept = quantizable(model)
    weights = {name: module.weight.detach for name, module in layers.items()}
    plan = plan_formats(weights, calibration, budget)
    rounded, report = quantize_model(
        weights,
        scheme=PRESETS["W8A8"].with_options(name=name),
        schemes=plan.schemes,
        calibration=calibration,
        family=family_of(model.state_dict(), FAMILIES),
        skip=kept,
    )
    twin = copy.deepcopy(model)
    return twin, install(twin, rounded), plan.report(report)
