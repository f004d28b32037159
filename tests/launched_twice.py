"""Launches kernels by Triton and by Launcher, with a driver that listens. In a process of its own, for one card:

    python tests/launched_twice.py 89

Prints {"operands": [operands whose kernel differs], "layers": {preset: [Triton's launches of each call, faults]},
"slots": {preset: [kernels of a layer in each slot]}}.
"""

import json
import os
import sys
from itertools import product
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import dry_launches
import torch

HEARD: list[tuple] = []
TRITONS: list[str] = []
# one class of shapes; twice the same, then of the other kind of number, twice
TOKENS = (16, 16, 9, 7)
PRESETS = ("W8A8", "W8A8 fast", "W8A8 static", "W4A8")


class Listener(dry_launches.Idle):
    def __call__(self, x, y, z, stream, function, *given):
        # packed metadata, launch metadata and two hooks come before the operands
        HEARD.append((function, (x, y, z), tuple(map(told, given[4:]))))


def told(operand):
    """What an operand is, whichever memory it lies in."""
    if isinstance(operand, torch.Tensor):
        return str(operand.dtype), tuple(operand.shape), tuple(operand.stride())
    if hasattr(operand, "block_shape"):
        return told(operand.base), list(operand.shape), list(operand.strides), list(operand.block_shape)
    return operand


def tensors() -> list[torch.Tensor]:
    memory = torch.zeros(256, dtype=torch.uint8)
    types = (torch.float32, torch.bfloat16, torch.int8, torch.int32)
    return [memory[start : start + 64].view(kind) for kind, start in product(types, (0, 16, 4, 8))]


def operands() -> list[tuple]:
    """For `toy`: each argument takes all of its kinds, most of them twice."""
    plain = (torch.zeros(16), None, 7, 7, 0.5)
    numbers = (1, 2, 3, 15, 16, 17, 32, 0, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, 2**40, -(2**31), -(2**31) - 1)
    values = [tensors(), [*tensors(), None], numbers, numbers, (0.0, 1.0, 0.5, 3.0)]
    return [(*plain[:i], value, *plain[i + 1 :]) for i, kinds in enumerate(values) for value in kinds]


def check_operands(capability: int) -> list[str]:
    """Same kinds, but not the kernel that Triton takes, or not its arguments."""
    from dit_quant.kernels.launcher import kind, launcher
    from launched_kernels import toy, toy_described
    from triton.tools.tensor_descriptor import TensorDescriptor

    described = [
        (TensorDescriptor(torch.zeros(rows, 64, dtype=dtype), [rows, 64], [64, 1], [blocks, 32]),)
        for rows, blocks, dtype in product((8, 24), (8, 16), (torch.int8, torch.bfloat16))
    ]
    faults = []
    for kernel, cases in ((toy, operands()), (toy_described, described)):
        given = {"WIDTH": 16, "NAME": "toy", "num_warps": 1, "enable_fp_fusion": False}
        launch = launcher(kernel, capability, **given)
        functions: dict[tuple, int] = {}
        for case in cases:
            HEARD.clear()
            kernel[(5,)](*case, **given)
            launch(5, *case)
            launch(5, *case)
            kinds = tuple(map(kind, case))
            first = functions.setdefault(kinds, HEARD[0][0])
            if len(HEARD) != 3 or len(set(map(str, HEARD))) != 1 or HEARD[0][0] != first:
                faults.append(f"{kernel.__name__}{case}: {HEARD}")
    return faults


def check_layers() -> dict[str, list]:
    """Per preset how often each call asked Triton, and what was launched otherwise than by the call before."""
    found = {}
    for preset in PRESETS:
        calls, asked = [], []
        for M in TOKENS:
            HEARD.clear()
            TRITONS.clear()
            dry_launches.launch(dry_launches.Launch(preset, M, 256, 256))
            calls.append(list(HEARD))
            asked.append(len(TRITONS))
        # the first two have the same operands, all of them the same kernels
        faults = [] if calls[0] == calls[1] else [str(calls[:2])]
        functions = {tuple(function for function, *_ in call) for call in calls}
        found[preset] = [asked, faults + [str(functions)] * (len(functions) != 1)]
    return found


def check_slots() -> dict[str, list]:
    """Per preset the kernels' handles of a layer in each slot of a state."""
    from dit_quant.quant_core.linear import quant_linear
    from dit_quant.quant_core.timesteps import TimestepGroups, TimestepState

    state = TimestepState([TimestepGroups(edges=(level,), centres=(0.9, 0.1)) for level in (0.5, 0.6, 0.7, 0.8, 0.9)])
    found = {}
    for preset in PRESETS:
        layer = dry_launches.empty_layer(dry_launches.Launch(preset, 16, 256, 256))
        slots = []
        for slot in range(len(state.partitions)):
            HEARD.clear()
            x = torch.zeros(16, 256, dtype=torch.bfloat16)
            quant_linear(x, layer, None, *state.select(slot), "triton")
            slots.append([function for function, *_ in HEARD])
        found[preset] = slots
    return found


def main() -> None:
    capability = int(sys.argv[1])
    dry_launches.pretend(capability)
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.active.launcher_cls = Listener
    run = JITFunction.run

    def counted(self, *args, **kwargs):
        TRITONS.append(self.__name__)
        return run(self, *args, **kwargs)

    JITFunction.run = counted
    with torch.inference_mode():
        found = {"operands": check_operands(capability), "layers": check_layers(), "slots": check_slots()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
