"""Tensor memory of compute capability 10.0 and the products that use it (tcgen05).

Tensor memory has 128 lanes of 512 columns of 32 bits; an address is the lane times 2**16 plus the column.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .engine import barrier_at, chosen, described
from .machine import WARP, Action, Fault, Machine, translates, unknown
from .memory import unchanged
from .operands import address, listed, reader, writer
from .program import Instruction, Program
from .warps import multiply

LANES, COLUMNS = 128, 512
SPANS = {2: 128, 4: 64, 6: 32}
SIGNED, INT32 = 1, 2


@dataclass(eq=False)
class Pending:
    """A product that was not waited for: columns that it writes, and what it reads with the values that it found."""

    columns: np.ndarray
    reads: list[tuple[Callable[[], np.ndarray], np.ndarray]]


@dataclass
class TensorMemory:
    """words: what it holds; known: what was written; allocated: columns."""

    words: np.ndarray = field(default_factory=lambda: np.zeros((LANES, COLUMNS), np.uint32))
    known: np.ndarray = field(default_factory=lambda: np.zeros((LANES, COLUMNS), bool))
    allocated: int = 0
    pending: list[Pending] = field(default_factory=list)


def memory_of(machine: Machine) -> TensorMemory:
    return machine.queues.setdefault("tensor memory", TensorMemory())


@translates("tcgen05")
def tensor(instruction: Instruction, program: Program) -> Action:
    what = instruction.parts[1]
    if what == "alloc":
        where, count = address(instruction.operands[0], program), int(instruction.operands[1])

        def allocate(machine: Machine) -> None:
            memory_of(machine).allocated = count
            active = machine.active()
            values = np.zeros((int(active.sum()), 4), np.uint8)
            machine.shared.store(where(machine)[active], values, machine.warps[active])

        return allocate
    if what == "dealloc":

        def free(machine: Machine) -> None:
            if memory_of(machine).pending:
                raise Fault("tensor memory is given back while products use it")
            memory_of(machine).allocated = 0

        return free
    if what in (
        "relinquish_alloc_permit",
        "wait__ld",
        "wait__st",
        "fence__before_thread_sync",
        "fence__after_thread_sync",
    ):
        return lambda machine: None
    if what in ("ld", "st"):
        return _move(instruction, program)
    if what == "mma" and instruction.parts[2:] == ("cta_group__1", "kind__i8"):
        return _product(instruction, program)
    if what == "commit":
        return _commit(instruction, program)
    raise unknown(instruction)


def _move(instruction: Instruction, program: Program) -> Action:
    """A thread's registers are neighbouring columns. 32x32b: lane of the warp = lane of memory. 16x32bx2: two times 16
    lanes, the second ones' columns further on by a number of the instruction."""
    shape, count = instruction.parts[4], int(instruction.parts[5][1:])
    loads = instruction.parts[1] == "ld"
    operands = list(instruction.operands)
    vector = listed(operands.pop(0) if loads else operands.pop())
    where = address(operands[0], program)
    if shape not in ("32x32b", "16x32bx2") or len(vector) != count:
        raise unknown(instruction)
    apart = int(operands[1]) if shape == "16x32bx2" else 0
    writes = [writer(name, "b32", program) for name in vector] if loads else []
    reads = [] if loads else [reader(name, "b32", program) for name in vector]

    def run(machine: Machine) -> None:
        active = machine.active()
        lane, column = np.divmod(where(machine), 1 << 16)
        own = machine.thread.astype(np.int64) % WARP
        if (lane[active] != machine.warps[active] % 4 * WARP).any():
            raise Fault("a warp touches lanes of tensor memory that are another's")
        if apart:
            lane, column = lane + own % 16, column + own // 16 * apart
        else:
            lane = lane + own
        columns = column[:, None] + np.arange(count)
        memory = memory_of(machine)
        if (columns[active] >= memory.allocated).any():
            raise Fault(
                f"column {int(columns[active].max())} of tensor memory, of which {memory.allocated} are allocated"
            )
        for pending in memory.pending:
            if np.isin(columns[active], pending.columns).any():
                raise Fault("tensor memory is touched while a product writes to it")
        if loads:
            if not memory.known[lane[active, None], columns[active]].all():
                raise Fault("reads tensor memory that nobody wrote")
            for i, write in enumerate(writes):
                write(machine, memory.words[lane, np.minimum(columns[:, i], COLUMNS - 1)])
        else:
            values = np.stack([read(machine) for read in reads], axis=1)
            memory.words[lane[active, None], columns[active]] = values[active]
            memory.known[lane[active, None], columns[active]] = True

    return run


