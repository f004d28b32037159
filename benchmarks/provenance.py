"""What a result was made with."""

import platform
from importlib import metadata

import torch


def provenance(*packages: str) -> dict[str, dict]:
    """Versions of torch, numpy, this pack and `packages`, and the machine, as results hold them."""
    names = ("torch", "numpy", *packages, "dit-quant")
    return {
        "versions": {name: metadata.version(name) for name in names},
        "machine": {"processor": platform.processor() or platform.machine(), "torch_threads": torch.get_num_threads()},
    }
