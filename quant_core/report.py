"""What was rounded, what was not and why, and what it costs."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from .budget import Choice

# names in a line of a report
SHOWN = 6
# how a line begins that nobody should overlook
WARNING = "warning: "


@dataclass(frozen=True)
class LayerReport:
    """One rounded layer. weight_error: relative L2 of the rounded weight; note: any fallback that was taken;
    format: name of its scheme; backend: what will multiply it on this machine, where that is known; directions: how
    many of its input stay in 16 bits."""

    name: str
    features: tuple[int, int]
    bits: int
    group_size: int
    hadamard: int
    groups: int
    nbytes: int
    weight_error: float
    note: str = ""
    format: str = ""
    backend: str = ""
    directions: int = 0


@dataclass(frozen=True)
class SkippedLayer:
    """A Linear left in floating point."""

    name: str
    reason: str


@dataclass(frozen=True)
class QuantReport:
    """The outcome of quantizing a model. Sizes count every table of the quantized layers.

    choices: what a budget decided for every layer, or None where one scheme was asked for.
    """

    scheme: str
    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    notes: tuple[str, ...] = field(default=())
    choices: Mapping[str, Choice] | None = None

    @property
    def weights(self) -> int:
        return sum(layer.features[0] * layer.features[1] for layer in self.layers)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk and in memory per weight of the quantized layers, tables included."""
        return 8 * self.nbytes / max(self.weights, 1)

    @property
    def groups(self) -> int:
        """The largest number of timestep groups any layer uses."""
        return max((layer.groups for layer in self.layers), default=1)

    @property
    def directions_text(self) -> str:
        """For a person; empty where no layer has directions."""
        most = max((layer.directions for layer in self.layers), default=0)
        return f"up to {most} direction{'s' if most != 1 else ''} in 16 bits, " if most else ""

    def to_json(self) -> dict:
        result = {
            "scheme": self.scheme,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "groups": self.groups,
            "layers": [asdict(layer) for layer in self.layers],
            "skipped": [asdict(layer) for layer in self.skipped],
            "notes": list(self.notes),
        }
        if self.choices is not None:
            result["choices"] = {name: asdict(choice) for name, choice in self.choices.items()}
        return result

    def text(self) -> str:
        """A few lines for a person, fallbacks and skips listed."""
        lines = [
            f"{self.scheme}: {len(self.layers)} layers, {self.bits_per_weight:.2f} bits per weight, "
            f"{self.groups} timestep group{'s' if self.groups != 1 else ''}, {self.directions_text}"
            f"{self.nbytes / 2**20:.1f} MB instead of {2 * self.weights / 2**20:.1f} MB in 16 bits"
        ]
        lines += warnings_first(self.notes)
        noted = by_text((layer.note, layer.name) for layer in self.layers if layer.note)
        kept = by_text((layer.reason, layer.name) for layer in self.skipped)
        lines += [f"{names}: {note}" for note, names in noted.items()]
        lines += [f"kept in floating point ({reason}): {names}" for reason, names in kept.items()]
        return "\n".join(lines)


def warnings_first(lines: Iterable[str]) -> list[str]:
    return sorted(lines, key=lambda line: not line.startswith(WARNING))


def by_text(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """(text, layer) -> text: the first layers that it is about, and how many more."""
    found: dict[str, list[str]] = {}
    for text, name in pairs:
        found.setdefault(text, []).append(name)
    return {
        text: ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for text, names in found.items()
    }
