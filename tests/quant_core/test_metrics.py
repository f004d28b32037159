"""Distances are scale-aware: a wrong factor is never hidden."""

import math

import pytest
import torch
from dit_quant.quant_core.metrics import psnr_db, relative_l2

X = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))


def test_relative_l2_sees_a_factor_and_no_unit():
    assert relative_l2(X, X) == 0
    assert relative_l2(3 * X, X) == pytest.approx(2)
    assert relative_l2(1e-20 * 3 * X, 1e-20 * X) == pytest.approx(2, rel=1e-6)
    assert relative_l2(X, torch.zeros_like(X)) > 1e100


def test_decibels():
    assert psnr_db(X, X) == math.inf
    assert psnr_db(X + 0.1, X) == pytest.approx(20, abs=1e-4)
    assert psnr_db(X + 0.2, X, peak=2.0) == pytest.approx(20, abs=1e-4)
