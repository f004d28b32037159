"""Opt-in choice of tiles by measurement: DIT_QUANT_AUTOTUNE=1. Without it the tables of tiles.py decide for products,
the counts of row_tiles.py for quantizers.

A result holds for every M of its bucket, so that a new resolution or prompt length never tunes again, and is kept in a
JSON file under the user's cache folder; DIT_QUANT_AUTOTUNE_CACHE names another one.
"""

import json
import logging
import os
import statistics
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from .backends import first_line
from .dispatch import cannot_launch
from .tiles import bucket_of
from .user_cache import user_cache

SWITCH, CACHE = "DIT_QUANT_AUTOTUNE", "DIT_QUANT_AUTOTUNE_CACHE"
VERSION = 1
WARM_UP, REPEATS = 2, 7

logger = logging.getLogger("dit_quant")
lock = threading.Lock()
# key -> tile, of this process; the file is read when a key is missing here
chosen: dict[str, Any] = {}
# a frozen dataclass of numbers
Tile = TypeVar("Tile")


def enabled(device: torch.device) -> bool:
    """Asked at every call: the switch works in a running host."""
    return os.environ.get(SWITCH) == "1" and device.type == "cuda"


def cache_file() -> Path:
    """Where results are kept: $DIT_QUANT_AUTOTUNE_CACHE, else in our cache folder of the user."""
    if named := os.environ.get(CACHE):
        return Path(named)
    return user_cache() / "autotune.json"


def tuned_tile(
    key: str,
    options: tuple[Tile, ...],
    usual: Tile,
    launch: Callable[[Tile], None],
    device: torch.device,
    timer: Callable[[Callable[[], None]], float] | None = None,
) -> Tile:
    """The fastest of `options` for this key: remembered, on disk, or measured now with `timer` (seconds of a call).

    While a CUDA graph is captured nothing can be timed: an unknown key then gets the usual tile, for that call.
    """
    if (tile := chosen.get(key)) is not None:
        return tile
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return usual
    with lock:
        if (tile := chosen.get(key)) is not None:
            return tile
        stored = known(cache_file()).get(key)
        tile = next((option for option in options if vars(option) == stored), None)
        if tile is None:
            tile = fastest(key, options, launch, timer or device_seconds)
            write(cache_file(), key, tile)
        chosen[key] = tile
    return tile


def key_of(op: str, device: torch.device, capability: int, M: int, N: int, K: int, flags: tuple) -> str:
    """What a choice depends on; the same for every M of a bucket. What another Triton makes of a tile may not fit."""
    from .version_triton import VERSION as TRITON

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    shape = f"M<={bucket_of(M)} N={N} K={K}"
    return f"{op} | {name} | {capability} | triton {TRITON} | {shape} | {' '.join(str(flag) for flag in flags)}"


def fastest(key: str, options: tuple[Tile, ...], launch: Callable[[Tile], None], timer: Callable) -> Tile:
    """The option of least time, with all times logged; those that cannot be launched on the card are left out."""
    seconds: dict[Tile, float] = {}
    failed: Exception | None = None
    for tile in options:
        try:
            seconds[tile] = timer(lambda tile=tile: launch(tile))
        except Exception as error:
            if not cannot_launch(error):
                raise
            failed = error
            logger.info("autotune: %s: %s: %s with %s", key, type(error).__name__, first_line(error), tile)
        else:
            logger.info("autotune: %s: %.1f us with %s", key, 1e6 * seconds[tile], tile)
    if not seconds:
        raise RuntimeError(f"none of the {len(options)} tiles can be launched on this card; unset {SWITCH}") from failed
    return min(seconds, key=lambda tile: seconds[tile])


def device_seconds(call: Callable[[], None]) -> float:
    """Median seconds of a call on the current CUDA device, after compilation."""
    for _ in range(WARM_UP):
        call()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for start, end in marks:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks) / 1e3


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Stored results, fields of tiles; none, with a warning, where the file is not one of ours. Raises OSError where
    there is one that cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            return {}
        return {key: dict(fields) for key, fields in content["tiles"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("autotune cache %s is not one of ours (%s) and will be written anew", path, error)
        return {}


def known(path: Path) -> dict[str, dict[str, Any]]:
    """As `read`; nothing, with a warning, where the file cannot be read now."""
    try:
        return read(path)
    except OSError as error:
        logger.warning("autotune cache %s cannot be read (%s)", path, error)
        return {}


def write(path: Path, key: str, tile: Any) -> None:
    """Adds one result to what the file holds by now. Atomic: a reader sees the old file or the new one."""
    temporary = None
    try:
        tiles = dict(sorted({**read(path), key: vars(tile)}.items()))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            temporary = file.name
            json.dump({"version": VERSION, "tiles": tiles}, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("autotune result not kept: %s", error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
