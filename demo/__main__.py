"""Quantizes the bundled emoji DiT and compares it with full precision: a picture, a report, a table.

python -m dit_quant.demo
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from ..kernels.native.library import AMX_FLAGS, amx_refusal, cpu_flags, unsupported
from ..quant_core.calibration import Calibration
from ..quant_core.files import read_header, replacing
from ..quant_core.metrics import psnr_db, relative_l2
from ..quant_core.report import QuantReport
from ..quant_core.schemes import PRESETS, QuantScheme, WeightArgs
from .comparison import Row, comparison_picture, png
from .emoji_dit import EmojiDiT, load_emoji_dit
from .experiment import (
    COVARIANCE_LIMIT,
    Probe,
    Prompts,
    Sampling,
    calibrate,
    prepare,
    quantized_copy,
    reference_velocities,
    split_prompts,
    timed_draw,
    update_with,
    velocity_error,
)
from .pixels import to_rgb
from .prompts import PromptTable, load_prompt_table

ASSETS = Path(__file__).parent / "assets"
MODEL_FILE, PROMPTS_FILE = "emoji_dit.safetensors", "emoji_prompts.safetensors"
# the second plain 4-bit row spends on finer weight groups what W4A8 spends on its tables, and more
SCHEMES = (
    PRESETS["rtn_w8a8"],
    PRESETS["W8A8"],
    PRESETS["rtn_w4a8"],
    PRESETS["rtn_w4a8"].with_options(name="rtn_w4a8_g8", weights=WeightArgs(4, 8, symmetric=False)),
    PRESETS["W4A8"],
    PRESETS["htg_paper"],
)
SHOWN = ("W8A8", "W4A8")
COLUMNS = 8
FIRST_CALIBRATION_SEED, FIRST_EVALUATION_SEED = 0, 10_000
PACKAGES = ("dit-quant", "torch", "numpy", "scipy", "safetensors", "einops", "pillow")


@dataclass(frozen=True)
class Baseline:
    """What every scheme is compared with: the full-precision model's pictures and trajectory."""

    latents: Tensor
    trajectory: list[Probe]
    seconds_per_step: float


@dataclass(frozen=True)
class Outcome:
    """One quantized model, sampled."""

    latents: Tensor
    quantization: QuantReport
    velocity_rel_l2: float
    final_latent_rel_l2: float
    psnr_db: float
    seconds_per_step: float

    def to_json(self) -> dict:
        return {
            "scheme": self.quantization.scheme,
            "bits_per_weight": self.quantization.bits_per_weight,
            "velocity_rel_l2": self.velocity_rel_l2,
            "final_latent_rel_l2": self.final_latent_rel_l2,
            "psnr_db": self.psnr_db,
            "groups": self.quantization.groups,
            "layers_quantized": len(self.quantization.layers),
            "layers_skipped": [asdict(layer) for layer in self.quantization.skipped],
            "seconds_per_step": self.seconds_per_step,
            "weight_bytes": self.quantization.nbytes,
            "weight_bytes_bf16": 2 * self.quantization.weights,
        }


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    started = time.monotonic()
    say = Progress(started)
    try:
        model, table = load(args.assets)
        calibration_names, evaluation_names = split_prompts(table, args.calibration, args.evaluation)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sampling = Sampling(steps=args.steps)
    prompts = prepare(table, evaluation_names, FIRST_EVALUATION_SEED)

    say(f"sampling {args.evaluation} pictures in full precision, {args.steps} steps each")
    baseline = measure_baseline(model, prompts, sampling)
    say(f"calibrating on {args.calibration} other prompts")
    calibrated = prepare(table, calibration_names, FIRST_CALIBRATION_SEED)
    calibration, _ = calibrate(model, calibrated, sampling)
    outcomes = []
    for scheme in SCHEMES:
        say(f"{scheme.name}: rounding the weights, sampling the same pictures")
        outcomes.append(measure_scheme(scheme, model, calibration, prompts, sampling, baseline))

    report = {
        "machine": machine(),
        "versions": versions(),
        "settings": {
            **asdict(sampling),
            "covariance": COVARIANCE_LIMIT,
            "first_calibration_seed": FIRST_CALIBRATION_SEED,
            "first_evaluation_seed": FIRST_EVALUATION_SEED,
        },
        "calibration_prompts": list(calibrated.names),
        "evaluation_prompts": list(prompts.names),
        "full_precision": {"seconds_per_step": baseline.seconds_per_step},
        "schemes": [outcome.to_json() for outcome in outcomes],
    }
    picture = compare(baseline, outcomes, evaluation_names, sampling)
    replace_file(args.out / "comparison.png", png(picture))
    replace_file(args.out / "report.json", json.dumps(report, indent=2, allow_nan=False).encode() + b"\n")
    print(f"\n{text_table(baseline, outcomes)}\n")
    say(f"wrote {args.out / 'comparison.png'} and {args.out / 'report.json'}")
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dit_quant.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder to write to (%(default)s)")
    parser.add_argument("--calibration", type=positive, default=32, help="prompts to calibrate on (%(default)s)")
    parser.add_argument("--evaluation", type=positive, default=16, help="other prompts to compare on (%(default)s)")
    parser.add_argument("--steps", type=positive, default=28, help="sampling steps (%(default)s)")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder of the model and its prompts (bundled)")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


