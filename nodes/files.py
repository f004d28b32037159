"""Save and load quantized models."""

import json
from pathlib import Path

import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..kernels.dispatch import cannot_launch
from ..quant_core.checkpoint import CONFIG_KEY, VERSION
from ..quant_core.files import DamagedFile, read_header, write_tensors
from ..quant_core.report import warnings_first
from .host.attached import not_in_a_file, refuse_bypass
from .host.backends import plan_backends
from .host.build import absent_from, build_model, quantized_names
from .host.detection import detection_metadata
from .host.paths import output_file
from .host.weights import float_state, full_state, is_quantized, quantized_state, smallest_exact
from .schema import schema

METADATA = "dit_quant"


class SaveQuantizedDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DiTQuantSave",
            display_name="Save Quantized DiT",
            description="Writes the quantized model; Load Quantized DiT needs no calibration.",
            search_aliases=["save model", "export", "quantize", "int8"],
            inputs=[
                io.Model.Input("model", tooltip="From Quantize DiT; LoRAs added after it are worked in."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/quantized_dit",
                    tooltip="Below the output folder. Load Quantized DiT lists what is in diffusion_models there.",
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename_prefix) -> io.NodeOutput:
        if not is_quantized(model):
            raise ValueError("the model is not quantized: connect the output of Quantize DiT")
        refuse_bypass(model)
        layers = quantized_state(model)
        floats = float_state(model, set(layers), model.model.get_dtype())
        state = full_state(layers, {name: smallest_exact(value) for name, value in floats.items()})
        metadata: dict[str, str] = {}
        if not args.disable_metadata:
            metadata |= {key: json.dumps(value) for key, value in (cls.hidden.extra_pnginfo or {}).items()}
            if cls.hidden.prompt is not None:
                metadata["prompt"] = json.dumps(cls.hidden.prompt)
        # behind what a client may have named alike
        metadata |= detection_metadata(model, state)
        metadata[METADATA] = json.dumps({"version": VERSION, "layers": len(layers)})
        path, left_out = output_file(filename_prefix), not_in_a_file(model)
        write_tensors(path, state, metadata)
        text = f"{path} ({path.stat().st_size / 2**20:.1f} MB)"
        if left_out:
            text += f"\nnot in the file, to be connected again behind Load Quantized DiT: {', '.join(left_out)}"
        return io.NodeOutput(str(path), ui=ui.PreviewText(text))


def load_quantized(path: Path, disable_dynamic: bool = False):
    """File -> MODEL. Raises DamagedFile for anything that is not one of our files, before the host sees it."""
    header = read_header(path)
    metadata = header.get("__metadata__") or {}
    if METADATA not in metadata:
        if any(key.endswith(f".{CONFIG_KEY}") for key in header) and any(".weight_shift" in key for key in header):
            raise DamagedFile(
                f"{path.name}: another node wrote this quantized model, without what loading it needs; save it again "
                "with Save Quantized DiT"
            )
        raise DamagedFile(f"{path.name}: not a quantized DiT of this pack; use Load Diffusion Model and Quantize DiT")
    try:
        described = dict(json.loads(metadata[METADATA]))
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{path.name}: its {METADATA} entry is not a JSON object; the file is damaged") from error
    version = described.get("version")
    if version != VERSION:
        older = isinstance(version, int) and version < VERSION
        remedy = "quantize the model again with this pack" if older else "update the pack"
        raise DamagedFile(f"{path.name}: format version {version}, this pack reads {VERSION}; {remedy}")
    try:
        state = comfy.utils.load_torch_file(str(path), safe_load=True)
    except Exception as error:
        raise DamagedFile(f"{path.name}: {error}") from error
    found = len(quantized_names(state))
    if not found or found != described.get("layers", found):
        raise DamagedFile(
            f"{path.name}: {found} quantized layers of {described.get('layers', 'some')} are there: the file is damaged"
        )
    for key, value in state.items():
        # of the tables of quantized layers more is asked, one by one
        if value.is_floating_point() and bool(torch.isnan(value.float() if value.element_size() == 1 else value).any()):
            raise DamagedFile(f"{path.name}: {key} holds NaN: the file is damaged")
    try:
        patcher = build_model(state, metadata, disable_dynamic=disable_dynamic)
    except DamagedFile as error:
        raise DamagedFile(f"{path.name}: {error}") from error
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError) as error:
        # a lack of memory says nothing about the file
        if not cannot_launch(error):
            raise
        raise DamagedFile(f"{path.name}: the host cannot read it ({type(error).__name__}: {error})") from error
    if absent := absent_from(patcher, state):
        raise DamagedFile(f"{path.name}: {len(absent)} tensors are missing, such as {absent[0]}: the file is damaged")
    # copies of the model read the file again: nothing of it is kept in memory for them
    patcher.cached_patcher_init = (load_quantized, (path,))
    return patcher


class LoadQuantizedDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DiTQuantLoad",
            display_name="Load Quantized DiT",
            description="Loads a model written by Save Quantized DiT.",
            search_aliases=["load model", "unet loader", "quantize", "int8", "int4"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A file in models/diffusion_models or output/diffusion_models.",
                )
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="report")],
        )

    @classmethod
    def fingerprint_inputs(cls, file):
        path = folder_paths.get_full_path("diffusion_models", file)
        stat = Path(path).stat() if path else None
        return (file, stat.st_mtime_ns, stat.st_size) if stat else file

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        model = load_quantized(Path(folder_paths.get_full_path_or_raise("diffusion_models", file)))
        plans, lines = plan_backends(model)
        text = "\n".join([f"{len(plans)} quantized layers", *warnings_first(lines)])
        return io.NodeOutput(model, text, ui=ui.PreviewText(text))
