"""What calibrating and quantizing cost, next to sampling the same prompts with the plain model.

    python benchmarks/calibration_cost.py --out benchmarks/results/calibration_cost.json [--quick]

The bundled emoji DiT, everything in one process, in turn and repeated; medians. Fails where a preset costs more
than LIMITS times the sampling.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from dit_quant.demo.emoji_dit import load_emoji_dit
from dit_quant.demo.experiment import (
    COVARIANCE_LIMIT,
    Prompts,
    Sampling,
    calibrate,
    draw,
    prepare,
    quantized_copy,
    spread,
)
from dit_quant.demo.prompts import load_prompt_table
from dit_quant.quant_core.schemes import PRESETS
from provenance import provenance
from torch import nn

ASSETS = Path(__file__).resolve().parents[1] / "demo" / "assets"
# (collect + quantize) / sampling
LIMITS = {"W8A8": 3.0, "W4A8": 6.0}


def timed(work: Callable):
    """-> what `work` returns, and its seconds: of the wall clock, and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, (time.perf_counter() - wall, time.process_time() - processor)


def measure(model: nn.Module, prompts: Prompts, sampling: Sampling, repeats: int) -> dict:
    """Median seconds of every part, and each preset's ratio to sampling."""
    draw(model, prompts, Sampling(steps=1))  # the first call pays for torch's own set-up
    times: dict[str, list[tuple[float, float]]] = {}
    size = 0
    for _ in range(repeats):
        _, taken = timed(lambda: draw(model, prompts, sampling))
        times.setdefault("sample", []).append(taken)
        (calibration, _), taken = timed(lambda: calibrate(model, prompts, sampling))
        times.setdefault("collect", []).append(taken)
        size = max(size, int(calibration.settings["statistics_bytes"]))
        for preset in LIMITS:
            _, taken = timed(lambda p=preset, c=calibration: quantized_copy(model, c, PRESETS[p]))
            times.setdefault(preset, []).append(taken)
    wall, processor = ({part: statistics.median(t[i] for t in taken) for part, taken in times.items()} for i in (0, 1))
    return {
        "seconds": wall,
        "processor_seconds": processor,
        "ratio": {preset: ratio(wall, preset) for preset in LIMITS},
        "processor_ratio": {preset: ratio(processor, preset) for preset in LIMITS},
        "statistics_bytes": size,
    }


def ratio(seconds: dict[str, float], preset: str) -> float:
    return (seconds["collect"] + seconds[preset]) / seconds["sample"]


def report(result: dict) -> str:
    seconds = result["seconds"]
    lines = [
        f"sampling {seconds['sample']:.1f} s, with collection {seconds['collect']:.1f} s, "
        f"statistics {result['statistics_bytes'] / 2**20:.0f} MB"
    ]
    for preset, limit in LIMITS.items():
        lines.append(
            f"{preset}: quantizing {seconds[preset]:.1f} s; collecting and quantizing {result['ratio'][preset]:.2f} x "
            f"sampling, by processor time {result['processor_ratio'][preset]:.2f} x (at most {limit:g})"
        )
    return "\n".join(lines)


def exceeded(result: dict) -> list[str]:
    """Presets over their limit, by the wall clock."""
    return [preset for preset, limit in LIMITS.items() if result["ratio"][preset] > limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--quick", action="store_true", help="4 prompts, 4 steps, once: does it run? Limits are ignored"
    )
    args = parser.parse_args()
    count, steps, repeats = (4, 4, 1) if args.quick else (32, 28, 3)
    model = load_emoji_dit(ASSETS / "emoji_dit.safetensors")
    table = load_prompt_table(ASSETS / "emoji_prompts.safetensors")
    sampling = Sampling(steps=steps)
    prompts = prepare(table, spread(list(table.prompts[0::2]), count, "calibration"), 0)
    result = {
        "model": "emoji",
        **provenance("scipy"),
        "settings": {
            "prompts": count,
            "steps": steps,
            "batch": sampling.batch,
            "repeats": repeats,
            "covariance": COVARIANCE_LIMIT,
        },
        "limits": LIMITS,
        **measure(model, prompts, sampling, repeats),
    }
    print(report(result))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if not args.quick and exceeded(result):
        raise SystemExit(f"over the limit: {', '.join(exceeded(result))}")


if __name__ == "__main__":
    main()
