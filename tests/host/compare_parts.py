"""Run by the host's own interpreter in the host's folder: a model that samples a part of the steps, calibrated and by
the host's own nodes, as JSON.

usage: python compare_parts.py PACK_ROOT
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import in_host  # noqa: F401 - its work is done by importing it

# isort: split
import torch
from comfy.patcher_extension import WrappersMP
from dit_quant.nodes.demo import EmojiPrompts, LoadEmojiDiT
from dit_quant.nodes.host.drawing import Drawing, Settings, schedule
from dit_quant.nodes.host.quantized import quantize
from dit_quant.nodes.host.sampling import Progress, calibrate
from dit_quant.quant_core.metrics import relative_l2
from dit_quant.quant_core.schemes import PRESETS

import nodes

STEPS, START, END = 8, 3, 6
WHOLE = Settings(((128, 128),), STEPS, 3.0, "euler", "simple", 5, memory_gb=4.0)
PART = replace(WHOLE, start=START, end=END)
LAYER = "joint_blocks.1.x_block.mlp.fc1"


def disturbed(patcher):
    """Another model in the same memory: as with two LoRAs on one checkpoint."""
    clone = patcher.clone()
    noise = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))
    clone.add_patches({f"diffusion_model.{LAYER}.weight": ("diff", (0.02 * noise,))})
    return clone


def counted(patcher, calls: list):
    """Notes the noise level of every call of the model."""
    clone = patcher.clone()

    def count(executor, x, t, *args, **kwargs):
        calls.append(round(float(t.flatten()[0]), 5))
        return executor(x, t, *args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", count)
    return clone


def chained(before, model, positive, negative, settings: Settings):
    """As a workflow of the host does it."""
    latent = {"samples": torch.zeros(1, model.get_model_object("latent_format").latent_channels, 16, 16)}
    sampler = nodes.KSamplerAdvanced()
    common = settings.steps, settings.cfg, settings.sampler, settings.scheduler, positive, negative
    (begun,) = sampler.sample(before, "enable", settings.seed, *common, latent, 0, settings.start, "enable")
    (done,) = sampler.sample(model, "disable", settings.seed, *common, begun, settings.start, settings.end, "enable")
    return done["samples"]


def nothing(*_) -> None:
    """A callback."""


@torch.inference_mode()  # as the host runs its nodes
def compared(folder: Path) -> dict:
    """Everything that the tests look at; `folder` for caches."""
    model, other = (LoadEmojiDiT.execute().args[0] for _ in range(2))
    positive = EmojiPrompts.execute("", first=0, count=2).args[0]
    prompts, negative = [[entry] for entry in positive], EmojiPrompts.execute("").args[0]
    before = disturbed(model)

    def calibrated(before, settings: Settings, notes: list[str]):
        shown: list[tuple[int, int]] = []
        progress = Progress(lambda done, total, denoised: shown.append((done, total)), notes)
        return calibrate(model, prompts, negative, settings, folder, progress, before), shown

    found = {}
    drawing = Drawing(model, before, prompts, negative, PART, schedule(model, PART))
    drawn = drawing.draw(model, 0, drawing.own, nothing, nothing)
    chains = {"shared": before, "apart": disturbed(other), "without": model}
    found["chain"] = {
        name: torch.equal(drawn, chained(first, model, prompts[0], negative, PART)) for name, first in chains.items()
    }

    calls: list[float] = []
    part, shown = calibrated(counted(before, calls), replace(PART, sensitivity=True), [])
    levels = schedule(model, PART).tolist()
    found["calls"], found["expected_calls"] = calls, [round(level, 5) for level in levels[:START]] * len(prompts)
    found["sigmas"], found["expected_sigmas"] = list(part.sigmas), levels[START:END]
    found["progress"] = [done for done, total in shown if total == len(prompts) * END]
    found["layers"] = len(part.layers)
    found["gains"] = {name: gain for name, gain in part.gains.items() if gain > 0}

    # the same steps, seen on the way through all of them and on their own
    whole, _ = calibrated(None, WHOLE, [])
    own, _ = calibrated(None, PART, [])
    rows = [whole.sigmas.index(min(whole.sigmas, key=lambda level: abs(level - sigma))) for sigma in own.sigmas]
    means = {name: (layer.mean, whole.layers[name].mean[rows]) for name, layer in own.layers.items()}
    found["on_the_way"] = max(relative_l2(*pair) for pair in means.values())
    found["behind_another"] = relative_l2(part.layers[LAYER].mean, own.layers[LAYER].mean)

    calls = []
    small = replace(PART, memory_gb=0.04, passes=8)
    calibrated(counted(before, calls), small, notes := [])
    found["passes"], found["calls_in_passes"] = notes[0], len(calls)

    # quantized models may come before, and are told apart by all that they sample
    files = {path.name for path in folder.iterdir()}
    for name in ("rtn_w8a8", "rtn_w4a8"):
        earlier, _ = quantize(before, PRESETS[name], None, {}, nothing)
        again, _ = calibrated(earlier, PART, [])
        found[name] = relative_l2(again.layers[LAYER].mean, part.layers[LAYER].mean)
    found["new_files"] = len({path.name for path in folder.iterdir()} - files)
    return found


with tempfile.TemporaryDirectory() as temporary:
    print(json.dumps(compared(Path(temporary))))
