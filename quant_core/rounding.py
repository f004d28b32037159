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
# columns per batch: small enough that a rank-one update runs on one thread
GPTQ_BLOCK = 32


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

    def columns(self, index: Tensor) -> "Columns":
        """The columns named by index [k], laid out for GPTQ."""
        return Columns(self.scale[:, 0].expand(len(index), -1), self.scale[:, 0])


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
        fine = (codes.float() - self._origin(start, k)) * self._columns(self.multiplier, start, k).float()
        return second_level(fine) * self.scale

    def columns(self, index: Tensor) -> "Columns":
        """The columns named by index [k], laid out for GPTQ."""
        group = index.to(self.scale.device) // self.group_size
        multiplier = self.multiplier[:, group].T.float().contiguous()
        origin = torch.full_like(multiplier, 8) if self.zero is None else self.zero[:, group].T.float().contiguous()
        scale = self.scale[:, 0]
        return Columns(scale * multiplier / (1 << INT4_SHIFT), scale, origin, multiplier)


Grid = Int8Grid | Int4Grid


@dataclass(frozen=True)
class Columns:
    """A grid laid out column by column, for GPTQ: step [K, N]; origin and multiplier [K, N] for 4 bits; scale [N]."""

    step: Tensor
    scale: Tensor
    origin: Tensor | None = None
    multiplier: Tensor | None = None

    def round(self, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """weight [N], column k -> (codes as fp32 [N], values [N]); agrees with the grid's encode and decode."""
        if self.origin is None or self.multiplier is None:
            codes = round_clamp(weight / self.step[k], -INT8_MAX, INT8_MAX)
            return codes, codes * self.scale
        codes = round_clamp(weight / self.step[k] + self.origin[k], 0, 15)
        return codes, second_level((codes - self.origin[k]) * self.multiplier[k]) * self.scale


def second_level(fine: Tensor) -> Tensor:
    """(code - zero) multiplier in sixteenths -> int8 codes as fp32, rounded as `decode_int4` does."""
    half = 1 << (INT4_SHIFT - 1)
    return torch.floor((fine + half) / (1 << INT4_SHIFT)).clamp(-INT8_MAX, INT8_MAX)


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
    dtype = torch.int8 if isinstance(grid, Int8Grid) else torch.uint8
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    width = hessian.shape[1]
    for block, H in enumerate(hessian):
        start = block * width
        part = weight[:, start : start + width].float()
        codes[:, start : start + width] = _gptq_block(part, H.to(weight.device).double(), grid, start, damp).to(dtype)
    return codes


def _gptq_block(W: Tensor, H: Tensor, grid: Grid, offset: int, damp: float) -> Tensor:
    """One diagonal block, in batches of GPTQ_BLOCK columns -> codes as fp32."""
    K = W.shape[1]
    dead = H.diagonal() <= 0
    H = H + torch.diag(dead.double() + damp * H.diagonal().mean().clamp(min=1e-12))
    order = torch.argsort(H.diagonal(), descending=True)
    W, H = W[:, order].clone(), H[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(_factor(H, damp)), upper=True).float()
    columns = grid.columns(order + offset)
    rest, codes, errors = (
        W.T.contiguous(),
        torch.empty_like(W.T),
        torch.empty_like(W.T),
    )  # [K, N]: a column is contiguous
    for start in range(0, K, GPTQ_BLOCK):
        end = min(start + GPTQ_BLOCK, K)
        for k in range(start, end):
            codes[k], value = columns.round(rest[k], k)
            errors[k] = (rest[k] - value) / inverse[k, k]
            rest[k:end].addr_(inverse[k, k:end], errors[k], alpha=-1)
        rest[end:] -= inverse[start:end, end:].T @ errors[start:end]
    restored = torch.empty_like(W)
    restored[:, order] = codes.T
    return restored


def _factor(H: Tensor, damp: float) -> Tensor:
    """Cholesky factor of H; ever more damping where fp32 cancellation (a large mean taken off) left it indefinite."""
    for power in range(12):
        factor, failed = torch.linalg.cholesky_ex(H)
        if not int(failed):
            return factor
        H = H + torch.diag(10**power * damp * H.diagonal().abs().mean().expand(len(H)))
    return torch.linalg.cholesky(H)


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
