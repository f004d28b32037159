"""Quantized layers on disk: the host's key names, our tables beside them, a JSON per layer."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from .files import DamagedFile
from .linear import TENSOR_FIELDS, QuantizedLinear
from .schemes import HADAMARD_ORDERS, MOST_DIRECTIONS
from .timesteps import TimestepGroups

FORMAT_PREFIX = "dit_quant_"
VERSION = 2
CONFIG_KEY = "comfy_quant"
# :{"dtype":"BF16","shape":[262144,262144],"data_offsets":[1099511627776,1099511627776]},
HEADER_ENTRY = 88
POSITIVE = ("scale", "smooth", "static_scale")
# field -> suffix after the layer's name
SUFFIXES = {name: "weight" if name == "qdata" else f"weight_{name}" for name in TENSOR_FIELDS}


def layer_config(w: QuantizedLinear) -> dict:
    """What the tensors do not say. A stock loader stops at the unknown format instead of reading codes as floats."""
    return {
        "format": f"{FORMAT_PREFIX}w{w.bits}a8",
        "version": VERSION,
        "hadamard": w.hadamard,
        "symmetric": w.symmetric,
        "groups": w.groups.to_json(),
        "tensors": list(w.tensors()),
    }


def layer_tensors(name: str, w: QuantizedLinear) -> dict[str, Tensor]:
    """`name.weight` (codes), `name.weight_*` (tables) and `name.comfy_quant` (JSON as uint8)."""
    tensors = {f"{name}.{SUFFIXES[field]}": value for field, value in w.tensors().items()}
    text = json.dumps(layer_config(w), separators=(",", ":")).encode()
    tensors[f"{name}.{CONFIG_KEY}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors


def extra_bytes(name: str, w: QuantizedLinear) -> int:
    """What a layer takes in a file beside its tensors: its JSON, and at most this much of the header."""
    tensors = layer_tensors(name, w)
    return tensors[f"{name}.{CONFIG_KEY}"].nbytes + sum(header_bytes(key) for key in tensors)


def header_bytes(key: str) -> int:
    """The most that a tensor's entry in a safetensors header takes: name, dtype, shape and two offsets."""
    return len(json.dumps(key)) + HEADER_ENTRY


def is_ours(config: Tensor) -> bool:
    """Whether a `comfy_quant` tensor names one of our formats."""
    try:
        return str(parse_config("", config).get("format", "")).startswith(FORMAT_PREFIX)
    except DamagedFile:
        return False


def parse_config(name: str, config: Tensor) -> dict:
    """The layer's JSON. Raises DamagedFile when it is not JSON."""
    try:
        data = json.loads(config.cpu().numpy().tobytes())
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{name}: its {CONFIG_KEY} entry is not JSON") from error
    if not isinstance(data, dict):
        raise DamagedFile(f"{name}: its {CONFIG_KEY} entry is not a JSON object")
    return data


def layer_from_tensors(name: str, tensors: Mapping[str, Tensor], features: tuple[int, int]) -> QuantizedLinear:
    """The inverse of `layer_tensors`, checked against the model's (N, K).

    Raises DamagedFile naming the layer and tensor that do not fit, or the unknown version.
    """
    if f"{name}.{CONFIG_KEY}" not in tensors:
        raise DamagedFile(f"{name}: tensor {name}.{CONFIG_KEY} is missing")
    config = parse_config(name, tensors[f"{name}.{CONFIG_KEY}"])
    if config.get("version") != VERSION:
        raise DamagedFile(
            f"{name}: format version {config.get('version')}, this pack reads {VERSION}; "
            "quantize the model again with this pack, or update the pack if the file is newer"
        )
    try:
        groups = TimestepGroups.from_json(config["groups"])
        hadamard, symmetric = config["hadamard"], config["symmetric"]
        if type(hadamard) is not int or type(symmetric) is not bool:
            raise ValueError(f"hadamard {hadamard!r}, symmetric {symmetric!r}")
        suffixes = {field: SUFFIXES[field] for field in ("qdata", "scale", *config["tensors"])}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedFile(f"{name}: its {CONFIG_KEY} entry is incomplete or wrong ({error})") from error
    # a table that got lost would otherwise mean a scheme without it, and a wrong picture
    for suffix in suffixes.values():
        if f"{name}.{suffix}" not in tensors:
            raise DamagedFile(f"{name}: tensor {name}.{suffix} is missing")
    for field, suffix in SUFFIXES.items():
        if f"{name}.{suffix}" in tensors and field not in suffixes:
            raise DamagedFile(f"{name}: its {CONFIG_KEY} entry does not name the tensor {name}.{suffix}")
    fields = {field: tensors[f"{name}.{suffix}"] for field, suffix in suffixes.items()}
    w = QuantizedLinear(**fields, hadamard=hadamard, symmetric=symmetric, groups=groups)  # type: ignore[arg-type]
    check_layer(name, w, features, str(config.get("format")))
    return w


