"""Speed of the integer kernels on the layers of published DiTs, beside full precision, comfy-kitchen and the roofline.

    python benchmarks/kernels.py --device cuda --out benchmarks/results/kernels_h100.json [--quick]
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python benchmarks/kernels.py --device cpu --out .../kernels_cpu_no_amx.json

Everything about a layer is timed in the same run, by turns. Before that every backend of every op is checked against
its reference; an op that fails is not timed, and the exit status is 1. Whole layers are compared with the fp32 layer
too: a row whose output is another function has no time. Rivals need `pip install comfy-kitchen`.
"""

import argparse
import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from dit_quant.demo.__main__ import machine, versions
from dit_quant.kernels import autotune
from dit_quant.kernels.tiles import MAX_BUCKET
from dit_quant.quant_core.linear import quant_linear
from dit_quant.quant_core.schemes import PRESETS
from kernel_checks import Checks, check_all
from kernel_layers import BF16, FP32, PRESET_NAMES, Contender, Problem, at, contenders, quantized
from kernel_shapes import LAYERS, Layer, cases
from kernel_timing import Clock, Roofline, measure_roofline, quartiles, race, ratio
from precompile import compile_all

ROOT = Path(__file__).resolve().parents[1]
# x of each device: a CPU computes in fp32 unless told otherwise
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
# seconds that one contender may use on one layer
BUDGET = 4.0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one layer, few rounds: does it run?")
    parser.add_argument("--models", default="", help="only models whose name contains this, such as flux")
    parser.add_argument("--tokens", type=int, nargs="+", help="only these numbers of tokens, all layers at one by one")
    parser.add_argument("--rounds", type=int, help="default 15; 3 with --quick")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; 0: all")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device; use --device cpu", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    timed = cases(args.device, args.quick, args.models)
    if not timed:
        print(f"error: no model with {args.models!r} in its name is timed on {args.device}", file=sys.stderr)
        return 2
    offered = sorted({M for _, M in timed})
    usual = timed
    if args.tokens is not None:
        timed = [case for M in dict.fromkeys(args.tokens) for case in timed if case[1] == M]
    if not timed:
        print(
            f"error: layers are timed at {', '.join(map(str, offered))} tokens, none at {args.tokens}", file=sys.stderr
        )
        return 2
    if args.device == "cuda" and not args.quick:
        for error in compile_all("kernels", kernels_of(timed)):
            print(f"while compiling: {error}", file=sys.stderr)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if autotune.enabled(torch.device(args.device)):
        # which tiles were compared, and how they did
        logging.basicConfig(level=logging.INFO)
    result = {}
    # written after every layer: a run that is cut off keeps what it has measured
    for result in run(torch.device(args.device), timed, args.rounds or (3 if args.quick else 15), args.quick):
        result = result | {"rows": sorted(result["rows"], key=lambda row: usual.index(case_of(row)))}
        args.out.write_text(json.dumps(result) + "\n")
    print(text(result))
    return 1 if result["failed"] else 0


def kernels_of(timed: list[tuple[Layer, int]]) -> dict[tuple, tuple]:
    """`launch`'s arguments -> what its quantizer is compiled by; a tile is chosen by the bucket of M."""
    return {
        (layer.model, layer.name, min(M, MAX_BUCKET), preset): (layer.K, preset)
        for layer, M in timed
        for preset in PRESET_NAMES
    }


def launch(device: torch.device, model: str, name: str, M: int, preset: str) -> None:
    """A preset's kernels of one layer, once."""
    layer = next(layer for layer in LAYERS if (layer.model, layer.name) == (model, name))
    problem = Problem.random(layer, M, torch.bfloat16, device)
    quant_linear(problem.x, quantized(problem, PRESETS[preset]), problem.bias.bfloat16(), *at(device).values())


def check(device: torch.device) -> Checks:
    return check_all(device, DTYPES[device.type])


@torch.inference_mode()
def run(
    device: torch.device, timed: list[tuple[Layer, int]], rounds: int, quick: bool = False
) -> Iterator[dict[str, Any]]:
    """The result so far, after every row."""
    clock, dtypes = Clock(device), DTYPES[device.type]
    checks = check(device)
    for label, reason in checks.failed.items():
        print(f"FAILED, not timed: {label}: {reason}", file=sys.stderr)
    roofline = measure_roofline(clock, quick)
    result: dict[str, Any] = {
        "machine": machine() | device_facts(device),
        "versions": versions() | of_kernels(),
        "commit": commit(),
        "settings": {"rounds": rounds, "quick": quick, "budget_s": BUDGET, "times": "[median, quartiles], ms"},
        "roofline": roofline.published(),
        "passed": sorted(f"{op}, {backend}" for op, backend in checks.passed),
        "refused": checks.refused,
        "failed": checks.failed,
        "rows": [],
    }
    for layer, M in timed:
        for dtype in dtypes:
            result["rows"].append(measure(Problem.random(layer, M, dtype, device), clock, checks, roofline, rounds))
            print(line(result["rows"][-1]), file=sys.stderr, flush=True)
            yield result


