"""What will multiply a quantized MODEL's layers on this machine, and a warning where that is slow."""

import logging

import torch
from comfy.model_patcher import ModelPatcher

from ...quant_core.backend_report import LayerPlan, compare_largest, describe, plan_layers
from .build import FLOATS, quantized_layers
from .layout import unwrap

log = logging.getLogger("dit_quant")


def inference_dtype(patcher: ModelPatcher) -> torch.dtype:
    """The type in which the host computes the model's activations."""
    dtype = patcher.model.get_dtype_inference()
    return dtype if dtype in FLOATS else torch.bfloat16


def plan_backends(patcher: ModelPatcher, backend: str = "auto") -> tuple[dict[str, LayerPlan], list[str]]:
    """The backends of every layer on the device that the host will load the MODEL on, and lines for a report.

    The largest layer is timed, even on a fast backend: small layers on a fast card do not gain. Slower than full
    precision is a warning in the lines and in the log.
    """
    modules = quantized_layers(patcher.model.diffusion_model)
    layers = {name: unwrap(module.weight) for name, module in modules.items()}
    device, dtype = patcher.load_device, inference_dtype(patcher)
    comparison = compare_largest(layers, plan_layers(layers, device, dtype, backend), device, dtype, backend)
    plans = plan_layers(layers, device, dtype, backend)
    lines = describe(plans, device)
    for line in lines:
        log.info("%s", line)
    if comparison is not None:
        text = str(comparison)
        lines.append(text)
        log.log(logging.WARNING if comparison.is_slower else logging.INFO, "%s", text)
    return plans, lines
