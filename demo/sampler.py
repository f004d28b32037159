"""Euler sampling of the rectified flow, with classifier-free guidance and SD3's shifted schedule."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

# velocity(x, sigma, context, pooled) -> velocity
Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def shifted_sigmas(steps: int, shift: float = 3.0) -> Tensor:
    """steps + 1 noise levels from 1 to 0: sigma = shift t / (1 + (shift - 1) t) (arXiv 2403.03206, eq. 23)."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def guided_velocity(model: Velocity, x: Tensor, sigma: float, prompt: tuple, empty: tuple, cfg: float) -> Tensor:
    """One batched call for the conditional and the unconditional branch."""
    batch = x.shape[0]
    context = torch.cat([prompt[0], empty[0].expand(batch, -1, -1)])
    pooled = torch.cat([prompt[1], empty[1].expand(batch, -1)])
    level = torch.full((2 * batch,), sigma, dtype=x.dtype)
    cond, uncond = model(torch.cat([x, x]), level, context, pooled).chunk(2)
    return uncond + cfg * (cond - uncond)


@torch.inference_mode()
def sample(
    model: Velocity,
    noise: Tensor,
    prompt: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor],
    *,
    steps: int = 28,
    cfg: float = 3.0,
    shift: float = 3.0,
    before_step: Callable[[float], None] | None = None,
) -> Tensor:
    """noise [B, 16, h, w] -> latents. `before_step(sigma)` lets a caller set the timestep group."""
    x = noise
    sigmas = shifted_sigmas(steps, shift).tolist()
    for sigma, following in itertools.pairwise(sigmas):
        if before_step is not None:
            before_step(sigma)
        x = x + (following - sigma) * guided_velocity(model, x, sigma, prompt, empty, cfg)
    return x


def seeded_noise(seeds: list[int], side: int = 16, channels: int = 16) -> Tensor:
    """One independent draw per seed: [len(seeds), channels, side, side] fp32."""
    return torch.stack(
        [torch.randn(channels, side, side, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
