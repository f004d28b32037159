"""Everything that a GPU can show, in one go and in the time there is: the kernels' tests on it, then the benchmarks.

    python benchmarks/card.py --name rtx4090 [--host ~/ComfyUI] [--minutes 12] [--only tests kernels]

Results go to benchmarks/results/*_NAME.json, what each step wrote to a file beside them. A step that fails or takes
longer than its share of the time does not keep the next ones from running; what it had measured by then stays.
"""

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
# tests/kernels: those that launch kernels, which emulated cards run too
LAUNCHING = (
    "test_quantize_activation_triton",
    "test_quantize_along",
    "test_adaln_quantize",
    "test_gelu_quantize",
    "test_swiglu_quantize",
    "test_int8_linear_triton",
    "test_int4_linear_triton",
    "test_ops",
    "test_layer",
    "test_fused_ops",
    "test_whole_model_triton",
)
TESTS = (*LAUNCHING, "test_launcher", "test_autotune", "test_dispatch")
# the number that the bars are about first: a run that is cut off has every layer at it
TOKENS = (4096, 16384, 1024, 256, 32768)


@dataclass(frozen=True)
class Step:
    """A command. share: of the time, beside the shares of the steps that are still to come."""

    name: str
    command: list[str]
    share: float
    environment: dict[str, str] = field(default_factory=dict)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the card, in the names of files: rtx4090")
    parser.add_argument("--minutes", type=float, default=60, help="for everything; 12 are enough for the most of it")
    parser.add_argument("--host", type=Path, help="a ComfyUI, for the speed of a whole model in it")
    parser.add_argument("--python", type=Path, help="the host's interpreter (HOST/.venv/bin/python)")
    parser.add_argument("--only", nargs="+", help="only steps of these names")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    return parser.parse_args(argv)


def steps(args: argparse.Namespace) -> list[Step]:
    """In the order of what is missed most without them."""

    def script(name: str, out: str, *options: str) -> list[str]:
        return [sys.executable, str(HERE / f"{name}.py"), *options, "--out", str(args.results / f"{out}.json")]

    # many small kernels to compile
    spread = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    tests = [str(HERE.parent / "tests" / "kernels" / f"{name}.py") for name in TESTS]
    gpu = ("--device", "cuda")
    tokens = ("--tokens", *map(str, TOKENS))
    found = [
        # every result by its name: those of a run that is cut off as well
        Step("tests", [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *spread, *tests], 3),
        Step("kernels", script("kernels", f"kernels_{args.name}", *gpu, *tokens), 5),
        Step("launch_cost", script("launch_cost", f"launch_cost_{args.name}"), 0.5),
        Step("fused", script("fused", f"fused_{args.name}", *gpu), 1.5),
        Step(
            "autotuned",
            script("kernels", f"kernels_{args.name}_autotuned", *gpu, "--tokens", "4096"),
            2,
            # a choice of its own: an older one may be of other kernels
            {"DIT_QUANT_AUTOTUNE": "1", "DIT_QUANT_AUTOTUNE_CACHE": str(args.results / f"{args.name}_autotune.json")},
        ),
    ]
    if args.host is not None:
        options = ["--host", str(args.host), "--model", "flux", "--depth", "4", "--size", "1024", "--rounds", "2"]
        options += ["--dtype", "bf16", "--rows", "bf16", "native int8", "native int8 + ConvRot"]
        options += ["native asym_w4a8_int8", "W8A8", "W8A8 fast", "W8A8 static", "W4A8"]
        options += ["--python", str(args.python)] if args.python else []
        found.append(Step("end_to_end", script("end_to_end", f"end_to_end_{args.name}", *options), 3))
    return [step for step in found if args.only is None or step.name in args.only]


def run(step: Step, seconds: float, log: Path) -> str:
    """'done', or what went wrong. The step's processes are stopped after `seconds`."""
    with log.open("w") as written:
        written.write(f"{shlex.join(step.command)}\n")
        written.flush()
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment
        process = subprocess.Popen(
            step.command,
            stdout=written,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=HERE.parent,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            stop(process)
            return f"stopped after {seconds:.0f} s; what it had written stays"
        except BaseException:
            stop(process)
            raise
    return "done" if status == 0 else f"failed with status {status}; see {log}"


def stop(process: subprocess.Popen) -> None:
    """With all that it started, where the system knows of that."""
    if os.name == "nt":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(todo: list[Step], seconds: float, folder: Path, name: str) -> dict[str, str]:
    """Step -> how it ended. What one leaves of its share falls to the next."""
    folder.mkdir(parents=True, exist_ok=True)
    end, outcomes = time.monotonic() + seconds, {}
    for i, step in enumerate(todo):
        left = end - time.monotonic()
        if left <= 0:
            outcomes[step.name] = "not begun: no time left"
            continue
        start = time.monotonic()
        share = step.share / sum(later.share for later in todo[i:])
        outcomes[step.name] = run(step, left * share, folder / f"{name}_{step.name}.log")
        print(f"{step.name}, {time.monotonic() - start:.0f} s: {outcomes[step.name]}", flush=True)
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device", file=sys.stderr)
        return 2
    todo = steps(args)
    if unknown := set(args.only or ()) - {step.name for step in todo}:
        print(
            f"error: no step {', '.join(sorted(unknown))}{'' if args.host else '; end_to_end wants --host'}",
            file=sys.stderr,
        )
        return 2
    outcomes = run_all(todo, 60 * args.minutes, args.results, args.name)
    return 0 if all(outcome == "done" for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
