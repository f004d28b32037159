"""Whole DiTs with random weights, built by the host's own classes: their speed is that of trained ones.

Imported by end_to_end_worker.py only, where the host is importable.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HostModel:
    """How a DiT is made and what it is sampled with.

    channels and ratio of its latent; context: width and tokens of the text; pooled: width of the pooled text or 0.
    """

    build: Callable[[int, torch.dtype], torch.nn.Module]
    depth: int
    channels: int
    ratio: int
    context: tuple[int, int]
    pooled: int = 0


def _pixart(depth: int, dtype: torch.dtype) -> torch.nn.Module:
    """PixArt-Sigma: width 1152, feed-forward 4608, cross attention."""
    import comfy.ops
    from comfy.ldm.pixart.pixartms import PixArtMS

    return PixArtMS(
        depth=depth, micro_condition=False, model_max_length=300, dtype=dtype, operations=comfy.ops.disable_weight_init
    )


def _sd35_medium(depth: int, dtype: torch.dtype) -> torch.nn.Module:
    """The SD3.5-Medium layout without its second attention: width 64 depth, joint attention."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    width = 64 * depth
    return OpenAISignatureMMDITWrapper(
        input_size=None,
        patch_size=2,
        in_channels=16,
        depth=depth,
        pos_embed_max_size=192,
        num_patches=192 * 192,
        adm_in_channels=2048,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": 4096, "out_features": width},
        },
        qk_norm="rms",
        pos_embed_scaling_factor=None,
        dtype=dtype,
        operations=comfy.ops.disable_weight_init,
    )


def _flux(depth: int, dtype: torch.dtype) -> torch.nn.Module:
    """FLUX.1: width 3072; two single blocks for every double block."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    return Flux(
        in_channels=16,
        out_channels=16,
        patch_size=2,
        vec_in_dim=768,
        context_in_dim=4096,
        hidden_size=3072,
        mlp_ratio=4.0,
        num_heads=24,
        depth=depth,
        depth_single_blocks=2 * depth,
        axes_dim=[16, 56, 56],
        theta=10000,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        dtype=dtype,
        operations=comfy.ops.disable_weight_init,
    )


MODELS = {
    "pixart": HostModel(_pixart, depth=28, channels=4, ratio=8, context=(4096, 300)),
    "sd3.5-medium": HostModel(_sd35_medium, depth=24, channels=16, ratio=8, context=(4096, 154), pooled=2048),
    "flux": HostModel(_flux, depth=19, channels=16, ratio=8, context=(4096, 256), pooled=768),
}


@torch.no_grad()
def random_state(name: str, depth: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict of a model whose weights are drawn so that activations neither vanish nor explode."""
    model = MODELS[name].build(depth, dtype)
    generator = torch.Generator().manual_seed(0)
    for key, value in model.named_parameters():
        if value.dim() > 1:
            value.normal_(0, 0.5 * value[0].numel() ** -0.5, generator=generator)
        else:
            value.fill_(1.0 if "norm" in key and key.endswith(("weight", "scale")) else 0.01)
    state = {key: value.detach() for key, value in model.state_dict().items()}
    # as in the published files: the host reads the trained side of 64 patches off it
    return state | ({"pos_embed": torch.zeros(1, 64 * 64, 1152)} if name == "pixart" else {})
