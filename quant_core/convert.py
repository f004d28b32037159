"""From weights and a calibration to quantized layers and a report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..kernels.numerics import rotate
from ..kernels.quantize_along.reference import dual
from .architectures import Family, Role
from .calibration import Calibration
from .covariance import rotated, rounding_hessian, scaled
from .directions import find_directions, less
from .fingerprint import tensor_fingerprint
from .grouping import (
    AUTO_NEGLIGIBLE,
    AUTO_NEGLIGIBLE_W4,
    AUTO_UNEXPLAINED,
    AUTO_UNEXPLAINED_BESIDE_DIRECTIONS,
    Linkage,
    group_layer_paper,
    group_model,
    members,
)
from .linear import QuantizedLinear, QuantLinear, column_sum, dequantize, half_if_exact, half_if_it_fits
from .metrics import relative_l2
from .observers import LayerStatistics
from .reparam import Folded, fold_linear
from .report import LayerReport, QuantReport, SkippedLayer, by_text
from .rounding import RoundedWeight, round_weight
from .schemes import Partition, QuantScheme, Rounding, Scale, Shift, StaticRange, group_size_for, hadamard_for
from .shift_scale import channel_scale, group_mean, group_shift
from .static_range import extreme_range, sampled_range
from .timesteps import SINGLE_GROUP, TimestepGroups, TimestepState, distinct

KEPT_BY_BUDGET = "16 bits, chosen by the budget"
PAPER_ROLES = (Role.MODULATED, Role.ATTENTION)


class CannotQuantize(ValueError):
    """The model or its calibration does not allow it; the message names the layer and the remedy."""


class DamagedWeight(CannotQuantize):
    """No reason to leave one layer out: the checkpoint is no good."""


@dataclass(frozen=True)
class LayerInput:
    """Calibrated statistics of one layer with the sigmas they were taken at, and its curvature where that is known."""

    sigmas: tuple[float, ...]
    statistics: LayerStatistics
    curvature: Tensor | None = None


def quantize_weight(
    name: str, weight: Tensor, scheme: QuantScheme, groups: TimestepGroups, source: LayerInput | None
) -> tuple[QuantizedLinear, LayerReport]:
    """weight [N, K] float -> quantized layer. `source` may be None for schemes that need no calibration.

    Raises CannotQuantize for non-finite weights or a K that no group size divides.
    """
    N, K = weight.shape
    if not bool(torch.isfinite(weight).all()):
        raise DamagedWeight(f"{name}: the weight holds NaN or infinity; the checkpoint is damaged")
    group_size = K if scheme.weights.bits == 8 else group_size_for(K, scheme.weights.group_size)
    if group_size is None:
        raise CannotQuantize(f"{name}: K={K} is not divisible by any group size; skip this layer")
    hadamard = hadamard_for(K, scheme.hadamard)
    rows = [] if source is None else members(source.sigmas, groups)
    statistics = None if source is None else source.statistics

    shift = scale = hessian = curvature = directions = None
    notes = []
    if statistics is not None:
        shift = group_shift(statistics, rows, scheme.shift)
        # z is rounded before c = W z is built from it, so the pair stays exact
        shift = None if shift is None else half_if_it_fits(shift)
        exact = None if shift is None else shift.double()
        scale = channel_scale(statistics, rows, exact, weight, scheme)
        scale = None if scale is None else half_if_exact(scale.float())
        if scheme.directions or scheme.weights.rounding is not Rounding.NEAREST:
            hessian = rounding_hessian(statistics, rows, exact, None, 1)
        if scheme.directions:
            scale, directions, why_not = find_directions(hessian, scale, weight, scheme)
            notes += [why_not] if why_not else []
        if hessian is not None:
            hessian = rotated(less(scaled(hessian, scale), directions, scale), hadamard)
        if scheme.weights.rounding is Rounding.GUIDED:
            curvature = None if source is None else source.curvature
    folded = fold_linear(weight, shift, scale, hadamard)
    rounded = round_weight(folded.weight, scheme.weights, group_size, hessian, curvature)
    correction = folded.correction
    static_scale = static_zero = None
    if statistics is not None:
        if scheme.bias_correction:
            mean = group_mean(statistics, rows)
            correction = _corrected(folded, rounded, mean, shift, directions, scale, hadamard)
        if not scheme.activations.dynamic:
            static_scale, static_zero = _static_tables(name, scheme, statistics, rows, shift, scale, hadamard)
    layer = QuantizedLinear(
        qdata=rounded.qdata,
        scale=rounded.scale,
        levels=rounded.levels,
        column_sum=None if scheme.activations.symmetric else column_sum(rounded.int8()),
        smooth=scale,
        shift=shift,
        correction=None if correction is None else half_if_it_fits(correction),
        directions=directions,
        responses=None if directions is None else (directions.double() @ weight.double().T).half(),
        static_scale=static_scale,
        static_zero=static_zero,
        hadamard=hadamard,
        symmetric=scheme.activations.symmetric,
        groups=groups,
    )
    if scheme.weights.bits == 4 and group_size != scheme.weights.group_size:
        notes.append(f"K={K} is not divisible by group size {scheme.weights.group_size}; {group_size} was used")
    if hadamard != scheme.hadamard:
        notes.append(f"K={K} is not divisible by {scheme.hadamard}; Hadamard blocks of {hadamard}")
    error = relative_l2(dequantize(layer), weight)
    report = LayerReport(
        name,
        (N, K),
        layer.bits,
        group_size,
        hadamard,
        len(groups),
        layer.nbytes,
        error,
        "; ".join(notes),
        scheme.name,
        directions=0 if directions is None else len(directions),
    )
    return layer, report


def _corrected(
    folded: Folded,
    rounded: RoundedWeight,
    mean: Tensor,
    shift: Tensor | None,
    directions: Tensor | None,
    scale: Tensor | None,
    hadamard: int,
) -> Tensor:
    """c_g + (W̃ - Q(W̃)) mean(x̃) over group g, [T, N] float64: the error is centred at the group's mean, which
    is not z when z is a mid-range. mean [T, K]."""
    centre = mean if shift is None else mean - shift.double()
    if directions is not None:
        centre = centre - centre @ dual(directions, scale).double().T @ directions.double()
    centre = rotate(centre if scale is None else centre / scale.double(), hadamard)
    lost = centre @ (folded.weight - rounded.int8().double() * rounded.scale.double()).T
    return lost if folded.correction is None else folded.correction + lost


def _static_tables(
    name: str, scheme: QuantScheme, statistics: LayerStatistics, rows, shift, scale, hadamard: int
) -> tuple[Tensor, Tensor | None]:
    """Fixed activation ranges, one per timestep group: scale [T] and, when asymmetric, zero [T]."""
    if scheme.activations.range is StaticRange.EXTREMES:
        return extreme_range(statistics, rows, shift, scale, scheme.activations.symmetric)
    try:
        return sampled_range(statistics, rows, shift, scale, hadamard), None
    except ValueError as error:
        raise CannotQuantize(f"{name}: {error}") from error


def layer_groups(
    name: str, scheme: QuantScheme, calibration: Calibration | None, shared: TimestepGroups
) -> TimestepGroups:
    """The partition a layer uses under a scheme."""
    if calibration is None or scheme.partition is Partition.SINGLE:
        return SINGLE_GROUP
    if scheme.partition is Partition.PAPER:
        return group_layer_paper(calibration.sigmas, calibration.layers[name], calibration.flow)
    if scheme.partition is Partition.LAYER:
        return _auto_groups(scheme, calibration, {name: calibration.layers[name]})
    return shared


def shared_groups(scheme: QuantScheme, calibration: Calibration | None) -> TimestepGroups:
    """The model's partition. One group where nothing uses groups; else as many as the artist asked Group Timesteps
    for, else as many as the scheme needs, cut from the tree chosen there."""
    grouped = scheme.shift is not Shift.NONE or scheme.bias_correction or not scheme.activations.dynamic
    if calibration is None or not grouped:
        return SINGLE_GROUP
    if calibration.grouping is not None and not calibration.grouping.automatic:
        given = calibration.grouping.groups
        return replace(given, interpolate=given.interpolate or scheme.interpolate)
    return _auto_groups(scheme, calibration, calibration.layers)


def _auto_groups(
    scheme: QuantScheme, calibration: Calibration, layers: Mapping[str, LayerStatistics]
) -> TimestepGroups:
    """The tree's own choice. Fixed ranges move with sigma even where the mean does not, so they always get groups."""
    negligible = 0.0
    if scheme.activations.dynamic:
        negligible = AUTO_NEGLIGIBLE if scheme.weights.bits == 8 else AUTO_NEGLIGIBLE_W4
    given = calibration.grouping
    grouping = group_model(
        calibration.sigmas,
        layers,
        linkage=Linkage.WARD if given is None else given.linkage,
        flow=calibration.flow,
        interpolate=scheme.interpolate or (given is not None and given.groups.interpolate),
        negligible=negligible,
        unexplained=AUTO_UNEXPLAINED_BESIDE_DIRECTIONS if scheme.directions else AUTO_UNEXPLAINED,
    )
    return grouping.groups


