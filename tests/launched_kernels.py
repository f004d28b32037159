"""Kernels for launched_twice.py that take one operand of every sort."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["free"])
def toy(a_ptr, b_ptr, size, free, factor, WIDTH: tl.constexpr, NAME: tl.constexpr):
    offsets = tl.arange(0, WIDTH)
    value = tl.load(a_ptr + offsets) * size
    if b_ptr is not None:
        value += tl.load(b_ptr + offsets)
    tl.store(a_ptr + offsets, (value * free * factor).to(a_ptr.dtype.element_ty))


@triton.jit
def toy_described(a, WIDTH: tl.constexpr, NAME: tl.constexpr):
    a.store([0, 0], a.load([0, WIDTH]))
