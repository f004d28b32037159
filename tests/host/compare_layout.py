"""Run by the host's own interpreter in the host's folder: where a changed weight is worked into a layer, as JSON.

usage: python compare_layout.py PACK_ROOT
"""

import json

import in_host  # noqa: F401 - its work is done by importing it

# isort: split
import torch
from dit_quant.nodes.host import layout
from dit_quant.quant_core.convert import quantize_weight
from dit_quant.quant_core.schemes import PRESETS
from dit_quant.quant_core.timesteps import SINGLE_GROUP


def devices(preset: str) -> dict[str, list[str]]:
    """Of the tables that a weight on another device is worked into, and of those that come back."""
    layer, _ = quantize_weight("layer", torch.randn(32, 64), PRESETS[preset], SINGLE_GROUP, None)
    seen: set[str] = set()

    def requantize(weight, like, seed):
        seen.update(str(table.device) for table in (weight, *like.tensors().values()))
        return like

    layout.requantize = requantize
    weight = torch.zeros(32, 64, device="meta")
    changed = layout.wrap(layer, torch.bfloat16).requantize_from_float(
        weight, scale="recalculate", stochastic_rounding=3
    )
    back = layout.unwrap(changed).tensors().values()
    return {"worked on": sorted(seen), "back": sorted({str(table.device) for table in back})}


print(json.dumps({preset: devices(preset) for preset in ("rtn_w8a8", "rtn_w4a8")}))