def check_calibration(calibration: Calibration, name: str, weight: Tensor) -> None:
    """Raises CannotQuantize when the statistics were taken on another weight or shape."""
    statistics = calibration.layers[name]
    if statistics.features != weight.shape[1]:
        raise CannotQuantize(
            f"{name}: calibrated with K={statistics.features}, the model has K={weight.shape[1]}; "
            "this calibration belongs to another model, run Calibrate DiT on this one"
        )
    if calibration.fingerprints.get(name) != tensor_fingerprint(weight):
        raise CannotQuantize(
            f"{name}: the weight changed since calibration (another checkpoint, or LoRAs added or removed); "
            "run Calibrate DiT on exactly this model"
        )


def quantize_model(
    weights: Mapping[str, Callable[[], Tensor]],
    *,
    scheme: QuantScheme,
    calibration: Calibration | None,
    family: Family | None,
    skip: Mapping[str, str] | None = None,
    schemes: Mapping[str, QuantScheme | None] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, QuantizedLinear], QuantReport]:
    """weights: layer name -> loader of its [N, K] weight, so that one layer at a time is in memory.

    skip: layers to leave alone, with the reason; schemes: layers that get another scheme than the others, or None
    to stay in floating point. Raises CannotQuantize for a calibration of another model,
    or when no layer is left to quantize. Deterministic.
    """
    of_layer = dict.fromkeys(weights, scheme) | {n: s for n, s in (schemes or {}).items() if n in weights}
    used = {s for s in of_layer.values() if s is not None}
    if not any(s.needs_calibration for s in used):
        calibration = None
    elif calibration is None:
        raise CannotQuantize(f"{scheme.name} needs a calibration; connect Calibrate DiT, or choose an rtn preset")
    skipped = {name: KEPT_BY_BUDGET for name, s in of_layer.items() if s is None} | dict(skip or {})
    if calibration is not None:
        for name in weights:
            if name not in skipped and name not in calibration.layers:
                skipped[name] = calibration.silent.get(name, "not in the calibration")
        if weights and not any(name in calibration.layers for name in weights):
            raise CannotQuantize("no layer of this model is in the calibration; it belongs to another model")
    shared = {s: shared_groups(s, calibration) for s in used}
    layers: dict[str, QuantizedLinear] = {}
    reports: list[LayerReport] = []
    todo = [name for name in weights if name not in skipped]
    for done, name in enumerate(todo):
        weight = weights[name]()
        own = of_layer[name]
        assert own is not None
        plain = own
        if own.paper_roles and family is not None and family.role(name) not in PAPER_ROLES:
            plain = own.with_options(shift=Shift.NONE, scale=Scale.NONE)
        source = None
        if calibration is not None:
            check_calibration(calibration, name, weight)
            source = LayerInput(calibration.sigmas, calibration.layers[name], (calibration.curvature or {}).get(name))
        try:
            groups = layer_groups(name, own, calibration, shared[own])
            layers[name], report = quantize_weight(name, weight, plain, groups, source)
            reports.append(report)
        except DamagedWeight:
            raise
        except CannotQuantize as error:
            skipped[name] = str(error).removeprefix(f"{name}: ")
        progress(done + 1, len(todo))
    if not weights:
        raise CannotQuantize("this model has no DiT blocks with Linear layers (a UNet?): there is nothing to quantize")
    if not layers:
        reasons = by_text((reason, name) for name, reason in skipped.items())
        listed = "; ".join(f"{names}: {reason}" for reason, names in reasons.items())
        raise CannotQuantize(f"no layer of this model was quantized: {listed}")
    notes = (f"family {family.name}",) if family else ("unknown family: every Linear of the repeated blocks",)
    notes += _unguided(layers, of_layer, calibration)
    if family is None and any(s.paper_roles for s in used):
        notes += (f"{scheme.name} shifts and scales every layer here: which of them HTG leaves alone is not known",)
    if calibration is not None and calibration.grouping is not None and scheme.partition is Partition.PAPER:
        notes += (f"{scheme.name} forms groups of its own for every layer, as published: Group Timesteps is not used",)
    return layers, QuantReport(
        scheme.name, tuple(reports), tuple(SkippedLayer(n, r) for n, r in sorted(skipped.items())), notes
    )


