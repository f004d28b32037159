"""Seconds per step, peak memory and load time of a whole DiT through the host: full precision, native formats, ours.

python benchmarks/end_to_end.py --model pixart --flags=--cpu --out FILE.json

Every row runs in a fresh process of the host's interpreter, the rows in turn for several rounds, so that a busy
machine slows all of them. Weights are random: speed does not ask for more. A row whose picture is not that of the
full-precision model is reported as wrong, without its speed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from dit_quant.demo.__main__ import machine, versions

HERE = Path(__file__).resolve().parent
FLOATS = ("fp32", "bf16")
NATIVE = ("native int8", "native int8 + ConvRot", "native asym_w4a8_int8")
OURS = ("W8A8", "W8A8 fast", "W8A8 static", "W4A8")
# random weights amplify rounding; a wrong model has an error of 1 and more
LARGEST_ERROR = 0.25


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("pixart", "sd3.5-medium", "flux"), default="pixart")
    parser.add_argument("--depth", type=int, default=0, help="blocks; 0: as published")
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels")
    parser.add_argument("--steps", type=int, default=4, help="timed steps per round, after one that is not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=FLOATS, default="fp32", help="arithmetic around the quantized layers")
    parser.add_argument("--rows", nargs="+", default=[*FLOATS, *NATIVE, *OURS])
    parser.add_argument("--host", type=Path, default=Path(os.environ.get("COMFYUI_PATH", Path.home() / "ComfyUI")))
    parser.add_argument("--python", type=Path, help="the host's interpreter (HOST/.venv/bin/python)")
    parser.add_argument("--flags", default="", help="of the host: --flags='--cpu --use-pytorch-cross-attention'")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for the model files; a temporary one by default")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if not (args.host / "main.py").is_file():
        print(f"error: no ComfyUI in {args.host}; name one with --host or COMFYUI_PATH", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(args, args.work or Path(temporary))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))
    print(text(result))
    return 0


def measure(args: argparse.Namespace, folder: Path) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    depth = args.depth or {"pixart": 28, "sd3.5-medium": 24, "flux": 19}[args.model]
    job = {
        "model": args.model,
        "depth": depth,
        "dtype": args.dtype,
        "size": args.size,
        "flags": args.flags.split(),
        "threads": args.threads,
        "folder": str(folder),
        "source": str(folder / f"{args.model}-{depth}.safetensors"),
    }
    # the file is in fp32 where a row computes in fp32
    made = work(args, job | {"do": "make", "dtype": "fp32" if "fp32" in args.rows else args.dtype})
    quantized = [row for row in args.rows if row not in FLOATS]
    files = work(args, job | {"do": "convert", "rows": quantized}) if quantized else {}
    absent = {row: files[row]["absent"] for row in quantized if "absent" in files[row]}
    rows = [row for row in args.rows if row not in absent]
    found: dict[str, list[dict]] = {row: [] for row in rows}
    for turn in range(args.rounds):
        for row in rows:
            timing = {"do": "time", "row": row, "file": files.get(row, {}).get("file"), "steps": args.steps}
            found[row].append(work(args, job | timing))
            step = statistics.median(found[row][-1]["step_s"])
            print(f"round {turn + 1}: {row}: {step:.3f} s per step", file=sys.stderr, flush=True)
    sizes = {row: files[row]["bytes"] if row in files else Path(job["source"]).stat().st_size for row in rows}
    sizes |= {row: sizes[row] // 2 for row in rows if row == "bf16" and "fp32" in args.rows}
    return {
        "model": f"{args.model}, {depth} blocks, {made['parameters'] / 1e6:.0f} M parameters, random weights",
        "size": args.size,
        "steps": args.steps,
        "rounds": args.rounds,
        "dtype_around": args.dtype,
        "flags": args.flags,
        "rows": summarize(found, sizes),
        "absent": absent,
        "machine": machine() | {"device": made["device"], "torch_threads": made["threads"]},
        "versions": versions() | made["versions"],
    }


def work(args: argparse.Namespace, job: dict) -> dict:
    """One job in the host's interpreter. Raises RuntimeError with the end of its output."""
    python = args.python or args.host / ".venv" / "bin" / "python"
    command = [str(python), str(HERE / "end_to_end_worker.py"), str(args.host), str(HERE.parent), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=args.host)
    if done.returncode:
        raise RuntimeError(f"{job['do']} {job.get('row', '')} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summarize(found: dict[str, list[dict]], sizes: dict[str, int]) -> dict[str, dict]:
    """Medians over rounds, and ratios to the full-precision rows of the same round."""
    base = next((row for row in FLOATS if row in found), next(iter(found)))
    expected = torch.tensor(found[base][0]["latent"])
    rows = {}
    for row, rounds in found.items():
        error = float((torch.tensor(rounds[0]["latent"]) - expected).norm() / expected.norm())
        entry: dict = {"latent_rel_l2": error, "file_bytes": sizes[row]}
        if error > LARGEST_ERROR or not all(r["finite"] for r in rounds):
            rows[row] = entry | {"wrong": f"latent error {error:.2f} to {base}: not timed"}
            continue
        step = [statistics.median(r["step_s"]) for r in rounds]
        entry["step_s"] = statistics.median(step)
        entry["step_s_of_rounds"] = step
        for other in FLOATS:
            if other in found:
                of_round = [statistics.median(r["step_s"]) for r in found[other]]
                entry[f"times_{other}"] = statistics.median(b / a for a, b in zip(step, of_round, strict=True))
        for key in ("load_s", "first_step_s", "peak_process_bytes", "peak_device_bytes"):
            entry[key] = statistics.median(r[key] for r in rounds)
        rows[row] = entry
    return rows


def text(result: dict) -> str:
    """A Markdown table."""
    columns = [f"times_{name}" for name in FLOATS if any(f"times_{name}" in r for r in result["rows"].values())]
    head = ["row", "s/step", *(f"speed of {c.removeprefix('times_')}" for c in columns), "load s", "peak MB", "file MB"]
    lines = [
        f"{result['model']}, {result['size']} px, {result['machine']['device']}",
        "",
        "| " + " | ".join(head) + " |",
    ]
    lines.append("|" + " --- |" * len(head))
    for row, entry in result["rows"].items():
        if "wrong" in entry:
            lines.append(f"| {row} | {entry['wrong']} |" + " |" * (len(head) - 2))
            continue
        peak = entry["peak_device_bytes"] or entry["peak_process_bytes"]
        cells = [row, f"{entry['step_s']:.3f}", *(f"{entry[c]:.2f}x" if c in entry else "" for c in columns)]
        cells += [f"{entry['load_s']:.1f}", f"{peak / 2**20:.0f}", f"{entry['file_bytes'] / 2**20:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"{row}: {why}" for row, why in result["absent"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
