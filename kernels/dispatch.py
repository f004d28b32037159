"""Which backend runs an op: chosen once per class of shapes, with every refusal and its reason kept."""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .backends import AUTO, Implementation, Shape, check_name, first_line, load, order

ENVIRONMENT = "DIT_QUANT_BACKEND"
# of errors that come from an earlier kernel, or that the host handles: another backend must not hide them
NOT_OURS = (
    "out of memory",
    "not enough memory",
    "allocate memory",
    "defaultcpuallocator",
    "alloc_failed",
    "execution_failed",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
)
log = logging.getLogger("dit_quant")


@dataclass(frozen=True)
class Choice:
    """The backend that runs an op, and (backend, reason) of each that was asked before it."""

    op: str
    backend: str
    refusals: tuple[tuple[str, str], ...] = ()


# (op, device, dtype, bucket of M, K, N, group size, hadamard, symmetric, static, asked backend): Shape's order
Key = tuple
_ready: dict[Key, tuple[str, Callable]] = {}
_choices: dict[Key, Choice] = {}
_ran: dict[Key, Choice] = {}
_failed: dict[Key, dict[str, str]] = {}
_warned: set[str] = set()
_replacing = threading.Lock()


def bucket(M: int) -> int:
    """Tokens rounded up to a power of 2, at least 16: a new resolution or prompt length is rarely a new class."""
    return 1 << max(M - 1, 15).bit_length() if M else 0


def asked(backend: str) -> str:
    """The backend that the caller or, where it has no wish, the environment asks for."""
    if backend != AUTO:
        return check_name(backend, "backend")
    return check_name(os.environ.get(ENVIRONMENT, AUTO).strip().lower() or AUTO, ENVIRONMENT)


def plan(shape: Shape, backend: str = AUTO) -> Choice:
    """The choice for a shape, without running anything. Failures at launch are known only once they happened."""
    return _choose(_key(shape, backend))


def recorded() -> Mapping[Shape, Choice]:
    """What has run so far. A class of shapes whose backend failed at launch stands under the one that took over."""
    return {Shape(*key[:-1]): choice for key, choice in _ran.items()}


def reset() -> None:
    """Forgets every choice, failure and warning: after a change of the environment variable, and in tests."""
    for table in (_ready, _choices, _ran, _failed, _warned):
        table.clear()


def run(key: Key, *args, **kwargs):
    """Calls the chosen implementation; one that cannot be launched is replaced by the next, for good."""
    backend, function = _ready.get(key) or _prepare(key)
    try:
        return function(*args, **kwargs)
    except Exception as error:
        if not cannot_launch(error):
            raise
        return _run_next(key, backend, error, args, kwargs)


def backend_of(key: Key) -> str:
    """The backend that `run` would call, as one that ran: the caller is about to call it."""
    backend, _ = _ready.get(key) or _prepare(key)
    return backend


def cannot_launch(error: Exception) -> bool:
    """Whether an error says that a kernel could not be compiled or launched: no earlier work is at fault."""
    accelerator = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)
    if isinstance(error, MemoryError | torch.OutOfMemoryError | accelerator):
        return False
    message = str(error).lower()
    return not any(phrase in message for phrase in NOT_OURS)


def _key(shape: Shape, backend: str) -> Key:
    return (*(getattr(shape, name) for name in Shape.__dataclass_fields__), backend)


def _choose(key: Key) -> Choice:
    """Asks the backends in order; warns where the one that was asked for by name is not the one that runs."""
    if key in _choices:
        return _choices[key]
    *fields, backend = key
    shape, wanted = Shape(*fields), asked(backend)
    failed, refusals = _failed.get(key, {}), []
    # no implementation is obliged to take an empty batch
    for name in order(shape.device, wanted) if shape.M else ("reference",):
        reason = failed.get(name) or _refusal(name, shape)
        if reason is None:
            choice = _choices[key] = Choice(shape.op, name, tuple(refusals))
            if wanted not in (AUTO, name) and refusals and wanted not in failed:
                warn_once(f"{shape.op}: {wanted} was asked for, but refuses ({refusals[0][1]}); {name} runs instead")
            return choice
        refusals.append((name, reason))
    raise RuntimeError(f"{shape.op}: no backend runs {shape}: " + "; ".join(f"{n}: {r}" for n, r in refusals))


def _refusal(name: str, shape: Shape) -> str | None:
    found = load(shape.op, name)
    if not isinstance(found, Implementation):
        return found
    try:
        return found.refusal(shape)
    except Exception as error:  # what it stands on is installed, and broken
        return f"cannot be asked: {type(error).__name__}: {first_line(error)}"


def _prepare(key: Key) -> tuple[str, Callable]:
    """The backend that runs, and its function."""
    choice = _choose(key)
    found = load(choice.op, choice.backend)
    assert isinstance(found, Implementation)
    _ready[key], _ran[key] = (choice.backend, found.function), choice
    return _ready[key]


def _run_next(key: Key, broken: str, error: Exception, args: tuple, kwargs: dict):
    """After `broken` failed at launch: the next backends in turn. When all fail the arguments are at fault, not the
    backends: the first error is raised and nothing is held against anyone."""
    known, first = dict(_failed.get(key, {})), error
    while True:
        if broken == "reference":
            _forget(key, known)
            raise first
        with _replacing:
            # another thread may have met the same: its reason stands, and a choice made before it must not
            reason = f"failed at launch: {type(error).__name__}: {first_line(error)}"
            _forget(key, {broken: reason, **_failed.get(key, {})})
            broken, function = _prepare(key)
            choice = _ran[key]
        try:
            result = function(*args, **kwargs)
        except Exception as another:
            if not cannot_launch(another):
                raise
            error = another
            continue
        for name, reason in choice.refusals:
            if name in _failed.get(key, {}) and name not in known:
                warn_once(f"{choice.op}: {name} {reason}; {choice.backend} runs instead")
        return result


def _forget(key: Key, failed: dict[str, str]) -> None:
    """Lets the next call choose again, without the backends that `failed`."""
    _failed[key] = failed
    for table in (_ready, _choices, _ran):
        table.pop(key, None)


def warn_once(text: str, about: str | None = None) -> None:
    """Once per text, or what it is `about`: a model has hundreds of layers of few shapes."""
    if (about or text) not in _warned:
        _warned.add(about or text)
        log.warning("%s", text)
