"""A changed weight goes back into its quantized layer: the change comes in, and nothing else moves."""

from dataclasses import replace

import pytest
import torch
from dit_quant.kernels.numerics import rotate
from dit_quant.quant_core import requantize as module
from dit_quant.quant_core.linear import dequantize, folded_weight, quant_linear
from dit_quant.quant_core.metrics import relative_l2
from dit_quant.quant_core.requantize import noise, requantize
from dit_quant.quant_core.schemes import PRESETS
from quantized_layers import GROUPS, SCHEMES, at, layer_of, normal

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize(("scheme", "groups"), SCHEMES.values(), ids=SCHEMES.keys())
def test_requantizing_the_same_weight_reproduces_the_layer(scheme, groups):
    """No change in, no change out, GPTQ's choices included."""
    layer, _, _ = layer_of(scheme, groups)
    again = requantize(dequantize(layer), layer)
    assert torch.equal(again.qdata, layer.qdata)
    for name, value in layer.tensors().items():
        assert getattr(again, name).dtype is value.dtype
        if name in ("correction", "responses"):
            # dequantize rounds in fp32, the sum is stored in fp16 again
            torch.testing.assert_close(getattr(again, name), value, rtol=2**-10, atol=1e-4)
        else:
            assert torch.equal(getattr(again, name), value)


@pytest.mark.parametrize("name", ["rtn_w8a8", "rtn_w4a8"])
def test_requantizing_the_original_weight_reproduces_plain_rounding(name):
    """Every weight lies within half a step of its code, so the same code is nearest again."""
    layer, weight, _ = layer_of(PRESETS[name], GROUPS)
    again = requantize(weight, layer)
    # undoing and redoing the rotation in fp32 may tip a tie
    assert (again.qdata != layer.qdata).double().mean() < 1e-3


@pytest.mark.parametrize("name", ["rtn_w8a8", "rtn_w4a8"])
@pytest.mark.parametrize("kind", ["ladder", "lopsided", "outlier", "zero rows"])
def test_requantizing_uneven_weights_changes_no_code(name, kind):
    """Codes of different value stay apart, however fine a group's step or however much of a row was clipped."""
    weight = normal(33, 256)
    if kind == "ladder":
        weight = weight * torch.logspace(-4, 2, 256)
    elif kind == "lopsided":
        weight = weight.abs() + 1
    elif kind == "outlier":
        weight[::2, 7] = 50
    else:
        weight[::3] = 0
    layer, _, _ = layer_of(PRESETS[name], GROUPS, K=256, weight=weight)
    again = requantize(dequantize(layer), layer)
    for field, value in layer.tensors().items():
        assert torch.equal(getattr(again, field), value)


@pytest.mark.parametrize("name", ["rtn_w8a8", "rtn_w4a8", "W4A8"])
def test_only_rows_that_outgrow_their_grid_get_a_new_one(name):
    layer, _, _ = layer_of(PRESETS[name], GROUPS, K=256)
    change = torch.zeros(33, 256)
    change[5] = 3 * dequantize(layer)[5].abs().amax()
    change[7, 40] = 20 * dequantize(layer)[7].abs().amax()
    weight = dequantize(layer) + change
    new = requantize(weight, layer)
    kept = [n for n in range(33) if n not in (5, 7)]
    for field in {"qdata", "scale", "levels"} & set(layer.tensors()):
        assert torch.equal(getattr(new, field)[kept], getattr(layer, field)[kept])
    assert (new.scale[[5, 7]] > layer.scale[[5, 7]]).all()
    folded = rotate(weight if layer.smooth is None else weight * layer.smooth, layer.hadamard)
    for n in (5, 7):
        row, lost = folded[n], folded_weight(new)[n] - folded[n]
        span = 2 * row.abs().amax() if layer.bits == 8 else row.amax().clamp(min=0) - row.amin().clamp(max=0)
        # rounding afresh leaves step / sqrt(12) at most; 1.1 for a 4-bit step that is not whole on the int8 grid
        assert lost.square().mean().sqrt() < 1.1 * span / (254 if layer.bits == 8 else 15) / 12**0.5


@pytest.mark.parametrize("seed", [1, 2**40 + 3])
def test_stochastic_rounding_keeps_a_small_change_on_average(seed):
    """A tenth of a step everywhere but in row 0: lost by rounding to nearest, kept in the mean by chance."""
    layer, _, _ = layer_of(PRESETS["rtn_w8a8"], GROUPS, K=256)
    change = 0.1 * layer.scale.expand(33, 256).clone()
    change[0] = 0
    weight = dequantize(layer) + change
    assert torch.equal(requantize(weight, layer).qdata, layer.qdata)
    new = requantize(weight, layer, seed)
    moved = (new.qdata.double() - layer.qdata.double())[layer.qdata.abs() < 127].reshape(-1)
    assert torch.equal(new.qdata[0], layer.qdata[0])
    share = moved.sum() / (moved.numel() - 256)
    # 32 x 256 coins of chance 0.1: standard error 0.0033, five of them
    assert abs(share - 0.1) < 0.017
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(new.qdata, requantize(weight, layer, seed).qdata)


