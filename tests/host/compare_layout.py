"""Run by the host's own interpreter in the host's folder: where a changed weight is worked into a layer, as JSON.

usage: python compare_layout.py PACK_ROOT
"""

import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(sys.argv[1])
sys.argv[1:] = ["--cpu"]
sys.path[0] = str(Path.cwd())

import comfy.options  # noqa: E402 - the host reads its arguments while it is imported

comfy.options.enable_args_parsing()

import torch  # noqa: E402

spec = importlib.util.spec_from_file_location("dit_quant", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
sys.modules["dit_quant"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
from dit_quant.nodes.host import layout  # noqa: E402
from dit_quant.quant_core.convert import quantize_weight  # noqa: E402
from dit_quant.quant_core.schemes import PRESETS  # noqa: E402
from dit_quant.quant_core.timesteps import SINGLE_GROUP  # noqa: E402


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
