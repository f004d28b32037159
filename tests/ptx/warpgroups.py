"""Products of warp groups (wgmma), which read shared memory while the threads go on."""

import re
from dataclasses import dataclass, field

import numpy as np

from .engine import described
from .machine import WARP, Action, Fault, Machine, finished, translates, unknown
from .memory import unchanged
from .operands import Read, listed, reader
from .program import Instruction, Program
from .warps import bytes_of, left_operand, multiply, sum_places

WARPGROUP = 128
# bytes of a row within which 16 bytes change places, by the number that a descriptor has for it
SPANS = {1: 128, 2: 64, 3: 32}


@dataclass
class Group:
    """Products that are waited for together: the registers that they add to, and where they read what."""

    accumulators: list[tuple[str, ...]] = field(default_factory=list)
    reads: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


@dataclass
class Products:
    """Groups that were started, the last one not yet closed, and the sums that they will leave."""

    groups: list[Group] = field(default_factory=lambda: [Group()])
    sums: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict)


@translates("wgmma")
def group_product(instruction: Instruction, program: Program) -> Action:
    what = instruction.parts[1]
    if what == "fence":
        return lambda machine: None
    if what == "commit_group":
        return lambda machine: _products(machine).groups.append(Group())
    if what == "wait_group":
        left = int(instruction.operands[0])
        return lambda machine: _finish_products(machine, left)
    shape = re.fullmatch(r"m64n(\d+)k32", instruction.parts[4])
    if what != "mma_async" or shape is None or instruction.parts[5:] != ("s32", "s8", "s8"):
        raise unknown(instruction)
    columns = int(shape[1])
    accumulator = tuple(listed(instruction.operands[0]))
    in_registers = instruction.operands[1].startswith("{")
    kind = "s32" if in_registers else "b64"
    left = [reader(name, kind, program) for name in listed(instruction.operands[1])]
    right, adds = reader(instruction.operands[2], "b64", program), reader(instruction.operands[3], "pred", program)
    before = [reader(name, "s32", program) for name in accumulator]

    def run(machine: Machine) -> None:
        machine.all_threads()
        products, groups = _products(machine), machine.threads // WARPGROUP
        if in_registers:
            a = left_operand(bytes_of([read(machine) for read in left])).reshape(groups, 64, 32)
        else:
            a = np.stack([_operand(machine, left[0], g, 64) for g in range(groups)])
        b = np.stack([_operand(machine, right, g, columns) for g in range(groups)])
        found = multiply(a, b.swapaxes(1, 2))
        if adds(machine).all():
            if accumulator in products.sums:
                found = found + products.sums[accumulator]
            else:
                found = found + gathered([read(machine) for read in before])
        products.sums[accumulator] = found
        for name in accumulator:
            machine.registers.pop(name, None)
        machine.busy.update(accumulator)
        products.groups[-1].accumulators.append(accumulator)

    return run


def _products(machine: Machine) -> Products:
    return machine.queues.setdefault("products", Products())


def _operand(machine: Machine, read: Read, group: int, rows: int) -> np.ndarray:
    """int8 [rows, 32] in shared memory, which has to stay until the product is waited for."""
    values = read(machine)[group * WARPGROUP : (group + 1) * WARPGROUP]
    if (values != values[0]).any():
        raise Fault("threads of a warp group describe different matrices")
    descriptor = int(values[0])
    places = described(machine, descriptor, rows, SPANS.get(descriptor >> 62 & 3))
    found = machine.shared.peek(places)
    _products(machine).groups[-1].reads.append((places, found))
    return found.view(np.int8)


def gathered(registers: list[np.ndarray]) -> np.ndarray:
    """Accumulators per thread -> [groups, 64, columns]."""
    columns = 2 * len(registers)
    found = np.empty((len(registers[0]) // WARP, 16, columns), np.int32)
    for n, register in enumerate(registers):
        rows, places = sum_places(n)
        found[:, rows, places] = register.reshape(-1, WARP)
    return found.reshape(-1, 64, columns)


def _finish_products(machine: Machine, left: int) -> None:
    products = _products(machine)
    done = finished(products.groups, left)
    for places, values in [read for group in done for read in group.reads]:
        unchanged(lambda places=places: machine.shared.data[places], values, "a product")
    still = {accumulator for group in products.groups for accumulator in group.accumulators}
    for accumulator in {name for group in done for name in group.accumulators} - still:
        _leave(machine, accumulator, products.sums.pop(accumulator))


def _leave(machine: Machine, accumulator: tuple[str, ...], found: np.ndarray) -> None:
    machine.busy.difference_update(accumulator)
    warps = found.reshape(machine.threads // WARP, 16, -1)
    for n, name in enumerate(accumulator):
        rows, columns = sum_places(n)
        machine.write(name, np.ascontiguousarray(warps[:, rows, columns]).reshape(-1).view(np.uint32))
