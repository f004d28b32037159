"""Streaming statistics: equal to those of all samples at once, in whatever order they come."""

import pytest
import torch
from dit_quant.quant_core.observers import LayerObserver, NonFiniteActivation, covariance_block
from drift import drift

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize(("K", "block"), [(1, 1), (7, None), (33, 33), (100, 20), (64, 16)])
def test_statistics_are_those_of_the_raw_samples(K, block):
    found = drift(K, 5)
    s = found.statistics(block)
    for t, x in enumerate(found.samples):
        assert s.count[t] == len(x)
        assert torch.equal(s.minimum[t], x.amin(dim=0))
        assert torch.equal(s.maximum[t], x.amax(dim=0))
        # a float64 sum, stored as fp32
        torch.testing.assert_close(s.mean[t], x.double().mean(dim=0).float(), rtol=2**-23, atol=1e-7)
    if block is None:
        assert s.second_moment is None
        return
    pool = torch.cat(found.samples).double()
    full = pool.T @ pool / len(pool)
    exact = torch.stack([full[i : i + block, i : i + block] for i in range(0, K, block)])
    # fp32 sums over M = 135 tokens: at most M u of the sum of magnitudes, sqrt(S_ii S_jj) bounds it
    size = exact.diagonal(dim1=1, dim2=2).sqrt()
    assert ((s.second_moment - exact).abs() <= len(pool) * 2**-24 * size[:, :, None] * size[:, None, :]).all()


def test_streaming_in_any_order_equals_one_call():
    found = drift(33, 4)
    whole = found.statistics(33)
    pieces = [(t, piece) for t, x in enumerate(found.samples) for piece in x.split(7)]
    observer = LayerObserver("layer", 33, 33)
    for at in torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist():
        row, piece = pieces[at]
        observer.update(piece[None], row, 0.5)  # leading dimensions are tokens too
    streamed = observer.statistics([0, 1, 2, 3])
    assert torch.equal(streamed.count, whole.count)
    assert torch.equal(streamed.minimum, whole.minimum)
    assert torch.equal(streamed.maximum, whole.maximum)
    torch.testing.assert_close(streamed.mean, whole.mean, rtol=2**-23, atol=1e-7)
    scale = float(whole.second_moment.abs().amax())
    torch.testing.assert_close(streamed.second_moment, whole.second_moment, rtol=0, atol=2**-18 * scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_names_layer_and_sigma(bad):
    observer = LayerObserver("blocks.3.fc1", 7, 7)
    x = torch.zeros(5, 7)
    observer.update(x, 0, 0.9)
    x[3, 2] = bad
    with pytest.raises(NonFiniteActivation, match=r"blocks\.3\.fc1.*sigma 0\.25"):
        observer.update(x, 1, 0.25)
    # the bad call left no trace in the sums
    assert float(observer.count.sum()) == 5
    assert torch.isfinite(observer.total).all()


def test_merging_bins_conserves_everything():
    found = drift(7, 5)
    observer = LayerObserver("layer", 7, 7)
    for t, x in enumerate(found.samples):
        observer.update(x, t, 0.5)
    moment = observer.moment.clone()
    observer.merge_rows(1, 3)
    joined = torch.cat([found.samples[1], found.samples[3]])
    rest = [found.samples[0], joined, found.samples[2], found.samples[4]]
    s = observer.statistics([0, 1, 2, 3])
    assert s.count.tolist() == [len(x) for x in rest]
    for t, x in enumerate(rest):
        assert torch.equal(s.minimum[t], x.amin(dim=0))
        assert torch.equal(s.maximum[t], x.amax(dim=0))
        torch.testing.assert_close(s.mean[t], x.double().mean(dim=0).float(), rtol=2**-23, atol=1e-7)
    assert torch.equal(observer.moment, moment)


def test_statistics_have_no_effect_and_follow_the_order():
    found = drift(7, 3)
    observer = LayerObserver("layer", 7, None)
    for row, t in enumerate((2, 0, 1)):
        observer.update(found.samples[t], row, 0.5)
    first, second = observer.statistics([1, 2, 0]), observer.statistics([1, 2, 0])
    plain = found.statistics()
    for field in ("count", "mean", "minimum", "maximum"):
        assert torch.equal(getattr(first, field), getattr(second, field))
        assert torch.equal(getattr(first, field), getattr(plain, field))


def test_a_skipped_sigma_takes_the_nearest_one_and_counts_nothing():
    observer = LayerObserver("layer", 7, None)
    observer.update(torch.full((5, 7), 1.0), 0, 0.9)
    observer.update(torch.full((5, 7), 4.0), 3, 0.1)
    s = observer.statistics([0, 1, 2, 3])
    assert s.count.tolist() == [5, 0, 0, 5]
    assert s.mean[:, 0].tolist() == [1, 1, 4, 4]
    assert s.minimum[:, 0].tolist() == [1, 1, 4, 4]


def test_a_layer_that_never_ran_says_so():
    with pytest.raises(ValueError, match="fc9: never ran"):
        LayerObserver("fc9", 7, None).statistics([])


def test_sums_round_trip():
    found = drift(33, 3)
    a, b = LayerObserver("layer", 33, 11), LayerObserver("layer", 33, 11)
    for t, x in enumerate(found.samples[:2]):
        a.update(x, t, 0.5)
    b.restore({name: value.clone() for name, value in a.tensors().items()})
    for observer in (a, b):
        observer.update(found.samples[2], 2, 0.1)
    for name, value in a.tensors().items():
        assert torch.equal(value, b.tensors()[name])


@pytest.mark.parametrize(
    ("K", "limit", "expected"),
    [
        (256, 1024, 256),
        (4096, 1024, 1024),
        (33, 1024, 33),
        (33, 16, 11),
        (1280, 1024, 256),
        (1024, 100, 256),
        (7, 1, 1),
    ],
)
def test_covariance_blocks_hold_whole_rotations(K, limit, expected):
    assert covariance_block(K, limit) == expected
    assert K % expected == 0