@pytest.mark.parametrize(("scheme", "groups"), SCHEMES.values(), ids=SCHEMES.keys())
def test_a_change_of_the_weight_reaches_codes_correction_and_sums(scheme, groups):
    layer, weight, found = layer_of(scheme, groups)
    change = normal(33, 2, seed=5) @ normal(2, 64, seed=6) / 4
    new = requantize(dequantize(layer) + change, layer)
    # no more weight error than rounding the changed weight afresh, doubled for keeping old grids and error
    fresh = layer_of(scheme, groups, weight=weight + change)[0]
    assert relative_l2(dequantize(new), weight + change) < 2 * relative_l2(dequantize(fresh), weight + change)
    if layer.shift is None:
        # a bias correction without a shift is about the rounding, not about the weight
        assert (new.correction is None) == (layer.correction is None)
        assert layer.correction is None or torch.equal(new.correction, layer.correction)
    else:
        expected = layer.shift.double() @ (weight + change).double().T
        # two fp16 roundings of tables up to max |c|
        assert (new.correction.double() - expected).abs().max() <= 2**-9 * expected.abs().max()
    if layer.directions is not None:
        assert torch.equal(new.directions, layer.directions)
        expected = layer.directions.double() @ (weight + change).double().T
        assert (new.responses.double() - expected).abs().max() <= 2**-9 * expected.abs().max()
    if layer.column_sum is not None:
        assert torch.equal(new.column_sum, (folded_weight(new) / new.scale).round().sum(dim=1).int())
    y = quant_linear(found.samples[0], new, None, *at(groups, found.sigmas[0]))
    old = quant_linear(found.samples[0], layer, None, *at(groups, found.sigmas[0]))
    target = found.samples[0] @ (weight + change).T
    assert relative_l2(y, target) < 0.25 * relative_l2(old, target)


def test_a_correction_that_outgrows_half_precision_stays_whole():
    layer, _, _ = layer_of(PRESETS["W8A8 fast"], GROUPS)
    layer = replace(layer, shift=torch.full_like(layer.shift, 2000.0))
    assert layer.correction.dtype is torch.float16
    weight = dequantize(layer) + 1.0
    again = requantize(weight, layer)
    assert again.correction.dtype is torch.float32
    expected = layer.correction.double() + layer.shift.double() @ (weight - dequantize(layer)).double().T
    assert expected.abs().max() > 65504
    torch.testing.assert_close(again.correction.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_change_that_is_not_finite_is_refused(value):
    layer, _, _ = layer_of(PRESETS["W8A8"], GROUPS)
    weight = dequantize(layer)
    weight[3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        requantize(weight, layer)


@pytest.mark.parametrize(("scheme", "groups"), SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize("seed", [0, 7])
def test_blocks_of_rows_change_nothing(scheme, groups, seed, monkeypatch):
    layer, _, _ = layer_of(scheme, groups)
    weight = dequantize(layer) + 0.01 * normal(33, 64, seed=5)
    # one row takes another grid
    weight[20] *= 4
    whole = requantize(weight, layer, seed)
    monkeypatch.setattr(module, "BLOCK", 7 * 64)
    for name, value in requantize(weight, layer, seed).tensors().items():
        if name in ("correction", "responses"):
            # products of fewer rows at a time may add in another order, by less than their type keeps
            torch.testing.assert_close(value, getattr(whole, name), rtol=2**-10, atol=0)
        else:
            assert torch.equal(value, getattr(whole, name))


def test_noise_is_uniform_and_a_function_of_seed_and_place():
    shape = torch.Size((256, 256))
    found = noise(shape, 7, 0, torch.device("cpu"))
    assert torch.equal(found.view(-1)[1000:1300], noise(torch.Size((300,)), 7, 1000, found.device))
    assert 0 <= found.min() < 1e-3 < 0.999 < found.max() < 1
    # 65536 draws of variance 1/12: standard error 0.0011; neighbours and other seeds as if independent
    assert abs(found.mean() - 0.5) < 0.006
    others = [found.roll(1), found.roll(256), *(noise(shape, seed, 0, found.device) for seed in (8, 7 + 2**32, 2**63))]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([found.view(-1), other.view(-1)]))[0, 1]) < 0.02
    counts = torch.histc(found, 64, 0, 1)
    # chi-square of 63 degrees: mean 63, standard deviation 11
    assert ((counts - 1024) ** 2 / 1024).sum() < 63 + 5 * 11
