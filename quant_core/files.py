"""Safe reading and writing of safetensors: clear refusals, and never a half-written file."""

import contextlib
import errno
import glob
import json
import os
import shutil
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

HEADER_LIMIT = 100 * 2**20
# seconds since a temporary file was last written to
ABANDONED = 3600


class DamagedFile(ValueError):
    """A file that is not what it should be; the message says what and what to do."""


def read_header(path: Path) -> dict:
    """The JSON header of a safetensors file, checked before any tensor is touched.

    Raises DamagedFile for a file that is missing, too short, not safetensors, or cut off.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise DamagedFile(f"{path.name}: {size} bytes are too few for a safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > HEADER_LIMIT:
                raise DamagedFile(f"{path.name}: claims a header of {length} bytes; it is not a safetensors file")
            if 8 + length > size:
                raise DamagedFile(f"{path.name}: header of {length} bytes in a file of {size}: the file is cut off")
            raw = file.read(length)
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path.name}: the header is not JSON; it is not a safetensors file") from error
    if not isinstance(header, dict):
        raise DamagedFile(f"{path.name}: the header is not a JSON object; it is not a safetensors file")
    ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__" and _has_offsets(v)]
    needed = 8 + length + max(ends, default=0)
    if needed > size:
        raise DamagedFile(
            f"{path.name}: {size} bytes, but its tensors need {needed}: the file is cut off; fetch it again"
        )
    return header


def _has_offsets(entry: object) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(offset, int) for offset in offsets)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata. Raises DamagedFile instead of returning half of anything."""
    header = read_header(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(header.get("__metadata__") or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DamagedFile(f"{path.name}: {error}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes beside the target and renames: an old file survives whatever goes wrong.

    Raises OSError naming the folder, and the space needed and left when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        free = shutil.disk_usage(path.parent).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{path.name} needs {needed / 2**20:.0f} MB, the disk of {path.parent} has {free / 2**20:.0f} MB left; "
                "make room there",
            )
        try:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place at the end, with its permissions, or goes where something fails.

    What a process that was killed while it wrote has left there goes too.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            # one that is still being written is younger
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # safetensors makes files that nobody else may read
        temporary.touch()
        mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):
            # not every file system lets everybody
            temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
