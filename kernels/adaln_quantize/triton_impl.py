"""adaln_quantize in one kernel: one read of x, one write of the codes."""

import torch
from torch import Tensor

from ..quantize_rows import launch
from ..quantize_rows import refusal as rows_refusal
from .reference import tokens_per_sample

__all__ = ["adaln_quantize", "refusal"]

# the norm needs the whole row at once, and up to here fp32 rows with every table have a tile
WIDEST = 12288


def refusal(
    device: torch.device,
    *,
    K: int,
    N: int | None = None,
    group_size: int | None = None,
    hadamard: int = 1,
    dtype: torch.dtype = torch.float32,
) -> str | None:
    """Why this implementation cannot take it, or None."""
    if K > WIDEST:
        return f"K={K} > {WIDEST}: the norm needs the whole row at once"
    return rows_refusal(device, K=K, N=N, group_size=group_size, hadamard=hadamard, dtype=dtype)


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
    """As the reference, but for the order in which the mean and the variance are summed; rows of x may lie apart."""
    x = x.reshape(-1, x.shape[-1])
    if x.shape[1] > WIDEST:
        raise ValueError(f"K={x.shape[1]} > {WIDEST}: the norm needs the whole row at once; use the reference")
    if kind not in ("layer", "rms"):
        raise ValueError(f"norm {kind!r} is not known; use 'layer' or 'rms'")
    tokens = {tokens_per_sample(table, len(x)) for table in (modulation_scale, modulation_shift) if table is not None}
    if len(tokens) > 1:
        raise ValueError(f"modulation scale and shift serve {sorted(tokens)} rows each; give both the same [B, K]")
    return launch(
        x,
        prologue=kind,
        weight=weight,
        bias=bias,
        gamma=modulation_scale,
        beta=modulation_shift,
        tokens=max(tokens, default=1),
        eps=eps,
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )
