"""Which format every layer gets, so that the model fits a number of bytes: a multiple-choice knapsack."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

GB = 2**30


class OverBudget(ValueError):
    """Even the smallest choice is too large; the message says by how much and what could go."""


@dataclass(frozen=True)
class Choice:
    """One format a layer could take: bytes of its tensors, and the squared error it adds to the result."""

    format: str
    nbytes: int
    error: float


def choose(options: Mapping[str, Sequence[Choice]], budget: int, fixed: int = 0) -> dict[str, Choice]:
    """One choice per layer with the least total error found within `budget` bytes, of which `fixed` are spent.

    Greedy on the lower convex hull of each layer's choices, the most error saved per byte first: the optimum of
    the LP relaxation up to the first step that does not fit; cheaper steps of other layers then fill what is left
    (Sinha & Zoltners, 1979). The error exceeds the optimum by less than that one step saves, and never grows with
    the budget. Ties go by name. Raises OverBudget.
    """
    hulls = {name: lower_hull(choices) for name, choices in options.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - fixed - sum(choice.nbytes for choice in chosen.values())
    if left < 0:
        fixed += sum(hull[0].nbytes for hull in hulls.values() if len(hull) == 1)
        raise OverBudget(
            f"{budget / GB:.3f} GB wanted, the smallest choice needs {at_least(budget - left)} GB, of which "
            f"{at_least(fixed)} GB cannot be made smaller; ask for more, or skip fewer layers"
        )
    for name, index in _steps(hulls):
        before, after = hulls[name][index], hulls[name][index + 1]
        # where an earlier step of the layer was too large, the later ones start elsewhere
        if chosen[name] is before and after.nbytes - before.nbytes <= left:
            left -= after.nbytes - before.nbytes
            chosen[name] = after
    return chosen


def at_least(nbytes: int) -> str:
    """GB with three digits behind the point, such that what is asked for in this many holds all bytes."""
    return f"{ceil(1000 * nbytes / GB) / 1000:.3f}"


def lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that some exchange rate between bytes and error prefers, smallest first."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.error, c.format)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _saved(hull[-2], hull[-1]) < _saved(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _saved(before: Choice, after: Choice) -> float:
    """Squared error saved per byte more."""
    return (before.error - after.error) / (after.nbytes - before.nbytes)


def _steps(hulls: Mapping[str, list[Choice]]) -> list[tuple[str, int]]:
    """Steps up the hulls as (layer, index of the choice left), the most error saved per byte first."""
    steps = [(name, i) for name, hull in hulls.items() for i in range(len(hull) - 1)]
    rates = {(n, i): _saved(*pair) for n, hull in hulls.items() for i, pair in enumerate(itertools.pairwise(hull))}
    return sorted(steps, key=lambda step: (-rates[step], step))
