"""The result of calibrating a model, and its resumable file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .collector import Collector
from .files import DamagedFile, read_tensors, write_tensors
from .grouping import Grouping
from .observers import LayerStatistics

FORMAT = "dit_quant_calibration"
VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """Statistics of every layer that ran, over one list of sigmas (strictly decreasing).

    fingerprints: identity of each layer's weight at calibration; silent: layers that never ran, with the
    reason; grouping: the partition chosen by Group Timesteps, or None until then.
    """

    sigmas: tuple[float, ...]
    layers: Mapping[str, LayerStatistics]
    fingerprints: Mapping[str, str]
    silent: Mapping[str, str]
    flow: bool
    settings: Mapping[str, object]
    grouping: Grouping | None = None


def finish(collector: Collector, fingerprints: Mapping[str, str], settings: Mapping[str, object]) -> Calibration:
    """Collector -> Calibration. Raises ValueError when nothing was recorded."""
    sigmas, layers, silent = collector.results()
    if not layers:
        raise ValueError("calibration recorded nothing: no quantizable layer ran while sampling")
    return Calibration(sigmas, layers, dict(fingerprints), silent, collector.flow, dict(settings))


def save_progress(path: Path, collector: Collector, key: str, done: int) -> None:
    """Writes the raw sums after `done` prompts; `key` binds the file to its model, prompts and settings."""
    tensors = {
        f"{name}|{field}": value
        for name, observer in collector.observers.items()
        for field, value in observer.tensors().items()
    }
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "key": key,
        "done": str(done),
        "sigmas": json.dumps(collector.sigmas),
    }
    write_tensors(path, tensors, metadata)


def restore_progress(path: Path, collector: Collector, key: str) -> int:
    """Fills a fresh collector from a file and returns how many prompts it holds.

    Everything is checked first: a foreign, old or damaged file raises DamagedFile and changes nothing.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise DamagedFile(f"{path.name}: not a calibration cache")
    if metadata.get("version") != str(VERSION):
        raise DamagedFile(f"{path.name}: cache version {metadata.get('version')}, this pack writes {VERSION}")
    if metadata.get("key") != key:
        raise DamagedFile(f"{path.name}: made for another model, other prompts or other settings")
    try:
        sigmas = [float(s) for s in json.loads(metadata["sigmas"])]
        done = int(metadata["done"])
    except (KeyError, ValueError, TypeError) as error:
        raise DamagedFile(f"{path.name}: its metadata is incomplete ({error})") from error
    states = {name: _layer_state(path, tensors, name, collector, len(sigmas)) for name in collector.observers}
    for name, state in states.items():
        collector.observers[name].restore(state)
    collector.sigmas[:] = sigmas
    return done


def _layer_state(path: Path, tensors: dict, name: str, collector: Collector, bins: int) -> dict:
    """The tensors of one layer, shapes checked."""
    observer = collector.observers[name]
    K, block = observer.features, observer.block
    rows = tensors.get(f"{name}|count")
    if rows is None or rows.ndim != 1 or len(rows) > bins:
        raise DamagedFile(f"{path.name}: {name} is missing or has the wrong number of timesteps")
    shapes = {"count": (len(rows),), **{field: (len(rows), K) for field in ("total", "minimum", "maximum")}}
    if block is not None and len(rows):
        shapes["moment"] = (K // block, block, block)
    state = {}
    for field, shape in shapes.items():
        tensor = tensors.get(f"{name}|{field}")
        dtype = torch.float64 if field in ("count", "total") else torch.float32
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise DamagedFile(f"{path.name}: {name} {field} should be {list(shape)} {dtype}")
        state[field] = tensor
    return state
