"""Quality of every method on the same prompts, seeds and noise, with paired bootstrap intervals.

    python benchmarks/quality.py --model emoji --out benchmarks/results/quality_emoji.json [--quick]

Models: emoji (the bundled DiT); emoji_outliers and emoji_drift (planted.py), the same function with planted outliers;
emoji_mean_drift (planted_drift.py), whose planted means move with sigma; emoji_all_outliers, with both, as in
billion-parameter models; emoji_wan, which train_fixture.py --layout wan wrote into benchmarks/assets, and
emoji_wan_outliers. Rivals need `pip install comfy-kitchen`.

The networks of LPIPS and FID cannot be downloaded everywhere. "perceptual" is LPIPS's formula with the features of
another network (features.py), beside SSIM; frechet.py measures the Frechet distance of many samples.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from dit_quant.demo.emoji_dit import load_emoji_dit
from dit_quant.demo.experiment import (
    Probe,
    Prompts,
    Sampling,
    calibrate,
    draw,
    prepare,
    quantizable,
    quantized_copy,
    reference_velocities,
    spread,
    update_with,
)
from dit_quant.demo.mixed import measure_gains, mixed_copy
from dit_quant.demo.pixels import to_rgb
from dit_quant.demo.prompts import PromptTable, load_prompt_table
from dit_quant.demo.sampler import guided_velocity
from dit_quant.quant_core.budget import OverBudget
from dit_quant.quant_core.calibration import Calibration
from dit_quant.quant_core.metrics import psnr_db
from dit_quant.quant_core.report import QuantReport
from dit_quant.quant_core.schemes import (
    PRESETS,
    ActivationArgs,
    Granularity,
    Partition,
    QuantScheme,
    Rounding,
    Scale,
    Shift,
)
from dit_quant.quant_core.timesteps import TimestepState
from emoji_wan import EmojiWan, load_emoji_wan
from features import installed, perceptual_distance
from planted import drifting, function_difference, mean_and_variance, plant, plant_wan
from planted_drift import mean_drift
from provenance import provenance
from rivals import rivals
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from train_fixture import FILES

WAN = Path(__file__).resolve().parent / "assets"
ASSETS = Path(__file__).resolve().parents[1] / "demo" / "assets"
MODELS = (
    "emoji",
    "emoji_outliers",
    "emoji_drift",
    "emoji_mean_drift",
    "emoji_all_outliers",
    "emoji_wan",
    "emoji_wan_outliers",
)
BASELINES = {8: "native int8 + ConvRot", 4: "native asym_w4a8_int8"}
DRAWS = 2000
FLOOR = "bf16 (noise floor)"
# bits per weight of the quantizable layers, every table counted
MIXED = {"mixed at the bytes of W4A8": None, "mixed at 4.5 bits": 4.5, "mixed at 6 bits": 6.0}


def ours() -> dict[str, QuantScheme]:
    """Presets, round to nearest, and one ablation per ingredient."""
    w8, static, w4, paper = (PRESETS[name] for name in ("W8A8", "W8A8 static", "W4A8", "htg_paper"))
    grid = w4.weights
    tokens = ActivationArgs(Granularity.PER_TOKEN, symmetric=False)
    return {
        "rtn_w8a8": PRESETS["rtn_w8a8"],
        "W8A8": w8,
        "W8A8, one group": w8.with_options(partition=Partition.SINGLE),
        "W8A8, groups per layer": w8.with_options(partition=Partition.LAYER),
        "W8A8, interpolated": w8.with_options(interpolate=True),
        "W8A8, no shift": w8.with_options(shift=Shift.NONE),
        "W8A8, no scale": w8.with_options(scale=Scale.NONE),
        "W8A8, scale at half strength": w8.with_options(scale_strength=0.5),
        "W8A8, Hadamard 64": w8.with_options(hadamard=64),
        "W8A8, symmetric tokens": w8.with_options(activations=ActivationArgs()),
        "W8A8, nearest": w8.with_options(weights=w8.weights.with_options(rounding=Rounding.NEAREST)),
        "W8A8, GPTQ alone": w8.with_options(weights=w8.weights.with_options(rounding=Rounding.GPTQ)),
        "W8A8, no directions": w8.with_options(directions=0),
        "W8A8, 8 directions": w8.with_options(directions=8),
        "W8A8 fast": PRESETS["W8A8 fast"],
        "W8A8 static": static,
        "W8A8 static, one group": static.with_options(partition=Partition.SINGLE),
        "W8A8 static, not interpolated": static.with_options(interpolate=False),
        "W8A8 static, scale at full strength": static.with_options(scale_strength=1.0),
        "W8A8 static, no shift": static.with_options(shift=Shift.NONE),
        "W8A8 static, no scale": static.with_options(scale=Scale.NONE),
        "W8A8 static, no rotation": static.with_options(hadamard=1),
        # the paper's ladder: per-tensor ranges fixed in advance, then its three ideas one by one
        "htg_paper": paper,
        "htg_paper, one group": paper.with_options(partition=Partition.SINGLE),
        "htg_paper, no shift": paper.with_options(shift=Shift.NONE),
        "htg_paper, no scale": paper.with_options(scale=Scale.NONE),
        "htg_paper, group ranges only": paper.with_options(shift=Shift.NONE, scale=Scale.NONE),
        "htg_paper, scale only": paper.with_options(shift=Shift.NONE, partition=Partition.SINGLE),
        "htg_paper, nothing (static int8)": paper.with_options(
            shift=Shift.NONE, scale=Scale.NONE, partition=Partition.SINGLE
        ),
        "htg_paper, bias corrected": paper.with_options(bias_correction=True),
        "rtn_w4a8": PRESETS["rtn_w4a8"],
        "W4A8": w4,
        "W4A8, group 32": w4.with_options(weights=grid.with_options(group_size=32)),
        "W4A8, group 64": w4.with_options(weights=grid.with_options(group_size=64)),
        "W4A8, one group": w4.with_options(partition=Partition.SINGLE),
        "W4A8, no shift": w4.with_options(shift=Shift.NONE),
        "W4A8, no shift, bias corrected": w4.with_options(shift=Shift.NONE, bias_correction=True),
        "W4A8, no scale": w4.with_options(scale=Scale.NONE),
        "W4A8, scale at full strength": w4.with_options(scale_strength=1.0),
        "W4A8, no rotation": w4.with_options(hadamard=1),
        "W4A8, asymmetric tokens": w4.with_options(activations=tokens),
        "W4A8, symmetric weights": w4.with_options(weights=grid.with_options(symmetric=True)),
        "W4A8, no level search": w4.with_options(weights=grid.with_options(search=False)),
        "W4A8, GPTQ alone": w4.with_options(weights=grid.with_options(rounding=Rounding.GPTQ)),
        "W4A8, nearest": w4.with_options(weights=grid.with_options(rounding=Rounding.NEAREST)),
    }


@dataclass(frozen=True)
class Setting:
    """One model with its reference pictures and trajectory on the evaluation prompts."""

    prompts: Prompts
    sampling: Sampling
    latents: Tensor
    trajectory: list[Probe]


def plain_model(name: str, wan: Path = WAN) -> tuple[nn.Module, PromptTable]:
    """The trained model that `name` is or is planted in, and its word table. wan: folder of the Wan-layout files."""
    layout = "wan" if name.startswith("emoji_wan") else "sd3"
    folder, load = (ASSETS, load_emoji_dit) if layout == "sd3" else (wan, load_emoji_wan)
    model_file, table_file = FILES[layout]
    return load(folder / model_file), load_prompt_table(folder / table_file)


def planted_model(name: str, base: nn.Module, calibration: Calibration) -> nn.Module:
    """The model of that name; planted ones are checked to be the same function.

    emoji_mean_drift is the function of `base` made blind to the drift, a few percent from that of `base`.
    """
    if name.startswith("emoji_wan") != isinstance(base, EmojiWan):
        raise ValueError(f"{name} is not planted in a {type(base).__name__}")
    same = base
    match name:
        case "emoji" | "emoji_wan":
            return base
        case "emoji_outliers":
            twin = plant(base, mean_and_variance(base))
        case "emoji_drift":
            twin = plant(base, drifting(base, calibration.layers))
        case "emoji_mean_drift" | "emoji_all_outliers":
            table = load_prompt_table(ASSETS / FILES["sd3"][1])
            same, twin = mean_drift(base, calibration.layers, table.encode([*table.prompts, ""])[1])
            if name == "emoji_all_outliers":
                twin = plant(twin, mean_and_variance(twin, seed=1))
        case "emoji_wan_outliers":
            twin = plant_wan(base)
        case _:
            raise ValueError(f"there is no model {name}; choose one of {', '.join(MODELS)}")
    difference = function_difference(same, twin)
    if difference > 1e-5:
        raise RuntimeError(f"{name}: planting changed the function by {difference:.2g}")
    return twin


def calibrated(name: str, wan: Path, prompts: int, sampling: Sampling) -> tuple[nn.Module, PromptTable, Calibration]:
    """The model of that name, its word table, and what its layers see on prompts at even positions."""
    base, table = plain_model(name, wan)
    even, model = list(table.prompts[0::2]), base
    if name not in ("emoji", "emoji_wan"):
        rough = prepare(table, spread(even, min(prompts, 32), "planting"), 0)
        model = planted_model(name, base, calibrate(base, rough, sampling)[0])
    calibration, _ = calibrate(model, prepare(table, spread(even, prompts, "calibration"), 0), sampling)
    return model, table, calibration


@torch.inference_mode()
def per_prompt_velocity(model, before_step: Callable[[float], None] | None, setting: Setting) -> Tensor:
    """Relative L2 of the guided velocity on the full-precision trajectory: [prompts], mean over the probes."""
    condition = (setting.prompts.context, setting.prompts.pooled)
    errors = []
    for probe in setting.trajectory:
        if before_step is not None:
            before_step(probe.sigma)
        found = guided_velocity(model, probe.x, probe.sigma, condition, setting.prompts.empty, setting.sampling.cfg)
        errors.append(relative_rows(found, probe.velocity))
    return torch.stack(errors).mean(dim=0)


def relative_rows(value: Tensor, reference: Tensor) -> Tensor:
    """Relative L2 per first index."""
    return (value - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Structural similarity of pictures [B, 3, h, w] in 0..1 with a uniform window (Wang et al. 2004): [B]."""
    mean_a, mean_b = avg_pool2d(a, window, 1), avg_pool2d(b, window, 1)
    var_a = avg_pool2d(a * a, window, 1) - mean_a**2
    var_b = avg_pool2d(b * b, window, 1) - mean_b**2
    covariance = avg_pool2d(a * b, window, 1) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similar / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).flatten(1).mean(dim=1)


