"""How calibration prompts are sampled: by the host, from noise to where this model's part of the steps ends."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from .latents import first_of, of_size

SEEDS = 2**64
# as in the host's own nodes
TO_THE_END = 10000

# (step, denoised latent or None, x, total steps), as the host's samplers call it
Callback = Callable[[int, torch.Tensor, torch.Tensor, int], None]


@dataclass(frozen=True)
class Settings:
    """How the calibration prompts are sampled. sizes: (width, height) pairs in pixels, taken in turn; latent: a LATENT
    to start from instead.

    start, end: the first step that this model samples, and the first one that it does not any more; memory_gb: budget
    of the statistics; passes: how often every prompt may be sampled to stay within it; sensitivity: whether the gains
    of all layers are measured too; curvature: whether some calls run under autograd.
    """

    sizes: tuple[tuple[int, int], ...]
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    seed: int
    memory_gb: float
    passes: int = 1
    sensitivity: bool = False
    curvature: bool = True
    latent: Mapping | None = None
    start: int = 0
    end: int = TO_THE_END


def schedule(patcher: ModelPatcher, settings: Settings) -> torch.Tensor:
    """Sigmas of all steps and the one at their end, as KSampler makes them. Raises ValueError where none of the steps
    is this model's."""
    sampler = comfy.samplers.KSampler(
        patcher, settings.steps, patcher.load_device, settings.sampler, settings.scheduler, 1.0, patcher.model_options
    )
    steps = len(sampler.sigmas) - 1
    if settings.start >= min(settings.end, steps):
        raise ValueError(
            f"start_at_step {settings.start} leaves no step to calibrate of {steps} up to end_at_step {settings.end}; "
            "take the three numbers from the KSampler (Advanced) that this model will be connected to"
        )
    return sampler.sigmas


def spread(sigmas: torch.Tensor, steps: int) -> torch.Tensor:
    """So many steps over the same noise levels, or all where there are not as many."""
    last = len(sigmas) - 1
    steps = min(steps, last)
    return sigmas[[round(i * last / steps) for i in range(steps + 1)]]


@dataclass(frozen=True)
class Drawing:
    """One CONDITIONING per prompt for `patcher`, and what samples the steps before `settings.start`.

    sigmas: of the whole schedule; begun: the latents between the two, kept for further passes.
    """

    patcher: ModelPatcher
    before: ModelPatcher
    positive: list[list]
    negative: list
    settings: Settings
    sigmas: torch.Tensor
    begun: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def own(self) -> torch.Tensor:
        """Sigmas of this model's steps and the one at their end."""
        return self.sigmas[self.settings.start : self.settings.end + 1]

    def draw(
        self, patcher: ModelPatcher, i: int, sigmas: torch.Tensor, callback: Callback, earlier: Callback
    ) -> torch.Tensor:
        """The latent [1, ...] of prompt i where `sigmas` end, sampled by a clone of the model; earlier: callback of the
        steps before."""
        if self.settings.start == 0:
            return self._sample(patcher, i, *self._noise_and_latent(i), sigmas, callback)
        if i not in self.begun:
            steps = self.sigmas[: self.settings.start + 1]
            self.begun[i] = self._sample(self.before, i, *self._noise_and_latent(i), steps, earlier)
        # its noise is in it
        return self._sample(patcher, i, self.begun[i] * 0, self.begun[i], sigmas, callback)

    def _seed(self, i: int) -> int:
        return (self.settings.seed + i) % SEEDS

    def _noise_and_latent(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        settings = self.settings
        if settings.latent:
            latent = first_of(self.patcher, settings.latent)
        else:
            latent = of_size(self.patcher, settings.sizes[i % len(settings.sizes)])
        return comfy.sample.prepare_noise(latent, self._seed(i)), latent

    def _sample(
        self,
        patcher: ModelPatcher,
        i: int,
        noise: torch.Tensor,
        latent: torch.Tensor,
        sigmas: torch.Tensor,
        callback: Callback,
    ) -> torch.Tensor:
        settings = self.settings
        return comfy.sample.sample(
            patcher,
            noise,
            settings.steps,
            settings.cfg,
            settings.sampler,
            settings.scheduler,
            self.positive[i],
            self.negative,
            latent,
            noise_mask=(settings.latent or {}).get("noise_mask"),
            sigmas=sigmas,
            callback=callback,
            disable_pbar=True,
            seed=self._seed(i),
        )
