"""What other nodes attached to a MODEL that cannot come along: refused with the remedy, never lost in silence."""

import functools
import inspect
from collections.abc import Iterable, Mapping

import comfy.hooks
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...quant_core.identity import closed_over, defaults

KEY = "dit_quant"
# the host's names
COMPILED, MULTI_GPU, BYPASS = "torch.compile", "multigpu", "bypass_lora"
COMPUTE_DTYPE = {"manual_cast_dtype": "compute dtype"}


class CannotCarry(ValueError):
    """The message names what is attached and where to connect it instead."""


def refuse_bypass(patcher: ModelPatcher) -> None:
    """Raises CannotCarry for LoRAs that are no part of the weights: what reads the weights would not see them."""
    if patcher.injections.get(BYPASS):
        raise CannotCarry(
            "a bypass LoRA is connected, which is not in the weights; use Load LoRA in its place. Behind Quantize DiT "
            "a bypass LoRA works, but is not saved"
        )
    if others := [str(key) for key, found in patcher.injections.items() if found]:
        raise CannotCarry(
            f"another node puts {', '.join(others)} into the modules of this model, which is not in the weights; "
            "connect it behind Quantize DiT, where it works but is not saved"
        )


def refuse_copies(patcher: ModelPatcher) -> None:
    """Raises CannotCarry for nodes that hold the float model: they would run it in place of the quantized one."""
    if patcher.get_wrappers(WrappersMP.APPLY_MODEL, COMPILED):
        raise CannotCarry("this model is compiled; connect Quantize DiT before TorchCompileModel")
    if patcher.additional_models.get(MULTI_GPU):
        raise CannotCarry("this model has copies on other GPUs; connect Quantize DiT before the MultiGPU node")


def refuse_holders(patcher: ModelPatcher) -> None:
    """Raises CannotCarry where a node's function holds the float model or a part of it, to change or to run it: the
    quantized model would not notice, and the float one stay in memory."""
    parts = {id(patcher.model), *map(id, patcher.model.diffusion_model.modules())}
    options = dict(patcher.model_options)
    of_blocks = options.pop("transformer_options", {})
    for place, attached in {**options, **of_blocks, "wrappers": patcher.wrappers}.items():
        if holds(attached, parts):
            raise CannotCarry(
                f"another node works on the modules of this very model ({place}; TeaCache and its like do); connect it "
                "behind Quantize DiT"
            )


def holds(value: object, parts: set[int], depth: int = 6) -> bool:
    """Whether one of the objects of these ids is in `value`: in containers, and in what functions close over."""
    if id(value) in parts:
        return True
    if depth == 0 or value is None or isinstance(value, str | bytes | int | float | torch.Tensor | ModelPatcher | type):
        return False
    if isinstance(value, Mapping):
        within = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        within = list(value)
    elif isinstance(value, functools.partial):
        within = [value.func, *value.args, *value.keywords.values()]
    elif inspect.isroutine(value):
        within = [getattr(value, "__self__", None), *closed_over(value), *defaults(value)]
    elif callable(value) and not isinstance(value, torch.nn.Module):
        within = list(vars(value).values()) if hasattr(value, "__dict__") else []
    else:
        within = []
    return any(holds(each, parts, depth - 1) for each in within)


def uncompiled(patcher: ModelPatcher) -> ModelPatcher:
    """A clone that runs as written, on one GPU: compiled code and copies cannot have what calibration attaches."""
    clone = patcher.clone()
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILED)
    clone.remove_additional_models(MULTI_GPU)
    return clone


def refuse_hooks(conditionings: Iterable[list]) -> None:
    """Raises CannotCarry for hooked conditionings: with dynamic VRAM the host runs another copy of the model for them,
    which calibration does not see."""
    if any(extra.get("hooks") is not None for entries in conditionings for _, extra in entries):
        raise CannotCarry(
            "a hook is on one of the conditionings (Create Hook LoRA, for instance), which a quantized model cannot "
            "take; connect prompts without hooks, and use Load LoRA before Calibrate DiT"
        )


def refuse_hook_loras(patcher: ModelPatcher) -> None:
    """From here on LoRAs that a conditioning switches on and off are refused before they touch a weight: the host
    cannot take them off a quantized one again."""

    def refuse(patcher: ModelPatcher, hooks: comfy.hooks.HookGroup, *_) -> None:
        if patcher.hook_patches:
            raise CannotCarry(
                "a LoRA is hooked to a conditioning (Create Hook LoRA), which a quantized model cannot take on and off "
                "while it samples; use Load LoRA, before Calibrate DiT or behind Quantize DiT"
            )

    patcher.remove_callbacks_with_key(CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES, KEY)
    patcher.add_callback_with_key(CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES, KEY, refuse)


def not_in_a_file(patcher: ModelPatcher) -> list[str]:
    """Names of what is attached to the MODEL and is no part of its weights."""
    names = {COMPUTE_DTYPE.get(name, name) for name in patcher.object_patches}
    for kind, keys in patcher.wrappers.items():
        names |= {str(key or kind) for key, wrappers in keys.items() if wrappers and key != KEY}
    options = dict(patcher.model_options)
    for each in (options.pop("transformer_options", {}), options):
        names |= {str(name) for name, value in each.items() if value}
    return sorted(names)
