"""Speed of the fused quantizers beside the same apart: the host's own ops, then `quantize_activation`.

    python benchmarks/fused.py --device cuda --out benchmarks/results/fused_h100.json [--quick]

The inputs of published DiTs' layers, with the quantizers of the presets that can be fused: those without directions.
Everything about one input is timed in the same run, by turns. Before that every backend is checked against its
reference; one that fails is not timed, and the exit status is 1. At the end: whether an architecture should call them.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dit_quant.demo.__main__ import machine, versions
from dit_quant.kernels.dispatch import plan
from dit_quant.quant_core.linear import quantizer
from dit_quant.quant_core.schemes import PRESETS
from fused_checks import Call, Quantized, check_all, distance
from kernel_checks import QUANTIZER, Checks, backends
from kernel_layers import PRESET_NAMES, Problem, at, quantized
from kernel_shapes import CPU_TOKENS, CPU_WIDTHS, CUDA_TOKENS, LAYERS, Layer
from kernel_timing import Clock, Roofline, measure_roofline, quartiles, race, ratio
from precompile import compile_all
from torch import Tensor

from kernels import BUDGET, DTYPES, commit, device_facts, of_kernels, rounded

ADALN, GELU, SWIGLU = OPS = ("adaln_quantize", "gelu_quantize", "swiglu_quantize")
# the layers whose input each op makes
BEFORE = {ADALN: ("qkv", "fc1"), GELU: ("fc2",), SWIGLU: ("w2",)}
# its norm is another one
RMS_NORMS = ("Z-Image",)
# the host computes x * (1 + scale) + shift there, and elsewhere the same in one op
TWO_OPS = ("PixArt",)
FUSIBLE = tuple(name for name in PRESET_NAMES if not PRESETS[name].directions)
# with and without the prompt
SAMPLES = 2
EPS = 1e-6
# M, K of the checks
SMALL = ((14, 256), (62, 1088))
APART = "apart"
# of fused from apart, relative: codes next to a tie; bf16 rounds in between, which moves up to a tenth of the codes
# by a step of 3 percent
LARGEST_DISTANCE = {"float32": 1e-3, "bfloat16": 0.02}


@dataclass(frozen=True)
class Place:
    """An op and where it would run: `layers` of a model read what it makes, rows of K."""

    op: str
    model: str
    layers: str
    K: int


@dataclass(frozen=True)
class Given:
    """Operands of a fused op, what it does to them by keyword, and the same as the host computes it: [M, K] in the
    dtype of the operands."""

    op: str
    operands: tuple[Tensor, ...]
    prologue: dict[str, Any]
    apart: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """The least traffic: every operand is read once, the codes are written once."""
        return sum(x.nbytes for x in self.operands) + self.operands[0].numel()

    @property
    def dtype(self) -> str:
        return str(self.operands[0].dtype).removeprefix("torch.")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one input of each op, few rounds: does it run?")
    parser.add_argument("--tokens", type=int, nargs="+", help="only these numbers of tokens")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device; use --device cpu", file=sys.stderr)
        return 2
    timed = [case for case in cases(args.device, args.quick) if args.tokens is None or case[1] in args.tokens]
    if not timed:
        print(f"error: nothing is timed at {args.tokens} tokens", file=sys.stderr)
        return 2
    if args.device == "cuda" and not args.quick:
        for error in compile_all("fused", kernels_of(timed)):
            print(f"while compiling: {error}", file=sys.stderr)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {}
    # written after every row: a run that is cut off keeps what it has measured
    for result in run(torch.device(args.device), timed, 3 if args.quick else 15, args.quick):
        args.out.write_text(json.dumps(result) + "\n")
    print("\n".join(summary(result["rows"])))
    for label, reason in result["failed"].items():
        print(f"FAILED, not timed: {label}: {reason}")
    return 1 if result["failed"] else 0


def cases(device: str, quick: bool) -> list[tuple[Place, int]]:
    """(place, tokens) to time; layers of one model that read rows of the same width are one place."""
    found: dict[tuple[str, str, int], list[str]] = {}
    for op, names in BEFORE.items():
        for layer in LAYERS:
            if layer.name in names and not (op == ADALN and layer.model in RMS_NORMS):
                found.setdefault((op, layer.model, layer.K), []).append(layer.name)
    places = [Place(op, model, " and ".join(names), K) for (op, model, K), names in found.items()]
    if device == "cpu":
        low, high = CPU_WIDTHS
        places = [place for place in places if low <= place.K <= high]
    if quick:
        first = {place.op: place for place in reversed(places)}
        return [(first[op], 1024 if device == "cpu" else 4096) for op in OPS if op in first]
    return [(place, M) for place in places for M in (CPU_TOKENS if device == "cpu" else CUDA_TOKENS)]


def kernels_of(timed: list[tuple[Place, int]]) -> dict[tuple, tuple]:
    """`launch`'s arguments -> what it compiles, which is the same for any number of tokens."""
    found = {}
    for place, M in sorted(timed, key=lambda case: case[1]):
        for preset in FUSIBLE:
            found.setdefault((place.op, place.K, preset), (place.op, place.model, place.K, M, preset))
    return {arguments: kernel for kernel, arguments in found.items()}


