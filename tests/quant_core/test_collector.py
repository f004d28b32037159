"""Collecting over sigma: bins by value, a bounded number of them, and hooks that go away."""

import itertools
import math

import pytest
import torch
from dit_quant.quant_core.collector import Collector
from dit_quant.quant_core.observers import NonFiniteActivation
from torch import nn


def inputs(count, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(3 + i % 4, 7, generator=random) for i in range(count)]


def test_bins_follow_the_value_of_sigma_not_the_order():
    samples, sigmas = inputs(6), [0.2, 0.9, 0.5, 0.9, 0.2 * (1 + 1e-7), 0.5]
    collector = Collector({"a": 7}, flow=True, covariance=None)
    for sigma, x in zip(sigmas, samples, strict=True):
        collector.at(sigma)
        collector.record("a", x)
    found, layers, silent = collector.results()
    assert found == (0.9, 0.5, 0.2)
    assert not silent
    expected = [
        torch.cat([samples[1], samples[3]]),
        torch.cat([samples[2], samples[5]]),
        torch.cat([samples[0], samples[4]]),
    ]
    assert layers["a"].count.tolist() == [len(x) for x in expected]
    for row, x in enumerate(expected):
        torch.testing.assert_close(layers["a"].mean[row], x.double().mean(dim=0).float(), rtol=2**-23, atol=1e-7)


@pytest.mark.parametrize("flow", [True, False], ids=["flow", "eps"])
@pytest.mark.parametrize("max_bins", [1, 2, 7])
def test_beyond_max_bins_nothing_is_lost(max_bins, flow):
    """Random sigmas (an SDE sampler), twice; layer b skips some of them."""
    samples = inputs(80)
    sigmas = torch.rand(40, generator=torch.Generator().manual_seed(1)).tolist() * 2
    collector = Collector({"a": 7, "b": 7}, flow=flow, covariance=7, max_bins=max_bins)
    used = {"a": [], "b": []}
    for i, (sigma, x) in enumerate(zip(sigmas, samples, strict=True)):
        collector.at(sigma)
        for name in ("a", "b"):
            if name == "a" or i % 3 == 0:
                collector.record(name, x)
                used[name].append(x)
    found, layers, _ = collector.results()
    assert len(found) <= max_bins
    assert all(a > b for a, b in itertools.pairwise(found))
    for name, statistics in layers.items():
        pool = torch.cat(used[name])
        assert statistics.count.shape == (len(found),)
        assert float(statistics.count.sum()) == len(pool)
        assert torch.equal(statistics.minimum.amin(dim=0), pool.amin(dim=0))
        assert torch.equal(statistics.maximum.amax(dim=0), pool.amax(dim=0))
        total = (statistics.mean.double() * statistics.count[:, None]).sum(dim=0)
        # means are stored in fp32
        torch.testing.assert_close(total, pool.double().sum(dim=0), rtol=0, atol=2**-22 * len(pool))
        moment = pool.double().T @ pool.double() / len(pool)
        torch.testing.assert_close(statistics.second_moment[0].double(), moment, rtol=0, atol=len(pool) * 2**-24 * 4)


def test_the_closest_pair_in_log_snr_is_merged():
    collector = Collector({"a": 7}, flow=True, covariance=None, max_bins=3)
    for sigma in (0.99, 0.6, 0.5, 0.01):
        collector.at(sigma)
        collector.record("a", torch.full((1, 7), sigma))
    found, layers, _ = collector.results()
    assert found == (0.99, 0.6, 0.01)
    assert layers["a"].count.tolist() == [1, 2, 1]
    assert layers["a"].mean[1, 0].item() == pytest.approx(0.55)


def test_silent_layers_are_listed():
    collector = Collector({"a": 7, "b": 7}, flow=True, covariance=None)
    collector.at(0.5)
    collector.record("a", inputs(1)[0])
    _, layers, silent = collector.results()
    assert set(layers) == {"a"}
    assert set(silent) == {"b"}


def test_recording_before_any_sigma_is_refused():
    with pytest.raises(RuntimeError, match="at\\(sigma\\)"):
        Collector({"a": 7}, flow=True, covariance=None).record("a", inputs(1)[0])


def test_hooks_record_the_input_and_leave_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 3))
    layers = {"0": model[0], "2": model[2]}
    collector = Collector(dict.fromkeys(layers, 7), flow=True, covariance=None)
    x = inputs(1)[0]
    collector.at(0.5)
    plain = model(x)
    with collector.attached(layers):
        assert torch.equal(model(x), plain)
    model(2 * x)
    _, found, _ = collector.results()
    assert torch.equal(found["0"].maximum[0], x.amax(dim=0))
    assert torch.equal(found["2"].maximum[0], model[1](model[0](x)).detach().amax(dim=0))


def test_hooks_are_gone_after_an_exception():
    model = nn.Linear(7, 7)
    collector = Collector({"fc": 7}, flow=True, covariance=None)
    collector.at(0.5)
    with pytest.raises(NonFiniteActivation, match="fc"), collector.attached({"fc": model}):
        model(torch.full((2, 7), math.nan))
    assert not model._forward_pre_hooks
    model(torch.full((2, 7), math.nan))
