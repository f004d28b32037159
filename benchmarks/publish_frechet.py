"""Writes the table of Frechet distances from benchmarks/results/frechet_*.json (made by frechet.py).

python benchmarks/publish_frechet.py
"""

import json

from pages import ROOT, publish
from publish_quality import MODELS


def table(results: dict[str, dict]) -> str:
    """One table per model, a row per method, and what was measured."""
    blocks = []
    for model, result in results.items():
        if len(results) > 1:
            blocks.append(f"{MODELS[model]}:")
        lines = [
            "| method | bits | Frechet distance | above full precision | KID x 1000, above full precision "
            "| perceptual distance x 1000 |",
            "|---|---|---|---|---|---|",
        ]
        blocks.append("\n".join(lines + [line(row) for row in result["rows"]]))
    first = next(iter(results.values()))
    settings, versions = first["settings"], first["versions"]
    blocks.append(
        f"{settings['samples']} samples of each method, of {settings['prompts']} prompts that calibration never saw, "
        f"{settings['steps']} Euler steps, guidance {settings['cfg']:g}, against as many of full precision from other "
        "noise: full precision's own distance is the floor that this number of samples makes. The next two columns "
        "are what rounding adds to it, with 95 % intervals over prompts; an interval around 0 is no difference seen. "
        "Perceptual distance: to full precision from the same noise, LPIPS's formula with unit weights; in brackets "
        "against native int8 + ConvRot at 8 bits, native asym_w4a8_int8 at 4. "
        f"Features: {settings['feature_network']}, in place of Inception and AlexNet, so that figures compare with "
        f"each other only. torch {versions['torch']}, comfy-kitchen {versions['comfy-kitchen']}, CPU; all of it in "
        "`benchmarks/results/frechet_*.json`."
    )
    return "\n\n".join(blocks)


def line(row: dict) -> str:
    """One method; full precision is above nothing."""
    above, kernel, ratio = (row.get(k) for k in ("frechet_over_floor", "kernel_over_floor", "perceptual_ratio"))
    times = f" ({ratio[0]:.2f}x)" if ratio and row["method"] != row["baseline"] else ""
    cells = [
        row["method"],
        f"{row['bits_per_weight']:.2f}",
        f"{row['frechet'][0]:.2f}",
        span(above, 2) if above else "-",
        span([1000 * value for value in kernel], 2) if kernel else "-",
        f"{1000 * row['perceptual']:.1f}{times}",
    ]
    return "| " + " | ".join(cells) + " |"


def span(interval: list[float], digits: int) -> str:
    """[value, low, high] -> '+1.23 (0.12 to 2.34)'."""
    value, low, high = interval
    return f"{value:+.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    files = {model: ROOT / "benchmarks" / "results" / f"frechet_{model}.json" for model in MODELS}
    publish("frechet table", table({m: json.loads(path.read_text()) for m, path in files.items() if path.exists()}))


if __name__ == "__main__":
    main()
