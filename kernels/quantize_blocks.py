"""A prologue and the quantizer in torch ops, a block of rows after the other: the whole is never there in fp32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .quantize_activation import torch_impl


@torch.no_grad()
def quantize_blocks(
    prologue: Callable[[slice], Tensor], shape: tuple[int, ...], device: torch.device, **quantizer: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """shape: (M, K); prologue: rows -> [m, K] fp32; quantizer: keywords of `quantize_activation`. Its results."""
    M, K = shape
    size = torch_impl.CPU_BLOCK if device.type == "cpu" else torch_impl.DEVICE_BLOCK
    block = max(1, size // max(K, 1))
    parts = [
        torch_impl.quantize_activation(prologue(slice(start, min(start + block, M))), **quantizer)
        for start in range(0, M, block)
    ]
    if len(parts) == 1:
        return parts[0]
    codes, scales, zeros = zip(*parts, strict=True)
    if quantizer["static_scale"] is not None:
        return torch.cat(codes), scales[0][:1].expand(M, 1), None if zeros[0] is None else zeros[0][:1].expand(M, 1)
    return torch.cat(codes), torch.cat(scales), None if zeros[0] is None else torch.cat(zeros)
