"""The C sources of this folder, compiled once with the machine's C compiler and kept in the user's cache."""

import atexit
import contextlib
import hashlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from ..user_cache import user_cache

log = logging.getLogger("dit_quant")
FOLDER = Path(__file__).parent
SOURCES = ("quantizer.c", "product.c")
HEADERS = (
    "along.h",
    "amx.h",
    "codes.h",
    "epilogue.h",
    "lanes.h",
    "product.h",
    "quantizer.h",
    "rotation.h",
    "tables.h",
    "team.h",
    "transpose.h",
    "vnni.h",
    "weights.h",
)
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT = 120
# others may write
OPEN = 0o002


def compiled(options: tuple[str, ...], machine: str, keep: bool = True) -> Path:
    """The shared library, compiled unless the cache has it. machine: what it is compiled for, beside the options; keep:
    in the user's cache, else in a folder that goes with the process.

    Raises RuntimeError with the compiler's first complaint, or when there is no compiler.
    """
    digest = hashlib.sha256("\0".join((*options, machine, os.environ.get("CC", ""))).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((FOLDER / name).read_bytes())
    name = f"native-{digest.hexdigest()[:16]}"
    folder, reason = cache_folder() if keep else (user_cache(), "has one that cannot be loaded")
    if reason is None and (found := kept(folder, name)):
        return found
    if reason is not None or not os.access(folder, os.W_OK):
        mine = of_this_process()
        if found := kept(mine, name):
            return found
        log.warning("the compiled C is not kept for another time: %s %s", folder, reason or "cannot be written to")
        folder = mine
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        compile_to(temporary, options)
        # whatever the linker has put there
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        path = folder / f"{name}-{os.stat(temporary).st_size}.so"
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def kept(folder: Path, name: str) -> Path | None:
    """What was compiled earlier, whole and by this user: a file that was cut off would kill the process."""
    for path in folder.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError):
            facts = path.stat()
            if facts.st_uid in (os.getuid(), 0) and path.stem.endswith(f"-{facts.st_size}"):
                return path
    return None


def cache_folder() -> tuple[Path, str | None]:
    """The user's cache folder, and why it is not used: somebody else could put a library into it, for instance."""
    folder = user_cache().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError as error:
        return folder, f"cannot be made ({error.strerror or error})"
    if facts.st_uid not in (os.getuid(), 0):
        return folder, "belongs to another user"
    return folder, "is open to everybody for writing" if facts.st_mode & OPEN else None


@lru_cache(maxsize=1)
def of_this_process() -> Path:
    """A folder that goes with the process."""
    folder = tempfile.mkdtemp(prefix="dit_quant-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def compile_to(path: str, options: tuple[str, ...]) -> None:
    """Raises RuntimeError with the compiler's first complaint."""
    # fmaxf is in libm, which must come behind what needs it
    command = [*compiler(), *options, *(str(FOLDER / name) for name in SOURCES), "-o", path, "-lm"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=TIMEOUT)
    except BaseException as error:
        # with the processes that it started
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise RuntimeError(f"{command[0]} did not finish within {TIMEOUT} s") from error
        raise
    if process.returncode:
        complaint = next((line for line in said.splitlines() if "error" in line), said or "no message")
        raise RuntimeError(f"{command[0]} failed: {complaint.strip()}")


def compiler() -> list[str]:
    """$CC, else the first C compiler on the path. Raises RuntimeError when there is none."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise RuntimeError(f"CC={os.environ['CC']} is no command: {error}") from error
    if named:
        return named
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise RuntimeError(f"no C compiler found ({', '.join(COMPILERS)}); install gcc for faster layers on the CPU")
    return [found]
