"""How numbers are rounded from one type to another."""

import numpy as np

from .operands import TYPES


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fp32 a * b + c, rounded once: the product is exact in fp64, and the sum is rounded to odd there."""
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)
        addend = c.astype(np.float64)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        odd = np.isfinite(total) & (error != 0) & (total.view(np.int64) % 2 == 0)
        step = np.where((error > 0) == (total > 0), 1, -1)
        return np.where(odd, (total.view(np.int64) + step).view(np.float64), total).astype(np.float32)


def from_float(bits: np.ndarray, kind: str) -> np.ndarray:
    """fp32 of a value of `kind`."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(np.float32)


def to_bf16(value: np.ndarray) -> np.ndarray:
    """fp32 -> bits of bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_half(value: np.ndarray, kind: str) -> np.ndarray:
    """fp32 -> bits of bf16 or fp16."""
    with np.errstate(over="ignore"):
        return to_bf16(value) if kind == "bf16" else value.astype(np.float16).view(np.uint16)


# to an integer that stays a float
WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(value: np.ndarray, rounding: str, kind: str) -> np.ndarray:
    """Clamped to the range; NaN is 0."""
    whole = WHOLE[rounding](value.astype(np.float64))
    limits = np.iinfo(TYPES[kind])
    # the largest double of an int64 is not its largest value
    top = float(limits.max) if limits.bits < 64 else float(limits.max - 1023)
    return np.clip(np.nan_to_num(whole, posinf=top, neginf=float(limits.min)), limits.min, top).astype(TYPES[kind])
