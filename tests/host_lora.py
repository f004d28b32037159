"""LoRA files for the hosts of tests."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 4


def write_lora(path: Path, layers: Mapping[str, tuple[int, int]], size: float) -> None:
    """A random LoRA, always the same, on Linears of shape (N, K) by name; size: of the factors' entries."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (N, K) in layers.items():
        tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(N, RANK, generator=generator) * size
        tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(RANK, K, generator=generator) * size
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(float(RANK))
    save_file(tensors, path)
