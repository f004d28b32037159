"""What a value is, as text: all that reaches a sampling belongs to the key of its calibration."""

import dis
import functools
import hashlib
import weakref
from collections.abc import Callable, Mapping
from itertools import chain, islice
from types import ModuleType

import numpy as np
import torch
from torch import nn

from .fingerprint import tensor_fingerprint

# containers and objects within one another
DEPTH = 8
# tensors of a network that are looked at
TENSORS = 64
# what ComfyUI's ControlNets put down while they sample, and a clock of its patchers
RUNTIME = ("cond_hint", "extra_concat", "timestep_range", "_last_free_log_time")
# id of an object -> the object, and what it was when it was first described: many change while they are used
_known: dict[int, tuple[weakref.ref, object]] = {}


def describe(value: object, depth: int = DEPTH) -> object:
    """JSON-able and the same for equal values: tensors and networks by fingerprint, functions with what they close
    over and take by default, other objects with what they hold, as far as it can be read: nothing in slots, and under
    names that begin with an underscore only numbers and text. An object is what it was when first seen."""
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return of_tensor(value)
    if isinstance(value, np.ndarray):
        return [list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, type):
        return name_of(value)
    if depth == 0:
        return name_of(type(value))
    if isinstance(value, Mapping):
        return {str(key): describe(each, depth - 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [describe(each, depth - 1) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(describe(each, depth - 1)) for each in value)
    return remembered(value, lambda: of_object(value, depth))


def remembered(value: object, look: Callable[[], object]) -> object:
    """What `look` said of this object the first time."""
    key = id(value)
    if key in _known and _known[key][0]() is value:
        return _known[key][1]
    try:
        reference = weakref.ref(value, lambda _: _known.pop(key, None))
    except TypeError:
        return look()
    # it may hold itself
    _known[key] = (reference, name_of(type(value)))
    found = look()
    _known[key] = (reference, found)
    return found


def of_object(value: object, depth: int) -> object:
    if isinstance(value, functools.partial):
        return describe([value.func, value.args, value.keywords], depth)
    if callable(value) and hasattr(value, "__qualname__"):
        owner = getattr(value, "__self__", None)
        inside = [] if owner is None or isinstance(owner, ModuleType) else [owner]
        held = *inside, *defaults(value), *closed_over(value)
        return [name_of(value), *(describe(each, depth - 1) for each in held)]
    held = {
        name: each
        for name, each in getattr(value, "__dict__", {}).items()
        if name not in RUNTIME and (not name.startswith("_") or isinstance(each, bool | int | float | str))
    }
    described = describe(dict(sorted(held.items())), depth)
    if isinstance(value, nn.Module):
        tensors = islice(chain(value.parameters(), value.buffers()), TENSORS)
        return [name_of(type(value)), described, [of_tensor(each) for each in tensors]]
    return [name_of(type(value)), described]


def of_tensor(value: torch.Tensor) -> object:
    if value.is_meta or value.layout is not torch.strided or not value.numel():
        return [list(value.shape), str(value.dtype)]
    return tensor_fingerprint(value)


def defaults(function: Callable) -> list[object]:
    """Of its arguments: what a loop or a node has bound, often."""
    function = getattr(function, "__func__", function)
    given = getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)
    return [each for each in given if each]


def closed_over(function: Callable) -> list[object]:
    """What a function closes over and does not itself bind anew: that would be its memory between calls."""
    function = getattr(function, "__func__", function)
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return []
    bound = {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_DEREF"}
    found = []
    for name, cell in zip(code.co_freevars, cells, strict=True):
        try:
            found += [] if name in bound else [cell.cell_contents]
        except ValueError:
            # bound later
            continue
    return found


def name_of(value: object) -> str:
    return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', type(value).__qualname__)}"
