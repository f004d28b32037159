"""Hopper's copy engine (TMA) and the barriers in memory that it arrives at."""

import re
from dataclasses import dataclass, field

import numpy as np

from .machine import Action, Fault, Machine, translates, unknown
from .memory import EVERYBODY, SHARED_BASE, Buffer, unchanged
from .operands import APART, PARAMETERS, address, listed, reader
from .program import Instruction, Program

# bytes of a row within which 16 bytes change places, by the number that a tensor map has for it
SPANS = {0: 0, 1: 32, 2: 64, 3: 128}


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled makes: blocks [rows, columns] of an operand [rows, columns] whose rows are `stride`
    bytes apart. size: bytes of an element; span: bytes within which they change places."""

    buffer: Buffer
    rows: int
    columns: int
    stride: int
    block_rows: int
    block_columns: int
    size: int
    span: int

    def places(self, x: int, y: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the block that begins in column x of row y, offsets in the operand [rows, bytes], and which exist."""
        rows = y + np.arange(self.block_rows)[:, None]
        columns = x * self.size + np.arange(self.block_columns * self.size)
        inside = (rows >= 0) & (rows < self.rows) & (columns >= 0) & (columns < self.columns * self.size)
        return rows * self.stride + columns, inside


def swizzled(addresses: np.ndarray, span: int) -> np.ndarray:
    """Which 16 bytes of a span are meant depends on the row of 128 bytes that they are in."""
    rows = {0: 0, 32: 1, 64: 3, 128: 7}[span]
    return addresses ^ (((addresses >> 7) & rows) << 4)


