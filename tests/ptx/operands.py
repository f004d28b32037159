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
    """Of a register, a number or a special register: its value per thread, or one for all, as `kind`. bf16 comes as
    its bits."""
    wanted = TYPES[kind]
    if NUMBER.match(operand):
        number = int(operand.rstrip("U"), 0)
        constant = np.array([number != 0]) if kind == "pred" else _bits(number, np.dtype(wanted).itemsize).view(wanted)
        return lambda machine: constant
    if found := FLOAT.match(operand):
        value = np.array([int(found[1], 16)], np.uint32).view(wanted)
        return lambda machine: value
    if special := SPECIAL.get(operand):
        return lambda machine: special(machine).view(wanted)
    if operand == "global_smem" or operand in program.parameters:
        place = SHARED_BASE if operand == "global_smem" else PARAMETERS + APART * program.parameters.index(operand)
        start = _bits(place, np.dtype(wanted).itemsize).view(wanted)
        return lambda machine: start
    width = np.dtype(WIDTHS[program.kind_of(operand)]).itemsize
    size = np.dtype(wanted).itemsize
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
    return lambda machine: np.broadcast_to(read(machine).astype(np.int64) + more, (machine.threads,))


SPECIAL: dict[str, Read] = {
    "%tid.x": lambda machine: machine.thread,
    "%laneid": lambda machine: machine.thread % np.uint32(WARP),
    "%ntid.x": lambda machine: np.array([machine.threads], np.uint32),
    **{f"%ctaid.{axis}": lambda m, i=i: np.array([m.position[i]], np.uint32) for i, axis in enumerate("xyz")},
    **{f"%nctaid.{axis}": lambda m, i=i: np.array([m.grid[i]], np.uint32) for i, axis in enumerate("xyz")},
}


def _bits(number: int, size: int) -> np.ndarray:
    return np.array([number & ((1 << (8 * size)) - 1)], np.dtype(f"uint{8 * size}"))
