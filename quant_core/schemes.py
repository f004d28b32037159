"""What is rounded, how, and under which name: schemes and presets."""

from dataclasses import dataclass, replace
from enum import Enum

HADAMARD_ORDERS = (1, 4, 16, 64, 256)
MOST_DIRECTIONS = 16


class Granularity(Enum):
    """One scale for: the whole tensor, an output channel [N], a token [M], or a run of `group_size` columns."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_TOKEN = "per_token"
    PER_GROUP = "per_group"


class Shift(Enum):
    """z_g subtracted from the activations of timestep group g."""

    NONE = "none"
    MEAN = "mean"
    MIDRANGE = "midrange"  # (max + min) / 2, HTG eq. 2


class Scale(Enum):
    """s divided out of the activation channels."""

    NONE = "none"
    PAPER = "paper"  # sqrt(EMA of the shifted maximum / max |W|), HTG eq. 7
    BALANCED = "balanced"  # sqrt(rms of the shifted input / norm of the weight column): best under rotation


class Rounding(Enum):
    NEAREST = "nearest"
    GPTQ = "gptq"  # errors of a channel make up for one another, weighed by the layer's inputs
    GUIDED = "guided"  # errors of several channels too, weighed by what they do to the model's output


class StaticRange(Enum):
    """How a fixed activation range is found."""

    EXTREMES = "extremes"  # calibrated minimum and maximum, as HTG does; not after a rotation
    SAMPLED = "sampled"  # least squared error over the calibration's row samples


class Partition(Enum):
    """Where a layer's timestep groups come from."""

    CALIBRATION = "calibration"  # the one partition chosen by Group Timesteps, or `auto`
    LAYER = "layer"  # `auto` on each layer alone
    PAPER = "paper"  # per layer, centroid linkage, T / 10 groups
    SINGLE = "single"  # no groups


@dataclass(frozen=True)
class WeightArgs:
    """bits 8 is per channel and symmetric; bits 4 is grouped, on the channel's int8 grid.

    search: whether the levels of a 4-bit group are searched with clipping, or span minimum to maximum.
    """

    bits: int = 8
    group_size: int = 16
    symmetric: bool = True
    rounding: Rounding = Rounding.NEAREST
    search: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"weights of {self.bits} bits are not supported; choose 4 or 8")
        if self.bits == 8 and not self.symmetric:
            raise ValueError("8-bit weights are symmetric per channel; asymmetric needs bits=4")
        if self.group_size < 4 or self.group_size % 4:
            raise ValueError(f"group size {self.group_size} is not a positive multiple of 4; choose 16 or 32")

    @property
    def granularity(self) -> Granularity:
        return Granularity.PER_CHANNEL if self.bits == 8 else Granularity.PER_GROUP

    def with_options(self, **changes) -> "WeightArgs":
        return replace(self, **changes)


@dataclass(frozen=True)
class ActivationArgs:
    """int8. PER_TOKEN ranges are measured at run time, PER_TENSOR ones are fixed per timestep group."""

    granularity: Granularity = Granularity.PER_TOKEN
    symmetric: bool = True
    range: StaticRange = StaticRange.EXTREMES

    def __post_init__(self) -> None:
        if self.granularity not in (Granularity.PER_TOKEN, Granularity.PER_TENSOR):
            raise ValueError(f"activations are per_token or per_tensor, not {self.granularity.value}")
        if self.range is StaticRange.SAMPLED and not self.symmetric:
            raise ValueError("sampled activation ranges are symmetric; set symmetric=True or range extremes")

    @property
    def dynamic(self) -> bool:
        return self.granularity is Granularity.PER_TOKEN


