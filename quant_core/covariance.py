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
        z = shift.double()
        mean = torch.stack([share[members] @ statistics.mean[members].double() for members in rows])  # [T, K]
        weight = torch.stack([share[members].sum() for members in rows])
        # of a group: sum_t p_t (m_t zᵀ + z m_tᵀ - z zᵀ) = a zᵀ + z aᵀ with a = sum_t p_t (m_t - z / 2)
        half = mean - weight[:, None] * z / 2
        a, z = (table.unflatten(1, (-1, width)).permute(1, 2, 0) for table in (half, z))  # [B, b, T]
        cross = a @ z.transpose(1, 2)
        H = H - cross - cross.transpose(1, 2)
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
