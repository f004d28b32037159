"""Compiles the Triton kernels that kernels.py will time, with every core: one process would take minutes.

Called by kernels.py on a GPU. Each process takes a share of the widths and presets, and the last one the checks:

    python benchmarks/precompile.py '{"device": "cuda", "share": 0, "shares": 8, "timed": [["PixArt", "fc1", 4096]]}'
"""

import json
import os
import subprocess
import sys

import torch
from dit_quant.kernels.tiles import MAX_BUCKET
from dit_quant.quant_core.linear import quant_linear
from dit_quant.quant_core.schemes import PRESETS
from kernel_checks import check_all
from kernel_layers import PRESET_NAMES, Problem, at, quantized
from kernel_shapes import LAYERS, Layer

# more processes than this only wait for the card; bytes of it that one of them may need
MOST, BYTES = 16, 2**31


def compile_all(timed: list[tuple[Layer, int]], device: str = "cuda") -> list[str]:
    """What kernels.py times with these (layer, tokens), compiled; the end of what went wrong, a line per process."""
    room = torch.cuda.mem_get_info()[0] // BYTES if device == "cuda" else MOST
    shares = max(1, min(MOST, os.cpu_count() or 1, room))
    # a tile is chosen by the bucket of M
    cases = list(dict.fromkeys((layer.model, layer.name, min(M, MAX_BUCKET)) for layer, M in timed))
    jobs = [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps({"device": device, "share": i, "shares": shares, "timed": cases})],
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(shares)
    ]
    errors = [job.communicate()[1] for job in jobs]
    return [error.strip().splitlines()[-1] for job, error in zip(jobs, errors, strict=True) if job.returncode]


def share_of(timed: list[tuple[Layer, int]], share: int, shares: int) -> list[tuple[Layer, int, str]]:
    """(layer, tokens, preset) of one process: kernels of one width and preset are compiled by one alone."""
    groups = sorted({(layer.K, preset) for layer, _ in timed for preset in PRESET_NAMES})
    mine = groups[share :: max(shares - 1, 1)]
    return [(layer, M, preset) for layer, M in timed for preset in PRESET_NAMES if (layer.K, preset) in mine]


@torch.inference_mode()
def main() -> None:
    job = json.loads(sys.argv[1])
    device, share, shares = torch.device(job["device"]), job["share"], job["shares"]
    named = {(layer.model, layer.name): layer for layer in LAYERS}
    timed = [(named[model, name], M) for model, name, M in job["timed"]]
    if share == shares - 1:
        check_all(device, (torch.bfloat16,))
    if share < shares - 1 or shares == 1:
        for layer, M, preset in share_of(timed, share, shares):
            problem = Problem.random(layer, M, torch.bfloat16, device)
            quant_linear(problem.x, quantized(problem, PRESETS[preset]), problem.bias.bfloat16(), *at(device).values())


if __name__ == "__main__":
    main()
