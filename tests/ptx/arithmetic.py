"""Instructions that each thread runs for itself."""

from collections.abc import Callable

import numpy as np

from .machine import Action, Fault, Machine, translates, unknown
from .operands import FLOATS, TYPES, listed, reader, writer
from .program import Instruction, Program
from .rounding import WHOLE, from_float, fused, to_half, to_integer

ROUNDINGS = {"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"}
WIDER = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers are divided towards zero; by zero the result is unspecified, here 0."""
    if a.dtype.kind == "f":
        with np.errstate(all="ignore"):
            return a / b
    with np.errstate(all="ignore"):
        return np.trunc(a.astype(np.float64) / np.where(b == 0, 1, b)).astype(a.dtype)


def _floating(f: Callable) -> Callable:
    def quiet(*values: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return f(*values)

    return quiet


def product_low(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _floating(np.multiply)(a, b)


def product_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    bits = 8 * a.dtype.itemsize
    return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)


def shifted_left(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), a.dtype.type(0))


def shifted_right(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    found = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return found if a.dtype.kind == "i" else np.where(count < bits, found, a.dtype.type(0))


# opcode -> function of its operands; all have the instruction's type
PLAIN: dict[str, Callable] = {
    "add": _floating(np.add),
    "sub": _floating(np.subtract),
    "div": quotient,
    "neg": lambda a: -a if a.dtype.kind != "u" else ~a + a.dtype.type(1),
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "rem": lambda a, b: np.fmod(a, np.where(b == 0, 1, b)).astype(a.dtype),
    "sqrt": _floating(np.sqrt),
    "rcp": _floating(lambda a: a.dtype.type(1) / a),
    "rsqrt": _floating(lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype)),
    "ex2": _floating(lambda a: np.exp2(a.astype(np.float64)).astype(a.dtype)),
    "lg2": _floating(lambda a: np.log2(a.astype(np.float64)).astype(a.dtype)),
    "tanh": _floating(lambda a: np.tanh(a.astype(np.float64)).astype(a.dtype)),
    "fma": fused,
}


@translates(*PLAIN)
def plain(instruction: Instruction, program: Program) -> Action:
    f, kinds = PLAIN[instruction.parts[0]], [part for part in instruction.parts if part in (*TYPES, "f32x2")]
    if kinds[0] == "f32x2":
        return _pairs(f, instruction, program)
    # add.rn.f32.bf16: the first operand is of the last type
    first = kinds[-1]
    one, *others = instruction.operands[1:]
    reads = [_widened(one, first, program) if first != kinds[0] else reader(one, first, program)]
    reads += [reader(operand, kinds[0], program) for operand in others]
    return _result(f, instruction, kinds[0], reads, program)


def _widened(operand: str, kind: str, program: Program) -> Callable[[Machine], np.ndarray]:
    read = reader(operand, kind, program)
    return lambda machine: from_float(read(machine), kind)


def _result(f: Callable, instruction: Instruction, kind: str, reads: list, program: Program) -> Action:
    write = writer(instruction.operands[0], kind, program)
    return lambda machine: write(machine, f(*[read(machine) for read in reads]))


def _pairs(f: Callable, instruction: Instruction, program: Program) -> Action:
    reads = [reader(operand, "b64", program) for operand in instruction.operands[1:]]
    write = writer(instruction.operands[0], "b64", program)

    def run(machine: Machine) -> None:
        values = [np.ascontiguousarray(read(machine)).view(np.float32) for read in reads]
        write(machine, np.ascontiguousarray(f(*values)).view(np.uint64))

    return run


@translates("mul", "mad")
def product(instruction: Instruction, program: Program) -> Action:
    """.lo, .hi, .wide of integers; of floats and pairs of them as is."""
    kind = instruction.parts[-1]
    if kind == "f32x2":
        return _pairs(product_low, instruction, program)
    wide, high = "wide" in instruction.parts, "hi" in instruction.parts
    reads = [reader(operand, kind, program) for operand in instruction.operands[1:3]]
    if kind in FLOATS and instruction.parts[0] == "mad":
        raise unknown(instruction)
    outer = kind if not wide else kind[0] + str(2 * int(kind[1:]))
    if instruction.parts[0] == "mad":
        reads.append(reader(instruction.operands[3], outer, program))

    def f(a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
        if wide:
            found = a.astype(WIDER[kind]) * b.astype(WIDER[kind])
        else:
            found = product_high(a, b) if high else product_low(a, b)
        return found + c[0] if c else found

    return _result(f, instruction, outer, reads, program)


@translates("min", "max")
def extreme(instruction: Instruction, program: Program) -> Action:
    """A NaN counts for nothing unless the instruction says so."""
    kind, smaller = instruction.parts[-1], instruction.parts[0] == "min"
    if kind in FLOATS and "NaN" not in instruction.parts:
        f = np.fmin if smaller else np.fmax
    else:
        f = np.minimum if smaller else np.maximum
    reads = [reader(operand, kind, program) for operand in instruction.operands[1:]]
    return _result(lambda first, *more: _fold(f, first, more), instruction, kind, reads, program)


def _fold(f: Callable, first: np.ndarray, more: tuple[np.ndarray, ...]) -> np.ndarray:
    for value in more:
        first = f(first, value)
    return first


@translates("shl", "shr")
def shift(instruction: Instruction, program: Program) -> Action:
    kind = instruction.parts[-1]
    reads = [reader(instruction.operands[1], kind, program), reader(instruction.operands[2], "u32", program)]
    return _result(shifted_left if instruction.parts[0] == "shl" else shifted_right, instruction, kind, reads, program)


COMPARISONS: dict[str, Callable] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


@translates("setp")
def comparison(instruction: Instruction, program: Program) -> Action:
    """The u of "neu", "ltu", ... makes it true for a NaN. setp.lt.and.f32 p, a, b, c joins c."""
    name, kind = instruction.parts[1], instruction.parts[-1]
    unordered = kind in FLOATS and name.endswith("u")
    compare = COMPARISONS[name.removesuffix("u") if unordered else name]
    reads = [reader(operand, kind, program) for operand in instruction.operands[1:3]]
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(instruction.parts[2])
    if join is not None:
        reads.append(reader(instruction.operands[3], "pred", program))

    def f(a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
        found = compare(a, b)
        if kind in FLOATS:
            nan = np.isnan(a) | np.isnan(b)
            found = found | nan if unordered else found & ~nan
        return join(found, c[0]) if join is not None else found

    return _result(f, instruction, "pred", reads, program)


@translates("selp")
def selection(instruction: Instruction, program: Program) -> Action:
    kind, (_, yes, no, which) = instruction.parts[-1], instruction.operands
    reads = [reader(yes, kind, program), reader(no, kind, program), reader(which, "pred", program)]
    return _result(lambda a, b, p: np.where(p, a, b), instruction, kind, reads, program)


@translates("mov")
def move(instruction: Instruction, program: Program) -> Action:
    """Also packs a vector of registers into one, and unpacks it."""
    kind, (target, source) = instruction.parts[-1], instruction.operands
    targets, sources = listed(target), listed(source)
    if len(targets) == len(sources) == 1:
        return _result(lambda a: a, instruction, kind, [reader(source, kind, program)], program)
    part = f"b{int(kind[1:]) // max(len(targets), len(sources))}"
    if len(sources) > 1:
        reads = [reader(name, part, program) for name in sources]
        write = writer(targets[0], kind, program)

        def pack(machine: Machine) -> None:
            write(machine, np.stack([read(machine) for read in reads], axis=1).view(TYPES[kind])[:, 0])

        return pack
    read = reader(sources[0], kind, program)
    writes = [writer(name, part, program) for name in targets]

    def unpack(machine: Machine) -> None:
        parts = np.ascontiguousarray(read(machine)).view(TYPES[part]).reshape(-1, len(writes))
        for i, write in enumerate(writes):
            write(machine, parts[:, i])

    return unpack


@translates("cvt")
def conversion(instruction: Instruction, program: Program) -> Action:
    modifiers, (target, source) = instruction.parts[1:-2], instruction.parts[-2:]
    if target.endswith("x2"):
        high, low = (reader(operand, "f32", program) for operand in instruction.operands[1:])
        write = writer(instruction.operands[0], "b32", program)

        def pair(machine: Machine) -> None:
            halves = [to_half(read(machine), target[:-2]).astype(np.uint32) for read in (high, low)]
            write(machine, (halves[0] << np.uint32(16)) | halves[1])

        return pair
    rounding = next((part for part in modifiers if part in ROUNDINGS), "")
    if set(modifiers) - ROUNDINGS - {"sat", "ftz"} or rounding in ("rz", "rm", "rp"):
        raise unknown(instruction)

    def f(value: np.ndarray) -> np.ndarray:
        floating = source in (*FLOATS, "bf16")
        if target in ("bf16", "f16") and floating:
            return to_half(from_float(value, source), target)
        if target in FLOATS:
            wide = (from_float(value, source) if source == "bf16" else value).astype(TYPES[target])
            return WHOLE[rounding](wide) if rounding in WHOLE else wide
        if floating:
            return to_integer(from_float(value, source) if source == "bf16" else value, rounding, target)
        if "sat" in modifiers:
            limits = np.iinfo(TYPES[target])
            value = np.clip(
                value, max(limits.min, np.iinfo(value.dtype).min), min(limits.max, np.iinfo(value.dtype).max)
            )
        return value.astype(TYPES[target])

    raw = "b16" if target in ("bf16", "f16") else target
    return _result(f, instruction, raw, [reader(instruction.operands[1], source, program)], program)


@translates("prmt")
def permutation(instruction: Instruction, program: Program) -> Action:
    """Each nibble of the third operand names a byte of the first two; its top bit spreads that byte's sign."""
    if instruction.parts != ("prmt", "b32"):
        raise unknown(instruction)
    reads = [reader(operand, "b32", program) for operand in instruction.operands[1:]]

    def f(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        found = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> (np.uint64(8) * (nibble & np.uint32(7)))) & np.uint64(255)
            sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
            found |= np.where(nibble & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * i)
        return found

    return _result(f, instruction, "b32", reads, program)