def check_layer(name: str, w: QuantizedLinear, features: tuple[int, int], declared: str) -> None:
    """Shapes, dtypes and values of every tensor. Raises DamagedFile naming the first that is wrong."""
    if declared != f"{FORMAT_PREFIX}w{w.bits}a8":
        raise DamagedFile(f"{name}: declared {declared}, but its tensors are of W{w.bits}A8")
    N, K = features
    T, R = len(w.groups), direction_count(name, w)
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "qdata": ((N, K) if w.bits == 8 else (N, K // 2), (torch.int8,) if w.bits == 8 else (torch.uint8,)),
        "scale": ((N, 1), (torch.float32,)),
        "column_sum": ((N,), (torch.int32,)),
        "smooth": ((K,), (torch.float16, torch.float32)),
        "shift": ((T, K), (torch.float16, torch.float32)),
        "correction": ((T, N), (torch.float16, torch.float32)),
        "directions": ((R, K), (torch.float16,)),
        "responses": ((R, N), (torch.float16,)),
        "static_scale": ((T,), (torch.float32,)),
        "static_zero": ((T,), (torch.float32,)),
    }
    if w.levels is not None:
        G = w.levels.shape[1] if w.levels.ndim == 2 else 0
        if G == 0 or K % G:
            raise DamagedFile(f"{name}.{SUFFIXES['levels']}: {G} weight groups do not divide K={K}")
        if K % 2:
            raise DamagedFile(f"{name}: K={K} is odd, 4-bit codes are stored in pairs")
        expected["levels"] = ((N, G), (torch.uint8,))
    for field, tensor in w.tensors().items():
        shape, dtypes = expected[field]
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise DamagedFile(
                f"{name}.{SUFFIXES[field]}: {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtypes[0]}"
            )
        check_values(f"{name}.{SUFFIXES[field]}", field, tensor)
    if w.hadamard not in HADAMARD_ORDERS or K % w.hadamard:
        raise DamagedFile(f"{name}: Hadamard blocks of {w.hadamard} do not fit K={K}")
    if w.column_sum is None and (w.static_zero is not None or not w.symmetric):
        raise DamagedFile(f"{name}: asymmetric activations need {name}.{SUFFIXES['column_sum']}")
    if w.static_zero is not None and w.static_scale is None:
        raise DamagedFile(f"{name}: fixed zero points need {name}.{SUFFIXES['static_scale']}")
    if w.static_scale is not None and w.directions is not None:
        raise DamagedFile(f"{name}: fixed ranges and directions do not go together; the file is damaged")
    if w.static_scale is not None and w.static_zero is None and not w.symmetric:
        raise DamagedFile(f"{name}: asymmetric fixed ranges need {name}.{SUFFIXES['static_zero']}")
    if w.shift is not None and w.correction is None:
        raise DamagedFile(f"{name}: a shift needs its correction {name}.{SUFFIXES['correction']}")


def check_values(key: str, field: str, tensor: Tensor) -> None:
    """Raises DamagedFile for numbers that no quantized layer has: a picture made with them is wrong."""
    if field == "levels" and not bool((tensor >= 16).all()):
        raise DamagedFile(f"{key}: a weight group has multiplier 0; the file is damaged")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise DamagedFile(f"{key}: holds NaN or infinity; the file is damaged")
    # smaller ones have no finite reciprocal; in fp16 the bound itself would be 0
    if field in POSITIVE and not bool((tensor.float() >= torch.finfo(torch.float32).tiny).all()):
        raise DamagedFile(f"{key}: holds {float(tensor.min()):g}, but scales are positive; the file is damaged")


def direction_count(name: str, w: QuantizedLinear) -> int:
    """R. Raises DamagedFile where directions and responses are not of one another."""
    tables = w.directions, w.responses
    counts = {0 if table is None or table.ndim != 2 else table.shape[0] for table in tables}
    if len(counts) > 1 or (counts == {0} and tables != (None, None)) or max(counts) > MOST_DIRECTIONS:
        keys = " and ".join(f"{name}.{SUFFIXES[field]}" for field in ("directions", "responses"))
        raise DamagedFile(f"{keys} do not hold the same number of rows, at most {MOST_DIRECTIONS}")
    return counts.pop()
