"""Writes the prompt count table from benchmarks/results/prompt_count.json (made by prompt_count.py).

python benchmarks/publish_prompt_count.py
"""

import json

from pages import ROOT, publish
from publish_quality import MODELS


def table(result: dict) -> str:
    """A row for every number of prompts, a column for every model and preset."""
    columns = [(model, scheme) for model, counts in result["models"].items() for scheme in next(iter(counts.values()))]
    lines = ["| prompts | " + " | ".join(f"{MODELS[model]}, {scheme}" for model, scheme in columns) + " |"]
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
    path = ROOT / "benchmarks" / "results" / "prompt_count.json"
    publish("prompt count table", table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
