"""Sampled rows: uniform, without replacement, the same however the stream is cut, bounded in memory."""

import numpy as np
import pytest
import torch
from dit_quant.quant_core.row_sample import EMPTY, RowSample, priority_keys

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def numbered(count, features=3, first=0):
    """Rows that say which they are."""
    return torch.arange(first, first + count).float()[:, None].expand(count, features)


def feed(sample, x, sigma=0.5, row=0, pieces=()):
    """x into a bin, cut into pieces of these sizes."""
    sample.reserve(row + 1)
    start = 0
    for part in x.split(list(pieces) or len(x)):
        sample.add(row, *sample.candidates(part, row, start, sigma))
        start += len(part)
    return sample


def kept(sample, order=(0,)):
    rows, row_bin = sample.rows(list(order))
    return rows[:, 0].int().tolist(), row_bin.tolist()


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 24), (24, 24), (25, 24), (1000, 24), (1000, 1)])
def test_as_many_distinct_rows_as_there_are_up_to_the_size(count, size):
    rows, _ = kept(feed(RowSample(3, size), numbered(count)))
    assert len(rows) == len(set(rows)) == min(count, size)
    assert set(rows) <= set(range(count))


@pytest.mark.parametrize("pieces", [[1] * 200, [199, 1], [3, 97, 100], [64, 64, 64, 8]])
def test_cuts_between_calls_change_nothing(pieces):
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    whole, cut = feed(RowSample(5, 7), x), feed(RowSample(5, 7), x, pieces=pieces)
    assert torch.equal(whole.keys, cut.keys)
    assert torch.equal(whole.values, cut.values)


def test_every_row_has_the_same_chance():
    """chi^2 of how often each of 40 rows is among 8, over 2000 noise levels; rows come in three uneven calls."""
    count, size, trials = 40, 8, 2000
    hits = np.zeros(count)
    for sigma in np.linspace(0.01, 1, trials):
        rows, _ = kept(feed(RowSample(1, size), numbered(count, 1), float(sigma), pieces=[30, 9, 1]))
        hits[rows] += 1
    share = size / count
    # without replacement: the variance of a row is trials p (1 - p), and the sum is fixed, so count - 1 freedoms
    chi2 = ((hits - trials * share) ** 2).sum() / (trials * share * (1 - share)) * (count - 1) / count
    assert chi2 < 72  # 99.9 % quantile of 39 freedoms
    # not so regular that it would be no sample
    assert chi2 > 16


def test_pairs_are_independent():
    """How often rows 0 and 1 are kept together: (8 / 40) (7 / 39) of the trials."""
    trials, expected = 4000, 8 / 40 * 7 / 39
    together = sum(
        {0, 1} <= set(kept(feed(RowSample(1, 8), numbered(40, 1), float(sigma)))[0])
        for sigma in np.linspace(0.01, 1, trials)
    )
    assert abs(together - trials * expected) < 4 * (trials * expected * (1 - expected)) ** 0.5


def test_merged_bins_keep_the_smallest_keys_of_both():
    sample = RowSample(1, 6)
    feed(sample, numbered(50, 1), sigma=0.5, row=0)
    feed(sample, numbered(200, 1, first=50), sigma=0.4, row=1)
    keys = np.concatenate([priority_keys(0.5, 0, 50), priority_keys(0.4, 0, 200)])
    sample.merge(1, 0)
    rows, row_bin = kept(sample, (0, 1))
    assert rows == np.argsort(keys)[:6].tolist()
    assert row_bin == [1] * 6
    assert (sample.keys[0] == EMPTY).all()


def test_keys_below_empty_and_different_at_every_sigma():
    keys = [priority_keys(sigma, 0, 10_000) for sigma in (0.0, 0.5, np.nextafter(0.5, 1), 1.0, 14.6)]
    assert len(np.unique(np.concatenate(keys))) == 50_000
    assert all((k >= 0).all() and (k < EMPTY).all() for k in keys)


def test_order_is_followed_and_empty_bins_have_no_rows():
    sample = RowSample(1, 2)
    feed(sample, numbered(1, 1, first=7), row=2)
    feed(sample, numbered(1, 1, first=9), row=0)
    assert kept(sample, (2, 1, 0)) == ([7, 9], [0, 2])
    assert RowSample(1, 2).rows([]) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_are_those_of_the_input(dtype):
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows, _ = feed(RowSample(5, 9), x).rows([0])
    assert rows.dtype == torch.float16
    assert torch.equal(rows.sort(dim=0).values, x.half().sort(dim=0).values)


def test_beyond_fp16_the_rows_are_fp32_and_half_as_many():
    small = numbered(50, 3)
    large = numbered(50, 3, first=50) * 1e5 + 0.123
    narrow, wide = RowSample(3, 7), RowSample(3, 7)
    feed(narrow, small)
    before = narrow.values.nbytes
    wide = feed(wide, torch.cat([small, large]), pieces=[50, 50])
    rows, _ = wide.rows([0])
    assert rows.dtype == torch.float32
    assert wide.values.nbytes <= before
    keys = priority_keys(0.5, 0, 100)
    assert torch.equal(rows, torch.cat([small, large])[np.argsort(keys)[:3]])
    one = feed(RowSample(3, 1), large)
    assert one.rows([0]) == (None, None)
    feed(one, small)


def test_nothing_is_kept_at_size_zero():
    sample = feed(RowSample(3, 0), numbered(5))
    assert sample.rows([0]) == (None, None)


def test_the_global_generators_are_left_alone():
    torch.manual_seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    feed(RowSample(3, 4), numbered(100), pieces=[50, 50])
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
