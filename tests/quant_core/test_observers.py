"""Streaming statistics: equal to those of all samples at once, in whatever order they come."""

import pytest
import torch
from dit_quant.quant_core import observers
from dit_quant.quant_core.observers import (
    COVARIANCE_TOKENS,
    LayerObserver,
    NonFiniteActivation,
    covariance_block,
    panel_starts,
    spread_tokens,
)
from dit_quant.quant_core.row_sample import ROWS
from drift import drift

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def assert_means(found, samples):
    """fp32 sums in a cascade: off by a few roundings of mean |x|, however many samples. Stored in fp32."""
    for mean, x in zip(found, samples, strict=True):
        exact = x.double().mean(dim=0)
        bound = 2**-24 * (4 * x.double().abs().mean(dim=0) + exact.abs())
        assert ((mean - exact).abs() <= bound).all()


@pytest.mark.parametrize(("K", "block"), [(1, 1), (7, None), (33, 33), (100, 20), (64, 16)])
def test_statistics_are_those_of_the_raw_samples(K, block):
    found = drift(K, 5)
    s = found.statistics(block)
    for t, x in enumerate(found.samples):
        assert s.count[t] == len(x)
        assert torch.equal(s.minimum[t], x.amin(dim=0))
        assert torch.equal(s.maximum[t], x.amax(dim=0))
    assert_means(s.mean, found.samples)
    if block is None:
        assert s.second_moment is None
        return
    pool = torch.cat(found.samples).double()
    full = pool.T @ pool / len(pool)
    exact = torch.stack([full[i : i + block, i : i + block] for i in range(0, K, block)])
    # fp32 sums over M = 135 tokens: at most M u of the sum of magnitudes, sqrt(S_ii S_jj) bounds it
    size = exact.diagonal(dim1=1, dim2=2).sqrt()
    assert ((s.second_moment - exact).abs() <= len(pool) * 2**-24 * size[:, :, None] * size[:, None, :]).all()


@pytest.mark.parametrize("count", [1000, 100_000])
def test_means_do_not_lose_digits_with_the_number_of_tokens(count):
    """0.1 added one by one in fp32 is off by hundreds of roundings after 1000 of them."""
    observer = LayerObserver("layer", 3, None)
    x = torch.full((count, 3), 0.1) + torch.tensor([0.0, 1.0, -7.0])
    observer.update(x, 0, 0.5)
    assert_means(observer.statistics([0]).mean, [x])


@pytest.mark.parametrize("K", [1, 127, 128, 129, 300, 1100])
def test_panels_cover_the_upper_triangle_once(K):
    """As x runs in calls of 1 and 50 tokens; symmetric to the bit, and equal to the whole product up to fp32."""
    x = torch.randn(51, K, generator=torch.Generator().manual_seed(0)) + 3
    observer = LayerObserver("layer", K, K)
    for part in x.split([1, 50]):
        observer.update(part, 0, 0.5)
    moment = observer.statistics([0]).second_moment[0]
    exact = x.double().T @ x.double() / len(x)
    size = exact.diagonal().sqrt()
    assert ((moment - exact).abs() <= (len(x) + 4) * 2**-24 * size[:, None] * size).all()
    assert len(panel_starts(K)) <= 8
    for i in panel_starts(K):
        end = i + panel_starts(K).step
        assert torch.equal(moment[i:end, end:], moment[end:, i:end].T)


def test_long_inputs_are_worked_on_in_chunks(monkeypatch):
    found = drift(33, 3)
    whole = found.statistics(11)
    monkeypatch.setattr(observers, "CHUNK", 4 * 33)
    chunked = found.statistics(11)
    for field in ("count", "minimum", "maximum", "rows", "row_bin"):
        assert torch.equal(getattr(whole, field), getattr(chunked, field))
    assert_means(chunked.mean, found.samples)
    scale = float(whole.second_moment.abs().amax())
    torch.testing.assert_close(chunked.second_moment, whole.second_moment, rtol=0, atol=2**-20 * scale)


