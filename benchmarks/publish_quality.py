"""Writes the quality tables from benchmarks/results/quality_*.json (made by quality.py --final).

python benchmarks/publish_quality.py
"""

import json

from pages import ROOT, publish

MODELS = {
    "emoji": "SD3 layout",
    "emoji_wan": "Wan layout",
    "emoji_outliers": "SD3, outliers",
    "emoji_drift": "SD3, outliers that drift",
    "emoji_mean_drift": "SD3, drifting means",
    "emoji_all_outliers": "SD3, all of these",
    "emoji_wan_outliers": "Wan, outliers",
}
# bits of codes and weight scales, what is left of a layer's size at real widths
METHODS = {
    "bf16 (noise floor)": 16,
    "native int8": 8,
    "SmoothQuant 0.5": 8,
    "htg_paper": 8,
    "native int8 + ConvRot": 8,
    "W8A8": 8,
    "W8A8 fast": 8,
    "W8A8 static": 8,
    "native convrot_w4a4": 4,
    "rtn_w4a8": 4 + 8 / 16,
    "native asym_w4a8_int8": 4 + 8 / 16,
    "W4A8": 4 + 8 / 16,
}
ABLATED = ("W8A8", "W8A8 static", "W4A8", "htg_paper", "mixed")


def table(results: dict[str, dict]) -> str:
    """One row per method: bits, velocity error on each model, and the ratio to the native format."""
    names = [label for model, label in MODELS.items() if model in results]
    lines = [
        "| method | bits: codes and weight scales (with all tables here) | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for method, bits in METHODS.items():
        rows = [row_of(result, method) for result in results.values()]
        cells = [figure(row) for row in rows]
        lines.append(f"| {method} | {bits:g} ({rows[0]['bits_per_weight']:.2f}) | " + " | ".join(cells) + " |")
    settings, versions = results["emoji"]["settings"], results["emoji"]["versions"]
    lines.append(
        "\nVelocity error; in brackets against native int8 + ConvRot at 8 bits, native asym_w4a8_int8 at 4. "
        f"{len(settings['evaluation_prompts'])} prompts kept for this table, {settings['calibration_prompts']} others "
        f"for calibration, {settings['steps']} steps; torch {versions['torch']}, "
        f"comfy-kitchen {versions['comfy-kitchen']}, CPU. The models are 256 wide, which is why tables weigh so much. "
        "Latent errors, PSNR, SSIM, a perceptual distance, paired 95 % intervals: `benchmarks/results/quality_*.json`."
    )
    return "\n".join(lines)


def ablations(result: dict) -> str:
    """One row per variant of a preset, against the preset itself, on the plain model."""
    lines = ["| what | bits with all tables | timestep groups | velocity error |", "|---|---|---|---|"]
    for preset in ABLATED:
        for row in result["rows"]:
            if row["method"].split(",")[0] == preset or (preset == "mixed" and row["method"].startswith("mixed")):
                name, change = row["method"], row["velocity"]
                lines.append(f"| {name} | {row['bits_per_weight']:.2f} | {row['groups']} | {change:.4f} |")
    return "\n".join(lines)


def row_of(result: dict, method: str) -> dict:
    return next(row for row in result["rows"] if row["method"] == method)


def figure(row: dict) -> str:
    """Error, and for what is not native the ratio."""
    ratio = row.get("velocity_ratio")
    return f"{row['velocity']:.4f}" + (f" ({ratio[0]:.2f}x)" if ratio and "native" not in row["method"] else "")


def main() -> None:
    files = {model: ROOT / "benchmarks" / "results" / f"quality_{model}.json" for model in MODELS}
    results = {model: json.loads(path.read_text()) for model, path in files.items() if path.exists()}
    publish("quality table", table(results))
    publish("ablation table", ablations(results["emoji"]))


if __name__ == "__main__":
    main()
