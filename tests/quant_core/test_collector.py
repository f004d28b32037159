"""Collecting over sigma: bins by value, a bounded number of them, and hooks that go away."""

import itertools
import math
import weakref

import pytest
import torch
from dit_quant.quant_core.collector import Collector
from dit_quant.quant_core.observers import NonFiniteActivation
from torch import nn

FIELDS = ("count", "mean", "minimum", "maximum", "second_moment", "rows", "row_bin")


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
        torch.testing.assert_close(layers["a"].mean[row], x.double().mean(dim=0).float(), rtol=2**-22, atol=1e-7)


@pytest.mark.parametrize("flow", [True, False], ids=["flow", "eps"])
@pytest.mark.parametrize("max_bins", [1, 2, 7])
def test_beyond_max_bins_nothing_is_lost(max_bins, flow):
    """Random sigmas (an SDE sampler), twice; layer b skips some of them, another all."""
    samples = inputs(80)
    sigmas = torch.rand(40, generator=torch.Generator().manual_seed(1)).tolist() * 2
    collector = Collector(dict.fromkeys(("a", "b", "silent"), 7), flow=flow, covariance=7, max_bins=max_bins)
    used = {"a": [], "b": []}
    for i, (sigma, x) in enumerate(zip(sigmas, samples, strict=True)):
        collector.at(sigma)
        for name in ("a", "b"):
            if name == "a" or i % 3 == 0:
                collector.record(name, x)
                used[name].append(x)
    found, layers, silent = collector.results()
    assert set(silent) == {"silent"}
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


@pytest.mark.parametrize("max_bins", [1, 3, 64])
def test_bins_are_never_more_than_allowed(max_bins):
    """Also while they are merged: memory is planned for max_bins."""
    collector = Collector({"a": 7}, flow=True, covariance=None, max_bins=max_bins)
    for sigma, x in zip(torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist(), inputs(20), strict=True):
        collector.at(sigma)
        collector.record("a", x)
        assert len(collector.sigmas) <= max_bins
        assert len(collector.observers["a"].count) == max_bins


def test_bins_of_an_earlier_pass_stay():
    collector = Collector({"a": 7}, flow=True, covariance=None, sigmas=[0.5, 0.9])
    for sigma in (0.9, 0.88, 0.1, 0.5):
        collector.at(sigma)
        collector.record("a", torch.full((1, 7), sigma))
    found, layers, _ = collector.results()
    assert found == (0.9, 0.5)
    assert layers["a"].minimum[:, 0].tolist() == pytest.approx([0.88, 0.1])


def scenario(seed, collectors):
    """Calls of a made-up model whose q, k and v mostly read one tensor; gives every collector the same inputs."""
    random = torch.Generator().manual_seed(seed)

    def chance(share):
        return float(torch.rand((), generator=random)) < share

    def record(name, x):
        for collector in collectors:
            if name in collector.observers:
                collector.record(name, x)

    for call in range(12):
        for collector in collectors:
            collector.at((0.9, 0.5, 0.2)[call % 3])
        x, other = (torch.randn(5 + call % 3, 7, generator=random) for _ in range(2))
        record("q", x)
        if chance(0.1):
            x *= 2  # in place: k and v read something else
        if not chance(0.1):
            record("k", x)
        if chance(0.1):
            record("k", x)
        record("v", other if call > 6 and chance(0.2) else x)
        record("out", other)
        record("q2", x)
        record("k2", x)
        if chance(0.3):
            record("q", x)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_shared_inputs_count_as_if_observed_separately(seed, inference):
    names = ("q", "k", "v", "out", "q2", "k2", "silent")
    together = Collector(dict.fromkeys(names, 7), flow=True, covariance=7, rows=3, max_bins=2)
    apart = {name: Collector({name: 7}, flow=True, covariance=7, rows=3, max_bins=2) for name in names}
    with torch.inference_mode(inference):
        scenario(seed, [together, *apart.values()])
    assert together.observers["q2"] is together.observers["k2"]
    assert together.nbytes < sum(collector.nbytes for collector in apart.values())
    found, layers, silent = together.results()
    assert set(silent) == {"silent"}
    assert layers["q2"] is layers["k2"]
    for name in names[:-1]:
        alone_sigmas, alone, _ = apart[name].results()
        assert alone_sigmas == found
        for field in FIELDS:
            assert torch.equal(getattr(layers[name], field), getattr(alone[name], field)), (name, field)


