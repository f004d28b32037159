"""The latents that calibration prompts start from."""

from collections.abc import Mapping

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher


def of_size(patcher: ModelPatcher, size: tuple[int, int]) -> torch.Tensor:
    """Zeros in the model's own latent shape for a picture of `size`, or one frame of a video."""
    latent_format = patcher.get_model_object("latent_format")
    ratio = getattr(latent_format, "spacial_downscale_ratio", 8)
    width, height = size
    zeros = torch.zeros(1, latent_format.latent_channels, max(height // ratio, 1), max(width // ratio, 1))
    return comfy.sample.fix_empty_latent_channels(patcher, zeros)


def first_of(patcher: ModelPatcher, latent: Mapping) -> torch.Tensor:
    """A LATENT as KSampler takes it, but its first entry alone. Latents of several media at once stay as they are."""
    ratios = (latent.get(f"downscale_ratio_{kind}") for kind in ("spacial", "temporal"))
    samples = comfy.sample.fix_empty_latent_channels(patcher, latent["samples"], *ratios)
    return samples if samples.is_nested else samples[:1]


def flat(latent: torch.Tensor) -> torch.Tensor:
    """All of its numbers, of every medium."""
    return torch.cat([part.flatten() for part in (latent.unbind() if latent.is_nested else [latent])])
