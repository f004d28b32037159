"""Weights to integers: grids, round-to-nearest and GPTQ."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.numerics import (
    INT4_SHIFT,
    INT8_MAX,
    MULTIPLIER_MAX,
    decode_int4,
    pack_int4,
    round_clamp,
    safe_scale,
)
from .schemes import Rounding, WeightArgs

GPTQ_DAMP = 0.05
GPTQ_BLOCK = 128


@dataclass(frozen=True)
class Int8Grid:
    """Symmetric, one step per output channel: w ~ scale code. scale [N, 1] fp32."""

    scale: Tensor

    def step(self, start: int, count: int) -> Tensor:
        """Width of a level in `count` columns from `start`, broadcastable to [N, count]."""
        return self.scale

    def encode(self, weight: Tensor, start: int) -> Tensor:
        """weight [N, k], columns from `start` -> codes [N, k] int8."""
        return round_clamp(weight / self.scale, -INT8_MAX, INT8_MAX).to(torch.int8)

    def decode(self, codes: Tensor, start: int) -> Tensor:
        """codes [N, k] -> fp32 values."""
        return codes.float() * self.scale


@dataclass(frozen=True)
class Int4Grid:
    """16 levels per group on the channel's int8 grid: w ~ scale ((code - zero) multiplier / 16).

    scale [N, 1] fp32; multiplier, zero [N, G] uint8 (zero None: 8); group_size columns share a group.
    """

    scale: Tensor
    multiplier: Tensor
    zero: Tensor | None
    group_size: int

    def _columns(self, table: Tensor, start: int, count: int) -> Tensor:
        index = torch.arange(start, start + count, device=table.device) // self.group_size
        return table[:, index]

    def _origin(self, start: int, count: int) -> Tensor | float:
        return 8.0 if self.zero is None else self._columns(self.zero, start, count).float()

    def step(self, start: int, count: int) -> Tensor:
        return self.scale * self._columns(self.multiplier, start, count).float() / (1 << INT4_SHIFT)

    def encode(self, weight: Tensor, start: int) -> Tensor:
        step = self.step(start, weight.shape[1])
        return round_clamp(weight / step + self._origin(start, weight.shape[1]), 0, 15).to(torch.uint8)

    def decode(self, codes: Tensor, start: int) -> Tensor:
        """What the kernel computes, integer rounding of the second level included."""
        k = codes.shape[1]
        half = 1 << (INT4_SHIFT - 1)
        fine = (codes.float() - self._origin(start, k)) * self._columns(self.multiplier, start, k).float()
        return torch.floor((fine + half) / (1 << INT4_SHIFT)).clamp(-INT8_MAX, INT8_MAX) * self.scale


Grid = Int8Grid | Int4Grid


def int8_grid(weight: Tensor) -> Int8Grid:
    return Int8Grid(safe_scale(weight.abs().amax(dim=1, keepdim=True), INT8_MAX))


def int4_grid(weight: Tensor, group_size: int, symmetric: bool) -> Int4Grid:
    """Min-max grid of weight [N, K]; K must be a multiple of group_size.

    The channel's step is the smallest that lets every group multiplier fit 8 bits and every value fit int8.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)  # 0 is always a level
    step = torch.maximum(high / 7, -low / 8) if symmetric else (high - low) / 15
    unit = 1 << INT4_SHIFT
    fits_multiplier = step.amax(dim=1, keepdim=True) * unit
    fits_int8 = weight.float().abs().amax(dim=1, keepdim=True) * (MULTIPLIER_MAX / (INT8_MAX - 1))
    scale = safe_scale(torch.maximum(fits_multiplier, fits_int8), MULTIPLIER_MAX)
    multiplier = torch.ceil(step / scale * unit - 1e-3).clamp(1, MULTIPLIER_MAX)
    zero = None
    if not symmetric:
        zero = round_clamp(-low / (scale * multiplier / unit), 0, 15).to(torch.uint8)
    return Int4Grid(scale, multiplier.to(torch.uint8), zero, group_size)


def round_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """weight [N, K] -> codes [N, K]."""
    return grid.encode(weight.float(), 0)


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, damp: float = GPTQ_DAMP) -> Tensor:
    """weight [N, K], hessian [B, b, b] diagonal blocks of E[x̃ x̃ᵀ] -> codes [N, K].

    GPTQ (arXiv 2210.17323): columns are rounded one by one, the error of each is spread over the
    later ones through the inverse Hessian; most important column first.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8 if isinstance(grid, Int8Grid) else torch.uint8)
    codes = codes.to(weight.device)
    width = hessian.shape[1]
    for block, H in enumerate(hessian):
        start = block * width
        part = weight[:, start : start + width].float()
        codes[:, start : start + width] = _gptq_block(part, H.to(weight.device).double(), grid, start, damp)
    return codes


def _gptq_block(W: Tensor, H: Tensor, grid: Grid, offset: int, damp: float) -> Tensor:
    """One diagonal block, in batches of GPTQ_BLOCK columns."""
    K = W.shape[1]
    dead = H.diagonal() <= 0
    H = H + torch.diag(dead.double() + damp * H.diagonal().mean().clamp(min=1e-12))
    order = torch.argsort(H.diagonal(), descending=True)
    W, H = W[:, order].clone(), H[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).float()
    codes = torch.empty(W.shape, dtype=torch.int8 if isinstance(grid, Int8Grid) else torch.uint8, device=W.device)
    position = (order + offset).tolist()
    for start in range(0, K, GPTQ_BLOCK):
        end = min(start + GPTQ_BLOCK, K)
        errors = torch.zeros(W.shape[0], end - start, device=W.device)
        for k in range(start, end):
            column = W[:, k : k + 1]
            code = grid.encode(column, position[k])
            codes[:, k : k + 1] = code
            error = (column - grid.decode(code, position[k])) / inverse[k, k]
            W[:, k:end] -= error * inverse[k, k:end]
            errors[:, k - start : k - start + 1] = error
        W[:, end:] -= errors @ inverse[start:end, end:]
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored


@dataclass(frozen=True)
class RoundedWeight:
    """Codes as stored: int8 [N, K], or packed uint8 [N, K / 2] with its group tables."""

    qdata: Tensor
    scale: Tensor
    multiplier: Tensor | None = None
    zero: Tensor | None = None

    def int8(self) -> Tensor:
        """The int8 codes that the matrix product sees, [N, K]."""
        return self.qdata if self.multiplier is None else decode_int4(self.qdata, self.multiplier, self.zero)


def round_weight(weight: Tensor, args: WeightArgs, group_size: int, hessian: Tensor | None) -> RoundedWeight:
    """Folded weight [N, K] -> RoundedWeight. `hessian` is needed for GPTQ only; without it, round to nearest."""
    weight = weight.float()
    grid: Grid = int8_grid(weight) if args.bits == 8 else int4_grid(weight, group_size, args.symmetric)
    use_gptq = args.rounding is Rounding.GPTQ and hessian is not None
    codes = gptq(weight, hessian, grid) if use_gptq else round_nearest(weight, grid)  # type: ignore[arg-type]
    if isinstance(grid, Int8Grid):
        return RoundedWeight(codes, grid.scale)
    return RoundedWeight(pack_int4(codes), grid.scale, grid.multiplier, grid.zero)
