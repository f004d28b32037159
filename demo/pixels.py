"""Pictures as space-to-depth latents: 32x32 RGBA in -1..1 <-> [16, 16, 16]. No VAE is needed."""

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


def to_latent(rgba: Tensor) -> Tensor:
    """[B, 4, 32, 32] in 0..1 -> [B, 16, 16, 16] in -1..1."""
    return pixel_unshuffle(rgba * 2 - 1, 2)


def to_rgb(latent: Tensor) -> Tensor:
    """[B, 16, h, w] -> [B, 3, 2h, 2w] in 0..1, over white."""
    rgba = (pixel_shuffle(latent.float(), 2) / 2 + 0.5).clamp(0, 1)
    return rgba[:, :3]
