"""Writes the speed tables from kernels_*, end_to_end_*, fused_*, compile_times and launch_cost* in
benchmarks/results/.

python benchmarks/publish_speed.py
"""

import json
from pathlib import Path

from kernel_shapes import COPY
from pages import ROOT, publish, spread

RESULTS = ROOT / "benchmarks" / "results"
OURS = ("W8A8", "W8A8 fast", "W8A8 static", "W4A8")
NATIVE = ("native int8", "native int8 + ConvRot", "native asym_w4a8_int8")
# a GPU's summary is of layers and inputs that fill it
WIDE, MANY = 3072, 4096


def summary_table(result: dict) -> str:
    """A GPU's wide layers with many tokens: our presets against bf16 and the native formats, least and largest."""
    wide = [r for r in result["rows"] if min(r["K"], r["N"]) >= WIDE and r["M"] >= MANY]
    rows = [r["timed"] for r in wide]
    others = ("bf16 F.linear", *NATIVE)
    lines = ["| | " + " | ".join(f"against {name}" for name in others) + " |", "|---|" + "---|" * len(others)]
    for name in OURS:
        cells = [spread([r[o]["ms"][0] / r[name]["ms"][0] for r in rows if name in r and o in r]) for o in others]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    models = ", ".join(dict.fromkeys(r["model"] for r in wide))
    lines.append(
        f"\nSpeed of a whole layer, least and largest of {len(rows)} with K and N of {WIDE} and more at {MANY} tokens "
        f"and more ({models}). {where(result)} {quantizer_line(rows)} {ceiling_line(wide, result['roofline'])}"
    )
    return "\n".join(lines)


def ceiling_line(wide: list[dict], roofline: dict) -> str:
    """What 8 bits could gain on these layers at the most: their fastest product for all, and activations copied."""
    product = "int8_linear of W8A8 fast, triton"
    rate = max(2e-9 * r["M"] * r["N"] * r["K"] / r["timed"][product]["ms"][0] for r in wide if product in r["timed"])
    gains = []
    for r in wide:
        # two bytes of every entry read, one written
        large = 3e-6 * r["M"] * r["K"] / roofline["copy_gb_per_s"]
        copied = r["timed"][COPY]["ms"][0] if COPY in r["timed"] else large
        least = 2e-9 * r["M"] * r["N"] * r["K"] / rate + copied
        gains.append(r["timed"]["bf16 F.linear"]["ms"][0] / least)
    return (
        f"Had all of them the rate of their fastest product, {rate:.0f} TOPS, and a quantizer that only copied, they "
        f"would be {spread(gains)} bf16 F.linear."
    )


def quantizer_line(rows: list[dict]) -> str:
    """How near the quantizers of these layers come to a copy of as many bytes, or in results that have none, to the
    card's rate of copying large tensors."""
    found, beside = [], all(COPY in row for row in rows)
    for name in OURS:
        entries = [(row, row[op]) for row in rows for op in row if is_quantizer(op, name)]
        shares = [row[COPY]["ms"][0] / entry["ms"][0] if beside else entry["roofline"] for row, entry in entries]
        if shares:
            found.append(f"{name} {min(shares):.0%} to {max(shares):.0%}")
    measure = "the speed of copying as many bytes" if beside else "its rate of copying memory"
    return f"The quantizers reach these shares of {measure}: {', '.join(found)}."


def is_quantizer(op: str, preset: str) -> bool:
    return op.startswith("quantize") and op.endswith(f" of {preset}, triton")


def folded(title: str, table: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{table}\n\n</details>"


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


def compile_table(result: dict) -> str:
    """First calls: seconds in all and, in brackets, of how many kernels."""
    presets = list(next(iter(result["rows"].values())))
    lines = ["| | " + " | ".join(presets) + " |", "|---|" + "---|" * len(presets)]
    for model, row in result["rows"].items():
        cells = [f"{row[preset]['seconds']:.1f} s ({row[preset]['kernels']})" for preset in presets]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    longest = max(cell["longest"] for row in result["rows"].values() for cell in row.values())
    major, minor = divmod(result["capability"], 10)
    tokens, cpu = " and ".join(map(str, result["tokens"])), result["machine"]["cpu"]
    lines.append(
        f"\nSeconds to compile all kernels of a model (their number) before its first step, at {tokens} tokens, for "
        f"compute capability {major}.{minor}; no kernel takes more than {longest:.1f} s. {cpu}, one thread; Triton "
        f"{result['versions']['triton']}."
    )
    return "\n".join(lines)


def launch_table(result: dict) -> str:
    """Microseconds of the host for one call of a layer, as it is and with Triton asked each time."""
    ways = {"again": "as it is", "asked": "Triton asked each time"}
    lines = ["| | " + " | ".join(result["rows"]) + " |", "|---|" + "---|" * len(result["rows"])]
    for way, title in ways.items():
        cells = [f"{row[way]:.0f} us" if way in row else "-" for row in result["rows"].values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    on_cpu = result["machine"]["device"] == "cpu"
    by = "a driver whose kernels return at once: no card" if on_cpu else "the card's own driver"
    lines.append(
        f"\nTime of the host for a layer's two launches, {result['tokens']} tokens and {result['channels']} channels, "
        f"with {by}; Triton {result['versions']['triton']}. {where(result)}"
    )
    return "\n".join(lines)


def where(result: dict) -> str:
    machine, versions = result["machine"], result["versions"]
    kitchen = f", comfy-kitchen {versions['comfy-kitchen']}" if "comfy-kitchen" in versions else ""
    return f"{device(machine)}; torch {versions['torch']}{kitchen}."


def device(machine: dict) -> str:
    return machine["device"] if machine["device"] != "cpu" else f"{machine['cpu']}, {machine['torch_threads']} threads"


def found(pattern: str) -> list[tuple[Path, dict]]:
    return [(path, json.loads(path.read_text())) for path in sorted(RESULTS.glob(pattern))]


def main() -> None:
    layers = [result for _, result in found("kernels_*.json")]
    gpus = [result for result in layers if result["machine"]["device"] != "cpu"]
    tables = [folded(f"Every layer on {device(result['machine'])}", kernel_table(result)) for result in layers]
    publish("gpu summary", "\n\n".join(map(summary_table, gpus)))
    publish("layer speed table", "\n\n".join(tables))
    publish("model speed table", "\n\n".join(model_table(result) for _, result in found("end_to_end_*.json")))
    publish("compile time table", "\n\n".join(compile_table(result) for _, result in found("compile_times.json")))
    publish("launch cost table", "\n\n".join(launch_table(result) for _, result in found("launch_cost*.json")))
    publish("fused speed table", "\n\n".join(fused_table(result) for _, result in found("fused_*.json")))


if __name__ == "__main__":
    main()
