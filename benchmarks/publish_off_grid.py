"""Writes the README's off grid table from benchmarks/results/off_grid_*.json (made by off_grid.py).

python benchmarks/publish_off_grid.py
"""

import json

from publish_quality import MODELS
from readme import ROOT, publish

OURS = ("W8A8", "W8A8 static", "W4A8")
METHODS = ("native int8 + ConvRot", "W8A8", "W8A8 static", "native asym_w4a8_int8", "W4A8")


def table(results: dict[str, dict]) -> str:
    """Every condition on the plain model, then the span of the ratios over the conditions on every model."""
    plain = results["emoji"]
    found = {(row["condition"], row["method"]): row for row in plain["rows"]}
    shown = [method for method in METHODS if any(method == label for _, label in found)]
    lines = ["| condition | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
    for condition in dict.fromkeys(condition for condition, _ in found):
        cells = []
        for method in shown:
            row = found[condition, method]
            cells.append(f"{row['latent']:.4f}" + (f" ({row['latent_ratio'][0]:.2f}x)" if method in OURS else ""))
        lines.append(f"| {condition} | " + " | ".join(cells) + " |")
    ours = [method for method in shown if method in OURS]
    lines += ["", "| all conditions | " + " | ".join(ours) + " |", "|---|" + "---|" * len(ours)]
    for model, result in results.items():
        lines.append(f"| {MODELS[model]} | " + " | ".join(span(result, method) for method in ours) + " |")
    settings, versions = plain["settings"], plain["versions"]
    base = settings["calibrated"]
    lines.append(
        f"\nLatent error against full precision in the same condition. Calibrated once, on {base['sampler']}, "
        f"{base['steps']} steps, guidance {base['cfg']:g}, flow shift {base['shift']:g}, 16 x 16 latents; each "
        "condition changes one of these (heun has half the steps, each of two calls). In brackets: against "
        "native int8 + ConvRot at 8 bits, native asym_w4a8_int8 at 4; below, the smallest and the largest of these. "
        f"{len(settings['evaluation_prompts'])} prompts; torch {versions['torch']}, "
        f"comfy-kitchen {versions['comfy-kitchen']}, CPU. "
        "Velocity errors and paired 95 % intervals: `benchmarks/results/off_grid_*.json`."
    )
    return "\n".join(lines)


def span(result: dict, method: str) -> str:
    """'0.14x to 0.20x': the method's latent ratios over the conditions, '-' where it was not measured."""
    ratios = [row["latent_ratio"][0] for row in result["rows"] if row["method"] == method]
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x" if ratios else "-"


def main() -> None:
    files = {model: ROOT / "benchmarks" / "results" / f"off_grid_{model}.json" for model in MODELS}
    publish("off grid table", table({m: json.loads(path.read_text()) for m, path in files.items() if path.exists()}))


if __name__ == "__main__":
    main()