class Attention(nn.Module):
    def __init__(self, spoil=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(7, 7) for _ in range(3))
        self.out, self.spoil = nn.Linear(7, 7), spoil

    def forward(self, x):
        x = x + 1
        q = self.q(x)
        if self.spoil:
            x[0] = 0
        return self.out(q + self.k(x) * self.v(x))


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("spoil", [True, False])
def test_a_hooked_model_shares_what_it_reads_unchanged(spoil, inference):
    torch.manual_seed(0)
    model = Attention(spoil).requires_grad_(False)
    layers = dict(model.named_children())
    collector = Collector(dict.fromkeys(layers, 7), flow=True, covariance=7)
    with torch.inference_mode(inference), collector.attached(layers):
        for sigma, x in zip((0.9, 0.5, 0.9), inputs(3), strict=True):
            collector.at(sigma)
            model(x)
    readers = list(collector.groups().values())
    assert readers == ([["q"], ["k", "v"], ["out"]] if spoil else [["q", "k", "v"], ["out"]])


def test_one_tensor_read_in_two_calls_is_two_inputs():
    """A context that lives through the whole sampling: k reads it at one noise level, v at another."""
    x = inputs(1)[0]
    collector = Collector(dict.fromkeys("kv", 7), flow=True, covariance=7)
    for sigma, name in ((0.9, "k"), (0.5, "v")):
        collector.at(sigma)
        collector.record(name, x)
    _, layers, _ = collector.results()
    assert layers["k"].count.tolist() == [len(x), 0]
    assert layers["v"].count.tolist() == [0, len(x)]


def test_an_input_is_not_kept_alive():
    """Activations are large: a tensor that only the collector knows is gone."""
    collector = Collector(dict.fromkeys("qk", 7), flow=True, covariance=7)
    collector.at(0.5)
    x = torch.ones(3, 7)
    gone = weakref.ref(x)
    collector.record("q", x)
    del x
    assert gone() is None


def test_statistics_are_handed_over():
    collector = Collector({"a": 7}, flow=True, covariance=7)
    collector.at(0.5)
    collector.record("a", inputs(1)[0])
    moment = collector.observers["a"].moment
    _, layers, _ = collector.results()
    assert layers["a"].second_moment.data_ptr() == moment.data_ptr()
    assert not collector.observers


def test_statistics_made_in_inference_mode_are_ordinary_tensors():
    collector = Collector({"a": 7}, flow=True, covariance=7, max_bins=2)
    with torch.inference_mode():
        for sigma, x in zip((0.9, 0.5, 0.1), inputs(3), strict=True):
            collector.at(sigma)
            collector.record("a", x)
        _, layers, _ = collector.results()
    assert not any(getattr(layers["a"], field).is_inference() for field in FIELDS)


def test_an_empty_input_counts_nothing():
    collector = Collector({"a": 7}, flow=True, covariance=7)
    collector.at(0.5)
    collector.record("a", torch.zeros(0, 7))
    assert set(collector.results()[2]) == {"a"}


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


def test_a_paused_collector_records_nothing():
    """And goes on afterwards, whatever happened."""
    layer = torch.nn.Linear(4, 4)
    collector = Collector({"a": 4}, flow=True, covariance=None)
    collector.at(0.5)
    with collector.attached({"a": layer}):
        with collector.paused():
            layer(torch.ones(3, 4))
        with pytest.raises(RuntimeError), collector.paused():
            layer(torch.ones(3, 5))
        layer(torch.ones(2, 4))
    assert collector.results()[1]["a"].count.tolist() == [2]


def test_layers_that_run_between_calls_are_not_part_of_one():
    """A text adapter of the model, which the host runs before sampling and again for the next prompt."""
    layers = {"adapter": nn.Linear(4, 4), "block": nn.Linear(4, 4)}
    collector = Collector(dict.fromkeys(layers, 4), flow=True, covariance=None)
    with collector.attached(layers):
        for _ in range(2):
            layers["adapter"](torch.ones(3, 4))
            collector.at(0.5)
            layers["block"](torch.ones(2, 4))
            collector.at(None)
    _, found, silent = collector.results()
    assert found["block"].count.tolist() == [4]
    assert set(silent) == {"adapter"}


def test_what_is_no_tensor_is_not_recorded():
    """The voxels of 3D models, in a class of their own."""
    layer = nn.Linear(4, 4)
    layer.forward = lambda voxels: voxels
    collector = Collector({"a": 4}, flow=True, covariance=None)
    collector.at(0.5)
    with collector.attached({"a": layer}):
        layer(object())
    assert set(collector.results()[2]) == {"a"}


def test_hooks_are_gone_after_an_exception():
    model = nn.Linear(7, 7)
    collector = Collector({"fc": 7}, flow=True, covariance=None)
    collector.at(0.5)
    with pytest.raises(NonFiniteActivation, match="fc"), collector.attached({"fc": model}):
        model(torch.full((2, 7), math.nan))
    assert not model._forward_pre_hooks
    model(torch.full((2, 7), math.nan))
