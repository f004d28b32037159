"""Writes the README's speed tables from kernels_*.json, end_to_end_*.json and fused_*.json in benchmarks/results/.

python benchmarks/publish_speed.py
"""

import json
from pathlib import Path

from readme import ROOT, publish, spread

RESULTS = ROOT / "benchmarks" / "results"
OURS = ("W8A8", "W8A8 fast", "W8A8 static", "W4A8")
NATIVE = ("native int8", "native int8 + ConvRot", "native asym_w4a8_int8")


def kernel_table(result: dict) -> str:
    """Whole layers: speed against the faster of the fp32 and the bf16 product of the same shape."""
    names = [name for name in (*OURS, *NATIVE) if any(name in row["timed"] for row in result["rows"])]
    lines = ["| layer | tokens | K | N | input | " + " | ".join(names) + " |", "|---|" + "---|" * (4 + len(names))]
    for row in result["rows"]:
        cells = [speed(row["timed"].get(name)) for name in names]
        head = (f"{row['model']} {row['layer']}", row["M"], row["K"], row["N"], row["dtype"])
        lines.append("| " + " | ".join(map(str, (*head, *cells))) + " |")
    lines.append(
        "\nSpeed of a whole layer (quantize, multiply, epilogue) against the faster of fp32 and bf16 `F.linear`, timed "
        f"by turns in one run: 2.0x takes half the time. {where(result)}"
    )
    return "\n".join(lines)


def speed(entry: dict | None) -> str:
    return "-" if entry is None else f"{min(entry['times_bf16'][0], entry['times_fp32'][0]):.2f}x"


def model_table(result: dict) -> str:
    """A whole model through the host."""
    lines = ["| | s per step | against fp32 | against bf16 | load s | peak memory MB | file MB |", "|---|" + "---|" * 6]
    for name, row in result["rows"].items():
        if "wrong" in row:
            lines.append(f"| {name} | {row['wrong']} |" + " |" * 5)
            continue
        ratios = " | ".join(f"{row[key]:.2f}x" if key in row else "-" for key in ("times_fp32", "times_bf16"))
        peak = row["peak_device_bytes"] or row["peak_process_bytes"]
        sizes = f"{row['load_s']:.1f} | {peak / 2**20:.0f} | {row['file_bytes'] / 2**20:.0f}"
        lines.append(f"| {name} | {row['step_s']:.2f} | {ratios} | {sizes} |")
    absent = "".join(f" {name} has no row: {why}." for name, why in result["absent"].items())
    lines.append(
        f"\n{result['model']}, {result['size']} x {result['size']} pixels, in ComfyUI {result['versions']['host']}; "
        f"around the quantized layers the model computes in {result['dtype_around']}. Medians of {result['rounds']} "
        f"rounds, every row in a process of its own. {where(result)}{absent}"
    )
    return "\n".join(lines)


def fused_table(result: dict) -> str:
    """Fused quantizers against the same apart, one line per op, preset and type of input; a column per backend."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["timed"] if name != "apart"))
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in result["rows"]:
        groups.setdefault((row["op"], row["preset"], row["dtype"]), []).append(row["timed"])
    lines = ["| op | preset | input | shapes | " + " | ".join(names) + " |", "|---|" + "---|" * (3 + len(names))]
    for head, rows in groups.items():
        cells = [spread([row[name]["times_apart"][0] for row in rows if name in row]) for name in names]
        lines.append("| " + " | ".join([*head, str(len(rows)), *cells]) + " |")
    quantizers = sorted({row["timed"]["apart"]["backend"] for row in result["rows"] if "apart" in row["timed"]})
    lines.append(
        f"\nTime of the host's ops and of the quantizer behind them ({', '.join(quantizers)}) over the time of the "
        "fused quantizer, timed by turns in one run: least and largest over the shapes, above 1.00x fusing is faster. "
        f"{where(result)}"
    )
    return "\n".join(lines)


def where(result: dict) -> str:
    machine, versions = result["machine"], result["versions"]
    device = (
        machine["device"] if machine["device"] != "cpu" else f"{machine['cpu']}, {machine['torch_threads']} threads"
    )
    kitchen = f", comfy-kitchen {versions['comfy-kitchen']}" if "comfy-kitchen" in versions else ""
    return f"{device}; torch {versions['torch']}{kitchen}."


def found(pattern: str) -> list[tuple[Path, dict]]:
    return [(path, json.loads(path.read_text())) for path in sorted(RESULTS.glob(pattern))]


def main() -> None:
    publish("layer speed table", "\n\n".join(kernel_table(result) for _, result in found("kernels_*.json")))
    publish("model speed table", "\n\n".join(model_table(result) for _, result in found("end_to_end_*.json")))
    publish("fused speed table", "\n\n".join(fused_table(result) for _, result in found("fused_*.json")))


if __name__ == "__main__":
    main()