def launch(device: torch.device, op: str, model: str, K: int, M: int, preset: str) -> None:
    """The kernels of one input, fused and apart, once."""
    for call in calls(random_input(Place(op, model, "", K), M, DTYPES[device.type][-1], device), preset):
        call.run()


def check(device: torch.device) -> Checks:
    return check_all(device, small_calls(device, DTYPES[device.type]))


@torch.inference_mode()
def run(
    device: torch.device, timed: list[tuple[Place, int]], rounds: int, quick: bool = False
) -> Iterator[dict[str, Any]]:
    """The result so far, after every row."""
    clock = Clock(device)
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
        "failed": dict(checks.failed),
        "rows": [],
    }
    for place, M in timed:
        for dtype in DTYPES[device.type]:
            given = random_input(place, M, dtype, device)
            for preset in FUSIBLE:
                row, wrong = measure(place, given, preset, clock, checks, roofline, rounds)
                result["rows"].append(row)
                result["failed"] |= {f"{name_of(row)}, {name}": reason for name, reason in wrong.items()}
                print(line(row), file=sys.stderr, flush=True)
                yield result


def small_calls(device: torch.device, dtypes: Sequence[torch.dtype]) -> list[Call]:
    """Every op as it is timed, and the quantizer alone, on small odd shapes."""
    found = []
    for op in OPS:
        for M, K in SMALL:
            for dtype in dtypes:
                given = random_input(Place(op, "", "", K), M, dtype, device)
                for preset in FUSIBLE:
                    found += calls(given, preset)
    return found


