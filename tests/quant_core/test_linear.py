"""The quantized layer: its integer forward, and its way back to the original weight."""

import math
from dataclasses import replace

import pytest
import torch
from dit_quant.kernels import quantize_along
from dit_quant.kernels.numerics import rotate
from dit_quant.quant_core.convert import LayerInput, quantize_weight
from dit_quant.quant_core.linear import (
    HALF_MAX,
    QuantLinear,
    column_sum,
    dequantize,
    folded_weight,
    half_if_it_fits,
    quant_linear,
    requantize,
)
from dit_quant.quant_core.metrics import relative_l2
from dit_quant.quant_core.schemes import PRESETS, ActivationArgs, Granularity, Rounding, Shift, WeightArgs
from dit_quant.quant_core.timesteps import TimestepGroups, TimestepState
from drift import drift

pytestmark = pytest.mark.usefixtures("poisoned_empty")

GROUPS = TimestepGroups((0.55,), (0.8, 0.3))
INTERPOLATED = TimestepGroups((0.55,), (0.8, 0.3), True, True)
STATIC = ActivationArgs(Granularity.PER_TENSOR, symmetric=False)
SCHEMES = {
    "W8A8": (PRESETS["W8A8"], GROUPS),
    "W8A8 directions": (PRESETS["W8A8"].with_options(directions=3), GROUPS),
    "W8A8 directions, symmetric": (
        PRESETS["W8A8"].with_options(directions=3, hadamard=1, activations=ActivationArgs()),
        INTERPOLATED,
    ),
    "W4A8": (PRESETS["W4A8"], GROUPS),
    "W4A8 directions": (PRESETS["W4A8"].with_options(directions=2), GROUPS),
    "W4A8 interpolated": (PRESETS["W4A8"], INTERPOLATED),
    "htg_paper": (PRESETS["htg_paper"], GROUPS),
    "rtn_w8a8": (PRESETS["rtn_w8a8"], GROUPS),
    "rtn_w4a8": (PRESETS["rtn_w4a8"], GROUPS),
    "static symmetric": (PRESETS["htg_paper"].with_options(activations=ActivationArgs(Granularity.PER_TENSOR)), GROUPS),
    "W8A8 fast": (PRESETS["W8A8 fast"], GROUPS),
    "W8A8 static": (PRESETS["W8A8 static"], GROUPS),
    "W4A8 symmetric": (PRESETS["W4A8"].with_options(weights=WeightArgs(4, 16, rounding=Rounding.GPTQ)), GROUPS),
    "W4A8 bias corrected": (PRESETS["W4A8"].with_options(shift=Shift.NONE, bias_correction=True), GROUPS),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(scheme, groups, N=33, K=64, weight=None):
    found = drift(K, 6)
    weight = normal(N, K) / 8 if weight is None else weight
    source = LayerInput(found.sigmas, found.statistics(K))
    layer, _ = quantize_weight("layer", weight, scheme, groups, source)
    return layer, weight, found


def at(groups, sigma):
    row, fraction = groups.locate(sigma)
    return torch.tensor([row]), torch.tensor([fraction])


@pytest.mark.parametrize(("scheme", "groups"), SCHEMES.values(), ids=SCHEMES.keys())
def test_integer_forward_is_the_quantized_formula(scheme, groups):
    """y = x_hat W_hat' + b + c, with x_hat, W_hat decoded in float64."""
    layer, _, found = layer_of(scheme, groups)
    bias = normal(33, seed=1)
    for sigma, x in zip(found.sigmas, found.samples, strict=True):
        index, fraction = at(groups, sigma)
        y = quant_linear(x, layer, bias, index, fraction)
        row, part = groups.locate(sigma)
        table = lambda name, row=row, part=part: interpolated(getattr(layer, name), row, part)  # noqa: E731
        moved = x.double() - (table("shift") if layer.shift is not None else 0)
        apart = 0
        if layer.directions is not None:
            tables = {"directions": layer.directions, "shift": layer.shift, "smooth": layer.smooth}
            p = quantize_along(x, **tables, index=index, fraction=fraction)[3].double()
            moved, apart = moved - p @ layer.directions.double(), p @ layer.responses.double()
        moved = moved / (1 if layer.smooth is None else layer.smooth.double())
        moved = rotate(moved, layer.hadamard)
        exact = decoded_activation(moved, layer, table) @ folded_weight(layer).double().T + bias + apart
        exact = exact + (table("correction") if layer.correction is not None else 0)
        # a value at a rounding tie may fall to either side in fp32: one step of one channel in a row, rarely
        assert relative_l2(y, exact) < 1e-3
        assert ((y - exact).abs() < 1e-4 * exact.norm(dim=1, keepdim=True)).double().mean() > 0.9


def interpolated(table, row, fraction):
    low = table[row].double()
    return low if fraction == 0 else low + fraction * (table[row + 1].double() - low)


def decoded_activation(x, layer, table):
    """x [M, K] float64 rounded to the layer's activation grid, by the textbook formulas."""
    if layer.static_scale is not None:
        scale = table("static_scale")
        zero = table("static_zero").round() if layer.static_zero is not None else 0
    elif layer.symmetric:
        scale, zero = x.abs().amax(dim=1, keepdim=True) / 127, 0
    else:
        low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
        scale = (high - low) / 254
        zero = (-127 - low / scale).round()
    return scale * ((x / scale + zero).round().clamp(-127, 127) - zero)


# a step of range / levels leaves step / sqrt(12): 5 rms a side in 127 steps, groups of 16 span 4.5 rms in 15 steps
EIGHT = 5 / 127 / 12**0.5
FOUR = 4.5 / 15 / 12**0.5


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("rtn_w8a8", math.hypot(EIGHT, EIGHT)),
        ("W8A8", math.hypot(EIGHT, EIGHT) / 2),
        ("W8A8 fast", math.hypot(EIGHT, EIGHT) / 2),
        ("W8A8 static", math.hypot(EIGHT, EIGHT)),
        ("rtn_w4a8", math.hypot(FOUR, EIGHT)),
        ("W4A8", math.hypot(FOUR, EIGHT) / 2),
    ],
)
def test_output_is_close_to_full_precision(name, limit):
    """Weight and activation errors add in squares; calibration at least halves them on drifting, off-centre inputs."""
    layer, weight, found = layer_of(PRESETS[name], GROUPS)
    for sigma, x in zip(found.sigmas, found.samples, strict=True):
        assert relative_l2(quant_linear(x, layer, None, *at(GROUPS, sigma)), x @ weight.T) < limit