@pytest.mark.parametrize("count", [1, 511, 1023, 1024, 1500, 4096, 5000])
def test_covariances_come_from_tokens_of_every_stretch(count):
    """All of a short input; of a long one, one of each few tokens, at places that differ."""
    chosen = spread_tokens(count, 0)
    if count < 2 * COVARIANCE_TOKENS:
        assert chosen == slice(None)
        return
    step = count // COVARIANCE_TOKENS
    assert torch.equal(chosen // step, torch.arange(count // step))
    assert int(chosen.amax()) < count
    places = torch.bincount(chosen % step, minlength=step)
    assert int(places.amin()) >= len(chosen) // step - 2
    assert not torch.equal(chosen, spread_tokens(count, 1))


def test_a_long_input_keeps_its_mean_and_about_its_covariance():
    """Means far from 0, as drift makes them: taken off again, nothing negative is left, nothing of them either."""
    K, M = 24, 4096
    mix = torch.randn(K, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ mix
    x = (x + 40 * torch.randn(K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).float()
    observer = LayerObserver("layer", K, K)
    for part in x.split(M // 2):
        observer.update(part, 0, 0.5)
    s = observer.statistics([0])
    mean = x.double().mean(dim=0)
    left = s.second_moment[0].double() - torch.outer(mean, mean)
    exact = torch.cov(x.T.double(), correction=0)
    # n = 1024 tokens of 4096: an entry is off by sqrt(2 S_ii S_jj / n) at most, one standard deviation
    size = exact.diagonal().sqrt()
    assert ((left - exact).abs() <= 5 * (2 / 1024) ** 0.5 * size[:, None] * size).all()
    # fp32 of moments as large as mean^2
    assert float(torch.linalg.eigvalsh(left)[0]) > -8 * 2**-24 * float(mean.square().sum())


def is_subset(rows, x) -> bool:
    """Whether every row is one of x, in fp16, and none twice."""
    same = (rows[:, None] == x.half()[None]).all(dim=2)
    return bool(same.any(dim=1).all()) and len(rows.unique(dim=0)) == len(rows)


def test_rows_are_tokens_of_their_timestep():
    found = drift(7, 5)
    s = found.statistics()
    assert s.rows.shape == (len(s.row_bin), 7)
    for t, x in enumerate(found.samples):
        assert (s.row_bin == t).sum() == min(len(x), ROWS)
        assert is_subset(s.rows[s.row_bin == t], x)
    observer = LayerObserver("layer", 7, None, rows=0)
    observer.update(found.samples[0], 0, 0.5)
    assert observer.statistics([0]).rows is None
    assert observer.statistics([0]).row_bin is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_count_as_their_values(dtype):
    found = drift(33, 2)
    x = found.samples[0].clamp(-1e4, 1e4).to(dtype)
    narrow, wide = LayerObserver("layer", 33, 33), LayerObserver("layer", 33, 33)
    narrow.update(x, 0, 0.5)
    wide.update(x.float(), 0, 0.5)
    a, b = narrow.statistics([0]), wide.statistics([0])
    assert_means(a.mean, [x])
    for field in ("minimum", "maximum", "second_moment", "rows"):
        assert torch.equal(getattr(a, field), getattr(b, field))


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
    assert_means(streamed.mean, found.samples)
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
    moment = observer.tensors()["moment"].clone()
    observer.merge_rows(1, 3)
    joined = torch.cat([found.samples[1], found.samples[3]])
    rest = [found.samples[0], joined, found.samples[2], found.samples[4]]
    assert float(observer.count[3]) == 0
    s = observer.statistics([0, 1, 2, 4])
    assert s.count.tolist() == [len(x) for x in rest]
    for t, x in enumerate(rest):
        assert torch.equal(s.minimum[t], x.amin(dim=0))
        assert torch.equal(s.maximum[t], x.amax(dim=0))
    assert_means(s.mean, rest)
    assert torch.equal(observer.moment, moment)
    for t, x in enumerate(rest):
        assert is_subset(s.rows[s.row_bin == t], x)
        assert (s.row_bin == t).sum() == min(len(x), ROWS)


def test_statistics_have_no_effect_and_follow_the_order():
    found = drift(7, 3)
    observer = LayerObserver("layer", 7, None)
    for row, t in enumerate((2, 0, 1)):
        observer.update(found.samples[t], row, 0.5)
    first, second = observer.statistics([1, 2, 0]), observer.statistics([1, 2, 0])
    plain = found.statistics()
    for field in ("count", "mean", "minimum", "maximum", "rows", "row_bin"):
        assert torch.equal(getattr(first, field), getattr(second, field))
    for field in ("count", "mean", "minimum", "maximum"):
        assert torch.equal(getattr(first, field), getattr(plain, field))


def test_a_skipped_sigma_takes_the_nearest_one_and_counts_nothing():
    observer = LayerObserver("layer", 7, None)
    observer.update(torch.full((5, 7), 1.0), 0, 0.9)
    observer.update(torch.full((5, 7), 4.0), 3, 0.1)
    s = observer.statistics([0, 1, 2, 3])
    assert s.count.tolist() == [5, 0, 0, 5]
    assert s.mean[:, 0].tolist() == [1, 1, 4, 4]
    assert s.minimum[:, 0].tolist() == [1, 1, 4, 4]
    assert s.row_bin.tolist() == [0] * 5 + [3] * 5
    assert s.rows[:, 0].tolist() == [1] * 5 + [4] * 5


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