def random_input(place: Place, M: int, dtype: torch.dtype, device: torch.device) -> Given:
    """Operands of M rows in all: [SAMPLES, M / SAMPLES, K] for a norm, else [M, K]."""
    K, random = place.K, torch.Generator(device).manual_seed(place.K + M)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return (spread * torch.randn(*shape, generator=random, device=device)).to(dtype)

    if place.op == GELU:
        x = normal(M, K, spread=2.0)
        return Given(GELU, (x,), {"approximate": "tanh"}, lambda: F.gelu(x, approximate="tanh"))
    if place.op == SWIGLU:
        gate, up = normal(M, K, spread=2.0), normal(M, K)
        return Given(SWIGLU, (gate, up), {}, lambda: F.silu(gate) * up)
    x, scale, shift = normal(SAMPLES, M // SAMPLES, K), normal(SAMPLES, K, spread=0.5), normal(SAMPLES, K, spread=0.5)
    scales, shifts = scale[:, None], shift[:, None]

    def apart() -> Tensor:
        y = F.layer_norm(x, (K,), eps=EPS)
        y = y * (1 + scales) + shifts if place.model in TWO_OPS else torch.addcmul(shifts, y, 1 + scales)
        return y.reshape(-1, K)

    prologue = {"kind": "layer", "eps": EPS, "modulation_scale": scale, "modulation_shift": shift}
    return Given(ADALN, (x,), prologue, apart)


def calls(given: Given, preset: str) -> tuple[Call, Call]:
    """The fused op with the settings that the preset gives a layer, and the quantizer of what the host computes."""
    y = given.apart()
    K = y.shape[1]
    weight = torch.randn(1, K, generator=torch.Generator(y.device).manual_seed(K), device=y.device)
    # one output feature: the quantizer does not depend on the weight
    layer = quantized(Problem(Layer("", "", K, 1), y, weight, weight[:, 0]), PRESETS[preset])
    settings = quantizer(layer) | at(y.device)
    return Call(given.op, given.operands, given.prologue | settings), Call(QUANTIZER, (y,), settings)


def measure(
    place: Place, given: Given, preset: str, clock: Clock, checks: Checks, roofline: Roofline, rounds: int
) -> tuple[dict, dict[str, str]]:
    """One input and one preset: name -> times, ratios, share of the roofline; and name -> what is wrong with it."""
    fused, alone = calls(given, preset)
    found, absent = contenders(given, fused, alone, checks)
    far = {name: distance(run(), found[APART]()) for name, run in found.items() if name != APART}
    wrong = {
        name: f"not timed: {value:.3g} from the ops apart"
        for name, value in far.items()
        if not value <= LARGEST_DISTANCE[given.dtype]
    }
    timed = {name: run for name, run in found.items() if name not in wrong}
    seconds = race(clock, timed, rounds, BUDGET) if timed else {}
    entries, ideal = {}, roofline.seconds(given.nbytes)
    for name, times in seconds.items():
        middle, low, high = quartiles(times)
        entries[name] = {"ms": rounded([1e3 * middle, 1e3 * low, 1e3 * high]), "roofline": rounded([ideal / middle])[0]}
        if name == APART:
            entries[name]["backend"] = plan(alone.shape).backend
        else:
            entries[name]["times_apart"] = rounded(ratio(seconds[APART], times))
            entries[name]["distance"] = rounded([far[name]])[0]
    row = {"op": place.op, "model": place.model, "layers": place.layers, "M": len(alone.operands[0]), "K": place.K}
    row |= {"preset": preset, "dtype": given.dtype, "hadamard": fused.keywords["hadamard"]}
    return row | {"timed": entries, "absent": absent | wrong}, wrong


def contenders(
    given: Given, fused: Call, alone: Call, checks: Checks
) -> tuple[dict[str, Callable[[], Quantized]], dict[str, str]]:
    """Name -> call to time, and name -> why it is absent."""
    usual = plan(alone.shape).backend
    if usual != "reference" and not checks.allows(QUANTIZER, usual):
        return {}, {APART: f"not timed: {QUANTIZER} of {usual} failed its check"}
    found = {APART: lambda: Call(QUANTIZER, (given.apart(),), alone.keywords).run()}
    absent = {}
    for backend in backends(fused.operands[0].device):
        name = f"fused, {backend}"
        if f"{fused.op}, {backend}" in checks.refused:
            continue
        if not checks.allows(fused.op, backend):
            absent[name] = "not timed: failed its check"
            continue
        fused.run(backend)
        # another backend takes over where this one refuses the shape or cannot be launched
        reason = dict(plan(fused.shape, backend).refusals).get(backend)
        if reason is None:
            found[name] = lambda backend=backend: fused.run(backend)
        else:
            absent[name] = reason
    return found, absent


def name_of(row: dict) -> str:
    return f"{row['op']} {row['model']} {row['layers']} {row['M']} x {row['K']} {row['preset']} {row['dtype']}"


def line(row: dict) -> str:
    timed = dict(row["timed"])
    if APART not in timed:
        return f"{name_of(row)}: {row['absent'][APART]}"
    base = timed.pop(APART)
    ours = "".join(f"; {name} {entry['times_apart'][0]:.2f}x" for name, entry in timed.items())
    return f"{name_of(row)}: apart {base['ms'][0]:.3g} ms ({base['backend']}){ours}"


def summary(rows: list[dict]) -> list[str]:
    """One line per op about its best backend: the one that surely is faster on most rows; it wins if on all."""
    lines = []
    for op in OPS:
        of_op = [row for row in rows if row["op"] == op]
        ratios: dict[str, list[list[float]]] = {}
        for row in of_op:
            for name, entry in row["timed"].items():
                if name != APART:
                    ratios.setdefault(name, []).append(entry["times_apart"])
        if not ratios:
            lines.append(f"{op}: not timed")
            continue
        won, median, best = max(
            (sum(low > 1.0 for _, low, _ in found), statistics.median(middle for middle, _, _ in found), name)
            for name, found in ratios.items()
        )
        verdict = "wins" if won == len(of_op) else f"does not win: surely faster on {won} of {len(of_op)} rows"
        lines.append(f"{op}: {best} {median:.2f}x apart; {verdict}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
