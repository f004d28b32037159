"""The C sources of this folder as functions.

Threads are those of the OpenMP runtime that torch itself runs on: a second pool would compete with the first.
"""

import ctypes
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from ..backends import first_line
from . import structs
from .build import compiled

log = logging.getLogger("dit_quant")
_loading = threading.Lock()
CPU_FLAGS = ("f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
# no contraction to fused multiply-adds: results are the reference's bits
OPTIONS = ("-O3", "-mtune=native", "-std=gnu11", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
OPTIONS += tuple(f"-m{flag.replace('_', '')}" for flag in CPU_FLAGS)
# used where the CPU has them
AMX_FLAGS = ("amx_tile", "amx_int8")
# by a macro of our own: a compiler may have been told, or tell itself, what this CPU has
AMX_OPTIONS = (*(f"-m{flag.replace('_', '-')}" for flag in AMX_FLAGS), "-DDIT_QUANT_AMX")
# arch_prctl asks Linux for the registers of AMX, of this whole process: number, request, XTILEDATA
ASK_FOR_AMX = (158, 0x1023, 18)

POINTER, SIZE, INT = structs.POINTER, structs.SIZE, structs.INT
TEAM = (POINTER, POINTER, ctypes.c_uint)
TOKENS, WEIGHT, GROUP = map(ctypes.POINTER, (structs.Tokens, structs.Weight, structs.Group))
SIGNATURES = {
    # tokens, group; coordinates, whether to find them; codes, scale, zero; buffer
    "quantize_activation": (INT, (*TEAM, TOKENS, GROUP, POINTER, INT, *[POINTER] * 4)),
    # a, M, K; row scale and zero, coordinates; weight, group; y, dtype; buffer
    "linear": (INT, (*TEAM, POINTER, SIZE, SIZE, *[POINTER] * 3, WEIGHT, GROUP, POINTER, INT, POINTER)),
    # tokens, weight, group; y; buffer
    "layer": (INT, (*TEAM, TOKENS, WEIGHT, GROUP, POINTER, POINTER)),
    "quantizer_buffer": (SIZE, (SIZE, SIZE, ctypes.c_uint)),
    "linear_buffer": (SIZE, (SIZE, SIZE, SIZE, SIZE, ctypes.c_uint)),
    "layer_buffer": (SIZE, (SIZE, SIZE, SIZE, SIZE, ctypes.c_uint)),
}


@dataclass(frozen=True)
class Library:
    """The functions of the C sources. Those that take a team of threads, their first arguments, return whether all
    tables have the timestep group."""

    quantize_activation: Callable[..., int]
    quantizer_buffer: Callable[[int, int, int], int]
    linear: Callable[..., int]
    linear_buffer: Callable[[int, int, int, int, int], int]
    layer: Callable[..., int]
    layer_buffer: Callable[[int, int, int, int, int], int]


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why the native ops do not run. The first call compiles them."""
    if device.type != "cpu":
        return "runs on CPU only"
    if dtype not in structs.DTYPES:
        return f"no {dtype}"
    found = library()
    return found if isinstance(found, str) else None


@lru_cache(maxsize=1)
def library() -> Library | str:
    """The loaded library, or why there is none."""
    try:
        if reason := unsupported():
            return reason
        # of two threads the second finds what the first has compiled
        with _loading:
            team, path = thread_team(), built()
            try:
                return loaded(path, team)
            except (OSError, AttributeError):
                # damaged in the cache, if it was whole when it was compiled; or nothing may be executed there
                path.unlink(missing_ok=True)
                return loaded(built(keep=False), team)
    except (OSError, AttributeError, RuntimeError) as error:
        return first_line(error)


def required() -> Library:
    """Raises RuntimeError where there is no library."""
    found = library()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def unsupported() -> str | None:
    """What this machine lacks."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"written for Linux on x86_64, not {sys.platform} on {platform.machine()}"
    missing = [flag for flag in CPU_FLAGS if flag not in cpu_flags()]
    return f"this CPU has no {', '.join(missing)}" if missing else None


def cpu_flags() -> set[str]:
    """Instruction sets of this CPU, as the kernel names them."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def thread_team() -> tuple[int, ...]:
    """Addresses of what starts threads, and what numbers them, in the OpenMP runtime that torch runs on: one that was
    loaded before everything, or the one that it was linked with.

    Raises OSError, AttributeError.
    """
    try:
        own = ctypes.CDLL(None)
        entries = own.GOMP_parallel, own.omp_get_thread_num
    except AttributeError:
        own = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        entries = own.GOMP_parallel, own.omp_get_thread_num
    found = [ctypes.cast(entry, POINTER).value for entry in entries]
    assert None not in found
    return tuple(address for address in found if address)


def loaded(path: Path, team: tuple[int, ...]) -> Library:
    """Raises OSError, AttributeError."""
    found = ctypes.CDLL(str(path))
    return Library(**{name: function(found, name, team) for name in SIGNATURES})


def function(loaded: ctypes.CDLL, name: str, team: tuple[int, ...]) -> Callable:
    """A C function; where it starts a team of threads, with that team bound."""
    result, arguments = SIGNATURES[name]
    found = getattr(loaded, name)
    found.restype, found.argtypes = result, arguments
    if arguments[: len(TEAM)] != TEAM:
        return found
    return lambda *given: found(*team, torch.get_num_threads(), *given)


def amx_refusal() -> str | None:
    """None, or why products do without AMX."""
    if reason := unsupported():
        return reason
    missing = [flag for flag in AMX_FLAGS if flag not in cpu_flags()]
    if missing:
        return f"this CPU has no {', '.join(missing)}"
    # as oneDNN reads them
    name = next(filter(os.environ.get, ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")), "")
    limit = os.environ.get(name, "").upper()
    if "AMX" not in limit and limit not in ("", "ALL", "DEFAULT"):
        return f"{name}={limit} switches it off, for torch too"
    refused = ctypes.CDLL(None, use_errno=True).syscall(*ASK_FOR_AMX)
    return f"Linux refuses the registers of AMX: {os.strerror(ctypes.get_errno())}" if refused else None


def built(keep: bool = True) -> Path:
    """The shared library with what this CPU has; keep: in the user's cache. Raises as `compiled`."""
    # a home may be shared by machines, and CC may name options that suit this one
    reason, machine = amx_refusal(), " ".join(sorted(cpu_flags()))
    if reason is None:
        try:
            return compiled((*OPTIONS, *AMX_OPTIONS), machine, keep)
        except RuntimeError as error:
            # compilers before 2021 do not know it
            reason = first_line(error)
    path = compiled(OPTIONS, machine, keep)
    if cpu_flags().issuperset(AMX_FLAGS):
        log.warning("products on the CPU do without AMX, at about half the speed: %s", reason)
    return path