def _unguided(
    layers: Mapping[str, object], of_layer: Mapping[str, QuantScheme | None], calibration: Calibration | None
) -> tuple[str, ...]:
    """Says how many layers wanted a curvature, or covariances, that the calibration does not have."""
    guided = [n for n in layers if (s := of_layer[n]) is not None and s.weights.rounding is Rounding.GUIDED]
    known = {} if calibration is None or calibration.curvature is None else calibration.curvature
    moments = {} if calibration is None else calibration.layers
    blind = [name for name in guided if name not in moments or moments[name].second_moment is None]
    plain = [name for name in guided if name not in known and name not in blind]
    found = []
    if blind:
        found.append(
            f"{len(blind)} of {len(guided)} layers without covariances: rounded to nearest, at much loss; "
            "calibrate with more memory_gb"
        )
    if plain:
        found.append(
            f"{len(plain)} of {len(guided)} layers without a measured curvature: rounded by plain GPTQ, at some loss"
        )
    return tuple(found)


def install(model: nn.Module, layers: Mapping[str, QuantizedLinear], backend: str = "auto") -> TimestepState:
    """Replaces nn.Linear modules by QuantLinear in place; returns the state that selects their groups."""
    partitions = distinct([layer.groups for layer in layers.values()])
    state = TimestepState(partitions)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        bias = linear.bias.detach() if isinstance(linear.bias, Tensor) else None
        slot = partitions.index(layer.groups)
        setattr(model.get_submodule(parent), child, QuantLinear(layer, bias, state, slot, backend))
    return state
