"""Sampling calibration prompts through the host's own sampler, resumable prompt by prompt."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...quant_core.calibration import VERSION, Calibration, finish, restore_progress, save_progress
from ...quant_core.collector import MAX_BINS, Collector
from ...quant_core.curvature import CurvatureCollector
from ...quant_core.files import DamagedFile
from ...quant_core.fingerprint import settings_key, tensor_fingerprint
from ...quant_core.identity import describe
from ...quant_core.memory import MemoryPlan, plan_memory
from ...quant_core.sensitivity import GAIN_PROMPTS, GAIN_STEPS
from .attached import refuse_bypass, refuse_hooks, uncompiled
from .drawing import Callback, Drawing, Settings, schedule, spread
from .gains import cached_gains, kept
from .latents import flat
from .probes import probing
from .weights import fingerprints, is_quantized, rest_fingerprint, select, weight_loaders, whole_fingerprint

log = logging.getLogger("dit_quant")
KEY = "dit_quant_calibration"
# samplers that call the model between steps fill more bins than a short schedule has steps
FEWEST_BINS = 16
# files of gigabytes are written again after this many times what that took
SAVING_SHARE = 20


@dataclass(frozen=True)
class Progress:
    """What the node shows: a callback (step, total, denoised latent or None), and lines for its report."""

    step: Callable[[int, int, torch.Tensor | None], None]
    notes: list[str]


def is_flow(patcher: ModelPatcher) -> bool:
    """Whether sigma runs from 0 to 1 as a mixing weight."""
    return isinstance(patcher.get_model_object("model_sampling"), comfy.model_sampling.CONST)


def conditioning_fingerprint(conditioning: list) -> list:
    """Identity of a CONDITIONING: its tensor, and all that it carries beside."""
    return [[tensor_fingerprint(tensor), describe(extra)] for tensor, extra in conditioning]


def attached_fingerprint(patcher: ModelPatcher) -> object:
    """Identity of what other nodes attached to the MODEL, as far as it can be read."""
    return describe((patcher.model_options, patcher.wrappers, patcher.callbacks, patcher.object_patches))


@dataclass(frozen=True)
class Run:
    """Everything that the passes over the prompts have in common."""

    layers: Mapping[str, torch.nn.Module]
    drawing: Drawing
    plan: MemoryPlan
    folder: Path
    key: str
    progress: Progress

    def part(self, index: int) -> str:
        """What tells the files of several passes apart."""
        return "" if len(self.plan.passes) == 1 else f"-{index + 1}of{len(self.plan.passes)}"

    def cache(self, index: int) -> Path:
        return self.folder / f"{self.key[:32]}{self.part(index)}.safetensors"

    def collectors(self, index: int, sigmas: list[float]) -> tuple[Collector, CurvatureCollector]:
        """Empty ones for the layers of a pass."""
        names = self.plan.passes[index]
        outputs = {} if self.plan.curvature is None else {name: self.layers[name].out_features for name in names}
        inputs = Collector(
            {name: self.layers[name].in_features for name in names},
            flow=is_flow(self.drawing.patcher),
            covariance=self.plan.covariance,
            max_bins=self.plan.bins,
            rows=self.plan.rows,
            sigmas=sigmas,
        )
        return inputs, CurvatureCollector(outputs, self.plan.curvature or 1)


def calibrate(
    patcher: ModelPatcher,
    positive: list[list],
    negative: list,
    settings: Settings,
    folder: Path,
    progress: Progress,
    before: ModelPatcher | None = None,
) -> Calibration:
    """positive: one CONDITIONING per prompt; before: samples the steps before `settings.start` in place of `patcher`.
    Statistics are cached in `folder` and saved after every prompt.

    Raises ValueError for an empty prompt list, NotADiT, and NonFiniteActivation; an interruption keeps
    the finished prompts.
    """
    if not positive:
        raise ValueError("no calibration prompts: write at least one prompt, one per line, or connect a conditioning")
    if is_quantized(patcher):
        raise ValueError("this model is quantized already; calibrate the full-precision model it came from")
    if before is not None and settings.start == 0:
        raise ValueError(
            "model_before is connected, but start_at_step is 0: it would sample nothing; set start_at_step to the step "
            "at which `model` takes over"
        )
    refuse_bypass(patcher)
    refuse_hooks([*positive, negative])
    patcher = uncompiled(patcher)
    earlier = patcher if before is None else uncompiled(before)
    layers, _, _ = select(patcher)
    features = {name: module.in_features for name, module in layers.items()}
    drawing = Drawing(patcher, earlier, positive, negative, settings, schedule(patcher, settings))
    sigmas = drawing.own.tolist()
    bins = min(max(sum(sigma > 0 for sigma in sigmas), FEWEST_BINS), MAX_BINS)
    outputs = {name: module.out_features for name, module in layers.items()} if settings.curvature else {}
    budget = int(settings.memory_gb * 2**30)
    plan = plan_memory(features, budget=budget, bins=bins, passes=settings.passes, outputs=outputs)
    progress.notes.append(str(plan))
    if budget == 0:
        progress.notes.append("memory_gb is 0: no covariances, weights will be rounded to nearest")
    elif plan.covariance is None:
        progress.notes.append(
            f"covariances do not fit {settings.memory_gb} GB: weights will be rounded to nearest instead of by GPTQ; "
            "raise memory_gb, or passes, for better quality"
        )
    elif settings.curvature and plan.curvature is None:
        progress.notes.append(
            f"curvatures do not fit {settings.memory_gb} GB beside the covariances: weights will be rounded by plain "
            "GPTQ; raise memory_gb, or passes, for better quality"
        )
    prints = fingerprints(patcher, layers)
    described = {
        "steps": settings.steps,
        "cfg": settings.cfg,
        "sampler": settings.sampler,
        "scheduler": settings.scheduler,
        "seed": settings.seed,
        "sizes": [list(size) for size in settings.sizes] if settings.latent is None else describe(settings.latent),
        "sigmas": [f"{s:.6g}" for s in sigmas],
        "before": None if before is None else [whole_fingerprint(earlier), attached_fingerprint(earlier)],
        "start": settings.start,
        "prompts": [conditioning_fingerprint(p) for p in positive],
        "negative": conditioning_fingerprint(negative),
        "covariance": plan.covariance,
        "rows": plan.rows,
        "bins": plan.bins,
        "curvature": plan.curvature,
        "passes": len(plan.passes),
    }
    rest, attached = rest_fingerprint(patcher, layers), attached_fingerprint(patcher)
    key = settings_key(VERSION, prints, rest, attached, described)
    run = Run(layers, drawing, plan, folder, key, progress)
    collectors: list[Collector] = []
    curvature: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for index in range(len(plan.passes)):
            inputs, measured = _observe(run, index, collectors[0].sigmas if collectors else [])
            collectors.append(inputs)
            curvature |= measured.moments
            if plan.curvature is not None and measured.note() not in progress.notes:
                progress.notes.append(measured.note())
    described["cache"] = run.cache(0).name
    result = finish(collectors[0], prints, described, collectors[1:], curvature)
    return replace(result, gains=_gains(run)) if settings.sensitivity else result


def _gains(run: Run) -> dict[str, float]:
    """How far an error in each layer moves the final latent, on a few steps of the first prompts."""
    patcher, count = run.drawing.patcher, min(GAIN_PROMPTS, len(run.drawing.positive))
    sigmas = spread(run.drawing.own, GAIN_STEPS)
    total, done = count * (len(sigmas) - 1) * (len(run.layers) + 2), 0
    run.progress.notes.append(f"sensitivity of {len(run.layers)} layers: at most {total} extra sampling steps")

    def step(index, denoised, x, steps):
        nonlocal done
        done += 1
        run.progress.step(done, total, denoised)

    def earlier(index, denoised, x, steps):
        run.progress.step(done, total, denoised)

    def sample() -> torch.Tensor:
        # latents of several sizes side by side
        return torch.cat([flat(run.drawing.draw(patcher, i, sigmas, step, earlier)) for i in range(count)])[None]

    weights = weight_loaders(patcher, run.layers)
    path = run.folder / f"{run.key[:32]}-gains.json"
    key = f"{run.key} {GAIN_STEPS} steps {GAIN_PROMPTS} prompts"
    return cached_gains(run.layers, weights, sample, path, key, run.progress.notes)


def _observe(run: Run, index: int, sigmas: list[float]) -> tuple[Collector, CurvatureCollector]:
    """One pass over all prompts, from where its cache ends. sigmas: the bins of the first pass, empty in it."""
    inputs, outputs = run.collectors(index, sigmas)
    cache, key = run.cache(index), run.key + run.part(index)
    prompts = len(run.drawing.positive)
    done = _resume(run, index, inputs, outputs, key)
    complete = done == prompts
    if not complete:
        sampled = hooked_clone(run.drawing.patcher, inputs, outputs, run.progress.notes)
        layers = {name: run.layers[name] for name in run.plan.passes[index]}
        saved, cost = time.monotonic(), 0.0
        with inputs.attached(layers), outputs.attached({name: layers[name] for name in outputs.shapes}):
            for i in range(done, prompts):
                outputs.at_prompt(i)
                _sample(sampled, run, i, index * prompts + i)
                if i + 1 == prompts or time.monotonic() - saved >= SAVING_SHARE * cost:
                    start = time.monotonic()
                    complete = _save(run, lambda i=i: save_progress(cache, inputs, key, i + 1, outputs))
                    saved = time.monotonic()
                    cost = saved - start
    if not complete:
        return inputs, outputs
    # the next pass needs the memory, and what the host holds of this node: it is read from the file as it is used
    mapped = run.collectors(index, sigmas)
    try:
        restore_progress(cache, mapped[0], key, mapped[1], copy=False)
    except DamagedFile as error:
        if len(run.plan.passes) > 1:
            raise
        run.progress.notes.append(f"calibration cache cannot be read again: {error}")
        return inputs, outputs
    return mapped


def _save(run: Run, save: Callable[[], None]) -> bool:
    """Whether it worked. A disk without room ends the run only where later passes read what this one has found."""
    if len(run.plan.passes) > 1:
        save()
        return True
    return kept(save, "not kept for another time", run.progress.notes)


def _resume(run: Run, index: int, inputs: Collector, outputs: CurvatureCollector, key: str) -> int:
    """Prompts already in the cache; a file that does not fit is reported and recomputed, never half used."""
    cache = run.cache(index)
    if not cache.exists():
        return 0
    try:
        done = restore_progress(cache, inputs, key, outputs)
    except DamagedFile as error:
        run.progress.notes.append(f"calibration cache refused and recomputed: {error}")
        log.warning("calibration cache refused and recomputed: %s", error)
        return 0
    which = "" if len(run.plan.passes) == 1 else f", pass {index + 1}"
    run.progress.notes.append(f"{done} prompts taken from the cache{which}")
    return done


def hooked_clone(
    patcher: ModelPatcher, inputs: Collector, outputs: CurvatureCollector, notes: list[str]
) -> ModelPatcher:
    """A clone that announces sigma to the collector of inputs at every model call, and probes some for outputs."""
    clone = patcher.clone()
    probe = probing(clone, inputs, outputs, notes) if outputs.shapes else None

    def announce(executor, x, t, *args, **kwargs):
        inputs.at(float(t.flatten()[0]))
        try:
            result = executor(x, t, *args, **kwargs)
        finally:
            inputs.at(None)
        if probe is not None and outputs.due():
            probe(executor, (x, t, *args), kwargs, result)
        return result

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, announce)
    return clone


def _sample(patcher: ModelPatcher, run: Run, i: int, before: int) -> None:
    """Prompt i, start to end, when `before` others have been sampled in all passes."""
    prompts = len(run.drawing.positive) * len(run.plan.passes)
    own, start = run.drawing.own, run.drawing.settings.start
    steps = start + len(own) - 1

    def counted_from(first: int) -> Callback:
        def callback(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
            run.progress.step(before * steps + first + step + 1, prompts * steps, denoised)

        return callback

    run.drawing.draw(patcher, i, own, counted_from(start), counted_from(0))
