"""Loads, stores, and copies from global to shared memory behind a program's back (cp.async)."""

import numpy as np

from .machine import Action, Fault, Machine, finished, translates, unknown
from .operands import TYPES, address, listed, reader, writer
from .program import Instruction, Program


@translates("ld")
def load(instruction: Instruction, program: Program) -> Action:
    kind, space = instruction.parts[-1], instruction.parts[1]
    if space == "param":
        return _parameter(instruction, program)
    where = address(instruction.operands[1], program)
    writes = [writer(name, kind, program) for name in listed(instruction.operands[0])]
    size = np.dtype(TYPES[kind]).itemsize * len(writes)
    if space not in ("global", "shared"):
        raise unknown(instruction)

    def run(machine: Machine) -> None:
        active = machine.active()
        found = np.zeros((machine.threads, size), np.uint8)
        if space == "global":
            found[active] = machine.memory.load(where(machine)[active], size)
        else:
            found[active] = machine.shared.load(where(machine)[active], size, machine.warps[active])
        values = found.view(TYPES[kind])
        for i, write in enumerate(writes):
            write(machine, np.ascontiguousarray(values[:, i]))

    return run


def _parameter(instruction: Instruction, program: Program) -> Action:
    kind = instruction.parts[-1]
    name = instruction.operands[1].strip("[] ")
    write = writer(instruction.operands[0], kind, program)

    def run(machine: Machine) -> None:
        value = machine.parameters[name]
        bits = int(np.float32(value).view(np.uint32)) if isinstance(value, float) else value
        size = np.dtype(TYPES[kind]).itemsize
        values = np.full(machine.threads, bits & (256**size - 1), np.dtype(f"uint{8 * size}"))
        write(machine, values.view(TYPES[kind]))

    return run


@translates("st")
def store(instruction: Instruction, program: Program) -> Action:
    kind, space = instruction.parts[-1], instruction.parts[1]
    where = address(instruction.operands[0], program)
    reads = [reader(name, kind, program) for name in listed(instruction.operands[1])]
    if space not in ("global", "shared"):
        raise unknown(instruction)

    def run(machine: Machine) -> None:
        active = machine.active()
        parts = np.stack([read(machine) for read in reads], axis=1).view(np.uint8)[active]
        if space == "global":
            machine.memory.store(where(machine)[active], parts)
        else:
            machine.shared.store(where(machine)[active], parts, machine.warps[active])

    return run


@translates("ldmatrix")
def load_matrix(instruction: Instruction, program: Program) -> Action:
    """8 x 8 matrices of 16 bits: lane 8 i + r has the address of row r of matrix i. A lane receives the elements
    2 (lane % 4) and + 1 of row lane // 4, transposed: of that column."""
    count, transposed = int(instruction.parts[4][1:]), "trans" in instruction.parts
    writes = [writer(name, "b32", program) for name in listed(instruction.operands[0])]
    where = address(instruction.operands[1], program)

    def run(machine: Machine) -> None:
        machine.all_threads()
        lanes = machine.thread % 32 < 8 * count
        rows = machine.shared.load(where(machine)[lanes], 16, machine.warps[lanes])
        matrices = rows.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32)
        for i, write in enumerate(writes):
            write(machine, words[:, i].reshape(-1))

    return run


@translates("stmatrix")
def store_matrix(instruction: Instruction, program: Program) -> Action:
    """The reverse of ldmatrix."""
    count, transposed = int(instruction.parts[4][1:]), "trans" in instruction.parts
    where = address(instruction.operands[0], program)
    reads = [reader(name, "b32", program) for name in listed(instruction.operands[1])]

    def run(machine: Machine) -> None:
        machine.all_threads()
        words = np.stack([read(machine) for read in reads])
        matrices = np.ascontiguousarray(words.reshape(count, -1, 32).swapaxes(0, 1)).view(np.uint16)
        matrices = matrices.reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        lanes = machine.thread % 32 < 8 * count
        rows = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)
        machine.shared.store(where(machine)[lanes], rows, machine.warps[lanes])

    return run


@translates("cp.async")
def copy(instruction: Instruction, program: Program) -> Action:
    """The copy engine's instructions (cp.async.bulk) stand in engine.py."""
    if instruction.parts[2] == "commit_group":
        return _close_group
    if instruction.parts[2] == "wait_group":
        left = int(instruction.operands[0])
        return lambda machine: _wait(machine, left)
    target, source = (address(operand, program) for operand in instruction.operands[:2])
    size = int(instruction.operands[2], 0)
    # with a fourth operand that many bytes are read
    read_size = reader(instruction.operands[3] if len(instruction.operands) > 3 else str(size), "u32", program)

    def run(machine: Machine) -> None:
        active = machine.active()
        warps = machine.warps[active][:, None]
        sizes = read_size(machine)[active]
        if not np.isin(sizes, (0, size)).all():
            raise Fault("a copy of a part of its size is not known here")
        values = np.zeros((len(sizes), size), np.uint8)
        some = sizes == size
        values[some] = machine.memory.load(source(machine)[active][some], size)
        places = machine.shared.offsets(target(machine)[active], size)
        machine.shared.begin_copy(places, warps)
        _groups(machine)[-1].append((places, values, warps))

    return run


def _groups(machine: Machine) -> list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Of copies that the program has started; the last one is not yet closed."""
    return machine.queues.setdefault("copies", [[]])


def _close_group(machine: Machine) -> None:
    machine.all_threads()
    _groups(machine).append([])


def _wait(machine: Machine, left: int) -> None:
    """All groups but the last `left` land now: no sooner than they must."""
    machine.all_threads()
    for group in finished(_groups(machine), left):
        for places, values, warps in group:
            machine.shared.end_copy(places, values, warps)
