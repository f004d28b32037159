"""Declarative description of a DiT family."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

MODULATION = "modulation: one token per call, and sensitive"
OUTSIDE = "outside the transformer blocks"


class Role(Enum):
    """What produces a Linear's input, and so what can be folded into the producer."""

    MODULATED = "modulated"  # adaLN: takes shift and scale
    NORMED = "normed"  # a norm with weight and bias: takes shift and scale, the same at every timestep
    ATTENTION = "attention"  # softmax average of V: takes shift and scale through V
    CONTEXT = "context"  # the encoded prompt, shared by all blocks: nothing can be folded
    ACTIVATED = "activated"  # behind a non-linearity: nothing can be folded
    OTHER = "other"


@dataclass(frozen=True)
class Site:
    """Linears that share one input, and the producer that can absorb (z, s).

    Names are relative to a block. modulation: (Linear, index of beta's chunk, index of gamma's chunk).
    values: the Linears whose last third of rows is V, all of which must be folded together.
    """

    consumers: tuple[str, ...]
    role: Role
    modulation: tuple[str, int, int] | None = None
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """block: pattern of a transformer block's path; marker: a key that only this family has.

    keep: patterns of Linears inside blocks that stay in floating point, with the reason.
    """

    name: str
    marker: str
    block: str
    sites: tuple[Site, ...]
    keep: tuple[tuple[str, str], ...] = ()

    def split(self, name: str) -> tuple[str, str] | None:
        """'joint_blocks.0.x_block.mlp.fc1' -> ('joint_blocks.0', 'x_block.mlp.fc1'), None outside blocks."""
        found = re.match(rf"({self.block})\.(.+)$", name)
        return (found[1], found[2]) if found else None

    def role(self, name: str) -> Role:
        parts = self.split(name)
        if parts is None:
            return Role.OTHER
        return next((site.role for site in self.sites if parts[1] in site.consumers), Role.OTHER)

    def reason_to_keep(self, name: str) -> str | None:
        """Why a Linear stays in floating point, or None when it is to be rounded."""
        parts = self.split(name)
        if parts is None:
            return OUTSIDE
        return next((reason for pattern, reason in self.keep if re.search(pattern, parts[1])), None)


def family_of(keys: Iterable[str], families: Iterable[Family]) -> Family | None:
    """The family whose marker is among the parameter names, or None."""
    names = list(keys)
    return next((family for family in families if any(re.match(family.marker, name) for name in names)), None)
