"""Mixed precision: the format of every layer that lets a model fit a number of bytes with the least error."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .budget import GB, Choice, choose
from .calibration import Calibration
from .checkpoint import extra_bytes, header_bytes
from .convert import CannotQuantize, LayerInput, check_calibration, layer_groups, quantize_weight, shared_groups
from .linear import HALF_MAX, QuantizedLinear
from .report import QuantReport
from .schemes import PRESETS, QuantScheme, Rounding, group_size_for
from .sensitivity import output_error
from .timesteps import TimestepGroups

# how many of a layer's output channels are rounded to judge a format
CHANNELS = 128
KEPT = "16 bits"
_W4 = PRESETS["W4A8"]
FORMATS = (
    PRESETS["W8A8"],
    *(
        _W4.with_options(name=f"W4A8 g{size}", weights=_W4.weights.with_options(group_size=size))
        for size in (16, 32, 64)
    ),
)
CHANNEL_TABLES = ("qdata", "scale", "levels", "column_sum", "correction", "responses")


@dataclass(frozen=True)
class Plan:
    """The chosen format of every layer. nbytes: of the whole model; error: predicted, of the final latent."""

    choices: Mapping[str, Choice]
    nbytes: int
    error: float

    @property
    def schemes(self) -> dict[str, QuantScheme | None]:
        """What `quantize_model` takes: None keeps a layer in floating point."""
        known: dict[str, QuantScheme | None] = {scheme.name: scheme for scheme in FORMATS}
        return {name: known.get(choice.format) for name, choice in self.choices.items()}

    def report(self, found: QuantReport) -> QuantReport:
        """The outcome with this choice in it."""
        return replace(found, notes=(*found.notes, str(self)), choices=dict(self.choices))

    def __str__(self) -> str:
        counts = Counter(choice.format for choice in self.choices.values())
        listed = ", ".join(f"{name}: {counts[name]} layers" for name in (*formats(), KEPT) if counts[name])
        return f"{listed}; {self.nbytes / GB:.3f} GB in all; predicted error of the final latent {self.error:.4f}"


def formats() -> tuple[str, ...]:
    """Names of the formats that a plan chooses among, widest first."""
    return tuple(scheme.name for scheme in FORMATS)


def plan_formats(
    weights: Mapping[str, Callable[[], Tensor]],
    calibration: Calibration,
    budget: int,
    *,
    fixed: int = 0,
    kept_bytes: Callable[[Tensor], int] = lambda weight: 2 * weight.numel(),
    in_file: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """weights: layer name -> loader of its [N, K] weight; budget: bytes of the whole model, of which `fixed` are not
    in `weights`; kept_bytes: of a weight that stays in floating point; in_file: whether a layer's share of the file's
    header counts. Deterministic.

    A layer that calibration or the measurement of gains did not see stays as it is. Raises CannotQuantize without
    gains or row samples or where nothing needs rounding, and OverBudget.
    """
    if calibration.gains is None:
        raise CannotQuantize(
            "fitting to a size needs the sensitivity of every layer; "
            "connect a calibration made with measure_sensitivity on"
        )
    shared = {scheme.name: shared_groups(scheme, calibration) for scheme in FORMATS}
    options: dict[str, list[Choice]] = {}
    for done, (name, load) in enumerate(weights.items()):
        weight = load()
        header = header_bytes(f"{name}.weight") if in_file else 0
        options[name] = [Choice(KEPT, kept_bytes(weight) + header, 0.0)]
        if name in calibration.layers and name in calibration.gains:
            check_calibration(calibration, name, weight)
            for scheme in FORMATS:
                if scheme.weights.bits == 8 or group_size_for(weight.shape[1], scheme.weights.group_size):
                    groups = layer_groups(name, scheme, calibration, shared[scheme.name])
                    options[name].append(price(name, weight, scheme, calibration, groups, in_file))
        progress(done + 1, len(weights))
    choices = choose(options, budget, fixed)
    total = fixed + sum(choice.nbytes for choice in choices.values())
    if all(choice.format == KEPT for choice in choices.values()):
        raise CannotQuantize(f"the model takes {total / GB:.3f} GB in 16 bits and fits as it is; ask for less")
    return Plan(choices, total, sum(choice.error for choice in choices.values()) ** 0.5)


def price(
    name: str, weight: Tensor, scheme: QuantScheme, calibration: Calibration, groups: TimestepGroups, in_file: bool
) -> Choice:
    """A format's bytes and predicted error, from a rounding of some channels.

    To nearest: GPTQ fits the very rows it would be judged on, and layers that see few different tokens would look
    far better than they are.
    """
    assert calibration.gains is not None
    nearest = scheme.with_options(weights=scheme.weights.with_options(rounding=Rounding.NEAREST))
    N, count = len(weight), min(CHANNELS, len(weight))
    chosen = torch.arange(count) * N // count
    part = weight[chosen]
    source = LayerInput(calibration.sigmas, calibration.layers[name])
    layer, _ = quantize_weight(name, part, nearest, groups, source)
    try:
        error = output_error(part, layer, source.statistics, calibration.sigmas)
    except ValueError as problem:
        raise CannotQuantize(f"{name}: {problem}") from problem
    # a channel's error goes with its energy, and a few wide channels may hold most of it
    smooth = torch.ones(weight.shape[1]) if layer.smooth is None else layer.smooth.float()
    energy = weight.float().square() @ smooth.square()
    error *= float(energy.mean() / energy[chosen].mean().clamp(min=torch.finfo(torch.float32).tiny))
    nbytes = nbytes_of(weight, layer) + (extra_bytes(name, layer) if in_file else 0)
    return Choice(scheme.name, nbytes, calibration.gains[name] * error)


def nbytes_of(weight: Tensor, part: QuantizedLinear) -> int:
    """Bytes of all tensors of weight [N, K] in the format of `part`, some of its channels rounded."""
    N, count = len(weight), part.features[0]
    total = sum(
        tensor.nbytes // count * N if name in CHANNEL_TABLES else tensor.nbytes
        for name, tensor in part.tensors().items()
    )
    if part.correction is not None and part.shift is not None and part.correction.dtype == torch.float16:
        # one channel beyond fp16 makes the whole table fp32
        largest = float((part.shift.float() @ weight.float().T).abs().amax())
        total += 2 * part.correction.shape[0] * N if largest >= HALF_MAX else 0
    return total
