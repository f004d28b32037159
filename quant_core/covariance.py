"""The Hessian of a layer's rounding error: second moment of the activations that the codes multiply."""

import torch
from torch import Tensor

from ..kernels.numerics import rotate
from .observers import LayerStatistics


def rounding_hessian(
    statistics: LayerStatistics, rows: list[list[int]], shift: Tensor | None, scale: Tensor | None, hadamard: int
) -> Tensor | None:
    """E[x̃ x̃ᵀ] for x̃ = ((x - z_g) / s) H, in diagonal blocks [B, b, b] float64; None without a second moment.

    With z_g the group mean this is the pooled within-group covariance. From the raw moment S and the
    means m_t: sum_t p_t (m_t zᵀ + z m_tᵀ - z zᵀ) is taken off, p_t the share of tokens at timestep t.
    """
    if statistics.second_moment is None:
        return None
    H = statistics.second_moment.double()
    width = H.shape[1]
    if shift is not None:
        share = statistics.count.double() / statistics.count.double().sum()
        for g, members in enumerate(rows):
            z = shift[g].double().unflatten(0, (-1, width))  # [B, b]
            for t in members:
                mean = statistics.mean[t].double().unflatten(0, (-1, width))
                cross = torch.einsum("bi,bj->bij", mean, z)
                H = H - share[t] * (cross + cross.transpose(1, 2) - torch.einsum("bi,bj->bij", z, z))
    H = rotated(scaled(H, scale), hadamard)
    return (H + H.transpose(1, 2)) / 2


def scaled(H: Tensor, scale: Tensor | None) -> Tensor:
    """E[(x / s) (x / s)ᵀ] from E[x xᵀ], both in diagonal blocks [B, b, b]; s [K]."""
    if scale is None:
        return H
    s = scale.double().unflatten(0, (-1, H.shape[1]))
    return H / (s[:, :, None] * s[:, None, :])


def rotated(H: Tensor, hadamard: int) -> Tensor:
    """E[x̃ x̃ᵀ] for x̃ rotated in Hadamard blocks. Raises ValueError where a block of H holds no whole number of them."""
    if hadamard == 1:
        return H
    if H.shape[1] % hadamard:
        raise ValueError(f"covariance blocks of {H.shape[1]} do not hold whole Hadamard blocks of {hadamard}")
    return rotate(rotate(H, hadamard).transpose(1, 2), hadamard)