@translates("bfe")
def extraction(instruction: Instruction, program: Program) -> Action:
    """`count` bits from `start` on, sign-extended for .s32."""
    kind = instruction.parts[-1]
    reads = [reader(instruction.operands[1], kind, program)]
    reads += [reader(operand, "u32", program) for operand in instruction.operands[2:]]
    bits = int(kind[1:])

    def f(value: np.ndarray, start: np.ndarray, count: np.ndarray) -> np.ndarray:
        start, count = start & 255, count & 255
        if (start + count > bits).any() or (count == 0).any():
            raise Fault("bfe beyond the value, whose result is another here")
        return shifted_right(shifted_left(value, bits - start - count), bits - count)

    return _result(f, instruction, kind, reads, program)


@translates("lop3")
def logic(instruction: Instruction, program: Program) -> Action:
    """Any function of three bits: bit 4a + 2b + c of the table."""
    table = int(instruction.operands[4], 0)
    reads = [reader(operand, "b32", program) for operand in instruction.operands[1:4]]

    def f(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        found = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
        for i in range(8):
            if table >> i & 1:
                found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return found

    return _result(f, instruction, "b32", reads, program)


@translates("cvta")
def converted_address(instruction: Instruction, program: Program) -> Action:
    return _result(lambda a: a, instruction, "b64", [reader(instruction.operands[1], "b64", program)], program)


@translates("createpolicy")
def policy(instruction: Instruction, program: Program) -> Action:
    write = writer(instruction.operands[0], "b64", program)
    return lambda machine: write(machine, np.zeros(machine.threads, np.uint64))
