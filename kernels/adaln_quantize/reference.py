"""Norm, modulate, quantize: the input of the linears behind an adaptive norm (DiT, arXiv 2212.09748).

The definition of the op.
"""

from torch import Tensor

from ..quantize_activation.reference import quantize_activation


def adaln(
    x: Tensor,
    kind: str,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    modulation_scale: Tensor | None,
    modulation_shift: Tensor | None,
) -> Tensor:
    """x [M, K] -> norm(x) (1 + modulation_scale) + modulation_shift [M, K] fp32; modulation [B, K], M / B rows each."""
    if kind not in ("layer", "rms"):
        raise ValueError(f"norm {kind!r} is not known; use 'layer' or 'rms'")
    x = x.float()
    centred = x - x.mean(dim=-1, keepdim=True) if kind == "layer" else x
    y = centred * (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt().reciprocal()
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    if modulation_scale is not None:
        y = y * (1 + per_row(modulation_scale, len(x)))
    if modulation_shift is not None:
        y = y + per_row(modulation_shift, len(x))
    return y


def per_row(modulation: Tensor, M: int) -> Tensor:
    """[B, K] -> [M, K] fp32, every sample's row for its M / B tokens."""
    return modulation.float().repeat_interleave(tokens_per_sample(modulation, M), dim=0)


def tokens_per_sample(modulation: Tensor, M: int) -> int:
    B = len(modulation)
    if B == M == 0:
        return 0
    if B == 0 or M % B:
        raise ValueError(f"{M} rows are not divisible by the {B} rows of the modulation; pass [1, K] or [B, K]")
    return M // B


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
    """x [M, K] or [B, L, K] float -> codes [M, K] (M = B L), scale, zero, as `quantize_activation` has them.

    kind "layer" or "rms"; weight, bias [K] of the norm; modulation_scale, modulation_shift [B, K]. The modulated row
    stays in fp32: a block that runs op by op would round it to the dtype of x before quantizing.
    """
    x = x.reshape(-1, x.shape[-1])
    return quantize_activation(
        adaln(x, kind, eps, weight, bias, modulation_scale, modulation_shift),
        index=index,
        fraction=fraction,
        shift=shift,
        smooth=smooth,
        hadamard=hadamard,
        symmetric=symmetric,
        static_scale=static_scale,
        static_zero=static_zero,
    )
