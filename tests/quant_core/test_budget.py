"""The budget: never exceeded, near the optimum, better with more bytes, the same every time."""

import itertools
import math
import random
import re

import pytest
from dit_quant.quant_core.budget import GB, Choice, OverBudget, choose, lower_hull
from hypothesis import given
from hypothesis import strategies as st

choices = st.lists(
    st.builds(Choice, st.sampled_from("abcd"), st.integers(1, 60), st.floats(0, 100, allow_subnormal=False)),
    min_size=1,
    max_size=4,
)
instances = st.dictionaries(st.sampled_from(["q", "k", "v", "fc1", "fc2"]), choices, min_size=1)


def error(chosen) -> float:
    return sum(choice.error for choice in chosen.values())


def nbytes(chosen) -> int:
    return sum(choice.nbytes for choice in chosen.values())


def best(options, budget: int) -> float:
    """The optimum, by trying everything."""
    tried = (c for c in itertools.product(*options.values()) if sum(x.nbytes for x in c) <= budget)
    return min((sum(x.error for x in c) for c in tried), default=math.inf)


def largest_step(options) -> float:
    """The most error that one step up any layer's hull saves."""
    hulls = [lower_hull(choices) for choices in options.values()]
    return max((a.error - b.error for hull in hulls for a, b in itertools.pairwise(hull)), default=0.0)


@given(instances, st.integers(0, 300))
def test_near_the_optimum_within_the_budget(options, budget):
    optimum = best(options, budget)
    if optimum == math.inf:
        with pytest.raises(OverBudget):
            choose(options, budget)
        return
    chosen = choose(options, budget)
    assert nbytes(chosen) <= budget
    assert all(chosen[name] in options[name] for name in options)
    # the bound of the greedy: less than the one step that did not fit (and fp64 sums)
    assert optimum - 1e-9 <= error(chosen) <= optimum + largest_step(options) + 1e-9


@given(instances, st.lists(st.integers(0, 300), min_size=2, max_size=8))
def test_more_bytes_are_never_worse(options, budgets):
    smallest = sum(min(c.nbytes for c in choices) for choices in options.values())
    errors = [error(choose(options, smallest + extra)) for extra in sorted(budgets)]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(errors))


@given(instances)
def test_the_order_of_layers_and_choices_does_not_matter(options):
    budget = sum(max(c.nbytes for c in choices) for choices in options.values()) * 2 // 3
    budget = max(budget, sum(min(c.nbytes for c in choices) for choices in options.values()))
    shuffled = list(options.items())
    random.Random(0).shuffle(shuffled)
    assert choose({n: c[::-1] for n, c in shuffled}, budget) == choose(options, budget)


def test_the_sensitive_layer_gets_the_bytes():
    def formats(weight: float) -> list[Choice]:
        return [Choice("4", 4, 1.0 * weight), Choice("8", 8, 0.05 * weight), Choice("16", 16, 0.0)]

    options = {"dull": formats(0.1), "sensitive": formats(10.0), "common": formats(1.0)}
    assert {n: c.format for n, c in choose(options, 16).items()} == {"dull": "4", "sensitive": "8", "common": "4"}
    assert {n: c.format for n, c in choose(options, 20).items()} == {"dull": "4", "sensitive": "8", "common": "8"}
    # 8 bytes more for the dull layer's 4 to 8 bits are left over: nothing else fits
    assert {n: c.format for n, c in choose(options, 28).items()} == {"dull": "4", "sensitive": "16", "common": "8"}
    assert nbytes(choose(options, 1000)) == 48


def test_fills_up_with_smaller_steps():
    """The best step is too large for what is left; a worse one fits."""
    options = {
        "large": [Choice("4", 10, 100.0), Choice("8", 110, 0.0)],
        "small": [Choice("4", 10, 1.0), Choice("8", 20, 0.5)],
    }
    chosen = choose(options, 40)
    assert (chosen["large"].format, chosen["small"].format) == ("4", "8")


def test_equal_layers_are_served_by_name():
    options = {name: [Choice("4", 1, 1.0), Choice("8", 2, 0.0)] for name in ("b", "a", "c")}
    assert [n for n, c in choose(options, 5).items() if c.format == "8"] == ["b", "a"]


def test_the_hull_drops_what_nothing_prefers():
    small, dominated, above, large = (
        Choice("s", 10, 10.0),
        Choice("d", 12, 11.0),
        Choice("a", 15, 9.0),
        Choice("l", 20, 0.0),
    )
    assert lower_hull([above, large, dominated, small]) == [small, large]


def test_impossible_budget_names_the_numbers():
    options = {"a": [Choice("4", GB, 1.0)], "b": [Choice("4", 2 * GB, 1.0), Choice("8", 4 * GB, 0.0)]}
    with pytest.raises(OverBudget, match=r"3.500 GB wanted, the smallest choice needs 4.000 GB, of which 2.000 GB"):
        choose(options, 7 * GB // 2, fixed=GB)
    assert nbytes(choose(options, 4 * GB, fixed=GB)) == 3 * GB


@pytest.mark.parametrize("nbytes", [1, 12345, GB - 1, GB, GB + 1, 12 * GB + 345])
def test_what_a_refusal_asks_for_is_enough(nbytes):
    with pytest.raises(OverBudget) as refusal:
        choose({"a": [Choice("4", nbytes, 1.0)]}, nbytes - 1)
    asked = float(re.search(r"needs ([\d.]+) GB", str(refusal.value))[1])
    assert choose({"a": [Choice("4", nbytes, 1.0)]}, int(asked * GB))