@dataclass(frozen=True)
class QuantScheme:
    """Everything that decides the integer codes of a layer, given its calibration.

    scale_strength: exponent of a balanced scale, 0 to 1.
    bias_correction: the mean error that rounding leaves in each timestep group goes into the correction c.
    directions: how many of the strongest directions of a layer's input stay in 16 bits.
    paper_roles: shift and scale only where HTG applies them (inputs of qkv, fc1 and the attention
    projection); other layers are rounded plainly.
    """

    name: str
    weights: WeightArgs = WeightArgs()
    activations: ActivationArgs = ActivationArgs()
    shift: Shift = Shift.NONE
    scale: Scale = Scale.NONE
    scale_strength: float = 1.0
    hadamard: int = 1
    directions: int = 0
    partition: Partition = Partition.CALIBRATION
    interpolate: bool = False
    bias_correction: bool = False
    paper_roles: bool = False

    def __post_init__(self) -> None:
        if self.hadamard not in HADAMARD_ORDERS:
            raise ValueError(f"Hadamard block {self.hadamard} is not a power of 4 up to 256; choose 64 or 256")
        if not 0 <= self.scale_strength <= 1:
            raise ValueError(f"scale strength {self.scale_strength} is not between 0 and 1")
        if not 0 <= self.directions <= MOST_DIRECTIONS:
            raise ValueError(f"{self.directions} directions are not 0 to {MOST_DIRECTIONS}")
        if self.directions and not self.activations.dynamic:
            raise ValueError("directions are measured token by token; fixed ranges are there to avoid that")
        if self.hadamard > 1 and not self.activations.dynamic and self.activations.range is StaticRange.EXTREMES:
            raise ValueError("extremes are measured before a rotation; set hadamard=1, or range sampled")
        if self.hadamard > 1 and self.shift is Shift.MIDRANGE:
            raise ValueError("a mid-range shift before a Hadamard piles up in one coefficient; use shift mean")

    @property
    def needs_calibration(self) -> bool:
        return not (
            self.shift is Shift.NONE
            and self.scale is Scale.NONE
            and self.activations.dynamic
            and not self.bias_correction
            and not self.directions
            and self.weights.rounding is Rounding.NEAREST
        )

    def with_options(self, **changes) -> "QuantScheme":
        return replace(self, **changes)


_BEST_W8A8 = QuantScheme(
    "W8A8",
    WeightArgs(8, rounding=Rounding.GUIDED),
    ActivationArgs(Granularity.PER_TOKEN, symmetric=False),
    shift=Shift.MEAN,
    scale=Scale.BALANCED,
    hadamard=256,
    directions=4,
)

PRESETS = {
    scheme.name: scheme
    for scheme in (
        _BEST_W8A8,
        QuantScheme(
            "W4A8",
            WeightArgs(4, 16, symmetric=False, rounding=Rounding.GUIDED),
            # at 4 bits the weights decide: a zero point per token buys nothing
            ActivationArgs(Granularity.PER_TOKEN, symmetric=True),
            shift=Shift.MEAN,
            scale=Scale.BALANCED,
            scale_strength=0.5,
            hadamard=256,
        ),
        _BEST_W8A8.with_options(name="W8A8 fast", hadamard=1, directions=0),
        _BEST_W8A8.with_options(
            name="W8A8 static",
            directions=0,
            # one step for all tokens is set by the largest, whose channels are not those of the average: held-out
            # prompts prefer less of a scale; ranges fall steadily with sigma
            scale_strength=0.7,
            interpolate=True,
            activations=ActivationArgs(Granularity.PER_TENSOR, symmetric=True, range=StaticRange.SAMPLED),
        ),
        QuantScheme(
            "htg_paper",
            WeightArgs(8),
            ActivationArgs(Granularity.PER_TENSOR, symmetric=False),
            shift=Shift.MIDRANGE,
            scale=Scale.PAPER,
            partition=Partition.PAPER,
            paper_roles=True,
        ),
        QuantScheme("rtn_w8a8", WeightArgs(8), ActivationArgs()),
        QuantScheme("rtn_w4a8", WeightArgs(4, symmetric=False), ActivationArgs()),
    )
}


def group_size_for(features: int, wanted: int) -> int | None:
    """The multiple of 4 that divides K and is nearest to `wanted` by ratio, at most twice it; None without one."""
    sizes = [size for size in range(4, 2 * wanted + 1, 4) if features % size == 0]
    return min(sizes, key=lambda size: (max(size / wanted, wanted / size), size), default=None)


def hadamard_for(features: int, wanted: int) -> int:
    """The largest power of 4 up to `wanted` that divides K; 1 leaves the layer unrotated."""
    order = wanted
    while order > 1 and features % order:
        order //= 4
    return order
