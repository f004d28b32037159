"""adaln_quantize in torch ops, with torch's own norms."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantize_activation.torch_impl import refusal
from ..quantize_blocks import quantize_blocks
from .reference import tokens_per_sample

__all__ = ["adaln_quantize", "refusal"]


def adaln_quantize(
    x: Tensor,
    *,
    kind: str = "layer",
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    modulation_scale: Tensor | None = None,
    modulation_shift: Tensor | None = None,
    index: Tensor,
    fraction: Tensor,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    hadamard: int = 1,
    symmetric: bool = True,
    static_scale: Tensor | None = None,
    static_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the reference, but for the order in which the mean and the variance are summed."""
    if kind not in ("layer", "rms"):
        raise ValueError(f"norm {kind!r} is not known; use 'layer' or 'rms'")
    x = x.reshape(-1, x.shape[-1])
    shape, weight, bias = x.shape[1:], as_float(weight), as_float(bias)

    def prologue(rows: slice) -> Tensor:
        if kind == "layer":
            y = F.layer_norm(x[rows].float(), shape, weight, bias, eps)
        else:
            y = F.rms_norm(x[rows].float(), shape, weight, eps)
            if bias is not None:
                y += bias
        if modulation_scale is not None:
            y *= 1 + modulation_of(modulation_scale, rows, len(x))
        if modulation_shift is not None:
            y += modulation_of(modulation_shift, rows, len(x))
        return y

    return quantize_blocks(
        prologue,
        x.shape,
        x.device,
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )


def as_float(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.float()


def modulation_of(table: Tensor, rows: slice, M: int) -> Tensor:
    """table [B, K] -> fp32 [m, K] of the m `rows` out of M, or [1, K] where they belong to one sample."""
    tokens = tokens_per_sample(table, M)
    first, last = rows.start // tokens, (rows.stop - 1) // tokens
    if first < last:
        table = table[torch.arange(rows.start, rows.stop, device=table.device) // tokens]
    else:
        table = table[first : first + 1]
    return table.float()
