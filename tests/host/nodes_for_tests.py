"""Nodes that only the host tests use; conftest copies this file into custom_nodes before the server starts."""

import copy
import gc
import json
from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from torch.multiprocessing.reductions import StorageWeakRef

TINY_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 64,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
}


class Trace:
    """Writes [sigma, group indices, fractions] of every model call, as the model left them, to a file."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "trace"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - the host's name
        return {"required": {"model": ("MODEL",), "name": ("STRING", {})}}

    def trace(self, model, name):
        path = Path(folder_paths.get_output_directory()) / "traces" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("")

        def record(executor, x, t, *args, **kwargs):
            output = executor(x, t, *args, **kwargs)
            state = executor.class_obj.dit_quant_state
            with path.open("a") as file:
                file.write(json.dumps([float(t[0]), state.index.tolist(), state.fraction.tolist()]) + "\n")
            return output

        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "dit_quant_test_trace", record)
        return (clone,)


class Wishes:
    """Writes the backends that the layers of a MODEL ask for, without repeats, to a file."""

    RETURN_TYPES = ()
    FUNCTION = "write"
    CATEGORY = "tests"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "name": ("STRING", {})}}

    def write(self, model, name):
        modules = model.model.diffusion_model.modules()
        wishes = sorted({module.backend for module in modules if getattr(module, "timestep_state", None)})
        folder = Path(folder_paths.get_output_directory()) / "wishes"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(wishes))
        return ()


class Again:
    """Hands a MODEL on; another `nonce` is another input for the host's cache of outputs."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "again"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "nonce": ("INT", {})}}

    def again(self, model, nonce):
        return (model,)


class Rebuild:
    """A clone with a model of its own, made by the loader's factory: what compiled and multi-GPU copies do."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "rebuild"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",)}}

    def rebuild(self, model):
        clone = model.clone(force_deepcopy=True)
        if clone.model is model.model:
            raise RuntimeError("the clone shares its model with the original")
        return (clone,)


class Moved:
    """Does to a quantized MODEL's weights what moving it to a GPU does: others take their place. Raises where that
    frees nothing."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "move"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",)}}

    def move(self, model):
        layers = [m for m in model.model.diffusion_model.modules() if hasattr(getattr(m, "weight", None), "_qdata")]
        before = [StorageWeakRef(m.weight._qdata.untyped_storage()) for m in layers]
        for m in layers:
            m.weight = torch.nn.Parameter(m.weight.clone(), requires_grad=False)
        gc.collect()
        kept = sum(not codes.expired() for codes in before)
        if not layers or kept:
            raise RuntimeError(f"{kept} of {len(layers)} weights are still in memory")
        return (model,)


class NoGradient:
    """A MODEL with a block that refuses to run under autograd, or computes something else there."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "factor": ("FLOAT", {"default": 0.0})}}

    def patch(self, model, factor):
        layer = model.model.diffusion_model.final_layer
        forward = type(layer).forward.__get__(layer)  # not what another prompt has patched in

        def call(*args, **kwargs):
            if torch.is_inference_mode_enabled():
                return forward(*args, **kwargs)
            if factor == 0:
                raise RuntimeError("this model knows no gradients")
            return factor * forward(*args, **kwargs)

        clone = model.clone()
        clone.add_object_patch("diffusion_model.final_layer.forward", call)
        return (clone,)


class Holder:
    """A MODEL whose wrapper keeps the network that it was made for, in the way of TeaCache."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        clone = model.clone()
        network = clone.get_model_object("diffusion_model")

        def wrapper(call, options):
            assert network is not None
            return call(options["input"], options["timestep"], **options["c"])

        clone.set_model_unet_function_wrapper(wrapper)
        return (clone,)


class InputScaled:
    """A copy of a MODEL with a layer that multiplies its input, as checkpoints of ModelOpt have them."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "build"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "name": ("STRING", {})}}

    def build(self, model, name):
        clone = model.clone()
        clone.model = copy.copy(model.model)
        clone.model._modules = model.model._modules | {"diffusion_model": copy.deepcopy(model.model.diffusion_model)}
        layer = clone.model.diffusion_model.get_submodule(name)
        layer.pre_quant_scale = torch.ones(layer.in_features)
        return (clone,)


class Scaled:
    """A MODEL with one parameter patched, in the way of a LoRA."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "name": ("STRING", {}), "factor": ("FLOAT", {"default": 1.0})}}

    def patch(self, model, name, factor):
        clone = model.clone()
        value = dict(model.model.diffusion_model.named_parameters())[name]
        clone.add_patches({f"diffusion_model.{name}": ("diff", (torch.ones(value.shape),))}, factor)
        return (clone,)


class Latent:
    """A LATENT of one value."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "paint"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"value": ("FLOAT", {"default": 0.0})}}

    def paint(self, value):
        return ({"samples": torch.full((1, 16, 8, 8), value)},)


class TinyUNet:
    """A MODEL of convolutions, with random weights."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "build"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {}}

    def build(self):
        config = comfy.supported_models.SD15(dict(TINY_UNET))
        config.custom_operations = comfy.ops.manual_cast
        model = comfy.model_base.BaseModel(config)
        device = comfy.model_management.get_torch_device()
        return (comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device),)


NODE_CLASS_MAPPINGS = {
    "DiTQuantTestTrace": Trace,
    "DiTQuantTestWishes": Wishes,
    "DiTQuantTestAgain": Again,
    "DiTQuantTestRebuild": Rebuild,
    "DiTQuantTestMoved": Moved,
    "DiTQuantTestNoGradient": NoGradient,
    "DiTQuantTestHolder": Holder,
    "DiTQuantTestInputScaled": InputScaled,
    "DiTQuantTestScaled": Scaled,
    "DiTQuantTestLatent": Latent,
    "DiTQuantTestUNet": TinyUNet,
}
