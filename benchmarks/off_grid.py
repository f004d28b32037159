"""Does the quality hold off the calibration grid? Every condition differs from calibration in one thing.

    python benchmarks/off_grid.py --model emoji --out benchmarks/results/off_grid_emoji.json [--quick]

Calibrated on euler, 28 steps, guidance 3, flow shift 3, latents of 16 x 16; judged against full precision drawn in the
same condition from the same noise. Models, rivals and intervals are those of quality.py.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from dit_quant.demo.experiment import (
    Probe,
    Prompts,
    Sampling,
    draw,
    prepare,
    quantized_copy,
    spread,
    update_with,
)
from dit_quant.demo.sampler import Velocity, guided_velocity, seeded_noise, shifted_sigmas
from dit_quant.quant_core.calibration import Calibration
from dit_quant.quant_core.schemes import PRESETS
from provenance import provenance
from quality import MODELS, WAN, Setting, calibrated, per_prompt_velocity, relative_rows, row, updated, wanted
from rivals import rivals
from samplers import SAMPLERS
from torch import Tensor, nn

RIVALS = ("native int8", "native int8 + ConvRot", "native asym_w4a8_int8")
OURS = tuple(name for name in ("W8A8", "W8A8 static", "W4A8") if name in PRESETS)
STEPS = (4, 8, 12, 20, 50)
PROBES = 4
# seeds: the pictures that img2img starts from, and the fresh noise of stochastic samplers
OTHER_PICTURES, FRESH = 5_000, 1_000_000

BeforeStep = Callable[[float], None]


@dataclass(frozen=True)
class Condition:
    """One way to draw pictures. `size` is the latent's height and width; `denoise` below 1 starts from a picture."""

    name: str
    sampling: Sampling
    sampler: str = "euler"
    denoise: float = 1.0
    size: tuple[int, int] = (16, 16)

    def sigmas(self) -> list[float]:
        """As KSampler: the last `steps` steps of a schedule of steps / denoise."""
        steps = self.sampling.steps
        return shifted_sigmas(int(steps / self.denoise), self.sampling.shift).tolist()[-steps - 1 :]


