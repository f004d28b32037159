"""Writes the table of rejected methods from benchmarks/results/alternatives.json (made by alternatives.py).

python benchmarks/publish_alternatives.py
"""

import json

from pages import ROOT, publish


def table(result: dict) -> str:
    """One row per method: size, velocity error, and its ratio to the preset with the 95 % interval."""
    settings = result["settings"]
    baseline = settings["baseline"]
    lines = [
        f"Tried and not adopted, on the bundled emoji DiT in place of a part of `{baseline}`:\n",
        f"| method | bits per weight | velocity error | against {baseline} (95 %) |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        name = row["method"] if row["method"] == baseline or not row["reference"] else f"*{row['method']}*"
        against = "-" if row["method"] == baseline else interval(row["velocity_ratio"])
        if row["method"] != baseline and "latent_ratio" in row:
            against += f"; latent {interval(row['latent_ratio'])}"
        lines.append(f"| {name} | {row['bits_per_weight']:.2f} | {row['velocity']:.4f} | {against} |")
    lines.append(
        f"\nIn italics: not rejected, but what the row before is to be compared with. "
        f"{len(settings['evaluation_prompts'])} development prompts, {settings['calibration_prompts']} others for "
        f"calibration, {settings['steps']} steps; torch {result['versions']['torch']}, CPU. Intervals are over "
        "prompts: the two dampings show how far apart roundings lie that differ in nothing else. "
        "The papers are named beside the code that `benchmarks/alternatives.py` calls."
    )
    return "\n".join(lines)


def interval(ratio: list[float]) -> str:
    """'1.03x (1.01 to 1.06)'."""
    mean, low, high = ratio
    return f"{mean:.2f}x ({low:.2f} to {high:.2f})"


def main() -> None:
    path = ROOT / "benchmarks" / "results" / "alternatives.json"
    publish("alternatives table", table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
