"""How many prompts does a calibration need? The same model, calibrated on fewer and on more, beside one another.

    python benchmarks/prompt_count.py --out benchmarks/results/prompt_count.json [--quick]

Velocity error along the full-precision trajectory of 16 prompts that calibration never saw, for each preset, on both
trained DiTs. Their prompts are alike; what people write is not, so that these are the fewest that may do.
"""

import argparse
import json
from pathlib import Path

from dit_quant.demo.experiment import (
    Sampling,
    prepare,
    quantized_copy,
    reference_velocities,
    spread,
    velocity_error,
)
from dit_quant.quant_core.schemes import PRESETS
from provenance import provenance
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
        **provenance("scipy"),
        "settings": {"counts": list(counts), "steps": steps, "evaluated": evaluated},
        "models": models,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
