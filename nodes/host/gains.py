"""Gains of a model's layers, measured by short samplings on the host and kept in a file beside the calibration."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ...quant_core.files import replacing
from ...quant_core.sensitivity import measure_gains

log = logging.getLogger("dit_quant")
FORMAT = "dit_quant_gains"


def cached_gains(
    layers: Mapping[str, torch.nn.Module],
    weights: Mapping[str, Callable[[], torch.Tensor]],
    sample: Callable[[], torch.Tensor],
    path: Path,
    key: str,
    notes: list[str],
) -> dict[str, float]:
    """As `measure_gains`; what is found is saved after every layer, so that an interrupted run goes on there."""
    gains = _read(path, key, notes)
    if gains:
        notes.append(f"sensitivity of {len(gains)} layers taken from the cache")
    with torch.inference_mode():
        for name, gain in measure_gains(layers, weights, sample, gains):
            gains[name] = gain
            kept(lambda: _write(path, key, gains), "sensitivity not kept for another time", notes)
    return gains


def kept(save: Callable[[], None], otherwise: str, notes: list[str]) -> bool:
    """Whether `save` worked; where a disk is full or a folder cannot be written to, a note says so, once."""
    try:
        save()
    except OSError as error:
        note = f"{otherwise}: {error.strerror or error}"
        if note not in notes:
            notes.append(note)
        return False
    return True


def _read(path: Path, key: str, notes: list[str]) -> dict[str, float]:
    """Gains of a file made for `key`; a damaged or foreign one is reported and measured again."""
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT or data["key"] != key:
            raise ValueError("made for another model, other prompts or other settings")
        return {str(name): float(value) for name, value in data["gains"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        notes.append(f"{path.name} refused and measured again: {error}")
        log.warning("%s refused and measured again: %s", path.name, error)
        return {}


def _write(path: Path, key: str, gains: Mapping[str, float]) -> None:
    """Writes beside the target and renames: an interruption leaves the last whole file."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, "key": key, "gains": dict(gains)}))