class Progress:
    """Prints a line with the seconds since the start."""

    def __init__(self, started: float):
        self.started = started

    def __call__(self, line: str) -> None:
        print(f"[{time.monotonic() - self.started:4.0f} s] {line}", flush=True)


def load(assets: Path) -> tuple[EmojiDiT, PromptTable]:
    """Raises DamagedFile naming the file that is missing or cut off."""
    for name in (MODEL_FILE, PROMPTS_FILE):
        read_header(assets / name)
    return load_emoji_dit(assets / MODEL_FILE), load_prompt_table(assets / PROMPTS_FILE)


def measure_baseline(model: EmojiDiT, prompts: Prompts, sampling: Sampling) -> Baseline:
    latents, seconds = timed_draw(model, prompts, sampling)
    return Baseline(latents, reference_velocities(model, prompts, sampling), seconds)


def measure_scheme(
    scheme: QuantScheme,
    model: EmojiDiT,
    calibration: Calibration,
    prompts: Prompts,
    sampling: Sampling,
    baseline: Baseline,
) -> Outcome:
    twin, state, quantization = quantized_copy(model, calibration, scheme)
    latents, seconds = timed_draw(twin, prompts, sampling, update_with(state))
    return Outcome(
        latents=latents,
        quantization=quantization,
        velocity_rel_l2=velocity_error(twin, state, prompts, sampling, baseline.trajectory),
        final_latent_rel_l2=relative_l2(latents, baseline.latents),
        psnr_db=psnr_db(to_rgb(latents), to_rgb(baseline.latents)),
        seconds_per_step=seconds,
    )


def compare(baseline: Baseline, outcomes: list[Outcome], names: list[str], sampling: Sampling) -> Image:
    """The picture of at most COLUMNS prompts, evenly spread over the evaluation."""
    columns = min(COLUMNS, len(names))
    chosen = [i * len(names) // columns for i in range(columns)]
    rows = [Row("full precision", ("16 bits per weight",), to_rgb(baseline.latents[chosen]))]
    for outcome in outcomes:
        if outcome.quantization.scheme in SHOWN:
            details = (f"{outcome.quantization.bits_per_weight:.1f} bits per weight", f"PSNR {outcome.psnr_db:.1f} dB")
            rows.append(Row(outcome.quantization.scheme, details, to_rgb(outcome.latents[chosen])))
    caption = f"Same prompts and seeds in every row; {sampling.steps} Euler steps, guidance {sampling.cfg:g}."
    return comparison_picture(rows, [names[i] for i in chosen], caption)


def text_table(baseline: Baseline, outcomes: list[Outcome]) -> str:
    header = ("scheme", "bits/weight", "groups", "velocity error", "latent error", "PSNR dB", "s/step")
    lines = [header, ("full precision", "16", "", "", "", "", f"{baseline.seconds_per_step:.3f}")]
    lines += [
        (
            outcome.quantization.scheme,
            f"{outcome.quantization.bits_per_weight:.2f}",
            str(outcome.quantization.groups),
            f"{outcome.velocity_rel_l2:.4f}",
            f"{outcome.final_latent_rel_l2:.4f}",
            f"{outcome.psnr_db:.1f}",
            f"{outcome.seconds_per_step:.3f}",
        )
        for outcome in outcomes
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def machine() -> dict:
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": cpu_name() + amx(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": "cpu",
    }


def amx() -> str:
    if amx_refusal() is None:
        return " with AMX"
    return ", its AMX switched off" if unsupported() is None and cpu_flags().issuperset(AMX_FLAGS) else ""


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def replace_file(path: Path, data: bytes) -> None:
    """Writes beside the target and renames: nobody ever reads half a file."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
