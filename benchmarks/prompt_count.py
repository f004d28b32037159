"""How many prompts does a calibration need? The same model, calibrated on fewer and on more, beside one another.

    python benchmarks/prompt_count.py --out benchmarks/results/prompt_count.json [--quick]

Velocity error along the full-precision trajectory of 16 prompts that calibration never saw, for each preset, on both
trained DiTs. Their prompts are alike; what people write is not, so that these are the fewest that may do.
"""

import argparse
import json
import platform
from importlib import metadata
from pathlib import Path

import torch
from dit_quant.demo.experiment import (
    Sampling,
    prepare,
    quantized_copy,
    reference_velocities,
    spread,
    velocity_error,
)
from dit_quant.quant_core.schemes import PRESETS
from quality import WAN, calibrated

SCHEMES = ("W8A8", "W8A8 static", "W4A8")
PLAIN = ("emoji", "emoji_wan")
COUNTS = (4, 8, 16, 32, 64, 96)


def errors(name: str, count: int, evaluated: int, sampling: Sampling, wan: Path) -> dict[str, float]:
    """Preset -> velocity error after a calibration on `count` prompts."""
    model, table, calibration = calibrated(name, wan, count, sampling)
    prompts = prepare(table, spread(list(table.prompts[1::4]), evaluated, "evaluation"), 10_000)
    reference = reference_velocities(model, prompts, sampling)
    found = {}
    for scheme in SCHEMES:
        twin, state, _ = quantized_copy(model, calibration, PRESETS[scheme])
        found[scheme] = velocity_error(twin, state, prompts, sampling, reference)
    return found


def table(result: dict) -> str:
    """A row for every number of prompts, a column for every model and preset."""
    models = {"emoji": "SD3 layout", "emoji_wan": "Wan layout"}
    columns = [(model, scheme) for model in result["models"] for scheme in SCHEMES]
    lines = ["| prompts | " + " | ".join(f"{models[model]}, {scheme}" for model, scheme in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for count in map(str, result["settings"]["counts"]):
        cells = [f"{result['models'][model][count][scheme]:.4f}" for model, scheme in columns]
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    settings, versions = result["settings"], result["versions"]
    lines.append(
        f"\nVelocity error on {settings['evaluated']} prompts that calibration never saw, {settings['steps']} steps; "
        f"torch {versions['torch']}, CPU."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wan", type=Path, default=WAN, help="folder that train_fixture.py --layout wan wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="2 prompts, 4 steps: does it run?")
    args = parser.parse_args()
    counts, steps, evaluated = ((2,), 4, 2) if args.quick else (COUNTS, 28, 16)
    models: dict[str, dict[str, dict[str, float]]] = {}
    for name in PLAIN:
        for count in counts:
            found = errors(name, count, evaluated, Sampling(steps=steps), args.wan)
            models.setdefault(name, {})[str(count)] = found
            print(f"{name}, {count} prompts: " + ", ".join(f"{s} {e:.4f}" for s, e in found.items()), flush=True)
    result = {
        "versions": {p: metadata.version(p) for p in ("torch", "numpy", "scipy", "dit-quant")},
        "machine": {"processor": platform.processor() or platform.machine(), "torch_threads": torch.get_num_threads()},
        "settings": {"counts": list(counts), "steps": steps, "evaluated": evaluated},
        "models": models,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
