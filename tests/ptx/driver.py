"""A driver of Triton whose card is machine.py."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from .engine import SPANS, TensorMap
from .machine import run
from .memory import Buffer, Global
from .program import Program, parse

# handle -> PTX, as Triton loaded it
KERNELS: dict[int, str] = {}


@lru_cache(maxsize=32)
def read(ptx: str) -> Program:
    return parse(ptx)


class Running:
    """What Triton launches a compiled kernel by."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, *given: Any) -> None:
        # packed metadata, launch metadata and two hooks come before the operands
        operands = flat(given[4:], self.source.signature.values())
        program = read(KERNELS[function])
        buffers, values = [], []
        maps = iter(getattr(self.metadata, "tensordesc_meta", None) or [])
        for operand in operands:
            values += parameters_of(operand, maps, buffers)
        # scratch memory, which no kernel here has
        values += [0] * (len(program.parameters) - len(values))
        parameters = dict(zip(program.parameters, values, strict=True))
        run(program, Global(buffers), parameters, self.metadata.shared, (x, y, z))


def attach() -> None:
    """Triton's active driver runs what it launches from here on."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    driver.active.launcher_cls = Running
    load = CompiledKernel._init_handles

    # Triton 3.4 has no hook for this
    def loaded(kernel: Any) -> None:
        load(kernel)
        KERNELS.setdefault(kernel.function, kernel.asm["ptx"])

    CompiledKernel._init_handles = loaded


def flat(values: Any, kinds: Any) -> list[Any]:
    """Operands that have a type of Triton's, not those that the kernel was compiled for."""
    found = []
    for value, kind in zip(values, kinds, strict=True):
        if isinstance(kind, tuple | list):
            found += flat(value, kind)
        elif kind != "constexpr":
            found.append(value)
    return found


def parameters_of(operand: Any, maps: Iterator[dict], buffers: list[Buffer]) -> list[object]:
    """What a kernel gets for an operand; its memory is added to `buffers`. maps: how the kernel wants tensor maps."""
    if isinstance(operand, torch.Tensor):
        buffers.append(buffer_of(operand, f"operand {len(buffers)}"))
        return [buffers[-1].start]
    if hasattr(operand, "block_shape"):
        buffer = buffer_of(operand.base, f"operand {len(buffers)}")
        buffers.append(buffer)
        known, size = next(maps), operand.base.element_size()
        block, span = known["block_size"], SPANS[known["swizzle"]]
        (rows, columns), strides = operand.shape, operand.strides
        made = TensorMap(buffer, rows, columns, strides[0] * size, block[0], block[1], size, span)
        return [made, rows, columns, *strides]
    return [operand]


def buffer_of(tensor: torch.Tensor, name: str) -> Buffer:
    """Everything of the memory that the tensor is a view of, from its first element to its last."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.element_size() if tensor.numel() else 0
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    start = tensor.storage_offset() * tensor.element_size()
    return Buffer(tensor.data_ptr(), storage[start : start + size].numpy(), name)
