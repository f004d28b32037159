"""The one home of scale, rounding, clamping and nibble order. Everything else imports from here."""

from functools import lru_cache

import torch
from torch import Tensor

INT8_MAX = 127
INT4_LEVELS = 16
# an int4 step is multiplier / 2**INT4_SHIFT steps of the channel's int8 grid
INT4_SHIFT = 4
MULTIPLIER_MAX = 255


def safe_scale(extent: Tensor, qmax: float) -> Tensor:
    """extent >= 0 -> fp32 step extent / qmax; a zero extent gets step 1, so that its codes are 0."""
    step = extent.float() / qmax
    return torch.where(step > torch.finfo(torch.float32).tiny, step, torch.ones_like(step))


def round_clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Ties to even, then clamp."""
    return x.round().clamp(low, high)


def lerp_rows(table: Tensor, index: Tensor, fraction: Tensor) -> Tensor:
    """table [T, ...], index [1] int64, fraction [1] fp32 -> row index + fraction, fp32.

    Fraction 0 is the piecewise-constant look-up. Nothing is read back to the host.
    """
    low = table.index_select(0, index)[0].float()
    if table.shape[0] == 1:
        return low
    following = (index + 1).clamp(max=table.shape[0] - 1)
    high = table.index_select(0, following)[0].float()
    return low + fraction.to(low.device) * (high - low)


def pack_int4(codes: Tensor) -> Tensor:
    """codes [N, K] uint8 in 0..15 -> [N, K / 2] uint8, even columns in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """[N, K / 2] uint8 -> [N, K] uint8 in 0..15."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def decode_int4(packed: Tensor, multiplier: Tensor, zero: Tensor | None) -> Tensor:
    """Progressive 4-bit weight -> int8 codes of the channel's grid.

    packed [N, K / 2] uint8; multiplier [N, G] uint8; zero [N, G] uint8 or None for the symmetric 8.
    code8 = ((code4 - zero) * multiplier + 8) >> 4, all in integers (two-level scales as in QServe,
    arXiv 2405.04532, with a 4.4 fixed-point second level).
    """
    codes = unpack_int4(packed).to(torch.int32)
    grouped = codes.unflatten(1, (multiplier.shape[1], -1))
    origin = 8 if zero is None else zero.to(torch.int32)[..., None]
    scaled = (grouped - origin) * multiplier.to(torch.int32)[..., None]
    half = 1 << (INT4_SHIFT - 1)
    return ((scaled + half) >> INT4_SHIFT).clamp(-INT8_MAX, INT8_MAX).to(torch.int8).flatten(1)


@lru_cache(maxsize=32)
def hadamard(order: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Regular Hadamard matrix [order, order] / sqrt(order), order a power of 4: orthogonal and symmetric.

    Kronecker powers of the 4x4 matrix without an all-ones column, so that no coefficient collects the
    mean of its block (ConvRot, arXiv 2512.03673). Cached: do not write into it.
    """
    base = torch.ones(4, 4, dtype=torch.float64) - 2 * torch.eye(4, dtype=torch.float64).flip(0)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.kron(matrix, base / 2)
    if matrix.shape[0] != order:
        raise ValueError(f"Hadamard block {order} is not a power of 4; choose 16, 64 or 256")
    return matrix.to(dtype=dtype, device=device)


def rotate(x: Tensor, order: int) -> Tensor:
    """Block Hadamard over the last dimension, in the dtype of x. order 1 is the identity."""
    if order == 1:
        return x
    blocks = x.unflatten(-1, (-1, order))
    return (blocks @ hadamard(order, x.dtype, x.device)).flatten(-2)
