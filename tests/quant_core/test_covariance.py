"""The Hessian of rounding, from streamed moments, against all raw samples at once."""

import pytest
import torch
from dit_quant.kernels.numerics import hadamard, rotate
from dit_quant.quant_core.covariance import rounding_hessian
from dit_quant.quant_core.schemes import Shift
from dit_quant.quant_core.shift_scale import group_shift
from drift import drift

ROWS = [[0, 1, 2], [3], [4, 5]]


def brute_force(found, z, s, order, block):
    """Second moment of ((x - z_g) / s) H over every token, diagonal blocks only."""
    group_of = {t: g for g, rows in enumerate(ROWS) for t in rows}
    pool = []
    for t, x in enumerate(found.samples):
        moved = x.double() - (0 if z is None else z[group_of[t]])
        moved = moved if s is None else moved / s
        width = moved.shape[1]
        H = torch.kron(torch.eye(width // order, dtype=torch.float64), hadamard(order, torch.float64))
        pool.append(moved @ H)
    x = torch.cat(pool)
    full = x.T @ x / len(x)
    return torch.stack([full[i : i + block, i : i + block] for i in range(0, len(full), block)])


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("kind", Shift)
@pytest.mark.parametrize(("K", "block", "order"), [(1, 1, 1), (33, 33, 1), (100, 20, 4), (64, 64, 64), (192, 64, 16)])
def test_equals_the_moment_of_the_raw_samples(K, block, order, kind, scaled):
    found = drift(K, 6, seed=K)
    statistics = found.statistics(block)
    z = group_shift(statistics, ROWS, kind)
    s = torch.randn(K, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).exp() if scaled else None
    H = rounding_hessian(statistics, ROWS, z, s, order)
    exact = brute_force(found, z, s, order, block)
    assert H.dtype is torch.float64
    assert torch.equal(H, H.transpose(1, 2))
    assert (H - exact).norm() <= 1e-5 * exact.norm()


def test_with_group_means_it_is_the_pooled_within_group_covariance():
    found = drift(33, 6)
    statistics = found.statistics(33)
    H = rounding_hessian(statistics, ROWS, group_shift(statistics, ROWS, Shift.MEAN), None, 1)[0]
    pools = [torch.cat([found.samples[t] for t in rows]).double() for rows in ROWS]
    scatter = sum(len(x) * torch.cov(x.T, correction=0) for x in pools) / sum(len(x) for x in pools)
    assert (H - scatter).norm() <= 1e-5 * scatter.norm()
    # negative control: another shift costs more, as the mean minimizes it
    other = rounding_hessian(statistics, ROWS, group_shift(statistics, ROWS, Shift.MIDRANGE), None, 1)[0]
    assert other.trace() > H.trace() * 1.001


def test_without_moments_there_is_no_hessian():
    assert rounding_hessian(drift(7).statistics(None), ROWS, None, None, 1) is None


def test_rotations_must_fit_the_blocks():
    with pytest.raises(ValueError, match="blocks of 20 do not hold whole Hadamard blocks of 16"):
        rounding_hessian(drift(80).statistics(20), ROWS, None, None, 16)


def test_rotated_hessian_measures_the_rotated_error():
    """tr(E H E') is the same quantity in both bases: |x' e|^2 does not depend on the basis."""
    statistics = drift(64).statistics(64)
    plain, turned = (rounding_hessian(statistics, ROWS, None, None, order)[0] for order in (1, 64))
    e = torch.randn(7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    a, b = torch.trace(e @ plain @ e.T), torch.trace(rotate(e, 64) @ turned @ rotate(e, 64).T)
    assert float(a) == pytest.approx(float(b), rel=1e-12)
