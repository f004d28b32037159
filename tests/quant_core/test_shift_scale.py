"""The vectors z and s, derived again from raw activations."""

import numpy as np
import pytest
import torch
from dit_quant.quant_core.schemes import PRESETS, Scale, Shift
from dit_quant.quant_core.shift_scale import (
    BALANCED_CAP,
    balanced_scale,
    channel_scale,
    group_mean,
    group_shift,
    input_power,
    paper_scale,
    shifted_maximum,
)
from drift import drift

ROWS = [[0, 1, 2], [3], [4, 5]]
K = 33


@pytest.fixture(scope="module")
def found():
    return drift(K, 6)


@pytest.fixture(scope="module")
def raw(found):
    return [x.double().numpy() for x in found.samples]


def test_no_shift_is_none(found):
    assert group_shift(found.statistics(), ROWS, Shift.NONE) is None


def test_midrange_is_the_plain_mean_over_the_group(found, raw):
    z = group_shift(found.statistics(), ROWS, Shift.MIDRANGE)
    for g, rows in enumerate(ROWS):
        expected = sum((raw[t].max(axis=0) + raw[t].min(axis=0)) / 2 for t in rows) / len(rows)
        np.testing.assert_allclose(z[g], expected, rtol=1e-14, atol=1e-14)


def test_mean_is_that_of_all_tokens_of_the_group(found, raw):
    """Timesteps with more tokens weigh more: the pooled mean, which minimizes E |x - z|^2."""
    s = found.statistics()
    z = group_shift(s, ROWS, Shift.MEAN)
    for g, rows in enumerate(ROWS):
        pool = np.concatenate([raw[t] for t in rows])
        # means are stored in fp32
        np.testing.assert_allclose(z[g], pool.mean(axis=0), rtol=2**-22, atol=1e-6)
        plain = np.mean([raw[t].mean(axis=0) for t in rows], axis=0)
        assert len(rows) == 1 or not np.allclose(z[g], plain, rtol=1e-4)
    assert torch.equal(z, group_mean(s, ROWS))


@pytest.mark.parametrize("kind", Shift)
def test_shifted_maximum_is_that_of_the_raw_samples(found, raw, kind):
    s = found.statistics()
    z = group_shift(s, ROWS, kind)
    maxima = shifted_maximum(s, ROWS, z)
    for g, rows in enumerate(ROWS):
        for t in rows:
            offset = 0 if z is None else z[g].numpy()
            np.testing.assert_allclose(maxima[t], np.abs(raw[t] - offset).max(axis=0), rtol=1e-14)


def weight(N=7, seed=3):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [Shift.NONE, Shift.MIDRANGE])
def test_paper_scale_is_the_square_root_of_the_average_over_the_weight(found, raw, kind):
    """m by its closed form: alpha^(T-1) m_T + sum of (1 - alpha) alpha^k m, from the noisiest step on."""
    s, W = found.statistics(), weight()
    z = group_shift(s, ROWS, kind)
    group_of = {t: g for g, rows in enumerate(ROWS) for t in rows}
    maxima = [np.abs(x - (0 if z is None else z[group_of[t]].numpy())).max(axis=0) for t, x in enumerate(raw)]
    T = len(maxima)
    m = 0.99 ** (T - 1) * maxima[0] + sum(0.01 * 0.99 ** (T - 1 - t) * maxima[t] for t in range(1, T))
    expected = np.sqrt(m / W.double().abs().amax(dim=0).numpy())
    np.testing.assert_allclose(paper_scale(s, ROWS, z, W), expected, rtol=1e-13)


def test_channels_without_range_or_weight_keep_scale_one(found):
    s, W = found.statistics(), weight()
    W[:, 5] = 0
    s.minimum[:, 9] = s.maximum[:, 9] = 2.0
    z = group_shift(s, ROWS, Shift.MIDRANGE)
    scale = paper_scale(s, ROWS, z, W)
    assert scale[5] == 1
    assert scale[9] == 1
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert channel_scale(s, ROWS, z, W, PRESETS["rtn_w8a8"]) is None


def spread(power, W, scale):
    """What the balanced scale minimizes: |x / s|^2 |W s|^2."""
    return float((power / scale**2).sum() * (scale**2 * W.double().square().sum(dim=0)).sum())


def test_balanced_scale_minimizes_the_product_of_energies(found):
    W = weight()
    power = input_power(found.statistics(), ROWS, None)
    best = balanced_scale(power, W, 1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = best * torch.exp(0.1 * torch.randn(K, generator=generator))
        assert spread(power, W, other) > spread(power, W, best)


def test_balanced_scale_undoes_planted_gains(found):
    """Channels made wider in the producer and narrower in the weight leave the folded weight as it was."""
    W = weight()
    power = input_power(found.statistics(), ROWS, None)
    gain = torch.ones(K, dtype=torch.float64)
    gain[[3, 8]] = torch.tensor([6.0, 0.3], dtype=torch.float64)
    plain, planted = balanced_scale(power, W, 1.0), balanced_scale(power * gain**2, W / gain, 1.0)
    ratio = planted / gain / plain
    assert float(plain.max() / plain.min()) < BALANCED_CAP / 6
    # both are rounded to fp16
    torch.testing.assert_close(ratio, ratio[:1].expand(K), rtol=2**-9, atol=0)


def test_balanced_scale_is_capped_and_total():
    """Also where no weight reads a channel: the limit of ever smaller weights. Without range it does not matter."""
    power = torch.tensor([1.0, 1e12, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    W = torch.ones(1, 6)
    W[:, [3, 5]] = 0
    scale = balanced_scale(power, W, 1.0)
    assert scale.tolist() == [1.0, BALANCED_CAP, 1.0, BALANCED_CAP, 1.0, 1.0]
    assert balanced_scale(power, W, 0.0).tolist() == [1.0] * 6
    # nothing to compare with
    assert balanced_scale(power, torch.zeros(1, 6), 1.0).tolist() == [1.0] * 6


def test_input_power_is_that_of_the_raw_samples(found, raw):
    s = found.statistics(K)
    z = group_shift(s, ROWS, Shift.MEAN)
    shifted = np.concatenate([x - z[g].numpy() for g, rows in enumerate(ROWS) for x in (raw[t] for t in rows)])
    # the second moment is an fp32 sum over all samples
    np.testing.assert_allclose(input_power(s, ROWS, z), np.square(shifted).mean(axis=0), rtol=1e-4)


def test_balanced_scale_is_what_the_presets_use(found):
    s = found.statistics(K)
    assert PRESETS["W8A8"].scale is Scale.BALANCED
    chosen = channel_scale(s, ROWS, None, weight(), PRESETS["W8A8"])
    torch.testing.assert_close(chosen, balanced_scale(input_power(s, ROWS, None), weight(), 1.0))
