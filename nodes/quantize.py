"""Quantize DiT: rounds a MODEL's layers and returns a MODEL that every other node accepts."""

import re

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui

from ..kernels.dispatch import asked
from ..quant_core.backend_report import with_backends
from ..quant_core.budget import GB
from ..quant_core.linear import BACKEND_NAMES
from ..quant_core.schemes import PRESETS
from .host.backends import plan_backends
from .host.quantized import quantize
from .host.weights import select
from .schema import CalibrationType, schema

FIT = "fit to size"


def skip_matching(names, patterns: str) -> dict[str, str]:
    """Layers whose name matches a line of `patterns` (regular expressions), with the reason."""
    skipped = {}
    for line, pattern in compiled(patterns).items():
        skipped |= {name: f"skip_layers {line}" for name in names if pattern.search(name)}
    return skipped


def compiled(patterns: str) -> dict[str, re.Pattern]:
    """Line -> what it says. Raises ValueError for one that is not a regular expression."""
    found = {}
    for line in filter(None, (line.strip() for line in patterns.splitlines())):
        try:
            found[line] = re.compile(line)
        except re.error as error:
            raise ValueError(f"skip_layers: {line!r} is not a regular expression ({error})") from error
    return found


def idle_patterns(names, patterns: str) -> list[str]:
    """A line for every one of `patterns` that matches no name: it was meant to."""
    return [
        f"skip_layers: {line!r} matches none of {len(names)} layers"
        for line, pattern in compiled(patterns).items()
        if not any(map(pattern.search, names))
    ]


class QuantizeDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DiTQuantQuantize",
            display_name="Quantize DiT",
            description="Rounds the model to 8 or 4 bits with the calibration. LoRAs on the input are merged first.",
            search_aliases=["quantize", "int8", "int4", "w8a8", "w4a8", "htg", "ptq", "low vram"],
            inputs=[
                io.Model.Input("model", tooltip="The model that was calibrated, with the same LoRAs."),
                CalibrationType.Input("calibration", optional=True, tooltip="Needed by every preset but rtn_*."),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, FIT],
                    default="W8A8",
                    tooltip="W8A8: best at half the size. fast: no rotation. static: fixed ranges. "
                    "W4A8: 0.3 of the size. htg_paper: as published. rtn_*: uncalibrated. "
                    "fit to size: 4, 8 or 16 bits per layer, by sensitivity.",
                ),
                io.Int.Input(
                    "group_size",
                    default=16,
                    min=16,
                    max=256,
                    step=16,
                    advanced=True,
                    tooltip="4-bit presets: weights that share a scale. 16: 4.5 bits per weight. 64: 4.1, less exact.",
                ),
                io.String.Input(
                    "skip_layers",
                    multiline=True,
                    default="",
                    advanced=True,
                    tooltip="Regular expressions, one per line: layers to keep in floating point.",
                ),
                io.Float.Input(
                    "size_gb",
                    default=8.0,
                    min=0.001,
                    max=1024.0,
                    step=0.001,
                    optional=True,
                    tooltip="Preset 'fit to size': what the saved model may take in all, in GB of 2^30 bytes.",
                ),
                io.Combo.Input(
                    "backend",
                    options=list(BACKEND_NAMES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Kernels that multiply the layers on this machine. auto: the fastest that can. "
                    "One that cannot is replaced, and the report says why. Not saved with the model.",
                ),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="report")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, preset, group_size, skip_layers, size_gb=8.0, calibration=None, backend="auto"
    ) -> io.NodeOutput:
        # a wrong name in the environment is told now, not after the work
        asked(backend)
        scheme = PRESETS["W8A8"].with_options(name=FIT) if preset == FIT else PRESETS[preset]
        size = int(size_gb * GB) if preset == FIT else None
        if scheme.weights.bits == 4:
            weights = scheme.weights.with_options(group_size=group_size)
            scheme = scheme.with_options(weights=weights)
        layers, _, _ = select(model)
        bar = comfy.utils.ProgressBar(len(layers), node_id=cls.hidden.unique_id)

        def progress(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        skipped = skip_matching(layers, skip_layers)
        result, report = quantize(model, scheme, calibration, skipped, progress, size, backend)
        plans, lines = plan_backends(result, backend)
        lines += idle_patterns(layers, skip_layers)
        text = with_backends(report, plans, lines).text()
        return io.NodeOutput(result, text, ui=ui.PreviewText(text))
