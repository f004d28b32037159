"""Run by the host's own interpreter in the host's folder: curvatures of small models of the host's classes, as JSON.

Built in inference mode as the host's loaders do, and probed with checkpointed blocks; beside them the same model, made
of ordinary tensors, by plain autograd.

usage: python compare_probes.py PACK_ROOT
"""

import copy
import json
from types import SimpleNamespace

import in_host  # noqa: F401 - its work is done by importing it

# isort: split
import comfy.ops
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from dit_quant.nodes.host.probes import probing, training, unchanged_by_later_writes
from dit_quant.quant_core.architectures import select_layers
from dit_quant.quant_core.collector import Collector
from dit_quant.quant_core.curvature import CurvatureCollector
from dit_quant.quant_core.metrics import relative_l2

COMMON = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.manual_cast}


def flux():
    model = Flux(
        image_model="flux", in_channels=16, out_channels=16, vec_in_dim=64, context_in_dim=64, hidden_size=128,
        mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[16, 24, 24], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=True, txt_ids_dims=[], **COMMON,
    )  # fmt: skip
    return (
        model,
        (torch.randn(2, 16, 8, 8), torch.full((2,), 0.5), torch.randn(2, 5, 64)),
        {
            "y": torch.randn(2, 64),
            "guidance": torch.full((2,), 3.5),
        },
    )


def sd3():
    model = OpenAISignatureMMDITWrapper(
        input_size=None, in_channels=16, depth=2, adm_in_channels=64, pos_embed_max_size=16, num_patches=256,
        pos_embed_scaling_factor=None, qk_norm="rms", context_size=64,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
        **COMMON,
    )  # fmt: skip
    context, y = torch.randn(2, 5, 64), torch.randn(2, 64)
    return model, (torch.randn(2, 16, 8, 8), torch.full((2,), 500.0), context), {"y": y}


def wan():
    model = WanModel(dim=128, ffn_dim=256, num_heads=2, text_dim=64, in_dim=16, out_dim=16, num_layers=2, **COMMON)
    return model, (torch.randn(2, 16, 1, 8, 8), torch.full((2,), 500.0), torch.randn(2, 5, 64)), {}


def z_image():
    model = NextDiT(
        in_channels=16, dim=256, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4, multiple_of=32, qk_norm=True,
        cap_feat_dim=64, axes_dims=[16, 24, 24], axes_lens=[64, 64, 64], z_image_modulation=True, time_scale=1000.0,
        pad_tokens_multiple=32, **COMMON,
    )  # fmt: skip
    return model, (torch.randn(2, 16, 8, 8), torch.full((2,), 0.5), torch.randn(2, 5, 64)), {"num_tokens": 5}


def qwen_image():
    model = QwenImageTransformer2DModel(
        in_channels=64, num_layers=2, attention_head_dim=64, num_attention_heads=2, joint_attention_dim=64,
        axes_dims_rope=(16, 24, 24), **COMMON,
    )  # fmt: skip
    return model, (torch.randn(2, 16, 1, 8, 8), torch.full((2,), 0.5), torch.randn(2, 5, 64)), {}


def managed(model: torch.nn.Module) -> None:
    """What dynamic VRAM makes of the modules: their weights are copies on the card, with a signature."""
    for module in model.modules():
        if hasattr(module, "comfy_cast_weights") and getattr(module, "weight", None) is not None:
            module._v, module._v_signature = "memory", None


def weight_that_is_loaded(module, *args, offloadable=False, **options):
    """The host's cast_bias_weight for a module that dynamic VRAM manages: the real one wants a card."""
    if not hasattr(module, "_v"):
        return cast_bias_weight(module, *args, offloadable=offloadable, **options)
    if module._v_signature is None:
        bias = getattr(module, "bias", None)
        module._v_weight = module.weight.data.clone()
        module._v_bias = None if bias is None else bias.data.clone()
        module._v_signature = "there"
    given = module._v_weight, module._v_bias
    return (*given, (None, None, None)) if offloadable else given


cast_bias_weight = comfy.ops.cast_bias_weight
comfy.ops.cast_bias_weight = weight_that_is_loaded


def compared(build, dynamic: bool = False) -> dict:
    """Notes of a probe in inference mode, and how far its curvatures are from those of plain autograd."""
    torch.manual_seed(0)
    with torch.inference_mode():
        model, args, options = build()
        for value in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            value.copy_(0.1 * torch.randn_like(value))
        if dynamic:
            managed(model)
    linears = {name: m for name, m in model.named_modules() if hasattr(m, "in_features")}
    shapes = {name: (m.out_features, m.in_features) for name, m in linears.items()}
    chosen, _, _ = select_layers(shapes, [name for name, _ in model.named_parameters()])
    layers = {name: linears[name] for name in chosen}
    outputs = {name: shapes[name][0] for name in layers}

    notes: list[str] = []
    found = CurvatureCollector(outputs)
    inputs = Collector({name: shapes[name][1] for name in layers}, flow=True, covariance=None)
    inputs.at(0.5)
    patcher = SimpleNamespace(model=SimpleNamespace(diffusion_model=model))
    with torch.inference_mode(), found.attached(layers), inputs.attached(layers):
        expected = model(*args, **options)
        counted = {name: int(observer.count.sum()) for name, observer in inputs.observers.items()}
        probing(patcher, inputs, found, notes)(model, args, options, expected)
        again = {name: int(observer.count.sum()) for name, observer in inputs.observers.items()}
        after = model(*args, **options)

    twin = copy.deepcopy(model)
    for module in twin.modules():
        for key in ("_v", "_v_signature", "_v_weight", "_v_bias"):
            vars(module).pop(key, None)
        for store in (module._parameters, module._buffers):
            for key, value in store.items():
                if value is not None:
                    store[key] = value.clone()
    plain = CurvatureCollector(outputs)
    twins = {name: twin.get_submodule(name) for name in layers}
    ordinary = [value.clone() for value in args]
    more = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    with plain.attached(twins), training(), unchanged_by_later_writes():
        plain.probe(lambda: twin(*ordinary, **more))
    errors = {name: relative_l2(found.moments[name], plain.moments[name]) for name in found.moments}
    return {
        "notes": notes,
        "probes": found.probes,
        "missing": sorted(set(layers) - set(found.moments)),
        "layers": len(layers),
        "worst": max(errors.values(), default=None),
        "restored": all(value.is_inference() for value in model.parameters())
        and torch.equal(after, expected)
        and not any("forward" in vars(module) for module in model.modules()),
        "recorded_once": counted == again,
    }


FOUND = {build.__name__: compared(build) for build in (sd3, flux, wan, z_image, qwen_image)}
print(json.dumps(FOUND | {"wan, dynamic VRAM": compared(wan, dynamic=True)}))
