"""The one home of scale, rounding, clamping and nibble order. Everything else imports from here."""

from functools import lru_cache

import torch
from torch import Tensor

INT8_MAX = 127
INT4_MAX = 15
# an int4 step is 1 to 15 steps of the channel's int8 grid
MULTIPLIER_MAX = 15
# adding it to |v| < 2**22 in fp32 leaves an integer in the low bits: v rounded, ties to even
MAGIC = 1.5 * 2**23


def safe_scale(extent: Tensor, qmax: float) -> Tensor:
    """extent >= 0 -> fp32 step extent / qmax; a zero extent gets step 1, so that its codes are 0. NaN stays, and
    reaches the output."""
    # a tensor, not a number: CUDA would multiply by the reciprocal of a number, one bit off
    step = extent.float() / torch.full((), qmax, device=extent.device)
    return torch.where(step <= torch.finfo(torch.float32).tiny, torch.ones_like(step), step)


def round_clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Ties to even, then clamp."""
    return x.round().clamp(low, high)


def round_sum(v: Tensor, zero: Tensor) -> Tensor:
    """fp32 v + zero, rounded once, ties to even; zero integers below 2**21, the sum below 2**22. Overwrites v."""
    return v.add_(zero + MAGIC).sub_(MAGIC)


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


def addend(bias: Tensor | None, correction: Tensor | None, index: Tensor, fraction: Tensor) -> Tensor | None:
    """bias [N] + correction [T, N] at the group: what a product's epilogue adds to every row, [N] fp32 or None."""
    total = None if bias is None else bias.float()
    if correction is not None:
        c = lerp_rows(correction, index, fraction)
        total = c if total is None else total + c
    return total


def pack_int4(codes: Tensor) -> Tensor:
    """codes [N, K] uint8 in 0..15 -> [N, K / 2] uint8, even columns in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """[N, K / 2] uint8 -> [N, K] uint8 in 0..15."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def pack_levels(multiplier: Tensor, zero: Tensor) -> Tensor:
    """multiplier (1 to 15), zero (0 to 15) [N, G] uint8 -> [N, G] uint8, zero in the low nibble."""
    return zero | (multiplier << 4)


def unpack_levels(levels: Tensor) -> tuple[Tensor, Tensor]:
    """[N, G] uint8 -> multiplier, zero."""
    return levels >> 4, levels & 0xF


def decode_int4(packed: Tensor, levels: Tensor, table: Tensor | None = None) -> Tensor:
    """4-bit weight -> int8 codes of the channel's grid: code8 = (code4 - zero) multiplier, in integers.

    packed [N, K / 2] uint8; levels [N, G] uint8, see `pack_levels`. Two-level scales as in QServe (arXiv
    2405.04532), the second one a nibble; whoever encodes keeps the product within int8.
    With a table [16] int8 code8 = table[code4] multiplier, and the zero is not used.
    """
    multiplier, zero = unpack_levels(levels)
    if table is None:
        codes = unpack_int4(packed).to(torch.int16).unflatten(1, (levels.shape[1], -1))
        centred = codes - zero[..., None].to(torch.int16)
    else:
        centred = table.to(torch.int16)[unpack_int4(packed).int()].unflatten(1, (levels.shape[1], -1))
    decoded = centred * multiplier[..., None].to(torch.int16)
    return decoded.to(torch.int8).flatten(1)


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
    """Block Hadamard over the last dimension, in the dtype of x. order 1 is the identity.

    Radix-4 butterflies, stride 1 first: every output is (sum of the four) / 2 - its mirror image, so that any
    implementation that adds in this order has the same bits.
    """
    stride = 1
    while stride < order:
        a, b, c, d = x.unflatten(-1, (-1, 4, stride)).unbind(-2)
        half = ((a + b) + (c + d)) * 0.5
        x = torch.stack((half - d, half - c, half - b, half - a), dim=-2).flatten(-3)
        stride *= 4
    if stride != order:
        raise ValueError(f"Hadamard block {order} is not a power of 4; choose 16, 64 or 256")
    return x