def measure(problem: Problem, clock: Clock, checks, roofline: Roofline, rounds: int) -> dict:
    """One layer at one number of tokens: name -> times, ratios, share of the roofline."""
    found, absent = contenders(problem, checks, roofline)
    exact = torch.nn.functional.linear(problem.x[:64].float(), problem.weight, problem.bias)
    errors = {name: relative_error(c, exact) for name, c in found.items() if c.largest_error is not None}
    for name, error in errors.items():
        if not error <= found[name].largest_error:
            absent[name] = f"not timed: its output is {error:.3g} from the layer's"
            del found[name]
    seconds = race(clock, {name: contender.run for name, contender in found.items()}, rounds, BUDGET)
    entries = {}
    for name, contender in found.items():
        entry: dict = {"ms": rounded([1e3 * s for s in quartiles(seconds[name])])}
        for key, baseline in (("times_bf16", BF16), ("times_fp32", FP32)):
            if baseline in seconds and contender.largest_error is not None and name != baseline:
                entry[key] = rounded(ratio(seconds[baseline], seconds[name]))
        if contender.ideal is not None:
            entry["roofline"] = rounded([1e3 * contender.ideal / entry["ms"][0]])[0]
        if name in errors:
            entry["error"] = rounded([errors[name]])[0]
        if contender.backends:
            entry["backends"] = sorted(set(contender.backends.values()))
        entries[name] = entry
    layer = problem.layer
    shape = {"model": layer.model, "layer": layer.name, "M": len(problem.x), "K": layer.K, "N": layer.N}
    return shape | {"dtype": str(problem.dtype).removeprefix("torch."), "timed": entries, "absent": absent}


def case_of(row: dict) -> tuple[Layer, int]:
    return Layer(row["model"], row["layer"], row["K"], row["N"]), row["M"]


def relative_error(contender: Contender, exact: torch.Tensor) -> float:
    """Of the first 64 tokens: |y - exact| / |exact| in L2."""
    return float((contender.run()[: len(exact)].float() - exact).norm() / exact.norm())


def rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def device_facts(device: torch.device) -> dict:
    if device.type != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    facts = {"device": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}", "cuda": torch.version.cuda}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return facts | {"driver": said(query)}


def of_kernels() -> dict[str, str]:
    """Versions of what the kernels are made with; absent where it is not installed."""
    found = {}
    for name in ("triton", "comfy-kitchen"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str:
    """The commit of this checkout; marked where files differ from it."""
    found = said(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    return found + (
        "+changes" if said(["git", "-C", str(ROOT), "status", "--porcelain"]) not in ("", "unknown") else ""
    )


def said(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def faster(entry: dict) -> float:
    """Speed against the faster of the two full-precision products."""
    return min(entry["times_bf16"][0], entry["times_fp32"][0])


def line(row: dict) -> str:
    ours = ", ".join(f"{name} {faster(row['timed'][name]):.2f}x" for name in PRESET_NAMES if name in row["timed"])
    return f"{row['model']} {row['layer']} {row['M']} x {row['K']} x {row['N']} {row['dtype']}: {ours}"


def text(result: dict) -> str:
    """A Markdown table of whole layers: speed against the faster of bf16 and fp32 F.linear."""
    names = [*PRESET_NAMES]
    for row in result["rows"]:
        names += [n for n, e in row["timed"].items() if "times_bf16" in e and n not in (*names, BF16, FP32)]
    where = result["machine"]
    lines = [f"{where['device'] if where['device'] != 'cpu' else where['cpu']}, {result['roofline']}", ""]
    lines += ["| layer | M | K | N | x | " + " | ".join(names) + " |", "|" + " --- |" * (5 + len(names))]
    for row in result["rows"]:
        speeds = [f"{faster(row['timed'][n]):.2f}" if n in row["timed"] else "" for n in names]
        head = [f"{row['model']} {row['layer']}", row["M"], row["K"], row["N"], row["dtype"]]
        lines.append("| " + " | ".join(map(str, head + speeds)) + " |")
    return "\n".join(lines + [f"FAILED, not timed: {k}: {v}" for k, v in result["failed"].items()])


if __name__ == "__main__":
    sys.exit(main())
