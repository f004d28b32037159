"""What a value is, as text: whatever reaches the sampling must be part of a calibration's key."""

import functools
from collections.abc import Mapping
from types import ModuleType

import torch

from ...quant_core.fingerprint import tensor_fingerprint

# containers within containers; the host nests three
DEPTH = 8


def describe(value: object, depth: int = DEPTH) -> object:
    """JSON-able and the same for equal values: tensors by fingerprint, functions with what they close over, other
    objects by the plain values and tensors that they hold."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return tensor_fingerprint(value) if value.numel() else list(value.shape)
    if depth == 0 or isinstance(value, torch.nn.Module | type):
        return f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Mapping):
        return {str(key): describe(each, depth - 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [describe(each, depth - 1) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(describe(each, depth - 1)) for each in value)
    if isinstance(value, functools.partial):
        return describe([value.func, value.args, value.keywords], depth)
    if callable(value) and hasattr(value, "__qualname__"):
        owner = getattr(value, "__self__", None)
        inside = [owner] if owner is not None and not isinstance(owner, ModuleType) else []
        inside += [held(cell) for cell in getattr(value, "__closure__", None) or ()]
        return [f"{value.__module__}.{value.__qualname__}", *(describe(each, depth - 1) for each in inside)]
    plain = {name: each for name, each in sorted(getattr(value, "__dict__", {}).items()) if is_plain(each)}
    return [f"{type(value).__module__}.{type(value).__qualname__}", describe(plain, 1 + (depth > 1))]


def held(cell) -> object:
    """What a closure holds; nothing yet where its name is bound later."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)
