"""From a state dict of quantized layers to a MODEL, by the host's own loader."""

import logging

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...quant_core.checkpoint import CONFIG_KEY
from ...quant_core.checkpoint import is_ours as config_is_ours
from ...quant_core.timesteps import TimestepState, distinct
from .attached import refuse_hook_loras
from .layout import is_ours, unwrap
from .ops import make_operations

log = logging.getLogger("dit_quant")
KEY = "dit_quant"
STATE = "dit_quant_state"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class CannotBuild(ValueError):
    """The host does not recognise the model; the message says what it saw."""


def quantized_names(state: dict[str, Tensor]) -> list[str]:
    """Layers of a state dict that are in our format."""
    suffix = f".{CONFIG_KEY}"
    return [key.removesuffix(suffix) for key, value in state.items() if key.endswith(suffix) and config_is_ours(value)]


def default_dtype(state: dict[str, Tensor], metadata: dict | None) -> torch.dtype:
    """The dtype the host would pick for this model on this machine, judged by its floating-point tensors."""
    floats = {key: value for key, value in state.items() if value.dtype in FLOATS and ".weight_" not in key}
    config = comfy.model_detection.model_config_from_unet(state, "", metadata=metadata)
    if config is None:
        raise CannotBuild("the host does not recognise this model; its ComfyUI may be too old for the family")
    return comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=list(config.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(floats),
    )


def build_model(
    state: dict[str, Tensor],
    metadata: dict | None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """state: the host's key names with our layers among them -> a ModelPatcher that sets its timestep group by itself.

    backend: a wish of this MODEL, see kernels/dispatch.py; it concerns the machine, so it is never saved.
    Raises CannotBuild when the host does not recognise the model.
    """
    names = quantized_names(state)
    dtype = default_dtype(state, metadata) if dtype is None else dtype
    options = {"custom_operations": make_operations(dtype), "dtype": dtype}
    # the host takes tensors out of the dictionary as it loads
    patcher = comfy.sd.load_diffusion_model_state_dict(
        dict(state), model_options=options, metadata=metadata, disable_dynamic=disable_dynamic
    )
    if patcher is None:
        raise CannotBuild("the host does not recognise this model; its ComfyUI may be too old for the family")
    attach_state(patcher, expected=len(names), backend=backend)
    return patcher


def attach_state(patcher: ModelPatcher, expected: int, backend: str) -> None:
    """Gives every quantized layer its slot in one TimestepState, kept on the BaseModel, and hooks its update."""
    layers = quantized_layers(patcher.model.diffusion_model)
    if len(layers) != expected:
        raise CannotBuild(f"{expected} quantized layers in the file, but the host's model took {len(layers)} of them")
    partitions = distinct([unwrap(module.weight).groups for module in layers.values()])
    state = TimestepState(partitions)
    for module in layers.values():
        module.timestep_state = state
        module.timestep_slot = partitions.index(unwrap(module.weight).groups)
        module.backend = backend
    setattr(patcher.model, STATE, state)
    refuse_hook_loras(patcher)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, select_group)


def quantized_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Modules of a diffusion model that hold our layout, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_ours(getattr(module, "_parameters", {}).get("weight"))
    }


def absent_from(patcher: ModelPatcher, state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that the model has and the state dict lacks: they would hold whatever was in memory."""
    model = patcher.model.diffusion_model
    wanted = {name for name, _ in model.named_parameters()}
    # the host makes the weight of a layer when it finds it
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}
    wanted |= {f"{name}.weight" for name, module in layers.items() if getattr(module, "weight", 0) is None}
    return sorted(wanted - set(state))


def select_group(executor, x, t, *args, **kwargs):
    """APPLY_MODEL wrapper: chooses the timestep group by the value of sigma, then runs the model.

    The state is looked up on the model that runs: clones, compiled and multi-GPU copies each have their own.
    """
    state: TimestepState | None = getattr(executor.class_obj, STATE, None)
    if state is not None:
        state.update(t)
    return executor(x, t, *args, **kwargs)
