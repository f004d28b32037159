"""Tensors as C takes them: contiguous, of the right type and size, by address."""

from torch import Tensor, dtype


def vector(name: str, values: Tensor | None, size: int, kind: dtype) -> Tensor | None:
    """values [size], in any shape -> contiguous, of type `kind`. Raises ValueError for another size."""
    if values is None:
        return None
    if values.numel() != size:
        raise ValueError(f"{name} has {values.numel()} entries, not {size}")
    return values.reshape(-1).to(kind).contiguous()


def address(tensor: Tensor | None) -> int | None:
    """Of the first entry. The caller keeps the tensor alive during the call."""
    return None if tensor is None else tensor.data_ptr()
