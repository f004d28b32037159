"""Runs a program: registers, branches, barriers. What instructions do stands in the modules beside it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from .memory import POISON, Fault, Global, Shared
from .program import Instruction, Program

WIDTHS = {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "pred": np.bool_}
WARP = 32
Action = Callable[["Machine"], None]
# the first parts of a name -> instruction and program -> what it does
TRANSLATORS: dict[str, Callable[[Instruction, Program], Action]] = {}


def translates(*opcodes: str):
    def register(make):
        TRANSLATORS.update(dict.fromkeys(opcodes, make))
        return make

    return register


@dataclass
class Machine:
    """One program (CTA) while it runs. Registers are arrays with a value per thread, unsigned ones of their width.

    mask: threads that run now; None stands for all. parameters: name -> value, a number or what an address stands for.
    """

    program: Program
    memory: Global
    shared: Shared
    parameters: dict[str, object]
    position: tuple[int, int, int]
    grid: tuple[int, int, int]
    registers: dict[str, np.ndarray] = field(default_factory=dict)
    mask: np.ndarray | None = None
    # what products write that were not waited for
    busy: set[str] = field(default_factory=set)
    # what asynchronous instructions keep, by their kind
    queues: dict[str, Any] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        return self.program.threads

    def __post_init__(self) -> None:
        self.thread = np.arange(self.threads, dtype=np.uint32)
        self.warps = (self.thread // WARP).astype(np.int16)

    def active(self) -> np.ndarray:
        return np.ones(self.threads, bool) if self.mask is None else self.mask

    def whole_warps(self) -> None:
        """For what a warp does together."""
        if not _complete(self.active(), "warp"):
            raise Fault("threads of a warp are missing")

    def all_threads(self) -> None:
        """For what is written here for all threads at once."""
        if self.mask is not None:
            raise Fault("only some threads do it, which is not known here")

    def value(self, register: str) -> np.ndarray:
        found = self.registers.get(register)
        if found is not None:
            return found
        if register in self.busy:
            raise Fault(f"reads {register}, which a product is still writing")
        # a compiler may copy what it never uses
        kind = WIDTHS[self.program.kind_of(register)]
        if kind is np.bool_:
            return np.ones(self.threads, bool)
        return np.full((self.threads, kind().itemsize), POISON, np.uint8).view(kind)[:, 0]

    def write(self, register: str, value: np.ndarray) -> None:
        """value [threads], of the register's type; threads that do not run keep theirs."""
        if self.mask is not None:
            before = self.registers.get(register)
            value = value if before is None else np.where(self.mask, value, before)
        self.registers[register] = value


def run(
    program: Program, memory: Global, parameters: dict[str, object], shared: int, grid: tuple[int, int, int]
) -> None:
    """All programs of a launch, one after the other. shared: bytes of each."""
    for z, y, x in product(*(range(count) for count in reversed(grid))):
        execute(Machine(program, memory, Shared(shared), parameters, (x, y, z), grid))


@lru_cache(maxsize=32)
def translate(program: Program) -> list[Action]:
    """Raises Fault for an instruction that is not known here."""
    actions = []
    for instruction in program.instructions:
        parts = instruction.parts
        names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        make = next((TRANSLATORS[name] for name in names if name in TRANSLATORS), None)
        if make is None:
            raise unknown(instruction)
        actions.append(guarded(make(instruction, program), instruction))
    return actions


def finished(groups: list, left: int) -> list:
    """Of groups, the last of which is not yet closed, all closed ones but the last `left`; they are taken off."""
    done = groups[: max(0, len(groups) - 1 - left)]
    del groups[: len(done)]
    return done


def unknown(instruction: Instruction) -> Fault:
    return Fault(f"{instruction.name} is not known here")


def guarded(action: Action, instruction: Instruction) -> Action:
    if not instruction.guard or instruction.parts[0] == "bra":
        return action

    def run_guarded(machine: Machine) -> None:
        wanted = machine.value(instruction.guard) ^ instruction.negated
        outer = machine.mask
        machine.mask = wanted if outer is None else outer & wanted
        if machine.mask.all():
            machine.mask = None
            action(machine)
        elif machine.mask.any():
            action(machine)
        machine.mask = outer

    return run_guarded


def execute(machine: Machine) -> None:
    """Threads that went different ways: those that are furthest behind run first. At what a warp or a program does
    together, those wait that arrive first."""
    program, apart = machine.program, Apart()
    actions = translate(program)
    position, end = 0, len(actions)
    while True:
        if apart:
            position = apart.meet(machine, position)
        if position >= end:
            if not apart:
                return
            position = apart.others(machine)
            continue
        instruction = program.instructions[position]
        opcode = instruction.parts[0]
        try:
            if opcode == "bra":
                position = _branch(machine, instruction, position, apart)
            elif opcode == "ret":
                position = end
            elif opcode in TOGETHER and machine.mask is not None and not _complete(machine.mask, opcode):
                apart.arrived[position] = machine.mask
                position = apart.others(machine)
            else:
                actions[position](machine)
                position += 1
        except Fault as fault:
            raise Fault(f"{program.name}: {fault} ({instruction.name} {', '.join(instruction.operands)})") from None


# what all threads of a warp do at once, or of a program
TOGETHER = {"shfl", "redux", "elect", "mma", "ldmatrix", "stmatrix", "wgmma", "bar", "barrier", "tcgen05"}


def _complete(mask: np.ndarray, opcode: str) -> bool:
    if opcode in ("bar", "barrier"):
        return bool(mask.all())
    warps = mask.reshape(-1, WARP)
    return bool((warps.any(axis=1) == warps.all(axis=1)).all())


@dataclass
class Apart:
    """Threads that are elsewhere, by position: `waiting` for their turn, or `arrived` where others have to come."""

    waiting: dict[int, np.ndarray] = field(default_factory=dict)
    arrived: dict[int, np.ndarray] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.waiting or self.arrived)

    def meet(self, machine: Machine, position: int) -> int:
        """Where threads go on that run next."""
        for places in (self.waiting, self.arrived):
            if position in places:
                machine.mask = machine.active() | places.pop(position)
        first = min(self.waiting, default=position)
        if first < position:
            self.waiting[position], machine.mask = machine.active(), self.waiting.pop(first)
        if machine.mask is not None and machine.mask.all():
            machine.mask = None
        return min(first, position)

    def others(self, machine: Machine) -> int:
        """The same, of threads that the running ones leave behind."""
        if not self.waiting:
            raise Fault("threads wait for others that never come")
        first = min(self.waiting)
        machine.mask = self.waiting.pop(first)
        return first


def _branch(machine: Machine, instruction: Instruction, position: int, apart: Apart) -> int:
    """Where threads go on that run next."""
    target = machine.program.labels[instruction.operands[-1]]
    if not instruction.guard:
        return target
    active = machine.active()
    taken = active & (machine.value(instruction.guard) ^ instruction.negated)
    if not taken.any():
        return position + 1
    if (taken == active).all():
        return target
    left = active & ~taken
    apart.waiting[target] = taken | apart.waiting.get(target, False)
    machine.mask = left
    return position + 1


@translates("ret", "bra")
def _nothing(instruction: Instruction, program: Program) -> Action:
    return lambda machine: None


@translates("bar", "barrier")
def _barrier(instruction: Instruction, program: Program) -> Action:
    if instruction.parts[1] == "warp":
        return lambda machine: None
    if instruction.parts[1] != "sync":
        raise unknown(instruction)
    return lambda machine: machine.shared.barrier()
