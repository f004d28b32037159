"""Run by the host's own interpreter in the host's folder: benchmarks' EmojiWan against the host's class, as JSON.

Also what the pack would round in every variant of Wan that the host knows, from models without memory.

usage: python compare_wan.py PACK_ROOT
"""

import json
from types import SimpleNamespace

from in_host import ROOT, bind

# isort: split
import comfy.latent_formats
import comfy.model_base  # imports every variant
import comfy.ops
import torch
from comfy.ldm.wan.model import VaceWanModel, WanModel
from comfy.nested_tensor import NestedTensor
from dit_quant.nodes.host.latents import first_of, flat, of_size
from dit_quant.quant_core.architectures import select_layers
from dit_quant.quant_core.metrics import relative_l2

emoji_wan = bind("emoji_wan", ROOT / "benchmarks" / "emoji_wan.py")
SHAPE = {"dim": 256, "ffn_dim": 1024, "num_heads": 2, "text_dim": 64, "in_dim": 16, "out_dim": 16}


def build(variant: type[WanModel], **options) -> WanModel:
    return variant(**SHAPE, **options, operations=comfy.ops.disable_weight_init)


def subclasses(variant: type) -> list[type]:
    return [found for child in variant.__subclasses__() for found in (child, *subclasses(child))]


@torch.inference_mode()
def outputs() -> dict[str, float]:
    """Relative difference of one call, by picture size and noise level, for random weights of every parameter."""
    torch.manual_seed(0)
    ours = emoji_wan.EmojiWan().eval()
    for parameter in ours.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    host = build(WanModel, num_layers=ours.config.depth, dtype=torch.float32).eval()
    host.load_state_dict(ours.state_dict(), strict=True)
    errors = {}
    for shape in ((16, 16), (12, 20), (8, 8)):
        for sigma in (1.0, 0.6, 0.05):
            x, context = torch.randn(3, 16, *shape), torch.randn(3, 8, 64)
            level = torch.full((3,), sigma)
            expected = host(x[:, :, None], level * 1000, context)[:, :, 0]
            errors[f"{shape} {sigma}"] = relative_l2(expected, ours(x, level, context, None))
    return errors


def rounded(model: WanModel) -> dict:
    """Family of a model and the roles of its chosen layers; names with the block number as N."""
    linears = {name: m for name, m in model.named_modules() if hasattr(m, "in_features")}
    shapes = {name: (m.out_features, m.in_features) for name, m in linears.items()}
    chosen, kept, family = select_layers(shapes, [name for name, _ in model.named_parameters()])
    split = {name: family.split(name) for name in chosen}
    return {
        "family": family.name,
        "roles": {
            f"{block.split('.')[0]}.N.{rest}": family.role(f"{block}.{rest}").value for block, rest in split.values()
        },
        "kept": sorted(kept),
    }


def latents() -> dict[str, list]:
    """Shapes that calibration starts from: sizes, and LATENTs of a video and of sound beside it."""
    formats = {"latent_format": comfy.latent_formats.Wan21()}
    patcher = SimpleNamespace(get_model_object=formats.get)
    video = {"samples": torch.zeros(2, 16, 21, 60, 104)}
    both = NestedTensor([torch.zeros(1, 128, 5, 4, 4), torch.zeros(1, 8, 20, 16)])
    return {
        "size": list(of_size(patcher, (832, 480)).shape),
        "video": list(first_of(patcher, video).shape),
        "both": [list(part.shape) for part in first_of(patcher, {"samples": both}).unbind()],
        "flat": [flat(both).numel(), flat(video["samples"]).numel()],
    }


def main() -> None:
    options = {"device": "meta", "num_layers": 5}
    variants = {"t2v": build(WanModel, **options), "i2v": build(WanModel, model_type="i2v", **options)}
    for variant in subclasses(WanModel):
        more = {"vace_layers": 2, "vace_in_dim": 96} if variant is VaceWanModel else {}
        variants[variant.__name__] = build(variant, **options, **more)
    found = {name: rounded(model) for name, model in variants.items()}
    print(json.dumps({"errors": outputs(), "variants": found, "latents": latents()}))


main()