def wanted(method: str, only: str) -> bool:
    """Whether the method is one of `only`: parts of names, or "=" and a name, with "/" between; empty: every one is."""
    return any(part in method or part == f"={method}" for part in only.split("/"))


def is_ablation(method: str) -> bool:
    """Ablations are named 'preset, what differs'; they are judged by velocity error alone, five times cheaper."""
    return ", " in method


def measure(model, before_step, setting: Setting, pictures: bool = True) -> dict[str, np.ndarray]:
    """Per-prompt figures of one method; only the velocity error without pictures."""
    velocity = per_prompt_velocity(model, before_step, setting).numpy()
    if not pictures:
        return {"velocity": velocity}
    latents = draw(model, setting.prompts, setting.sampling, before_step)
    found, expected = to_rgb(latents), to_rgb(setting.latents)
    psnr = [psnr_db(a, b) for a, b in zip(found, expected, strict=True)]
    figures = {
        "velocity": velocity,
        "latent": relative_rows(latents, setting.latents).numpy(),
        "psnr_db": np.array(psnr),
        "ssim": ssim(found, expected).numpy(),
    }
    return figures | ({"perceptual": perceptual_distance(found, expected).numpy()} if installed() else {})


def ratio_interval(values: np.ndarray, baseline: np.ndarray, seed: int = 0) -> list[float]:
    """[ratio of means, 2.5 %, 97.5 %] of a paired bootstrap over prompts."""
    picks = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    ratios = values[picks].mean(axis=1) / baseline[picks].mean(axis=1)
    return [float(values.mean() / baseline.mean()), *(float(q) for q in np.quantile(ratios, (0.025, 0.975)))]


