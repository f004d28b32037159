"""Weights of a MODEL as its other nodes left them: LoRAs and merges applied, nothing rounded."""

from collections.abc import Callable

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from torch import Tensor

from ...quant_core.architectures import Family, select_layers
from ...quant_core.checkpoint import layer_tensors
from ...quant_core.fingerprint import settings_key, tensor_fingerprint
from ...quant_core.linear import QuantizedLinear
from ...quant_core.requantize import requantize
from .build import quantized_layers
from .detection import detection_hints
from .layout import is_ours, unwrap

PREFIX = "diffusion_model."


def base_weight(patcher: ModelPatcher, key: str):
    """(weight as loaded, function that makes it a float tensor), also while patches are applied in place."""
    weight, _, convert = get_key_weight(patcher.model, key)
    for backup, read in ((patcher.backup, lambda b: b.weight), (patcher.hook_backup, lambda b: b[0])):
        if key in backup:
            weight = read(backup[key])
    return weight, convert


def merged_weight(patcher: ModelPatcher, key: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
    """A parameter or buffer with every patch applied, on the CPU. dtype None keeps an unpatched tensor's own."""
    weight, convert = base_weight(patcher, key)
    patches = patcher.patches.get(key)
    if patches is None and dtype is None and convert is None:
        return weight.detach().cpu()
    device = torch.device("cpu") if patches is None else patcher.load_device
    value = comfy.model_management.cast_to_device(weight.detach(), device, None, copy=True)
    value = convert(value, inplace=True) if convert is not None else value
    if patches is not None:
        value = comfy.lora.calculate_weight(patches, value.float(), key, intermediate_dtype=torch.float32)
    return value.to(device="cpu", dtype=dtype if dtype is not None else value.dtype)


def linears(patcher: ModelPatcher) -> dict[str, torch.nn.Module]:
    """Every Linear of the diffusion model by name: the host's Linears need not derive from torch's.

    Raises ValueError where one multiplies its input by more than its weight."""
    found = {
        name: module
        for name, module in patcher.model.diffusion_model.named_modules()
        if hasattr(module, "comfy_cast_weights") and hasattr(module, "in_features") and hasattr(module, "weight")
    }
    for name, module in found.items():
        if getattr(module, "pre_quant_scale", None) is not None:
            raise ValueError(
                f"{name}: this checkpoint scales the layer's input (pre_quant_scale, ModelOpt AWQ), which its weight "
                "does not show; load the checkpoint in 16 bits that it was made from"
            )
    return found


def select(patcher: ModelPatcher) -> tuple[dict[str, torch.nn.Module], dict[str, str], Family | None]:
    """Linears to round, those to keep with the reason, and the family. Raises NotADiT."""
    found = linears(patcher)
    features = {name: (module.out_features, module.in_features) for name, module in found.items()}
    parameters = [name for name, _ in patcher.model.diffusion_model.named_parameters()]
    chosen, kept, family = select_layers(features, parameters)
    return {name: found[name] for name in chosen}, kept, family


def weight_loaders(patcher: ModelPatcher, names) -> dict[str, Callable[[], Tensor]]:
    """Layer name -> function that merges its weight, so that one is in memory at a time.

    Raises ValueError for weights that another loader has packed: the host cannot unpack those."""
    for name in names:
        module = patcher.model.diffusion_model.get_submodule(name)
        stored = tuple(base_weight(patcher, f"{PREFIX}{name}.weight")[0].size())
        if stored != (module.out_features, module.in_features):
            raise ValueError(
                f"{name}: its weight is stored as {list(stored)}, not [{module.out_features}, {module.in_features}]: "
                "another loader has packed it (GGUF, NF4); load the model's safetensors file with Load Diffusion Model"
            )
    return {name: (lambda key=f"{PREFIX}{name}.weight": merged_weight(patcher, key)) for name in names}


def fingerprints(patcher: ModelPatcher, names) -> dict[str, str]:
    """Identity of every layer's merged weight."""
    return {name: tensor_fingerprint(load()) for name, load in weight_loaders(patcher, names).items()}


def rest_fingerprint(patcher: ModelPatcher, layers) -> str:
    """Identity of everything in the diffusion model but the weights of `layers`: it decides what these see."""
    skip = {f"{name}.weight" for name in layers}
    found = {}
    for name, _ in patcher.model.diffusion_model.named_parameters():
        if name not in skip:
            key = f"{PREFIX}{name}"
            weight, convert = base_weight(patcher, key)
            if key in patcher.patches or convert is not None:
                weight = merged_weight(patcher, key)
            found[name] = tensor_fingerprint(weight.detach())
    return settings_key(found)


def whole_fingerprint(patcher: ModelPatcher) -> str:
    """Identity of the diffusion model, quantized or not, with its patches: it decides what it samples."""
    quantized = quantized_layers(patcher.model.diffusion_model)
    described = {name: quantized_fingerprint(quantized_layer(patcher, name)) for name in quantized}
    floats = [name for name in select(patcher)[0] if name not in described]
    return settings_key(described, fingerprints(patcher, floats), rest_fingerprint(patcher, [*described, *floats]))


def quantized_fingerprint(layer: QuantizedLinear) -> str:
    tensors = {field: tensor_fingerprint(tensor) for field, tensor in layer.tensors().items()}
    return settings_key(tensors, layer.hadamard, layer.symmetric, repr(layer.groups))


def float_state(patcher: ModelPatcher, without: set[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every other tensor of the diffusion model, patches applied. `without`: layers whose weight is left out."""
    model = patcher.model.diffusion_model
    skip = {f"{name}.weight" for name in without}
    buffers = {name for name, _ in model.named_buffers()} & set(model.state_dict())
    names = [*(name for name, _ in model.named_parameters()), *sorted(buffers)]
    state = {}
    for name in names:
        if name not in skip:
            value = merged_weight(patcher, f"{PREFIX}{name}", None)
            state[name] = value.to(dtype) if value.is_floating_point() else value
    return state | detection_hints(patcher)


def smallest_exact(tensor: torch.Tensor) -> torch.Tensor:
    """fp32 stored as bf16 or fp16 where that loses nothing: a bf16 checkpoint run in fp32 keeps its size."""
    if tensor.dtype is not torch.float32:
        return tensor
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(dtype).float(), tensor):
            return tensor.to(dtype)
    return tensor


def quantized_layer(patcher: ModelPatcher, name: str) -> QuantizedLinear:
    """A quantized layer of a MODEL on the CPU, with the LoRAs applied after quantization worked in."""
    key = f"{PREFIX}{name}.weight"
    weight, _ = base_weight(patcher, key)
    layer = unwrap(weight).map(lambda tensor: tensor.cpu())
    if key in patcher.patches:
        layer = requantize(merged_weight(patcher, key), layer, seed=rounding_seed(patcher, key))
    return layer


def quantized_state(patcher: ModelPatcher) -> dict[str, QuantizedLinear]:
    """All of them by name."""
    return {name: quantized_layer(patcher, name) for name in quantized_layers(patcher.model.diffusion_model)}


def rounding_seed(patcher: ModelPatcher, key: str) -> int:
    """What the host gives to the rounding of a patched weight as it loads: by dynamic VRAM, by the layer's name."""
    return comfy.utils.string_to_seed(key.removesuffix(".weight") if patcher.is_dynamic() else key)


def is_quantized(patcher: ModelPatcher) -> bool:
    return any(is_ours(p) for p in patcher.model.diffusion_model.parameters())


def full_state(layers: dict[str, QuantizedLinear], floats: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantized layers and the rest as one state dict in the host's key names."""
    state = dict(floats)
    for name, layer in layers.items():
        state.update(layer_tensors(name, layer))
    return state
