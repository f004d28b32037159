"""Tensors as C takes them: contiguous, of the right type and size, by address."""

import torch
from torch import Tensor

from .structs import DTYPES, Group, Table

ABSENT = Table()


def vector(name: str, values: Tensor | None, size: int, *kinds: torch.dtype) -> Tensor | None:
    """values [size], in any shape -> contiguous, of one of the types, else of the first. Raises ValueError for another
    size."""
    if values is None:
        return None
    if values.numel() != size:
        raise ValueError(f"{name} has {values.numel()} entries, not {size}")
    if values.dtype not in kinds:
        values = values.to(kinds[0])
    return values.contiguous()


def table(name: str, values: Tensor | None, size: int, timesteps: bool = False) -> Table:
    """values [size], or for timestep groups [T, size]. Raises as `vector` and `address`."""
    if values is None:
        return ABSENT
    rows = values.shape[0] if timesteps else 0
    if timesteps and not rows:
        raise ValueError(f"{name} has no timestep groups")
    kept = vector(name, values, rows * size if timesteps else size, *DTYPES)
    assert kept is not None
    filled = Table(address(kept), DTYPES[kept.dtype], rows)
    filled.kept = kept
    return filled


def group_of(index: Tensor, fraction: Tensor) -> Group:
    """index, fraction [1]. C reads them: to ask torch for them takes as long as anything else that Python does here."""
    kept = vector("index", index, 1, torch.int64), vector("fraction", fraction, 1, torch.float32)
    group = Group(*map(address, kept))
    group.kept = kept
    return group


def check_group(found: int, index: Tensor, **tables: Tensor | None) -> None:
    """Raises IndexError where C has not found the group in all tables [T, ...]."""
    if found:
        return
    sizes = {name: len(values) for name, values in tables.items() if values is not None}
    name, size = next(((name, size) for name, size in sizes.items() if not 0 <= int(index) < size), ("a table", 0))
    raise IndexError(f"timestep group {int(index)} is not in {name}, which has {size}")


def address(tensor: Tensor | None) -> int | None:
    """Of the first entry. The caller keeps the tensor alive during the call. Raises ValueError for one that is not in
    the CPU's memory."""
    if tensor is None:
        return None
    if tensor.device.type != "cpu":
        raise ValueError(f"all operands belong on the CPU, one is on {tensor.device}")
    return tensor.data_ptr()
