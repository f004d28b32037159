"""Coordinates as a skinny matrix product in fp32, by blocks of rows; then the quantizer in torch ops."""

import torch
from torch import Tensor

from ..numerics import lerp_rows
from ..quantize_activation.torch_impl import quantize_activation
from .reference import dual

# entries of x that are widened to fp32 at a time
BLOCK = 2**22


def refusal(device: torch.device) -> str | None:
    """Runs wherever torch does."""
    return None


@torch.no_grad()
def coordinates(
    x: Tensor, directions: Tensor, shift: Tensor | None, smooth: Tensor | None, index: Tensor, fraction: Tensor
) -> Tensor:
    """As the reference, but for the order of the sums: x · (V / s²) - z · (V / s²)."""
    factors = dual(directions, smooth)
    bias = None if shift is None else (factors @ lerp_rows(shift, index, fraction)).neg_()
    found = torch.empty(len(x), len(directions), dtype=torch.bfloat16, device=x.device)
    block = max(1, len(x) if x.dtype is torch.float32 else BLOCK // max(1, x.shape[1]))
    for start in range(0, len(x), block):
        rows = slice(start, start + block)
        found[rows] = torch.nn.functional.linear(x[rows].float(), factors, bias)
    return found


def quantize_along(
    x: Tensor,
    *,
    directions: Tensor,
    index: Tensor,
    fraction: Tensor,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    hadamard: int = 1,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """As the reference, but for the order of sums."""
    p = coordinates(x, directions, shift, smooth, index, fraction)
    given = {"index": index, "fraction": fraction, "shift": shift, "smooth": smooth, "hadamard": hadamard}
    return *quantize_activation(x, directions=directions, coordinates=p, symmetric=symmetric, **given), p
