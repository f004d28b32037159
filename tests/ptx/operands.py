"""Operands of an instruction: where values come from and go to."""

import re
from collections.abc import Callable

import numpy as np

from .machine import WARP, WIDTHS, Machine
from .memory import SHARED_BASE
from .program import Program

FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
TYPES = {
    **FLOATS,
    **{f"{letter}{bits}": np.dtype(f"uint{bits}").type for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"int{bits}").type for bits in (8, 16, 32, 64)},
    "bf16": np.uint16,
    "pred": np.bool_,
}
NUMBER = re.compile(r"[-+]?(?:0x[0-9a-fA-F]+|\d+)U?$")
FLOAT = re.compile(r"0f([0-9a-fA-F]{8})$")
# parameters have addresses of 32 bits, far from all others
PARAMETERS, APART = 1 << 30, 4096
Read = Callable[[Machine], np.ndarray]


def listed(operand: str) -> list[str]:
    """The names in braces, or the one name."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def reader(operand: str, kind: str, program: Program) -> Read:
    """Of a register, a number or a special register: its value per thread [threads], as `kind`. bf16 comes as its
    bits."""
    wanted, size = TYPES[kind], np.dtype(TYPES[kind]).itemsize
    if NUMBER.match(operand):
        number = int(operand.rstrip("U"), 0)
        return _constant(number != 0 if kind == "pred" else number, size, wanted, program)
    if found := FLOAT.match(operand):
        return _constant(int(found[1], 16), 4, wanted, program)
    if special := SPECIAL.get(operand):
        return lambda machine: special(machine).view(wanted)
    if operand == "global_smem" or operand in program.parameters:
        place = SHARED_BASE if operand == "global_smem" else PARAMETERS + APART * program.parameters.index(operand)
        return _constant(place, size, wanted, program)
    width = np.dtype(WIDTHS[program.kind_of(operand)]).itemsize
    if width == size:
        return lambda machine: machine.value(operand).view(wanted)
    if size > width:
        raise ValueError(f"{operand} has {width} bytes, {kind} has {size}")
    low = np.dtype(f"uint{8 * size}")
    return lambda machine: machine.value(operand).astype(low).view(wanted)


def writer(operand: str, kind: str, program: Program) -> Callable[[Machine, np.ndarray], None]:
    """To a register: a value of `kind`, sign- or zero-extended to its width. "_" takes nothing."""
    if operand == "_":
        return lambda machine, value: None
    raw = np.dtype(WIDTHS[program.kind_of(operand)])
    if raw.type is np.bool_:
        return lambda machine, value: machine.write(operand, value)
    signed = np.dtype(f"int{8 * raw.itemsize}")

    def write(machine: Machine, value: np.ndarray) -> None:
        if value.dtype.itemsize != raw.itemsize:
            value = value.astype(signed if value.dtype.kind == "i" else raw)
        machine.write(operand, value.view(raw))

    return write


def address(operand: str, program: Program) -> Read:
    """Of "[register + offset]": one per thread, int64."""
    base, _, offset = operand.strip("[] ").partition("+")
    base, more = base.strip(), int(offset or "0", 0)
    read = reader(base, program.kind_of(base) if base.startswith("%") else "b64", program)
    return lambda machine: read(machine).astype(np.int64) + more


SPECIAL: dict[str, Read] = {
    "%tid.x": lambda machine: machine.thread,
    "%laneid": lambda machine: machine.thread % np.uint32(WARP),
    "%ntid.x": lambda machine: np.full(machine.threads, machine.threads, np.uint32),
    **{f"%ctaid.{axis}": lambda m, i=i: np.full(m.threads, m.position[i], np.uint32) for i, axis in enumerate("xyz")},
    **{f"%nctaid.{axis}": lambda m, i=i: np.full(m.threads, m.grid[i], np.uint32) for i, axis in enumerate("xyz")},
}


def _constant(number: int, size: int, wanted: type, program: Program) -> Read:
    """`size` bytes of a number, for all threads."""
    bits = number & ((1 << (8 * size)) - 1)
    values = np.full(program.threads, bits, np.dtype(f"uint{8 * size}")).view(wanted)
    return lambda machine: values