def _product(instruction: Instruction, program: Program) -> Action:
    """D [M, N] += A [M, 32] B [N, 32].T; A in tensor memory or, as B, described. By one thread."""
    target = address(instruction.operands[0], program)
    source = instruction.operands[1]
    in_memory = source.startswith("[")
    left = address(source, program) if in_memory else reader(source, "b64", program)
    right = reader(instruction.operands[2], "b64", program)
    kinds, adds = reader(instruction.operands[3], "u32", program), reader(instruction.operands[4], "pred", program)

    def run(machine: Machine) -> None:
        if int(machine.active().sum()) != 1:
            raise Fault("a product that more than one thread starts")
        memory = memory_of(machine)
        (kind,) = chosen(machine, kinds(machine))
        M, N = _shape(kind)
        lanes = np.arange(M) if M == LANES else np.arange(M) // 16 * WARP + np.arange(M) % 16
        (start,), (first,), (second,) = (chosen(machine, read(machine)) for read in (target, left, right))
        columns = start + np.arange(N)
        if columns[-1] >= memory.allocated:
            raise Fault(f"a product writes column {columns[-1]} of tensor memory; {memory.allocated} are allocated")
        checks = []
        if in_memory:
            words = lanes[:, None], first + np.arange(8)
            if not memory.known[words].all():
                raise Fault("a product reads tensor memory that nobody wrote")
            a = np.ascontiguousarray(memory.words[words]).view(np.int8)
            before = memory.words[words]
            checks.append((lambda: memory.words[words], before))
        else:
            a = _described(machine, first, M, checks)
        found = multiply(a, _described(machine, second, N, checks).T)
        if chosen(machine, adds(machine))[0]:
            if not memory.known[lanes[:, None], columns].all():
                raise Fault("a product adds to tensor memory that nobody wrote")
            found = found + memory.words[lanes[:, None], columns].view(np.int32)
        memory.words[lanes[:, None], columns] = found.view(np.uint32)
        memory.known[lanes[:, None], columns] = True
        memory.pending.append(Pending(columns, checks))

    return run


def _shape(kind: int) -> tuple[int, int]:
    """M and N of an instruction's descriptor."""
    if kind >> 4 & 3 != INT32 or kind >> 7 & 7 != SIGNED or kind >> 10 & 7 != SIGNED or kind >> 13 & 15:
        raise Fault(f"a product of kind {kind:#x} is not known here")
    return 16 * (kind >> 24 & 31), 8 * (kind >> 17 & 63)


def _described(machine: Machine, descriptor: int, rows: int, checks: list) -> np.ndarray:
    """int8 [rows, 32] in shared memory, rows along k."""
    places = described(machine, descriptor, rows, SPANS.get(descriptor >> 61 & 7))
    found = machine.shared.peek(places)
    checks.append((lambda: machine.shared.data[places], found))
    return found.view(np.int8)


def _commit(instruction: Instruction, program: Program) -> Action:
    """The barrier is arrived at when all products before are done: when it is waited for, no sooner."""
    if "arrive__one" not in instruction.name:
        raise unknown(instruction)
    where = address(instruction.operands[0], program)

    def run(machine: Machine) -> None:
        memory = memory_of(machine)
        (place,) = chosen(machine, where(machine))
        known = barrier_at(machine, place)
        mine = list(memory.pending)

        def arrive() -> None:
            # those of earlier commits may be done
            for done in [product for product in mine if product in memory.pending]:
                memory.pending.remove(done)
                for read, before in done.reads:
                    unchanged(read, before, "a product")
            known.arrivals -= 1

        known.copies.append(arrive)

    return run
