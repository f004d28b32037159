"""Tensors as C takes them: contiguous, of the right type and size, by address."""

from torch import Tensor, dtype

from ..numerics import lerp_rows


def table_row(table: Tensor, index: Tensor, fraction: Tensor) -> Tensor:
    """`lerp_rows`; where nothing is interpolated, in a third of its calls: a CPU may look at its own memory.

    May be a part of the table, which an op must not return.
    """
    return table[int(index)].float() if float(fraction) == 0 else lerp_rows(table, index, fraction)


def vector(name: str, values: Tensor | None, size: int, kind: dtype) -> Tensor | None:
    """values [size], in any shape -> contiguous, of type `kind`. Raises ValueError for another size."""
    if values is None:
        return None
    if values.numel() != size:
        raise ValueError(f"{name} has {values.numel()} entries, not {size}")
    if values.dtype is kind and values.is_contiguous():
        return values
    return values.reshape(-1).to(kind).contiguous()


def address(tensor: Tensor | None) -> int | None:
    """Of the first entry. The caller keeps the tensor alive during the call. Raises ValueError for one that is not in
    the CPU's memory."""
    if tensor is None:
        return None
    if tensor.device.type != "cpu":
        raise ValueError(f"all operands belong on the CPU, one is on {tensor.device}")
    return tensor.data_ptr()
