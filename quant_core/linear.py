"""A quantized Linear: what is stored, its integer forward, and its way back to the original weight."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import int4_linear, int8_linear, quantize_activation, quantize_along, whole_layer
from ..kernels.backends import AUTO, BACKENDS
from ..kernels.numerics import decode_int4, pack_int4, rotate
from .grid import Grid, Int4Grid, Int8Grid, int4_grid, int8_grid
from .reparam import fold_linear
from .timesteps import SINGLE_GROUP, TimestepGroups, TimestepState

# what a MODEL may ask to be multiplied by
BACKEND_NAMES = (AUTO, *BACKENDS)
HALF_MAX = 6.0e4
# in steps: a searched grid clips by less than this, so more means that the weight left its grid
OUTGROWN = 2.5


@dataclass(frozen=True)
class QuantizedLinear:
    """Everything a layer needs at run time but its bias. Tensors that a scheme does not use are None.

    qdata int8 [N, K] or uint8 [N, K / 2]; scale [N, 1] fp32; levels [N, G] uint8 (4 bits only: multiplier and
    zero of each weight group); column_sum [N] int32 (asymmetric activations); smooth [K], shift [T, K] and
    correction [T, N] fp16 or fp32; directions V [R, K] and responses W V [R, N] fp16 (what stays in 16 bits);
    static_scale, static_zero [T] fp32 (fixed activation ranges).
    """

    qdata: Tensor
    scale: Tensor
    levels: Tensor | None = None
    column_sum: Tensor | None = None
    smooth: Tensor | None = None
    shift: Tensor | None = None
    correction: Tensor | None = None
    directions: Tensor | None = None
    responses: Tensor | None = None
    static_scale: Tensor | None = None
    static_zero: Tensor | None = None
    hadamard: int = 1
    symmetric: bool = True
    groups: TimestepGroups = SINGLE_GROUP

    @property
    def bits(self) -> int:
        return 8 if self.levels is None else 4

    @property
    def features(self) -> tuple[int, int]:
        """(N, K)."""
        N, columns = self.qdata.shape
        return N, columns if self.bits == 8 else 2 * columns

    @property
    def group_size(self) -> int:
        """Columns per weight group; K for 8 bits."""
        return self.features[1] if self.levels is None else self.features[1] // self.levels.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors in use, by field name."""
        return {name: value for name in TENSOR_FIELDS if (value := getattr(self, name)) is not None}

    def map(self, fn) -> "QuantizedLinear":
        """The same layer with `fn` applied to every tensor in use."""
        return replace(self, **{name: fn(value) for name, value in self.tensors().items()})

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.tensors().values())


TENSOR_FIELDS = (
    "qdata",
    "scale",
    "levels",
    "column_sum",
    "smooth",
    "shift",
    "correction",
    "directions",
    "responses",
    "static_scale",
    "static_zero",
)


def half_if_it_fits(table: Tensor) -> Tensor:
    """fp16 (11 bits of mantissa) unless a value would overflow; then fp32."""
    return table.half() if float(table.abs().amax()) < HALF_MAX else table.float()


def half_if_exact(table: Tensor) -> Tensor:
    """fp16 where that changes nothing, else the table as it is."""
    half = table.half()
    return half if torch.equal(half.to(table.dtype), table) else table


def quant_linear(
    x: Tensor, w: QuantizedLinear, bias: Tensor | None, index: Tensor, fraction: Tensor, backend: str = AUTO
) -> Tensor:
    """x [..., K] -> [..., N] in the dtype of x: y = Q_a((x - z - p V) / s H) Q_wᵀ + p (W V) + b + c.

    Products of K in integers; p, the coordinates of a token along the layer's directions V, where it has any.
    """
    group = {"index": index, "fraction": fraction, "backend": backend}
    y = whole_layer(x, w.qdata, **quantizer(w), directions=w.directions, **product(w, bias), **group)
    if y is not None:
        return y
    rows = x.reshape(-1, x.shape[-1])
    if w.directions is None:
        quantized, p = quantize_activation(rows, **quantizer(w), **group), None
    else:
        tables = {"shift": w.shift, "smooth": w.smooth, "hadamard": w.hadamard, "symmetric": w.symmetric}
        codes, scale, zero, p = quantize_along(rows, directions=w.directions, **tables, **group)
        quantized = codes, scale, zero
    y = multiply(quantized, w, bias, index, fraction, x.dtype, backend, p)
    return y.reshape(*x.shape[:-1], w.features[0])


def quantizer(w: QuantizedLinear) -> dict[str, Any]:
    """What the quantizers of the layer's input take from it, by keyword, but its directions."""
    return {
        "shift": w.shift,
        "smooth": w.smooth,
        "hadamard": w.hadamard,
        "symmetric": w.symmetric,
        "static_scale": w.static_scale,
        "static_zero": w.static_zero,
    }


def product(w: QuantizedLinear, bias: Tensor | None) -> dict[str, Tensor | None]:
    """What the products take from it, by keyword, but its codes; levels with 4 bits only."""
    levels = {} if w.levels is None else {"levels": w.levels}
    return {
        "column_scale": w.scale,
        "column_sum": w.column_sum,
        "bias": bias,
        "correction": w.correction,
        "responses": w.responses,
    } | levels


