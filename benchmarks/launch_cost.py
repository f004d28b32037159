"""What the launches of a layer cost the host, beside asking Triton each time which compiled kernel is meant.

    python benchmarks/launch_cost.py --out benchmarks/results/launch_cost.json [--capability 89] [--rounds 15]

On a GPU the calls are queued and the time until they are is taken, F.linear's too; without one Triton gets a driver
whose kernels return at once, so that the last step of a launch is missing from both. publish_speed.py writes the
table in docs/speed.md.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from dit_quant.demo.__main__ import machine, versions
from dit_quant.kernels.launcher import Launcher
from dit_quant.kernels.triton_device import capability_of
from dit_quant.quant_core.linear import quant_linear
from dry_launches import TIMESTEP_GROUPS, Launch, empty_layer, pretend
from kernel_layers import BF16, PRESET_NAMES
from publish_speed import launch_table

from kernels import commit, device_facts, of_kernels

# few tokens, so that a card is done with a call before the host is
TOKENS, CHANNELS = 16, 1152
# fewer launches than a card's queue holds
CALLS = 100


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=89, help="10 major + minor of an absent card's; default 89")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def calls(preset: str, device: torch.device) -> dict[str, Callable[[], object]]:
    """A layer of a preset, launched as it is and by asking Triton."""
    layer = empty_layer(Launch(preset, TOKENS, CHANNELS, CHANNELS)).map(lambda tensor: tensor.to(device))
    x = torch.zeros(TOKENS, CHANNELS, dtype=torch.bfloat16, device=device)
    bias, fraction = torch.zeros_like(x[0]), torch.zeros(1, device=device)
    index = torch.full((1,), TIMESTEP_GROUPS // 2, device=device)

    def again() -> None:
        for _ in range(CALLS):
            quant_linear(x, layer, bias, index, fraction, "triton")

    def asked() -> None:
        with triton_is_asked():
            again()

    return {"again": again, "asked": asked}


@contextmanager
def triton_is_asked():
    """Inside, every launch is Triton's own way of launching."""

    def ask(self: Launcher, programs: int, *operands) -> None:
        self.kernel[(programs,)](*operands, *self.constants, **self.options)

    ours = Launcher.__call__
    Launcher.__call__ = ask
    try:
        yield
    finally:
        Launcher.__call__ = ours


def full_precision(device: torch.device) -> Callable[[], None]:
    x = torch.zeros(TOKENS, CHANNELS, dtype=torch.bfloat16, device=device)
    w, bias = torch.zeros(CHANNELS, CHANNELS, dtype=x.dtype, device=device), torch.zeros_like(x[0])

    def run() -> None:
        for _ in range(CALLS):
            torch.nn.functional.linear(x, w, bias)

    return run


def microseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one of its calls, on the host."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / CALLS * 1e6


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    # asked when Triton is imported, at the first launch
    os.environ.pop("TRITON_INTERPRET", None)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    capability = capability_of(device) if on_gpu else args.capability
    if not on_gpu:
        pretend(capability)
    contenders = {(preset, way): run for preset in PRESET_NAMES for way, run in calls(preset, device).items()}
    if on_gpu:
        contenders[BF16, "again"] = full_precision(device)
    with torch.inference_mode():
        for run in contenders.values():
            run()
        found = {name: [] for name in contenders}
        for _ in range(args.rounds):
            for name, run in contenders.items():
                found[name].append(microseconds(run, device))
    rows: dict[str, dict[str, float]] = {}
    for (name, way), times in found.items():
        rows.setdefault(name, {})[way] = round(statistics.median(times), 2)
    result = {
        "machine": machine() | device_facts(device),
        "versions": versions() | of_kernels(),
        "commit": commit(),
        "capability": capability,
        "tokens": TOKENS,
        "channels": CHANNELS,
        "rounds": args.rounds,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n")
    print(launch_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
