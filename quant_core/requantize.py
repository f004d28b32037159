"""A quantized layer whose weight has changed: a LoRA or a merge behind Quantize DiT."""

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.numerics import decode_int4, pack_int4, rotate, unpack_levels
from .grid import Grid, Int4Grid, Int8Grid, int4_grid, int8_grid
from .linear import HALF_MAX, QuantizedLinear, column_sum, dequantize, folded_weight, half_if_it_fits

# in steps: a searched grid clips by less than this, so more means that the weight left its grid
OUTGROWN = 2.5
# entries of a weight that are worked on at a time: ten tensors of as many are in memory
BLOCK = 2**22
LOW_BITS = 2**32 - 1


def requantize(weight: Tensor, like: QuantizedLinear, seed: int = 0) -> QuantizedLinear:
    """`weight` [N, K] is dequantize(like) plus a change (a LoRA, a merge): the same layer with the change in it.

    Keeps the shift, scale, rotation, directions and ranges of `like`, and the grid of every row that still fits it,
    so that no change gives the same codes. Correction and responses gain (weight - old) z and (weight - old) V,
    unrounded. A seed != 0 rounds stochastically: a change smaller than half a step then survives on average instead
    of vanishing. Raises ValueError for a weight that is not finite.
    """
    N, K = weight.shape
    rows = max(1, BLOCK // K)
    blocks = [slice(first, min(first + rows, N)) for first in range(0, N, rows)]
    symmetric = like.levels is not None and bool((unpack_levels(like.levels)[1] == 8).all())
    changed = [changed_rows(weight[b], rows_of(like, b), symmetric, seed, b.start * K) for b in blocks]
    stored = {name: torch.cat([each[name] for each in changed]) for name in changed[0]}
    if "correction" in stored and like.correction is not None:
        fitting = half_if_it_fits(stored["correction"].T)
        stored["correction"] = fitting.to(torch.promote_types(fitting.dtype, like.correction.dtype)).contiguous()
    if "responses" in stored:
        # past fp16's reach: 1e4 times what responses are
        stored["responses"] = stored["responses"].T.clamp(-HALF_MAX, HALF_MAX).half().contiguous()
    return replace(like, **stored)


def rows_of(w: QuantizedLinear, rows: slice) -> QuantizedLinear:
    """Some of the outputs of a layer."""
    by_row = ("qdata", "scale", "levels", "column_sum")
    parts = {name: value[rows] for name in by_row if (value := getattr(w, name)) is not None}
    for name in ("correction", "responses"):
        if (value := getattr(w, name)) is not None:
            parts[name] = value[:, rows]
    return replace(w, **parts)


def changed_rows(weight: Tensor, like: QuantizedLinear, symmetric: bool, seed: int, first: int) -> dict[str, Tensor]:
    """New tensors by name, all [n, ...] for weight [n, K]; correction and responses in fp32. symmetric: whether the
    layer's 4-bit levels are; first: the number of the weight's first entry in the layer, for its random numbers."""
    old = folded_weight(like)
    change = weight.float() - dequantize(like)
    if not bool(torch.isfinite(change).all()):
        raise ValueError("a LoRA or a merge puts NaN or infinity into a quantized weight; remove it")
    delta = rotate(change if like.smooth is None else change * like.smooth, like.hadamard)
    grid = grid_for(old + delta, like, symmetric)
    codes = encode(old, delta, grid, seed, first)
    if isinstance(grid, Int8Grid):
        stored, sums = {"qdata": codes, "scale": grid.scale}, codes
    else:
        stored = {"qdata": pack_int4(codes), "scale": grid.scale, "levels": grid.levels}
        sums = decode_int4(stored["qdata"], stored["levels"])
    if like.correction is not None and like.shift is not None:
        stored["correction"] = like.correction.float().T + change @ like.shift.float().T
    if like.responses is not None and like.directions is not None:
        stored["responses"] = like.responses.float().T + change @ like.directions.float().T
    if like.column_sum is not None:
        stored["column_sum"] = column_sum(sums)
    return stored


def grid_for(weight: Tensor, like: QuantizedLinear, symmetric: bool) -> Grid:
    """The grid of `like`, with fresh rows where the folded weight [N, K] no longer fits it."""
    if like.levels is None:
        fresh = int8_grid(weight)
        return Int8Grid(torch.where(fresh.scale > like.scale * 1.0001, fresh.scale, like.scale))
    old = Int4Grid.unpack(like.scale, like.levels, like.group_size)
    error = (old.decode(old.encode(weight, 0), 0) - weight).abs()
    outgrown = (error > OUTGROWN * old.step(0, weight.shape[1])).any(dim=1, keepdim=True)
    if not bool(outgrown.any()):
        return old
    fresh = int4_grid(weight, like.group_size, symmetric)
    scale, multiplier, zero = (
        torch.where(outgrown, getattr(fresh, name), getattr(old, name)) for name in ("scale", "multiplier", "zero")
    )
    return Int4Grid(scale, multiplier, zero, like.group_size)


def encode(old: Tensor, delta: Tensor, grid: Grid, seed: int, first: int) -> Tensor:
    """Codes of old + delta; where seed != 0, a weight that changed is rounded up or down by chance."""
    nearest = grid.encode(old + delta, 0)
    if seed == 0:
        return nearest
    chance = noise(old.shape, seed, first, old.device) - 0.5
    moved = grid.encode(old + delta + chance * grid.step(0, old.shape[1]), 0)
    return torch.where(delta.abs() > 1e-6 * old.abs().amax(dim=1, keepdim=True), moved, nearest)


def noise(shape: torch.Size, seed: int, first: int, device: torch.device) -> Tensor:
    """Uniform in [0, 1), fp32, the same on every device: entry i is a hash of seed and first + i (MurmurHash3's
    finalizer, Appleby 2011). The host may ask at every model call, on the card."""
    start = (seed ^ seed >> 32) * 0x9E3779B1 + first & LOW_BITS
    x = torch.arange(start, start + shape.numel(), device=device)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x.bitwise_and_(LOW_BITS)
        x.bitwise_xor_(x >> shift).mul_(factor)
    x.bitwise_and_(LOW_BITS)
    x.bitwise_xor_(x >> 16)
    return (x >> 8).float().mul_(2**-24).view(shape)