def run(
    name: str,
    prompts: int,
    steps: int,
    calibration_prompts: int,
    *,
    final: bool,
    only: str = "",
    ablations: bool = True,
    wan: Path = WAN,
) -> dict:
    sampling = Sampling(steps=steps)
    model, table, calibration = calibrated(name, wan, calibration_prompts, sampling)
    # a second set of evaluation prompts is kept for the final table
    pool = table.prompts[3::4] if final else table.prompts[1::4]
    evaluation = prepare(table, spread(list(pool), prompts, "evaluation"), 20_000 if final else 10_000)
    setting = Setting(
        evaluation, sampling, draw(model, evaluation, sampling), reference_velocities(model, evaluation, sampling)
    )
    figures, bits, groups = {}, {FLOOR: 16.0}, {}
    figures[FLOOR] = measure(bf16(model), None, setting)
    for method, build in rivals().items():
        if wanted(method, only):
            rival = build(model, calibration)
            figures[method], bits[method] = measure(rival.model, None, setting), rival.bits_per_weight
            report_line(method, bits[method], figures[method])
    for method, scheme in ours().items():
        if wanted(method, only) and (ablations or not is_ablation(method)):
            twin, state, report = quantized_copy(model, calibration, scheme)
            figures[method] = measure(twin, update_with(state), setting, pictures=not is_ablation(method))
            bits[method], groups[method] = report.bits_per_weight, report.groups
            report_line(method, bits[method], figures[method])
    even = spread(list(table.prompts[0::2]), calibration_prompts, "calibration")
    for method, mixed in mixed_models(model, calibration, prepare(table, even, 0), sampling, only):
        figures[method] = measure(mixed.model, update_with(mixed.state), setting)
        bits[method], groups[method] = mixed.bits_per_weight, mixed.report.groups
        report_line(method, bits[method], figures[method])
    return {
        "model": name,
        **provenance("comfy-kitchen"),
        "settings": {
            "evaluation_prompts": list(evaluation.names),
            "calibration_prompts": calibration_prompts,
            "steps": steps,
            "cfg": sampling.cfg,
            "set": "final" if final else "development",
        },
        "rows": [row(m, figures, bits, groups) for m in figures],
    }