def described(machine: Machine, descriptor: int, rows: int, span: int | None) -> np.ndarray:
    """Where in shared memory the bytes of a product's operand [rows, 32] are, whose rows lie along k."""
    if not span or descriptor >> 49 & 7:
        raise Fault("a matrix without swizzling, or with an offset, is not known here")
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    row = np.arange(rows)[:, None]
    places = swizzled(start + row // 8 * stride + row % 8 * span + np.arange(32), span) - SHARED_BASE
    if places.min() < 0 or places.max() >= len(machine.shared.data):
        raise Fault("a product reads outside of shared memory")
    return places


@dataclass
class MemoryBarrier:
    """arrivals: still wanted in this phase; missing: bytes; copies: of the engine, under way."""

    wanted: int
    arrivals: int
    missing: int = 0
    phase: int = 0
    copies: list = field(default_factory=list)

    def settle(self) -> None:
        if self.arrivals == 0 and self.missing == 0:
            self.phase ^= 1
            self.arrivals = self.wanted


def barriers(machine: Machine) -> dict[int, MemoryBarrier]:
    return machine.queues.setdefault("barriers", {})


def barrier_at(machine: Machine, place: int) -> MemoryBarrier:
    known = barriers(machine).get(place)
    if known is None:
        raise Fault(f"no barrier at byte {place - SHARED_BASE} of shared memory")
    return known


def chosen(machine: Machine, values: np.ndarray) -> list[int]:
    """Of the threads that run."""
    return [int(value) for value in values[machine.active()]]


@translates("mbarrier")
def memory_barrier(instruction: Instruction, program: Program) -> Action:
    what, operands = instruction.parts[1], instruction.operands
    if what == "init":
        where, count = address(operands[0], program), int(operands[1])

        def init(machine: Machine) -> None:
            for place in chosen(machine, where(machine)):
                barriers(machine)[place] = MemoryBarrier(count, count)

        return init
    if what == "inval":
        where = address(operands[0], program)

        def forget(machine: Machine) -> None:
            for place in chosen(machine, where(machine)):
                if barrier_at(machine, place).copies:
                    raise Fault("a barrier ends while copies to it are under way")
                del barriers(machine)[place]

        return forget
    if what == "arrive":
        expects = instruction.parts[2] == "expect_tx"
        where = address(operands[1], program)
        count = reader(operands[2] if len(operands) > 2 else "1", "u32", program)

        def arrive(machine: Machine) -> None:
            for place, value in _of_threads(machine, [where(machine), count(machine)]):
                known = barrier_at(machine, place)
                known.missing += value if expects else 0
                known.arrivals -= 1 if expects else value
                known.settle()

        return arrive
    if what == "try_wait" and "parity" in instruction.parts:
        return _try_wait(instruction, program)
    raise unknown(instruction)


def _try_wait(instruction: Instruction, program: Program) -> Action:
    """Copies land now, no sooner than they must; a wait that nothing will end is an error."""
    where, parity = address(instruction.operands[1], program), reader(instruction.operands[2], "u32", program)
    done = instruction.operands[0]

    def run(machine: Machine) -> None:
        places, parities = set(chosen(machine, where(machine))), set(chosen(machine, parity(machine)))
        if len(places) != 1 or len(parities) != 1:
            raise Fault("threads that wait for different barriers are not known here")
        known, wanted = barrier_at(machine, places.pop()), parities.pop()
        while known.phase == wanted and known.copies:
            land(machine, known)
        if known.phase == wanted:
            raise Fault("waits for a barrier that nothing will complete")
        machine.write(done, np.ones(machine.threads, bool))

    return run


def land(machine: Machine, known: MemoryBarrier) -> None:
    known.copies.pop(0)()
    known.settle()


def tensor_map(machine: Machine, value: int) -> TensorMap:
    number, rest = divmod(value - PARAMETERS, APART)
    known = machine.program.parameters
    found = machine.parameters[known[number]] if rest == 0 and 0 <= number < len(known) else None
    if not isinstance(found, TensorMap):
        raise Fault("the copy engine is given something that is no tensor map")
    return found


@translates("cp.async.bulk")
def bulk(instruction: Instruction, program: Program) -> Action:
    parts = instruction.parts
    if parts[3] == "commit_group":
        return lambda machine: None
    if parts[3] == "wait_group":
        return _finish_stores
    if parts[3:5] != ("tensor", "2d"):
        raise unknown(instruction)
    # without clusters both spaces are the same
    if parts[5] in ("shared__cta", "shared__cluster") and parts[6:] == ("global", "mbarrier__complete_tx__bytes"):
        return _load_block(instruction, program)
    if parts[5:] == ("global", "shared__cta", "bulk_group"):
        return _store_block(instruction, program)
    raise unknown(instruction)


def _block(operand: str, program: Program):
    """[map, {x, y}]"""
    name, coordinates = re.fullmatch(r"\[\s*([^,]+),\s*(\{.*\})\s*\]", operand).groups()
    return reader(name.strip(), "b64", program), [reader(name, "s32", program) for name in listed(coordinates)]


def _load_block(instruction: Instruction, program: Program) -> Action:
    target, barrier = address(instruction.operands[0], program), address(instruction.operands[2], program)
    name, coordinates = _block(instruction.operands[1], program)

    def run(machine: Machine) -> None:
        reads = [read(machine) for read in (name, *coordinates, target, barrier)]
        for warp, values in zip(machine.warps[machine.active()], _of_threads(machine, reads), strict=True):
            _load(machine, int(warp), *values)

    return run


def _of_threads(machine: Machine, values: list[np.ndarray]) -> list[tuple[int, ...]]:
    """Per running thread, each of which starts a copy of its own."""
    return list(zip(*(chosen(machine, value) for value in values), strict=True))


def _load(machine: Machine, warp: int, name: int, x: int, y: int, start: int, barrier: int) -> None:
    source = tensor_map(machine, name)
    offsets, inside = source.places(x, y)
    values = np.where(inside, source.buffer.data[np.where(inside, offsets, 0)], 0).astype(np.uint8)
    places = _shared_places(machine, start, values.shape, source.span)
    machine.shared.begin_copy(places, np.full((1, 1), warp, np.int16))
    known = barrier_at(machine, barrier)

    def arrive() -> None:
        machine.shared.end_copy(places, values, EVERYBODY)
        known.missing -= values.size

    known.copies.append(arrive)


def _shared_places(machine: Machine, start: int, shape: tuple[int, ...], span: int) -> np.ndarray:
    """Of a block's bytes [rows, columns]."""
    if start % max(128, 8 * span):
        raise Fault(f"a block that changes places within {span} bytes begins at byte {start - SHARED_BASE}")
    count = shape[0] * shape[1]
    places = swizzled(start + np.arange(count).reshape(shape), span) - SHARED_BASE
    if places.min() < 0 or places.max() >= len(machine.shared.data):
        raise Fault("the copy engine leaves the program's shared memory")
    return places


def _store_block(instruction: Instruction, program: Program) -> Action:
    source = address(instruction.operands[1], program)
    name, coordinates = _block(instruction.operands[0], program)

    def run(machine: Machine) -> None:
        reads = [read(machine) for read in (name, *coordinates, source)]
        for which, x, y, start in _of_threads(machine, reads):
            target = tensor_map(machine, which)
            offsets, inside = target.places(x, y)
            places = _shared_places(machine, start, offsets.shape, target.span)
            values = machine.shared.peek(places)
            target.buffer.data[offsets[inside]] = values[inside]
            machine.queues.setdefault("stores", []).append((places, values))

    return run


def _finish_stores(machine: Machine) -> None:
    for places, values in machine.queues.pop("stores", []):
        unchanged(lambda places=places: machine.shared.data[places], values, "the copy engine")


@translates("fence")
def fence(instruction: Instruction, program: Program) -> Action:
    if instruction.parts[1:3] == ("proxy", "async"):
        return lambda machine: machine.shared.fence()
    return lambda machine: None
