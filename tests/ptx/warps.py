"""Instructions of whole warps: exchange, reduction, products of small matrices (mma.sync)."""

import numpy as np

from .machine import WARP, Action, Machine, translates, unknown
from .operands import listed, reader, writer
from .program import Instruction, Program

GROUP, PLACE = np.arange(WARP) // 4, np.arange(WARP) % 4
BYTES = np.arange(4)


@translates("shfl")
def shuffle(instruction: Instruction, program: Program) -> Action:
    """shfl.sync.bfly and .idx over whole warps."""
    way, kind = instruction.parts[2], instruction.parts[3]
    if way not in ("bfly", "idx") or instruction.operands[3] != "31" or instruction.operands[4] != "-1":
        raise unknown(instruction)
    read = reader(instruction.operands[1], kind, program)
    lane = reader(instruction.operands[2], "u32", program)
    write = writer(instruction.operands[0], kind, program)

    def run(machine: Machine) -> None:
        machine.whole_warps()
        value, other = read(machine), lane(machine) % WARP
        own = machine.thread % WARP
        source = machine.thread - own + (own ^ other if way == "bfly" else other)
        write(machine, value[source])

    return run


@translates("redux")
def reduction(instruction: Instruction, program: Program) -> Action:
    """A NaN counts for nothing unless the instruction says so."""
    _, _, way, *rest, kind = instruction.parts
    if way not in ("max", "min") or rest not in ([], ["NaN"]):
        raise unknown(instruction)
    if kind == "f32" and not rest:
        f = np.fmax if way == "max" else np.fmin
    else:
        f = np.maximum if way == "max" else np.minimum
    read = reader(instruction.operands[1], kind, program)
    write = writer(instruction.operands[0], kind, program)

    def run(machine: Machine) -> None:
        machine.whole_warps()
        value = read(machine).reshape(-1, WARP)
        write(machine, np.repeat(f.reduce(value, axis=1), WARP))

    return run


@translates("elect")
def election(instruction: Instruction, program: Program) -> Action:
    """True for one thread of every warp."""
    name, elected = instruction.operands[0].split("|")
    write, write_elected = writer(name, "u32", program), writer(elected, "pred", program)

    def run(machine: Machine) -> None:
        machine.whole_warps()
        write(machine, np.zeros(machine.threads, np.uint32))
        write_elected(machine, machine.thread % WARP == 0)

    return run


def bytes_of(registers: list[np.ndarray]) -> np.ndarray:
    """int8 [warps, lanes, registers, 4]."""
    words = np.stack(registers, axis=1)
    return words.view(np.int8).reshape(-1, WARP, len(registers), 4)


def left_operand(parts: np.ndarray) -> np.ndarray:
    """Registers [warps, 32, 4, 4] -> A [warps, 16, 32]: register i holds row lane // 4 + 8 (i % 2), columns
    4 (lane % 4) + 16 (i // 2) and the three after it."""
    matrix = np.empty((len(parts), 16, 32), np.int8)
    for i in range(4):
        rows, columns = GROUP + 8 * (i % 2), 4 * PLACE[:, None] + 16 * (i // 2) + BYTES
        matrix[:, rows[:, None], columns] = parts[:, :, i]
    return matrix


def sum_places(register: int) -> tuple[np.ndarray, np.ndarray]:
    """Row of the warp's 16 and column that each lane holds of a sum [16, 8 j] in one of its 4 j registers."""
    j, i = divmod(register, 4)
    return GROUP + 8 * (i // 2), 8 * j + 2 * PLACE + i % 2


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """int8 [..., m, k] @ [..., k, n] -> int32; exact in fp32, since k is 32."""
    return (a.astype(np.float32) @ b.astype(np.float32)).astype(np.int32)


@translates("mma")
def matrix_product(instruction: Instruction, program: Program) -> Action:
    if instruction.parts != ("mma", "sync", "aligned", "m16n8k32", "row", "col", "satfinite", "s32", "s8", "s8", "s32"):
        raise unknown(instruction)
    writes = [writer(name, "s32", program) for name in listed(instruction.operands[0])]
    a, b, c = ([reader(name, "s32", program) for name in listed(names)] for names in instruction.operands[1:])

    def run(machine: Machine) -> None:
        machine.all_threads()
        left = left_operand(bytes_of([read(machine) for read in a]))
        parts = bytes_of([read(machine) for read in b])
        right = np.empty((len(parts), 32, 8), np.int8)
        for i in range(2):
            right[:, 4 * PLACE[:, None] + 16 * i + BYTES, GROUP[:, None]] = parts[:, :, i]
        found = multiply(left, right)
        for i, write in enumerate(writes):
            rows, columns = sum_places(i)
            write(machine, found[:, rows, columns].reshape(-1) + c[i](machine))

    return run