@dataclass(frozen=True)
class Mixed:
    """A model of mixed precision; bits count the layers kept in 16 bits too."""

    model: nn.Module
    state: TimestepState
    report: QuantReport
    bits_per_weight: float


def mixed_models(
    model: nn.Module, calibration: Calibration, prompts: Prompts, sampling: Sampling, only: str
) -> Iterator[tuple[str, Mixed]]:
    """The models of MIXED whose name contains `only`. Gains are measured on the calibration prompts."""
    chosen = {method: target for method, target in MIXED.items() if wanted(method, only)}
    gains = measure_gains(model, prompts, sampling) if chosen else {}
    weights = sum(layer.weight.numel() for layer in quantizable(model)[0].values())
    for method, target in chosen.items():
        if target is None:
            budget = quantized_copy(model, calibration, PRESETS["W4A8"])[2].nbytes
        else:
            budget = int(target * weights / 8)
        try:
            twin, state, report = mixed_copy(model, calibration, gains, budget)
        except OverBudget as error:
            # many timestep groups on a narrow model: the tables alone pass 4.5 bits
            print(f"{method}: left out, {error}", flush=True)
            continue
        assert report.choices is not None
        used = sum(choice.nbytes for choice in report.choices.values())
        yield method, Mixed(twin, state, report, 8 * used / weights)


def bf16(model: nn.Module):
    """The full-precision model run in bf16: what precision alone changes."""
    twin = copy.deepcopy(model).bfloat16()
    return lambda x, sigma, context, pooled: twin(x.bfloat16(), sigma, context.bfloat16(), pooled.bfloat16()).float()


def row(method: str, figures: dict, bits: dict, groups: dict) -> dict:
    """Means, and ratios to the best calibration-free format of the same width with 95 % intervals."""
    found = figures[method]
    result = {"method": method, "bits_per_weight": round(bits[method], 3), "groups": groups.get(method, 1)}
    result |= {name: float(values.mean()) for name, values in found.items()}
    baseline = BASELINES[8 if bits[method] > 6 else 4]
    if baseline in figures:
        result["baseline"] = baseline
        for name in ("velocity", "latent") if "latent" in found else ("velocity",):
            result[f"{name}_ratio"] = ratio_interval(found[name], figures[baseline][name])
    return result


def report_line(method: str, bits: float, found: dict) -> None:
    figures = "  ".join(f"{name} {values.mean():.4f}" for name, values in found.items())
    print(f"{method:32s} {bits:6.2f} bits  {figures}", flush=True)


def updated(old: dict, new: dict) -> dict:
    """`old` with the rows of `new` in place of its own for the same method (and condition).

    Raises ValueError where anything else differs.
    """
    for key in ("model", "versions", "machine", "settings"):
        if old[key] != new[key]:
            raise ValueError(f"{key} differ: {old[key]} was measured, now {new[key]}; measure everything again")
    rows = {(row.get("condition"), row["method"]): row for row in (*old["rows"], *new["rows"])}
    return new | {"rows": list(rows.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="emoji")
    parser.add_argument("--wan", type=Path, default=WAN, help="folder that train_fixture.py --layout wan wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="4 prompts, 8 steps: does it run?")
    parser.add_argument("--final", action="store_true", help="the second evaluation set, for the published table only")
    parser.add_argument(
        "--only", default="", help="methods whose name contains one of these, or is one, as =W8A8; / between"
    )
    parser.add_argument("--update", action="store_true", help="keep the other rows of --out")
    parser.add_argument("--no-ablations", action="store_true", help="presets and rivals only")
    parser.add_argument("--calibration-prompts", type=int, help="default 96; 4 with --quick")
    args = parser.parse_args()
    prompts, steps, calibrated = (4, 8, 4) if args.quick else (16, 28, 96)
    result = run(
        args.model,
        prompts,
        steps,
        args.calibration_prompts or calibrated,
        final=args.final,
        only=args.only,
        ablations=not args.no_ablations,
        wan=args.wan,
    )
    if args.update:
        result = updated(json.loads(args.out.read_text()), result)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
