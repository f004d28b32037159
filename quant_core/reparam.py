"""Re-parameterization: shift and scale folded into weights and biases, exact for every z and s.

y = x Wᵀ + b = ((x - z) / s) (W diag(s))ᵀ + b + W z   (HTG eq. 5 and 6, in torch's layout)
"""

from dataclasses import dataclass

from torch import Tensor

from ..kernels.numerics import rotate


@dataclass(frozen=True)
class Folded:
    """W̃ = W diag(s) H [N, K] and c = W z [T, N] (or None), in float64."""

    weight: Tensor
    correction: Tensor | None


def fold_linear(weight: Tensor, shift: Tensor | None, scale: Tensor | None, hadamard: int = 1) -> Folded:
    """weight [N, K]; shift [T, K]; scale [K]. The Hadamard blocks are orthogonal, so W̃ x̃ᵀ is unchanged by them."""
    W = weight.double()
    folded = W if scale is None else W * scale.double()
    return Folded(rotate(folded, hadamard), None if shift is None else shift.double() @ W.T)


def fold_modulation(
    weight: Tensor, bias: Tensor, *, shift_rows: slice, scale_rows: slice, z: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """Moves one z [K] and s [K] into an adaLN Linear, so that it emits the modulation of (x - z) / s.

    norm (1 + gamma) + beta -> (1 + gamma)' = (1 + gamma) / s and beta' = (beta - z) / s. weight [6 D, D] or
    alike, bias [6 D]; the slices name the rows of beta (shift) and gamma (scale).
    """
    weight, bias = weight.clone(), bias.clone()
    weight[scale_rows] = weight[scale_rows] / s[:, None]
    bias[scale_rows] = (1 + bias[scale_rows]) / s - 1
    weight[shift_rows] = weight[shift_rows] / s[:, None]
    bias[shift_rows] = (bias[shift_rows] - z) / s
    return weight, bias


def fold_value(weight: Tensor, bias: Tensor, *, value_rows: slice, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Moves z and s of the attention's output into V: rows of the softmax sum to 1, so P(V - z)/s = (PV - z)/s.

    In a joint attention every stream's V must take the same z and s.
    """
    weight, bias = weight.clone(), bias.clone()
    weight[value_rows] = weight[value_rows] / s[:, None]
    bias[value_rows] = (bias[value_rows] - z) / s
    return weight, bias


def fold_consumer(weight: Tensor, bias: Tensor | None, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The Linear whose producer was folded: W diag(s), b + W z."""
    correction = weight @ z
    return weight * s, correction if bias is None else bias + correction
