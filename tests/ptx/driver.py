"""A driver of Triton whose card is machine.py."""

from pathlib import Path
from typing import Any

import torch

from .engine import SPANS, TensorMap
from .machine import run
from .memory import Buffer, Global
from .program import Program, parse

PROGRAMS: dict[str, Program] = {}


class Running:
    """What Triton launches a compiled kernel by."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, *given: Any) -> None:
        # packed metadata, launch metadata and two hooks come before the operands
        operands = flat(given[4:], list(self.source.signature.values()))
        text = KERNELS[function]
        program = PROGRAMS.setdefault(text, parse(text))
        buffers, values = [], []
        maps = iter(getattr(self.metadata, "tensordesc_meta", None) or [])
        for operand, kind in operands:
            values += parameters_of(operand, kind, maps, buffers)
        names = [parameter.name for parameter in program.parameters]
        # scratch memory, which no kernel here has
        values += [0] * (len(names) - len(values))
        parameters = dict(zip(names, values, strict=True))
        run(program, Global(buffers), parameters, self.metadata.shared, (x, y, z))


KERNELS: dict[int, str] = {}


def attach() -> None:
    """Triton's active driver runs what it launches from here on."""
    from triton import knobs
    from triton.runtime import driver

    driver.active.launcher_cls = Running
    knobs.runtime.kernel_load_end_hook = _loaded


def _loaded(module: Any, function: int, name: str, files: dict[str, str], key: str) -> None:
    KERNELS[function] = Path(files[f"{name}.ptx"]).read_text()


def flat(values: Any, kinds: Any) -> list[tuple[Any, Any]]:
    """Operands and Triton's types of them, constants left out."""
    found = []
    for value, kind in zip(values, kinds, strict=True):
        if isinstance(kind, tuple | list):
            found += flat(value, kind)
        elif kind != "constexpr":
            found.append((value, kind))
    return found


def parameters_of(operand: Any, kind: str, maps: Any, buffers: list[Buffer]) -> list[object]:
    if isinstance(operand, torch.Tensor):
        buffers.append(buffer_of(operand, f"operand {len(buffers)}"))
        return [buffers[-1].start]
    if hasattr(operand, "block_shape"):
        buffer = buffer_of(operand.base, f"operand {len(buffers)}")
        buffers.append(buffer)
        known, size = next(maps), operand.base.element_size()
        block = known["block_size"]
        spans = SPANS[known["swizzle"]]
        shape, strides = list(operand.shape), list(operand.strides)
        made = TensorMap(buffer, shape[0], shape[1], strides[0] * size, block[0], block[1], size, spans)
        return [made, *shape, *strides]
    return [operand]


def buffer_of(tensor: torch.Tensor, name: str) -> Buffer:
    """Everything of the memory that the tensor is a view of, from its first element to its last."""
    last = (
        sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else -1
    )
    size = (last + 1) * tensor.element_size()
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    start = tensor.storage_offset() * tensor.element_size()
    return Buffer(tensor.data_ptr(), storage[start : start + size].numpy(), name)
