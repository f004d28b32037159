"""Writes the off grid table from benchmarks/results/off_grid_*.json (made by off_grid.py).

python benchmarks/publish_off_grid.py
"""

import json

from pages import ROOT, publish, spread
from publish_quality import MODELS

# what each of ours is held against: fixed ranges against a format without rotation
RIVALS = {"W8A8": "native int8 + ConvRot", "W8A8 static": "native int8", "W4A8": "native asym_w4a8_int8"}
METHODS = ("native int8", "native int8 + ConvRot", "W8A8", "W8A8 static", "native asym_w4a8_int8", "W4A8")


def table(results: dict[str, dict]) -> str:
    """Every condition on the plain model, then the span of the ratios over the conditions on every model."""
    plain = results["emoji"]
    found = {(row["condition"], row["method"]): row for row in plain["rows"]}
    shown = [method for method in METHODS if any(method == label for _, label in found)]
    lines = ["| condition | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
    for condition in dict.fromkeys(condition for condition, _ in found):
        cells = []
        for method in shown:
            ratio = f" ({against(found, condition, method, 'latent'):.2f}x)" if method in RIVALS else ""
            cells.append(f"{found[condition, method]['latent']:.4f}{ratio}")
        lines.append(f"| {condition} | " + " | ".join(cells) + " |")
    ours = [method for method in shown if method in RIVALS]
    heads = [f"{method}, {error}" for method in ours for error in ("velocity", "latent")]
    lines += ["", "| all conditions | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for model, result in results.items():
        spans = [span(result, method, error) for method in ours for error in ("velocity", "latent")]
        lines.append(f"| {MODELS[model]} | " + " | ".join(spans) + " |")
    settings, versions = plain["settings"], plain["versions"]
    base = settings["calibrated"]
    lines.append(
        f"\nLatent error against full precision in the same condition. Calibrated once, on {base['sampler']}, "
        f"{base['steps']} steps, guidance {base['cfg']:g}, flow shift {base['shift']:g}, 16 x 16 latents; each "
        "condition changes one of these (heun has half the steps, each of two calls). In brackets: "
        + ", ".join(f"{ours} against {rival}" for ours, rival in RIVALS.items() if ours in shown)
        + "; below, the smallest and the largest of these, of the velocity error on the full-precision trajectory too. "
        f"{len(settings['evaluation_prompts'])} prompts; torch {versions['torch']}, "
        f"comfy-kitchen {versions['comfy-kitchen']}, CPU. "
        "Paired 95 % intervals: `benchmarks/results/off_grid_*.json`."
    )
    return "\n".join(lines)


def against(found: dict, condition: str, method: str, error: str) -> float:
    """The method's error in a condition / that of its rival."""
    return found[condition, method][error] / found[condition, RIVALS[method]][error]


def span(result: dict, method: str, error: str) -> str:
    """The method's ratios over the conditions."""
    found = {(row["condition"], row["method"]): row for row in result["rows"]}
    return spread([against(found, condition, method, error) for condition, label in found if label == method])


def main() -> None:
    files = {model: ROOT / "benchmarks" / "results" / f"off_grid_{model}.json" for model in MODELS}
    publish("off grid table", table({m: json.loads(path.read_text()) for m, path in files.items() if path.exists()}))


if __name__ == "__main__":
    main()
