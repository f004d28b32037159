"""Runs the demo and publishes it: benchmarks/results/demo.json, docs/comparison.png and the table of the README.

python benchmarks/publish_demo.py
"""

import json
import shutil
import tempfile
from pathlib import Path

from dit_quant.demo.__main__ import main as run_demo
from pages import ROOT, publish


def table(report: dict) -> str:
    """The README's table, one row per scheme."""
    lines = [
        "| scheme | bits per weight | groups | velocity error | latent error | PSNR dB |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["schemes"]:
        lines.append(
            f"| `{row['scheme']}` | {row['bits_per_weight']:.2f} | {row['groups']} | {row['velocity_rel_l2']:.4f} "
            f"| {row['final_latent_rel_l2']:.4f} | {row['psnr_db']:.1f} |"
        )
    prompts, steps = len(report["evaluation_prompts"]), report["settings"]["steps"]
    lines.append(
        f"\nRelative to full precision on {prompts} prompts that calibration never saw, {steps} Euler steps, guidance "
        f"{report['settings']['cfg']:g}, calibrated on {len(report['calibration_prompts'])} others; bits count every "
        f"table. torch {report['versions']['torch']}, {report['machine']['cpu']}; all of it in "
        "[demo.json](benchmarks/results/demo.json)."
    )
    return "\n".join(lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if run_demo(["--out", folder]) != 0:
            raise SystemExit("the demo failed; nothing was published")
        report = json.loads((out / "report.json").read_text())
        shutil.copyfile(out / "report.json", ROOT / "benchmarks" / "results" / "demo.json")
        shutil.copyfile(out / "comparison.png", ROOT / "docs" / "comparison.png")
    publish("demo table", table(report))


if __name__ == "__main__":
    main()