def test_the_wrong_group_is_noticed():
    """Negative control: the shift of another group with the correction of this one."""
    layer, weight, found = layer_of(PRESETS["W8A8"], GROUPS)
    swapped = replace(layer, shift=layer.shift.flip(0))
    x = found.samples[0]
    right, wrong = (relative_l2(quant_linear(x, w, None, *at(GROUPS, 1.0)), x @ weight.T) for w in (layer, swapped))
    assert wrong > 10 * right


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 5, 64), (0, 64), (2, 0, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shape_and_dtype_are_kept(shape, dtype):
    layer, _, _ = layer_of(PRESETS["W4A8"], GROUPS)
    y = quant_linear(normal(*shape).to(dtype), layer, normal(33), *at(GROUPS, 0.9))
    assert y.shape == (*shape[:-1], 33)
    assert y.dtype is dtype


@pytest.mark.parametrize(("scheme", "groups"), SCHEMES.values(), ids=SCHEMES.keys())
def test_dequantized_weight_is_near_the_original(scheme, groups):
    layer, weight, _ = layer_of(scheme, groups)
    assert dequantize(layer).shape == weight.shape
    folded = weight if layer.smooth is None else weight * layer.smooth
    # half a step is the most any entry is off, without and with a second level
    error = relative_l2(folded_weight(layer), rotate(folded, layer.hadamard))
    assert error < 3**0.5 * (EIGHT if layer.bits == 8 else FOUR)
    back = dequantize(layer) if layer.smooth is None else dequantize(layer) * layer.smooth
    assert relative_l2(rotate(back, layer.hadamard), folded_weight(layer)) < 1e-6


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


def test_column_sums_do_not_overflow():
    codes = torch.full((3, 4097), -127, dtype=torch.int8)
    assert column_sum(codes).tolist() == [-127 * 4097] * 3
    assert column_sum(codes).dtype is torch.int32


def test_tables_are_half_unless_they_overflow():
    small, large = torch.tensor([1.0, HALF_MAX - 100]), torch.tensor([1.0, 7e4])
    assert half_if_it_fits(small).dtype is torch.float16
    assert half_if_it_fits(large).dtype is torch.float32
    assert torch.isfinite(half_if_it_fits(large)).all()
    assert half_if_it_fits(torch.tensor([float("nan")])).dtype is torch.float32


def test_module_follows_the_state_and_the_value_of_sigma():
    layer, _, found = layer_of(PRESETS["W8A8"], INTERPOLATED)
    state = TimestepState([TimestepGroups((), (1.0,)), INTERPOLATED])
    bias = normal(33, seed=1)
    module = QuantLinear(layer, bias, state, 1)
    assert (module.out_features, module.in_features) == (33, 64)
    x = found.samples[2]
    for sigma in (0.95, 0.6, 0.55, 0.1):
        state.update(torch.tensor([sigma]))
        expected = quant_linear(x, layer, bias, *at(INTERPOLATED, sigma))
        # the state's fraction is fp32 log arithmetic; codes may differ at a tie
        assert relative_l2(module(x), expected) < 1e-3


def test_sizes_and_features_come_from_the_tensors():
    layer, _, _ = layer_of(PRESETS["W4A8"], GROUPS, N=7, K=192)
    assert layer.features == (7, 192)
    assert layer.bits == 4
    assert layer.group_size == 16
    assert layer.levels.shape == (7, 12)
    assert layer.nbytes == sum(t.numel() * t.element_size() for t in layer.tensors().values())
    assert layer.map(lambda t: t.clone()).tensors().keys() == layer.tensors().keys()


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
