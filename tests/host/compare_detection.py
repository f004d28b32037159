"""Run by the host's own interpreter: models whose architecture the host reads off more than their weights, as JSON.

usage: python compare_detection.py PACK_ROOT FOLDER
"""

import json
from pathlib import Path

from in_host import ARGUMENTS

# isort: split
import comfy.ops
import comfy.sd
import torch
from dit_quant.nodes import files
from dit_quant.nodes.host import quantized, weights
from dit_quant.nodes.host.detection import difference
from dit_quant.quant_core.files import write_tensors
from dit_quant.quant_core.metrics import relative_l2
from dit_quant.quant_core.schemes import PRESETS

(FOLDER,) = map(Path, ARGUMENTS)
KINDS = {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32, "device": "cpu"}


def pixart():
    """The side of its position table is written in no layer."""
    from comfy.ldm.pixart.pixartms import PixArtMS

    model = PixArtMS(depth=1, micro_condition=False, model_max_length=20, **KINDS)
    return random_state(model) | {"pos_embed": torch.zeros(1, 64 * 64, 1152)}, None, (4, 64, 64), 4096


def ltxv():
    """Half of its configuration stands in the header of the file."""
    from comfy.ldm.lightricks.model import LTXVModel

    named = {"positional_embedding_theta": 5000.0, "positional_embedding_max_pos": [16, 1024, 1024]}
    model = LTXVModel(
        num_layers=1, attention_head_dim=4, cross_attention_dim=128, num_attention_heads=32, **named, **KINDS
    )
    return random_state(model), {"config": json.dumps({"transformer": named})}, (128, 2, 4, 4), 4096


def random_state(model) -> dict:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in model.state_dict().items():
        scale = 0.5 * value[0].numel() ** -0.5 if value.dim() > 1 else 0.02
        state[key] = scale * torch.randn(value.shape, generator=generator) + (value.dim() == 1 and "norm" in key)
    return state


def velocity(patcher, shape, width) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, *shape, generator=generator)
    context = torch.randn(1, 20, width, generator=generator)
    extra = {"attention_mask": None, "frame_rate": 25} if len(shape) == 4 else {}
    return patcher.model.diffusion_model(x, torch.tensor([300.0]), context, **extra)


def compare(name: str, make) -> dict:
    state, metadata, shape, width = make()
    source = comfy.sd.load_diffusion_model_state_dict(dict(state), {"dtype": torch.float32}, metadata=metadata)
    built, _ = quantized.quantize(source, PRESETS["rtn_w8a8"], None, {}, lambda *_: None)
    layers = weights.quantized_state(built)
    kept = weights.full_state(layers, weights.float_state(built, set(layers), torch.float32))
    path = FOLDER / f"{name}.safetensors"
    header = {files.METADATA: json.dumps({"version": files.VERSION})} | files.detection_metadata(built, kept)
    write_tensors(path, kept, header)
    loaded = files.load_quantized(path)
    expected = velocity(source, shape, width)
    result = {
        "loaded": difference(source, loaded),
        "error": relative_l2(velocity(built, shape, width), expected),
        "error_loaded": relative_l2(velocity(loaded, shape, width), expected),
    }
    weights.detection_hints = lambda patcher: {}
    quantized.detection_metadata = lambda patcher, state: {}
    try:
        quantized.quantize(source, PRESETS["rtn_w8a8"], None, {}, lambda *_: None)
    except quantized.CannotQuantize as error:
        result["unhinted"] = str(error)
    return result


@torch.inference_mode()
def main() -> None:
    hints, metadata = weights.detection_hints, quantized.detection_metadata
    found = {}
    for name, make in (("pixart", pixart), ("ltxv", ltxv)):
        weights.detection_hints, quantized.detection_metadata = hints, metadata
        found[name] = compare(name, make)
    print(json.dumps(found))


main()
