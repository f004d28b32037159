"""Directions of a layer's input that stay in 16 bits: the strongest of what shift and scale leave.

x - z = p V + r: p = ((x - z) / s) · (V / s) of every token is multiplied by W V in floating point, and only r is
rounded to 8 bits, over the smaller range that it has. The idea of a low-rank branch (SVDQuant, arXiv 2411.05007), taken
from the activations instead of the weight: it costs R (K + N) products a token and as many values a layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .covariance import scaled
from .linear import HALF_MAX
from .schemes import QuantScheme, Scale
from .shift_scale import balanced_scale

# s and V are each the best for the other after a few turns
TURNS = 3
SWEEPS = 12
# tried beside the wanted ones, so that these are found sooner
SPARE = 8
# a narrower input is rounded as well without: fewer columns than this a direction
LEAST_COLUMNS = 16


@dataclass(frozen=True)
class Strongest:
    """vectors U [R, K], orthonormal, and the power [R] that tokens have along each; float64."""

    vectors: Tensor
    power: Tensor


def find_directions(
    covariance: Tensor | None, scale: Tensor | None, weight: Tensor, scheme: QuantScheme
) -> tuple[Tensor | None, Tensor | None, str]:
    """s [K], V [R, K] fp16 with V / s orthonormal, and "" or why there are none; s then stays as it was.

    A balanced s is found anew for what the directions leave, and they for it, by turns.
    covariance: E[(x - z) (x - z)ᵀ] in diagonal blocks [B, b, b] float64 (`rounding_hessian`), or None where unknown.
    """
    if covariance is None:
        return scale, None, "no directions: calibrated without second moments; calibrate with more memory"
    count = min(scheme.directions, weight.shape[1] // LEAST_COLUMNS)
    if count == 0:
        return scale, None, f"no directions: K={weight.shape[1]} is too narrow"
    s = torch.ones(weight.shape[1], dtype=torch.float64) if scale is None else scale.double()
    found = strongest(scaled(covariance, s), count)
    for _ in range(TURNS if scheme.scale is Scale.BALANCED else 0):
        power = covariance.diagonal(dim1=1, dim2=2).flatten()
        left = (power - found.power @ (found.vectors * s).square()).clamp(min=0)
        # a channel that lies along them as a whole keeps its place
        s = balanced_scale(torch.maximum(left, 1e-3 * power), weight, scheme.scale_strength)
        found = strongest(scaled(covariance, s), count)
    V = found.vectors * s
    if float(V.abs().amax()) > HALF_MAX or float((V @ weight.double().T).abs().amax()) > HALF_MAX:
        return scale, None, "no directions: they leave the range of fp16"
    return None if scale is None else s.half(), V.half(), ""


def strongest(hessian: Tensor, count: int) -> Strongest:
    """Leading eigenvectors of E[x̃ x̃ᵀ], given in diagonal blocks [B, b, b]; strongest first, each within one block.

    Subspace iteration from a fixed start, as accurate as rounding needs. Deterministic. At most b of them.
    """
    blocks, width, _ = hessian.shape
    count = min(count, width)
    H = hessian.double()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(width, min(count + SPARE, width), generator=generator, dtype=torch.float64)
    Q = start.to(H.device).expand(blocks, -1, -1)
    for _ in range(SWEEPS):
        Q = torch.linalg.qr(H @ Q).Q
    power, mix = torch.linalg.eigh(Q.transpose(1, 2) @ H @ Q)
    candidates = (Q @ mix).transpose(1, 2)  # [B, count + SPARE, b]
    order = power.flatten().argsort(descending=True, stable=True)[:count]
    block, place = order // power.shape[1], order % power.shape[1]
    vectors = torch.zeros(count, blocks, width, dtype=torch.float64, device=H.device)
    vectors[torch.arange(count, device=H.device), block] = candidates[block, place]
    return Strongest(vectors.flatten(1), power.flatten()[order].clamp(min=0))


def less(hessian: Tensor, directions: Tensor | None, scale: Tensor | None) -> Tensor:
    """E[x̃ x̃ᵀ] of what V [R, K] leaves of x̃ = (x - z) / s, in the same diagonal blocks [B, b, b], not rotated."""
    if directions is None:
        return hessian
    U = directions.double() if scale is None else directions.double() / scale.double()
    parts = U.to(hessian.device).unflatten(1, (hessian.shape[0], -1)).transpose(0, 1)  # [B, R, b]
    # (1 - UᵀU) H (1 - UᵀU): 1 - UᵀU on either side leaves no negative power, whatever fp16 took from V
    seen = parts @ hessian  # [B, R, b]
    cross = parts.transpose(1, 2) @ (seen - seen @ parts.transpose(1, 2) @ parts / 2)
    return hessian - cross - cross.transpose(1, 2)
