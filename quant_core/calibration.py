"""The result of calibrating a model, and its resumable file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .collector import Collector
from .curvature import CurvatureCollector
from .files import DamagedFile, read_tensors, write_tensors
from .grouping import Grouping
from .observers import LayerObserver, LayerStatistics

FORMAT = "dit_quant_calibration"
VERSION = 3


@dataclass(frozen=True)
class Calibration:
    """Statistics of every layer that ran, over one list of sigmas (strictly decreasing).

    fingerprints: identity of each layer's weight at calibration; silent: layers that never ran, with the
    reason; grouping: the partition chosen by Group Timesteps, or None until then; gains: how far an error at each
    layer's output moves the final latent (see `sensitivity`), or None where that was not measured; curvature: diagonal
    blocks [P, c, c] of what errors in a layer's output cost (see `curvature`) where that was measured, or None.
    """

    sigmas: tuple[float, ...]
    layers: Mapping[str, LayerStatistics]
    fingerprints: Mapping[str, str]
    silent: Mapping[str, str]
    flow: bool
    settings: Mapping[str, object]
    grouping: Grouping | None = None
    gains: Mapping[str, float] | None = None
    curvature: Mapping[str, torch.Tensor] | None = None


def finish(
    collector: Collector,
    fingerprints: Mapping[str, str],
    settings: Mapping[str, object],
    further: Sequence[Collector] = (),
    curvature: Mapping[str, torch.Tensor] | None = None,
) -> Calibration:
    """Collector -> Calibration; further: those of later passes, over the same sigmas. Empties the collectors.

    Raises ValueError when nothing was recorded.
    """
    sigmas, layers, silent = collector.results()
    for other in further:
        _, more, quiet = other.results()
        layers, silent = layers | more, silent | quiet
    if not layers:
        raise ValueError("calibration recorded nothing: no quantizable layer ran while sampling")
    return Calibration(
        sigmas, layers, dict(fingerprints), silent, collector.flow, dict(settings), curvature=curvature or None
    )


def save_progress(
    path: Path, collector: Collector, key: str, done: int, curvature: CurvatureCollector | None = None
) -> None:
    """Writes the raw sums after `done` prompts; `key` binds the file to its model, prompts, settings and pass.

    Layers that share an observer are written once, under the first one's name.
    """
    curvature = curvature or CurvatureCollector({})
    groups = collector.groups()
    tensors = {
        f"{names[0]}|{field}": value
        for observer, names in groups.items()
        for field, value in observer.tensors().items()
    }
    tensors |= {f"{name}|curvature": moment for name, moment in curvature.moments.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "key": key,
        "done": str(done),
        "sigmas": json.dumps(collector.sigmas),
        "shared": json.dumps({name: names[0] for names in groups.values() for name in names[1:]}),
        "probes": str(curvature.probes),
        "probe_failure": curvature.failure,
    }
    write_tensors(path, tensors, metadata)


@torch.inference_mode(False)  # what is made here is changed in place later on, in either mode
def restore_progress(
    path: Path, collector: Collector, key: str, curvature: CurvatureCollector | None = None, *, copy: bool = True
) -> int:
    """Fills fresh collectors from a file and returns how many prompts it holds.

    Everything is checked first: a foreign, old or damaged file raises DamagedFile and changes nothing.
    copy=False leaves the tensors in the file, mapped: for one that is complete, to be read and no more.
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
        shared = {str(name): str(first) for name, first in json.loads(metadata["shared"]).items()}
        done = int(metadata["done"])
        probes, failure = int(metadata["probes"]), metadata["probe_failure"]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{path.name}: its metadata is incomplete ({error})") from error
    if len(sigmas) > collector.max_bins or (collector.fixed and sigmas != collector.sigmas):
        raise DamagedFile(f"{path.name}: made with other noise levels")
    restored: dict[str, LayerObserver] = {}
    for name, fresh in collector.observers.items():
        first = shared.get(name, name)
        if first in restored and restored[first].features == fresh.features:
            restored[name] = restored[first]
            continue
        state = _layer_state(path, tensors, first, fresh, len(sigmas), collector.max_bins)
        restored[name] = fresh.copy(name)
        restored[name].restore({field: value.clone() if copy else value for field, value in state.items()})
    if curvature is not None:
        moments = _curvature(path, tensors, curvature)
        moments = {name: moment.clone() if copy else moment for name, moment in moments.items()}
        curvature.moments, curvature.probes, curvature.failure = moments, probes, failure
    collector.adopt(sigmas, restored)
    return done


def _curvature(path: Path, tensors: dict, fresh: CurvatureCollector) -> dict[str, torch.Tensor]:
    """The curvature of every layer that has one, shapes checked."""
    found = {}
    for name, (blocks, width) in fresh.shapes.items():
        moment = tensors.get(f"{name}|curvature")
        if moment is None:
            continue
        if tuple(moment.shape) != (blocks, width, width) or moment.dtype != torch.float32:
            raise DamagedFile(f"{path.name}: {name} curvature should be {[blocks, width, width]} torch.float32")
        found[name] = moment
    return found


def _layer_state(path: Path, tensors: dict, name: str, fresh: LayerObserver, sigmas: int, bins: int) -> dict:
    """The tensors of one layer, shapes checked. A layer that never ran has no bins."""
    K, block, size = fresh.features, fresh.block, fresh.sample.size
    count, values = tensors.get(f"{name}|count"), tensors.get(f"{name}|rows")
    if count is None or count.ndim != 1 or len(count) not in (0, bins) or bool((count[sigmas:] != 0).any()):
        raise DamagedFile(f"{path.name}: {name} is missing or has the wrong number of timesteps")
    T = len(count)
    wide = values is not None and values.dtype == torch.float32
    size = size // 2 if wide else size
    expected = {"count": ((T,), torch.float64), "total": ((T, K), torch.float64)}
    expected |= {"minimum": ((T, K), torch.float32), "maximum": ((T, K), torch.float32)}
    expected |= {"keys": ((T, size), torch.int64), "rows": ((T, size, K), torch.float32 if wide else torch.float16)}
    if block is not None and bool((count > 0).any()):
        expected["moment"] = ((K // block, block, block), torch.float32)
    state = {}
    for field, (shape, dtype) in expected.items():
        tensor = tensors.get(f"{name}|{field}")
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise DamagedFile(f"{path.name}: {name} {field} should be {list(shape)} {dtype}")
        state[field] = tensor
    return state
