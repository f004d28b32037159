"""Folding one Linear: exact in float64 for every z, s and rotation."""

import pytest
import torch
from dit_quant.kernels.numerics import rotate
from dit_quant.quant_core.metrics import relative_l2
from dit_quant.quant_core.reparam import fold_consumer, fold_linear, fold_modulation, fold_value

SHAPES = [(1, 1, 1), (7, 33, 1), (33, 100, 4), (63, 192, 64), (7, 256, 256)]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parts(N, K, T=3):
    return normal(7, K, seed=1), normal(N, K, seed=2), normal(N, seed=3), normal(T, K, seed=4), normal(K, seed=5).exp()


@pytest.mark.parametrize(("N", "K", "order"), SHAPES)
@pytest.mark.parametrize("with_shift", [False, True], ids=["no shift", "shift"])
@pytest.mark.parametrize("with_scale", [False, True], ids=["no scale", "scale"])
def test_folded_linear_is_the_linear(N, K, order, with_shift, with_scale):
    x, weight, bias, z, s = parts(N, K)
    folded = fold_linear(weight, z if with_shift else None, s if with_scale else None, order)
    assert folded.weight.dtype is torch.float64
    assert (folded.correction is not None) == with_shift
    for group in range(3):
        moved = rotate((x - z[group] * with_shift) / (s if with_scale else 1), order)
        y = moved @ folded.weight.T + bias + (folded.correction[group] if with_shift else 0)
        assert relative_l2(y, x @ weight.T + bias) < 1e-10


def test_interpolated_shift_and_correction_stay_exact():
    x, weight, bias, z, s = parts(33, 63)
    folded = fold_linear(weight, z, s)
    for fraction in (0.1, 0.5, 1.0):
        middle = torch.lerp(z[0], z[1], fraction)
        c = torch.lerp(folded.correction[0], folded.correction[1], fraction)
        y = ((x - middle) / s) @ folded.weight.T + bias + c
        assert relative_l2(y, x @ weight.T + bias) < 1e-10


@pytest.mark.parametrize("omitted", ["correction", "rescaling", "rotation"])
def test_half_a_fold_is_noticed(omitted):
    """Negative control of the law above."""
    x, weight, bias, z, s = parts(33, 192)
    folded = fold_linear(weight, z, s, 64)
    W = {"rescaling": rotate(weight, 64), "rotation": weight * s}.get(omitted, folded.weight)
    c = 0 if omitted == "correction" else folded.correction[0]
    y = rotate((x - z[0]) / s, 64) @ W.T + bias + c
    assert relative_l2(y, x @ weight.T + bias) > 1e-3


def test_correction_uses_the_full_weight_whatever_its_dtype():
    weight, z = normal(7, 33).float(), normal(2, 33, seed=1).half()
    assert torch.equal(fold_linear(weight, z, None).correction, z.double() @ weight.double().T)


@pytest.mark.parametrize("K", [1, 7, 33, 100])
def test_modulation_emits_the_modulation_of_the_shifted_input(K):
    D = 13
    weight, bias, z, s = normal(6 * K, D), normal(6 * K, seed=1), normal(K, seed=2), normal(K, seed=3).exp()
    vec, normed = normal(5, D, seed=4), normal(5, K, seed=5)
    beta, gamma = slice(3 * K, 4 * K), slice(4 * K, 5 * K)
    new = fold_modulation(weight, bias, shift_rows=beta, scale_rows=gamma, z=z, s=s)

    def modulated(weight, bias):
        out = vec @ weight.T + bias
        return normed * (1 + out[:, gamma]) + out[:, beta]

    assert relative_l2(modulated(*new), (modulated(weight, bias) - z) / s) < 1e-10
    others = torch.ones(6 * K, dtype=torch.bool)
    others[beta] = others[gamma] = False
    assert torch.equal(new[0][others], weight[others])
    assert torch.equal(new[1][others], bias[others])


@pytest.mark.parametrize("K", [1, 7, 33, 100])
def test_softmax_average_of_folded_values_is_shifted_and_scaled(K):
    D, L = 13, 9
    weight, bias, z, s = normal(3 * K, D), normal(3 * K, seed=1), normal(K, seed=2), normal(K, seed=3).exp()
    probability, x = normal(5, L, seed=4).softmax(dim=-1), normal(L, D, seed=5)
    rows = slice(2 * K, 3 * K)
    new = fold_value(weight, bias, value_rows=rows, z=z, s=s)
    old_out = probability @ (x @ weight.T + bias)[:, rows]
    assert relative_l2(probability @ (x @ new[0].T + new[1])[:, rows], (old_out - z) / s) < 1e-10
    assert torch.equal(new[0][: 2 * K], weight[: 2 * K])
    assert torch.equal(new[1][: 2 * K], bias[: 2 * K])


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_consumer_undoes_what_its_producer_did(with_bias):
    x, weight, bias, z, s = parts(33, 63, T=1)
    bias = bias if with_bias else None
    new_weight, new_bias = fold_consumer(weight, bias, z[0], s)
    y = x @ weight.T + (bias if with_bias else 0)
    assert relative_l2(((x - z[0]) / s) @ new_weight.T + new_bias, y) < 1e-10
