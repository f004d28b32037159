"""What other nodes attached to a MODEL that cannot come along: refused with the remedy, never lost in silence."""

import comfy.hooks
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

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


def uncompiled(patcher: ModelPatcher) -> ModelPatcher:
    """A clone that runs as written: compiled code has no place for what calibration attaches."""
    clone = patcher.clone()
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILED)
    return clone


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
