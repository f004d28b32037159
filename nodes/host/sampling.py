"""Sampling calibration prompts through the host's own sampler, resumable prompt by prompt."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...quant_core.calibration import VERSION, Calibration, finish, restore_progress, save_progress
from ...quant_core.collector import Collector
from ...quant_core.files import DamagedFile
from ...quant_core.fingerprint import settings_key, tensor_fingerprint
from ...quant_core.observers import covariance_block
from .weights import fingerprints, is_quantized, select

log = logging.getLogger("dit_quant")
KEY = "dit_quant_calibration"
COVARIANCE_LIMITS = (4096, 2048, 1024, 512, 256)


@dataclass(frozen=True)
class Settings:
    """How the calibration prompts are sampled. sizes: (width, height) pairs in pixels, taken in turn."""

    sizes: tuple[tuple[int, int], ...]
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    seed: int
    memory_gb: float


@dataclass(frozen=True)
class Progress:
    """What the node shows: prompts done before this run, and a callback (step, total, denoised latent or None)."""

    step: Callable[[int, int, torch.Tensor | None], None]
    notes: list[str]


def is_flow(patcher: ModelPatcher) -> bool:
    """Whether sigma runs from 0 to 1 as a mixing weight."""
    return isinstance(patcher.get_model_object("model_sampling"), comfy.model_sampling.CONST)


def covariance_limit(features: Mapping[str, int], memory_gb: float) -> int | None:
    """The widest covariance blocks whose sum over all layers stays within the budget; None when none does."""
    for limit in COVARIANCE_LIMITS:
        if sum(K * covariance_block(K, limit) * 4 for K in features.values()) <= memory_gb * 2**30:
            return limit
    return None


def conditioning_fingerprint(conditioning: list) -> list:
    """Identity of a CONDITIONING: its tensors, and the names of what else it carries."""
    described = []
    for tensor, extra in conditioning:
        tensors = {k: tensor_fingerprint(v) for k, v in sorted(extra.items()) if isinstance(v, torch.Tensor)}
        others = {k: repr(v) for k, v in sorted(extra.items()) if isinstance(v, int | float | str | bool | tuple)}
        described.append([tensor_fingerprint(tensor), tensors, others])
    return described


def empty_latent(patcher: ModelPatcher, size: tuple[int, int]) -> torch.Tensor:
    """Zeros in the model's own latent shape for a picture of `size`."""
    latent_format = patcher.get_model_object("latent_format")
    ratio = getattr(latent_format, "spacial_downscale_ratio", 8)
    width, height = size
    zeros = torch.zeros(1, latent_format.latent_channels, max(height // ratio, 1), max(width // ratio, 1))
    return comfy.sample.fix_empty_latent_channels(patcher, zeros)


def calibrate(
    patcher: ModelPatcher,
    positive: list[list],
    negative: list,
    settings: Settings,
    folder: Path,
    progress: Progress,
) -> Calibration:
    """positive: one CONDITIONING per prompt. Statistics are cached in `folder` and saved after every prompt.

    Raises ValueError for an empty prompt list, NotADiT, and NonFiniteActivation; an interruption keeps
    the finished prompts.
    """
    if not positive:
        raise ValueError("no calibration prompts: write at least one prompt, one per line, or connect a conditioning")
    if is_quantized(patcher):
        raise ValueError("this model is quantized already; calibrate the full-precision model it came from")
    layers, _, _ = select(patcher)
    features = {name: module.in_features for name, module in layers.items()}
    limit = covariance_limit(features, settings.memory_gb)
    if limit is None:
        progress.notes.append(
            f"covariances do not fit {settings.memory_gb} GB: weights will be rounded to nearest instead of by GPTQ; "
            "raise memory_gb for better quality"
        )
    prints = fingerprints(patcher, layers)
    sigmas = comfy.samplers.calculate_sigmas(
        patcher.get_model_object("model_sampling"), settings.scheduler, settings.steps
    )
    described = {
        "steps": settings.steps,
        "cfg": settings.cfg,
        "sampler": settings.sampler,
        "scheduler": settings.scheduler,
        "seed": settings.seed,
        "sizes": [list(size) for size in settings.sizes],
        "sigmas": [f"{s:.6g}" for s in sigmas.tolist()],
        "prompts": [conditioning_fingerprint(p) for p in positive],
        "negative": conditioning_fingerprint(negative),
        "covariance": limit,
    }
    key = settings_key(VERSION, prints, described)
    cache = folder / f"{key[:32]}.safetensors"
    collector = Collector(features, flow=is_flow(patcher), covariance=limit)
    done = _resume(cache, collector, key, progress)
    if done < len(positive):
        sampled = hooked_clone(patcher, collector)
        with torch.inference_mode(), collector.attached(layers):
            for i in range(done, len(positive)):
                _sample(sampled, positive[i], negative, settings, i, len(positive), progress)
                save_progress(cache, collector, key, i + 1)
    return finish(collector, prints, described | {"cache": str(cache.name)})


def _resume(cache: Path, collector: Collector, key: str, progress: Progress) -> int:
    """Prompts already in the cache; a file that does not fit is reported and recomputed, never half used."""
    if not cache.exists():
        return 0
    try:
        done = restore_progress(cache, collector, key)
    except DamagedFile as error:
        progress.notes.append(f"calibration cache refused and recomputed: {error}")
        log.warning("calibration cache refused and recomputed: %s", error)
        return 0
    progress.notes.append(f"{done} prompts taken from the cache")
    return done


def hooked_clone(patcher: ModelPatcher, collector: Collector) -> ModelPatcher:
    """A clone that announces sigma to the collector at every model call."""
    clone = patcher.clone()

    def announce(executor, x, t, *args, **kwargs):
        collector.at(float(t.flatten()[0]))
        return executor(x, t, *args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, announce)
    return clone


def _sample(patcher, positive, negative, settings: Settings, i: int, prompts: int, progress: Progress) -> None:
    """One prompt, start to end."""
    latent = empty_latent(patcher, settings.sizes[i % len(settings.sizes)])
    noise = comfy.sample.prepare_noise(latent, settings.seed + i)

    def callback(step, denoised, x, total):
        progress.step(i * total + step + 1, prompts * total, denoised)

    comfy.sample.sample(
        patcher,
        noise,
        settings.steps,
        settings.cfg,
        settings.sampler,
        settings.scheduler,
        positive,
        negative,
        latent,
        callback=callback,
        disable_pbar=True,
        seed=settings.seed + i,
    )
