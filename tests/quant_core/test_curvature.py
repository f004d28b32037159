"""Curvature: gradients are those of the probe's loss, wherever the model runs, and add up to JᵀJ."""

import math

import pytest
import torch
from dit_quant.quant_core.curvature import PROBE_EVERY, CurvatureCollector, is_probed, probe_loss
from torch import nn


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Chain(nn.Module):
    """Two layers without a gradient of their own, and a nonlinearity between them."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 4)
        self.requires_grad_(False)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def collector(model, **options):
    layers = {"one": model.one, "two": model.two}
    return CurvatureCollector({name: layer.out_features for name, layer in layers.items()}, **options), layers


def expected_gradients(model, x, seed):
    """Of the probe's loss in the outputs of both layers, by plain autograd."""
    one = model.one(x).requires_grad_()
    two = model.two(torch.tanh(one))
    return torch.autograd.grad(probe_loss(two, seed), (one, two))


def blocks(g, width):
    g = g.flatten(0, -2)
    return torch.stack([part.T @ part for part in g.split(width, dim=1)])


@pytest.mark.parametrize("width", [6, 3, 2])
def test_gradients_are_those_of_the_probe(width):
    model, x = Chain(), normal(3, 7, 5)
    found, layers = collector(model, block=width)
    with found.attached(layers), torch.inference_mode():
        y = found.probe(lambda: model(x.clone()))
    assert torch.equal(y, model(x))
    assert not y.requires_grad
    for name, g in zip(layers, expected_gradients(model, x, 0), strict=True):
        count, own = found.shapes[name]
        assert own <= width
        assert count * own == g.shape[-1]
        assert torch.allclose(found.moments[name], blocks(g, own), rtol=1e-5, atol=1e-7)
    assert found.probes == 1


def test_moments_add_up_to_the_curvature():
    """Sum over tokens of JᵀJ / mean(v^2) for the linear last part; each entry's spread is that of chi-square."""
    model, x, count = Chain(), normal(1, 4, 5), 4000
    found, layers = collector(model)
    v = model(x)
    with found.attached(layers):
        for i in range(count):
            found.at_prompt(i)
            found.probe(lambda: model(x))
    slope = 1 - torch.tanh(model.one(x))[0] ** 2  # [M, 6]
    jacobian = model.two.weight[None] * slope[:, None]  # [M, 4, 6]
    exact = (jacobian.transpose(1, 2) @ jacobian).sum(dim=0) / v.square().mean()
    error = (found.moments["one"][0] / count - exact).norm() / exact.norm()
    # a sum of at least 4 independent squares: relative deviation of an entry below sqrt(2), of the mean / sqrt(count)
    assert float(error) < 4 * math.sqrt(2 / count)


def test_the_size_of_a_sample_does_not_matter():
    """Probes are relative to each sample's own output."""
    v = normal(2, 3, 4)
    v.requires_grad_()
    (one,) = torch.autograd.grad(probe_loss(v, 1), v)
    scaled = (v * torch.tensor([10.0, 0.1])[:, None, None]).detach().requires_grad_()
    (two,) = torch.autograd.grad(probe_loss(scaled, 1), scaled)
    assert torch.allclose(two * torch.tensor([10.0, 0.1])[:, None, None], one, rtol=1e-5)
    assert not torch.equal(one, torch.autograd.grad(probe_loss(v, 2), v)[0])


def test_nothing_is_recorded_outside_a_probe_and_hooks_leave_no_trace():
    model, x = Chain(), normal(2, 5)
    found, layers = collector(model)
    with found.attached(layers):
        model(x)
        model(x.requires_grad_())
    assert found.moments == {}
    assert not model.one._forward_hooks
    with pytest.raises(ZeroDivisionError), found.attached(layers):
        found.probe(lambda: 1 / 0)
    assert not model.one._forward_hooks
    with found.attached(layers):
        model(x)
    assert found.moments == {}
    assert found.probes == 0


def test_a_model_without_attached_layers_is_no_probe():
    model = Chain()
    found, _ = collector(model)
    assert torch.equal(found.probe(lambda: model(normal(2, 5))), model(normal(2, 5)))
    assert found.probes == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_left_out(bad):
    found = CurvatureCollector({"a": 4})
    found.record("a", torch.ones(3, 4))
    found.record("a", torch.tensor([[bad, 0, 0, 0]]))
    assert torch.equal(found.moments["a"], torch.full((1, 4, 4), 3.0))
    assert found.nbytes == 64


def test_giving_up_forgets_and_says_why():
    found = CurvatureCollector({"a": 4}, every=1)
    assert found.due()
    found.record("a", torch.ones(3, 4))
    found.give_up("OutOfMemoryError: 3 GB")
    assert found.moments == {}
    assert not found.due()
    assert found.note() == "curvature not measured (OutOfMemoryError: 3 GB): plain GPTQ is used, at some loss"


@pytest.mark.parametrize("calls", [4, 6, 8, 20, 28, 50])
@pytest.mark.parametrize("prompts", [16, 64])
def test_probes_are_spread_evenly(calls, prompts):
    """As many as asked for, give or take what the edges of the interval let in, over prompts and over calls."""
    probed = torch.tensor([[is_probed(p, c) for c in range(calls)] for p in range(prompts)])
    wanted = calls * prompts / PROBE_EVERY
    assert bool(probed[0, 0])
    assert wanted - 1 <= int(probed.sum()) <= wanted + 4
    thirds = [int(part.sum()) for part in probed.tensor_split(3, dim=1)]
    assert min(thirds) >= 1


def test_a_prompt_is_probed_where_it_is_whatever_came_before():
    one, two = CurvatureCollector({"a": 4}), CurvatureCollector({"a": 4})
    for _ in range(17):
        two.due()
    for found in (one, two):
        found.at_prompt(3)
    assert [one.due() for _ in range(30)] == [two.due() for _ in range(30)]