def conditions(base: Sampling) -> list[Condition]:
    """Calibration's own condition first, then one change at a time."""
    # heun calls twice per step: as many calls, and steps that the calibrated ones are no multiple of
    half = replace(base, steps=base.steps // 2 + 1)
    return [
        Condition("as calibrated", base),
        Condition("dpmpp_2m", base, sampler="dpmpp_2m"),
        Condition("dpmpp_2m_sde", base, sampler="dpmpp_2m_sde"),
        Condition(f"heun, {half.steps} steps", half, sampler="heun"),
        *(Condition(f"{steps} steps", replace(base, steps=steps)) for steps in STEPS),
        *(Condition(f"shift {shift:g}", replace(base, shift=shift)) for shift in (1.0, 6.0)),
        *(Condition(f"cfg {cfg:g}", replace(base, cfg=cfg)) for cfg in (1.0, 5.0, 7.0)),
        Condition("denoise 0.5", base, denoise=0.5),
        *(Condition(f"latents {h} x {w}", base, size=(h, w)) for h, w in ((12, 20), (24, 24))),
    ]


@dataclass(frozen=True)
class Method:
    """A rounded model, how it follows sigma, and its size."""

    model: Velocity
    before_step: BeforeStep | None
    bits_per_weight: float
    groups: int = 1


def methods(model: nn.Module, calibration: Calibration, only: str = "") -> Iterator[tuple[str, Method]]:
    """Built one at a time, in the order of the table. only: see `quality.wanted`."""
    builders = rivals()
    for name in (name for name in RIVALS if wanted(name, only)):
        rival = builders[name](model, calibration)
        yield name, Method(rival.model, None, rival.bits_per_weight)
    for name in (name for name in OURS if wanted(name, only)):
        twin, state, report = quantized_copy(model, calibration, PRESETS[name])
        yield name, Method(twin, update_with(state), report.bits_per_weight, report.groups)


def noise(seeds: list[int], size: tuple[int, int]) -> Tensor:
    """[len(seeds), 16, h, w]: one draw per seed, cut from a square; that of the demo where it is 16 x 16."""
    height, width = size
    return seeded_noise(seeds, side=max(size))[..., :height, :width].contiguous()


@torch.inference_mode()
def draw_in(
    condition: Condition,
    model: Velocity,
    prompts: Prompts,
    before_step: BeforeStep | None = None,
    record: list[Probe] | None = None,
) -> Tensor:
    """Final latents [B, 16, h, w] from x = prompts.noise at the first sigma; `record` takes every model call."""
    count = len(prompts.names)

    def velocity(x: Tensor, sigma: float) -> Tensor:
        if before_step is not None:
            before_step(sigma)
        found = guided_velocity(
            model, x, sigma, (prompts.context, prompts.pooled), prompts.empty, condition.sampling.cfg
        )
        if record is not None:
            record.append(Probe(sigma, x, found))
        return found

    def fresh(step: int) -> Tensor:
        return noise([FRESH + step * count + i for i in range(count)], condition.size)

    return SAMPLERS[condition.sampler](velocity, prompts.noise, condition.sigmas(), fresh)


def reference(condition: Condition, model: Velocity, prompts: Prompts, pictures: Tensor, first_seed: int) -> Setting:
    """Full precision in one condition: its start, final latents, and evenly spread probes of its trajectory.

    `pictures` [B, 16, h, w] are what a condition with denoise below 1 adds its noise to.
    """
    start = noise(list(range(first_seed, first_seed + len(prompts.names))), condition.size)
    if condition.denoise < 1:
        sigma = condition.sigmas()[0]
        start = (1 - sigma) * pictures + sigma * start
    prompts = replace(prompts, noise=start)
    calls: list[Probe] = []
    latents = draw_in(condition, model, prompts, record=calls)
    chosen = sorted({round(i * (len(calls) - 1) / (PROBES - 1)) for i in range(PROBES)})
    return Setting(prompts, condition.sampling, latents, [calls[i] for i in chosen])


def measure(condition: Condition, setting: Setting, method: Method) -> dict[str, np.ndarray]:
    """Per-prompt relative L2 of the velocity on the reference's trajectory, and of the final latent."""
    latents = draw_in(condition, method.model, setting.prompts, method.before_step)
    return {
        "velocity": per_prompt_velocity(method.model, method.before_step, setting).numpy(),
        "latent": relative_rows(latents, setting.latents).numpy(),
    }


def run(name: str, prompts: int, steps: int, calibration_prompts: int, final: bool, wan: Path, only: str = "") -> dict:
    sampling = Sampling(steps=steps)
    model, table, calibration = calibrated(name, wan, calibration_prompts, sampling)
    # the two evaluation sets of quality.py
    pool, first_seed = (table.prompts[3::4], 20_000) if final else (table.prompts[1::4], 10_000)
    names = spread(list(pool), prompts, "evaluation")
    evaluation = prepare(table, names, first_seed)
    pictures = draw(model, prepare(table, names, first_seed + OTHER_PICTURES), sampling)
    settings = {
        condition: reference(condition, model, evaluation, pictures, first_seed)
        for condition in conditions(sampling)
        if final or condition.sampling.steps <= steps
    }
    figures: dict[str, dict] = {condition.name: {} for condition in settings}
    bits, groups = {}, {}
    for label, method in methods(model, calibration, only):
        bits[label], groups[label] = method.bits_per_weight, method.groups
        for condition, setting in settings.items():
            found = figures[condition.name][label] = measure(condition, setting, method)
            report_line(condition.name, label, found)
    return {
        "model": name,
        **provenance("comfy-kitchen"),
        "settings": {
            "evaluation_prompts": names,
            "calibration_prompts": calibration_prompts,
            "calibrated": {"sampler": "euler", "steps": steps, "cfg": sampling.cfg, "shift": sampling.shift},
            "probes": PROBES,
            "set": "final" if final else "development",
        },
        "rows": [
            {"condition": condition, **row(label, found, bits, groups)}
            for condition, found in figures.items()
            for label in found
        ],
    }


def report_line(condition: str, method: str, found: dict[str, np.ndarray]) -> None:
    print(
        f"{method:24s} {condition:16s} velocity {found['velocity'].mean():.4f}  latent {found['latent'].mean():.4f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="emoji")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="2 development prompts, 3 steps: does it run?")
    parser.add_argument("--prompts", type=int, default=6, help="evaluation prompts of the full run")
    parser.add_argument("--wan", type=Path, default=WAN, help="folder that train_fixture.py --layout wan wrote")
    parser.add_argument(
        "--only", default="", help="methods whose name contains one of these, or is one, as =W8A8; / between"
    )
    parser.add_argument("--update", action="store_true", help="keep the other rows of --out")
    args = parser.parse_args()
    size = (2, 3, 4) if args.quick else (args.prompts, 28, 96)
    result = run(args.model, *size, final=not args.quick, wan=args.wan, only=args.only)
    if args.update:
        result = updated(json.loads(args.out.read_text()), result)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
