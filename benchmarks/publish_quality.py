"""Writes the README's quality table from benchmarks/results/quality_*.json (made by quality.py --final).

python benchmarks/publish_quality.py
"""

import json

from readme import ROOT, publish

MODELS = {"emoji": "plain", "emoji_outliers": "planted outliers", "emoji_drift": "planted drift"}
METHODS = (
    "bf16 (noise floor)",
    "native int8",
    "SmoothQuant 0.5",
    "htg_paper",
    "native int8 + ConvRot",
    "W8A8",
    "native convrot_w4a4",
    "rtn_w4a8",
    "native asym_w4a8_int8",
    "W4A8",
    "W4A8, group 32",
)


def table(results: dict[str, dict]) -> str:
    """One row per method: bits on the plain model, velocity error on each, and the ratio to the native format."""
    names = [label for model, label in MODELS.items() if model in results]
    lines = [
        "| method | bits per weight | " + " | ".join(f"velocity error, {name}" for name in names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for method in METHODS:
        cells = []
        for model in results:
            row = next(r for r in results[model]["rows"] if r["method"] == method)
            ratio = row.get("velocity_ratio")
            cells.append(f"{row['velocity']:.4f}" + (f" ({ratio[0]:.2f}x)" if ratio and "native" not in method else ""))
        bits = next(r for r in results["emoji"]["rows"] if r["method"] == method)["bits_per_weight"]
        lines.append(f"| {method} | {bits:.2f} | " + " | ".join(cells) + " |")
    settings, versions = results["emoji"]["settings"], results["emoji"]["versions"]
    lines.append(
        f"\nIn brackets: against native int8 + ConvRot at 8 bits, native asym_w4a8_int8 at 4. "
        f"{len(settings['evaluation_prompts'])} prompts kept for this table, {settings['calibration_prompts']} others "
        f"for calibration, {settings['steps']} steps; torch {versions['torch']}, "
        f"comfy-kitchen {versions['comfy-kitchen']}, CPU. "
        "Latent errors, PSNR, SSIM, ablations and paired 95 % intervals: `benchmarks/results/quality_*.json`."
    )
    return "\n".join(lines)


def main() -> None:
    files = {model: ROOT / "benchmarks" / "results" / f"quality_{model}.json" for model in MODELS}
    publish("quality table", table({m: json.loads(path.read_text()) for m, path in files.items() if path.exists()}))


if __name__ == "__main__":
    main()
