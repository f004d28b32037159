"""Short identities of weights and settings, for caches and for refusing foreign calibrations."""

import hashlib
import json
from math import gcd

import torch
from torch import Tensor

SAMPLES = 4096


def tensor_fingerprint(tensor: Tensor) -> str:
    """Identity of a weight: its shape and SAMPLES evenly spaced values, rounded to bf16.

    Any change that touches the whole weight (training, a LoRA, a merge) shows; a single altered element may not.
    bf16, so that a checkpoint stored in 16 bits keeps its identity when it is loaded in bf16 or fp32. An fp32
    checkpoint loaded in fp16 is rounded twice and counts as another weight.
    """
    flat = tensor.detach().reshape(-1)
    step, width = max(1, flat.numel() // SAMPLES), tensor.shape[-1] if tensor.ndim else 1
    # every column has its turn
    while gcd(step, width) > 1:
        step += 1
    values = flat[::step].to(torch.bfloat16).view(torch.int16).cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(tensor.shape)}|".encode())
    digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def settings_key(*parts: object) -> str:
    """sha256 over JSON-able parts, order of dictionary keys aside."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