def multiply(
    quantized: tuple[Tensor, Tensor, Tensor | None],
    w: QuantizedLinear,
    bias: Tensor | None,
    index: Tensor,
    fraction: Tensor,
    dtype: torch.dtype,
    backend: str = AUTO,
    p: Tensor | None = None,
) -> Tensor:
    """codes [M, K], scale, zero of a quantizer, and the coordinates p [M, R] that it left out -> [M, N] dtype."""
    codes, row_scale, row_zero = quantized
    linear = int8_linear if w.levels is None else int4_linear
    tokens = {"row_scale": row_scale, "row_zero": row_zero, "coordinates": p}
    group = {"index": index, "fraction": fraction, "backend": backend}
    return linear(codes, w.qdata, **tokens, **product(w, bias), **group, dtype=dtype)


def codes_of(w: QuantizedLinear) -> Tensor:
    """int8 codes [N, K] that the product sees."""
    return w.qdata if w.levels is None else decode_int4(w.qdata, w.levels)


def folded_weight(w: QuantizedLinear) -> Tensor:
    """The rounded W̃ [N, K] in the basis of the product, fp32."""
    return codes_of(w).float() * w.scale


def dequantize(w: QuantizedLinear) -> Tensor:
    """The rounded weight in the original basis [N, K], fp32: rotation and scale undone."""
    weight = rotate(folded_weight(w), w.hadamard)
    return weight if w.smooth is None else weight / w.smooth


def requantize(weight: Tensor, like: QuantizedLinear, seed: int = 0) -> QuantizedLinear:
    """`weight` [N, K] is dequantize(like) plus a change (a LoRA, a merge): the same layer with the change in it.

    Keeps the shift, scale, rotation, directions and ranges of `like`, and the grid of every row that still fits it,
    so that no change gives the same codes. Correction and responses gain (weight - old) z and (weight - old) V,
    unrounded. A seed != 0 rounds stochastically: a change smaller than half a step then survives on average instead
    of vanishing. Raises ValueError for a weight that is not finite.
    """
    old = folded_weight(like)
    change = weight.float() - dequantize(like)
    if not bool(torch.isfinite(change).all()):
        raise ValueError("a LoRA or a merge puts NaN or infinity into a quantized weight; remove it")
    scale = None if like.smooth is None else like.smooth.double()
    delta = fold_linear(change, None, scale, like.hadamard).weight.float()
    grid = grid_for(old + delta, like)
    codes = encode(old, delta, grid, seed)
    if isinstance(grid, Int8Grid):
        stored = {"qdata": codes, "scale": grid.scale}
        sums = codes
    else:
        stored = {"qdata": pack_int4(codes), "scale": grid.scale, "levels": grid.levels}
        sums = decode_int4(stored["qdata"], stored["levels"])
    if like.correction is not None and like.shift is not None:
        correction = like.correction.double() + like.shift.double() @ change.double().T
        fitting = half_if_it_fits(correction)
        stored["correction"] = fitting.to(torch.promote_types(fitting.dtype, like.correction.dtype))
    if like.responses is not None and like.directions is not None:
        responses = like.responses.double() + like.directions.double() @ change.double().T
        # past fp16's reach: 1e4 times what responses are
        stored["responses"] = responses.clamp(-HALF_MAX, HALF_MAX).half()
    if like.column_sum is not None:
        stored["column_sum"] = column_sum(sums)
    return replace(like, **stored)


def grid_for(weight: Tensor, like: QuantizedLinear) -> Grid:
    """The grid of `like`, with fresh rows where the folded weight [N, K] no longer fits it."""
    if like.levels is None:
        fresh = int8_grid(weight)
        return Int8Grid(torch.where(fresh.scale > like.scale * 1.0001, fresh.scale, like.scale))
    old = Int4Grid.unpack(like.scale, like.levels, like.group_size)
    error = (old.decode(old.encode(weight, 0), 0) - weight).abs()
    outgrown = (error > OUTGROWN * old.step(0, weight.shape[1])).any(dim=1, keepdim=True)
    symmetric = bool((old.zero == 8).all())
    fresh = int4_grid(weight, like.group_size, symmetric)
    scale, multiplier, zero = (
        torch.where(outgrown, getattr(fresh, name), getattr(old, name)) for name in ("scale", "multiplier", "zero")
    )
    return Int4Grid(scale, multiplier, zero, like.group_size)


def encode(old: Tensor, delta: Tensor, grid: Grid, seed: int) -> Tensor:
    """Codes of old + delta; where seed != 0, a weight that changed is rounded up or down by chance."""
    nearest = grid.encode(old + delta, 0)
    if seed == 0:
        return nearest
    generator = torch.Generator().manual_seed(seed & 0x7FFFFFFF)
    noise = (torch.rand(old.shape, generator=generator) - 0.5).to(old.device)
    chance = grid.encode(old + delta + noise * grid.step(0, old.shape[1]), 0)
    return torch.where(delta.abs() > 1e-6 * old.abs().amax(dim=1, keepdim=True), chance, nearest)


def column_sum(codes: Tensor) -> Tensor:
    """Sum over K of the int8 codes, [N] int32: what an activation zero point multiplies."""
    return codes.sum(dim=1, dtype=torch.int32)


class QuantLinear(nn.Module):
    """Drop-in for nn.Linear outside the host. `state` and `slot` say where the active group is kept."""

    def __init__(
        self, weight: QuantizedLinear, bias: Tensor | None, state: TimestepState, slot: int, backend: str = AUTO
    ):
        super().__init__()
        self.out_features, self.in_features = weight.features
        self.weight, self.bias, self.state, self.slot, self.backend = weight, bias, state, slot, backend

    def forward(self, x: Tensor) -> Tensor:
        return quant_linear(x, self.weight, self.bias, *self.state.select(self.slot), self.backend)
