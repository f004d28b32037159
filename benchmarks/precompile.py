"""Compiles the Triton kernels that a benchmark will time, with every core: one process would take minutes.

Called by kernels.py and fused.py on a GPU. Each process launches a share of their cases, the last one their checks:

    python benchmarks/precompile.py '{"script": "kernels", "device": "cuda", "check": false,
                                      "cases": [["PixArt", "fc1", 4096, "W8A8"]]}'
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from dit_quant.kernels.autotune import CACHE

# more processes than this only wait for the card; bytes of it that one of them may need
MOST, BYTES = 16, 2**31


def compile_all(script: str, cases: Mapping[tuple, Hashable], device: str = "cuda") -> list[str]:
    """What the script's `launch(device, *case)` and `check(device)` launch, compiled; what went wrong, a line per
    process. Cases of the same value launch the same kernels: one process does them all."""
    room = torch.cuda.mem_get_info()[0] // BYTES if device == "cuda" else MOST
    shares = max(1, min(MOST, os.cpu_count() or 1, room))
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for share in range(shares):
            job = {"script": script, "device": device, "check": share == shares - 1}
            job["cases"] = share_of(cases, share, shares)
            # processes that measure tiles side by side measure each other: what they choose is thrown away
            environment = os.environ | {CACHE: str(Path(folder) / f"{share}.json")}
            command = [sys.executable, __file__, json.dumps(job)]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        errors = [process.communicate()[1] for process in running]
    return [
        (error.strip().splitlines() or [f"ended with status {process.returncode}"])[-1]
        for process, error in zip(running, errors, strict=True)
        if process.returncode
    ]


def share_of(cases: Mapping[tuple, Hashable], share: int, shares: int) -> list[tuple]:
    """The cases of one process; the last has none where there are others, since it does the checks."""
    alone, last = shares == 1, share == shares - 1
    owners = list(dict.fromkeys(cases.values()))[share :: max(shares - 1, 1)] if alone or not last else []
    return [case for case, owner in cases.items() if owner in owners]


@torch.inference_mode()
def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    script, device = importlib.import_module(job["script"]), torch.device(job["device"])
    if job["check"]:
        script.check(device)
    for case in job["cases"]:
        script.launch(device, *case)


if __name__ == "__main__":
    main()
