"""What the host reads a model's architecture off, where that is more than the weights that the model keeps."""

import json

import comfy.model_detection
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

# entries of the host's configuration that say how a model is computed, not what it is
NOT_ARCHITECTURE = frozenset(("dtype", "device", "disable_unet_model_creation"))


def detection_hints(patcher: ModelPatcher) -> dict[str, Tensor]:
    """Tensors that no layer keeps but whose shape the host looks at.

    PixArt: the side of the position table sets the scale of all positions; without it the picture is another one.
    """
    config = patcher.model.model_config.unet_config
    if str(config.get("image_model", "")).startswith("pixart") and "input_size" in config:
        side = config["input_size"] // config["patch_size"]
        return {"pos_embed": torch.zeros(1, side * side, 1, dtype=torch.float16)}
    return {}


def detection_metadata(patcher: ModelPatcher, state: dict[str, Tensor]) -> dict[str, str]:
    """File metadata that makes the host find this MODEL's architecture in `state`; empty where the tensors tell all.

    LTX and others read a part of their configuration from the header of the original file.
    """
    config = patcher.model.model_config
    wanted = architecture(config.unet_config)
    found = comfy.model_detection.detect_unet_config(state, "")
    if found is None or architecture({**found, **config.unet_extra_config}) == wanted:
        return {}
    return {"config": json.dumps({"transformer": wanted})}


def architecture(config: dict) -> dict:
    """The part of a host configuration that says what the model is, as JSON would give it back."""
    kept = {key: value for key, value in config.items() if key not in NOT_ARCHITECTURE}
    return json.loads(json.dumps(kept, default=str))


def difference(source: ModelPatcher, built: ModelPatcher) -> str:
    """What the host took differently about `built`, as "key=was instead of wanted"; empty for the same model."""
    if type(built.model) is not type(source.model):
        return f"class {type(built.model).__name__} instead of {type(source.model).__name__}"
    was, became = (architecture(patcher.model.model_config.unet_config) for patcher in (source, built))
    keys = sorted(key for key in {*was, *became} if was.get(key) != became.get(key))
    return ", ".join(f"{key}={became.get(key)} instead of {was.get(key)}" for key in keys)
