"""What reaches a sampling has a description: other for other values, the same however often it is asked for."""

import functools
import json
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from dit_quant.quant_core.identity import describe
from torch import nn


def closure(scale, other=None):
    def patch(x):
        return x * scale if other is None else other(x)

    return patch


def defaulting(scale, offset=0.0):
    def patch(x, scale=scale, *, offset=offset):
        return x * scale + offset

    return patch


def normed(mean):
    layer = nn.BatchNorm1d(3, affine=False)
    layer.running_mean.fill_(mean)
    return layer


def with_memory(momentum):
    average = torch.zeros(2)

    def guide(x):
        nonlocal average
        average = momentum * average + x
        return average

    return guide


@dataclass
class Net:
    strength: float = 1.0
    hint: torch.Tensor = field(default_factory=lambda: torch.zeros(3))
    model: nn.Module | None = None
    previous: "Net | None" = None
    cond_hint: torch.Tensor | None = None


def linear(seed, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.Linear(4, 4)
    vars(layer).update(changes)
    return layer


class Private:
    def __init__(self, strength):
        self._strength, self._cache = strength, object()


class Guider:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x):
        return self.scale * x

    def method(self, x):
        return x


DIFFERENT = {
    "numbers": (1, 2),
    "kinds of number": (1, "1"),
    "tensors": (torch.zeros(3), torch.ones(3)),
    "lists of tensors": ([torch.zeros(3)], [torch.ones(3)]),
    "arrays": (np.zeros(3), np.ones(3)),
    "dtypes": (torch.float16, torch.bfloat16),
    "classes": (int, str),
    "closures": (closure(0.7), closure(0.3)),
    "closures within": (closure(1, closure(0.7)), closure(1, closure(0.3))),
    "functions with memory": (with_memory(0.5), with_memory(0.9)),
    "defaults": (defaulting(0.7), defaulting(0.3)),
    "defaults of keywords": (defaulting(1, 0.7), defaulting(1, 0.3)),
    "partials": (functools.partial(closure, 1), functools.partial(closure, 2)),
    "private numbers": (Private(0.5), Private(1.5)),
    "callable objects": (Guider(1), Guider(2)),
    "methods": (Guider(1).method, Guider(2).method),
    "objects": (Net(1.0), Net(0.5)),
    "tensors of objects": (Net(hint=torch.zeros(3)), Net(hint=torch.ones(3))),
    "networks": (linear(1), linear(2)),
    "buffers of networks": (normed(0.0), normed(1.0)),
    "networks of objects": (Net(model=linear(1)), Net(model=linear(2))),
    "settings of networks": (linear(1, multiplier=1.0), linear(1, multiplier=1000.0)),
    "chained objects": (Net(previous=Net(1.0)), Net(previous=Net(0.5))),
    "sets": ({1, 2}, {1, 3}),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_other_values_are_told_apart(kind):
    left, right = DIFFERENT[kind]
    assert describe(left) != describe(right)
    assert describe({"a": [left]}) != describe({"a": [right]})
    for value in (left, right):
        assert describe(value) == describe(value)
        json.dumps(describe(value))


def test_equal_values_are_the_same_whichever_object_holds_them():
    def net():
        return Net(0.3, torch.ones(3), linear(3), Net())

    for make in (net, lambda: closure(0.7, closure(2)), lambda: Guider(4).method):
        assert describe(make()) == describe(make())


def test_what_changes_while_it_is_used_stays_what_it_was():
    """An interrupted calibration is found again by the same key."""
    guide, net = with_memory(0.5), Net()
    before = describe([guide, net])
    guide(torch.ones(2))
    net.cond_hint, net.strength = torch.ones(5), 0.25
    assert describe([guide, net]) == before
    # a fresh one that has never been used is the same
    assert describe(with_memory(0.5)) == before[0]


NOWHERE = torch.ones(3, device="meta")


@pytest.mark.parametrize(
    "value",
    [str.lower, torch.Tensor.add, "".join, len, NOWHERE, torch.eye(3).to_sparse(), object(), json],
    ids=["descriptor", "torch's descriptor", "bound", "builtin", "meta", "sparse", "object", "module"],
)
def test_everything_has_a_description(value):
    json.dumps(describe({"a": value}))


def test_what_holds_itself_ends():
    net = Net()
    net.previous = net
    loop: list = []
    loop.append(loop)
    json.dumps(describe([net, loop]))


def test_another_process_says_the_same():
    code = (
        "import json, torch\n"
        "from dit_quant.quant_core.identity import describe\n"
        "def make(scale):\n"
        "    return lambda x: x * scale\n"
        "print(json.dumps(describe({'a': make(0.7), 'b': {3, 1, 2}, 'c': torch.ones(3), 'd': torch.nn.ReLU()})))\n"
    )
    found = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert found[0].stdout == found[1].stdout != ""
