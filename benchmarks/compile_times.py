"""How long the first call of a model's layers takes to compile, without its card.

    python benchmarks/compile_times.py --out benchmarks/results/compile_times.json [--capability 89]

A model and preset get a process and an empty cache of their own, as on an artist's first run; kernels that several
layers share are compiled once there, too. One process compiles, so that cores do not matter. publish_speed.py writes
the table in docs/speed.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dit_quant.demo.__main__ import machine, versions
from dry_launches import Launch, dry_launches
from kernel_layers import PRESET_NAMES
from kernel_shapes import LAYERS
from publish_speed import compile_table

from kernels import commit, of_kernels

# tokens of a picture of 1024 x 1024 pixels, and of a prompt
TOKENS = (4096, 256)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=89, help="10 major + minor of the card's; default 89")
    parser.add_argument("--models", default="", help="only models whose name contains this, such as flux")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def models(containing: str) -> dict[str, list[tuple[int, int]]]:
    """Model -> (K, N) of its layers; double and single blocks are of one model."""
    found: dict[str, list[tuple[int, int]]] = {}
    for layer in LAYERS:
        name = layer.model.removesuffix(" double").removesuffix(" single")
        if containing.lower() in name.lower():
            found.setdefault(name, []).append((layer.K, layer.N))
    return found


def first_call(capability: int, preset: str, layers: list[tuple[int, int]]) -> dict[str, float]:
    """Kernels that are compiled, seconds in all, and of the one that takes longest."""
    launches = [Launch(preset, M, K, N) for K, N in layers for M in TOKENS]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        launched = dry_launches(capability, launches, path, cache=path / "cache")
    seconds = [kernel.seconds for kernels in launched for kernel in kernels if not kernel.cached]
    return {"kernels": len(seconds), "seconds": round(sum(seconds), 2), "longest": max(seconds)}


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    chosen = models(args.models)
    if not chosen:
        print(f"error: no model with {args.models!r} in its name", file=sys.stderr)
        return 2
    rows = {name: {p: first_call(args.capability, p, layers) for p in PRESET_NAMES} for name, layers in chosen.items()}
    result = {
        "machine": machine(),
        "versions": versions() | of_kernels(),
        "commit": commit(),
        "capability": args.capability,
        "tokens": TOKENS,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n")
    print(compile_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
