"""The quantized layer: its integer forward, and its way back to the original weight."""

import math
from dataclasses import replace

import pytest
import torch
from dit_quant.kernels import quantize_along
from dit_quant.kernels.numerics import rotate
from dit_quant.quant_core.linear import (
    HALF_MAX,
    QuantLinear,
    column_sum,
    dequantize,
    folded_weight,
    half_if_it_fits,
    quant_linear,
)
from dit_quant.quant_core.metrics import relative_l2
from dit_quant.quant_core.schemes import PRESETS
from dit_quant.quant_core.timesteps import TimestepGroups, TimestepState
from quantized_layers import EIGHT, FOUR, GROUPS, INTERPOLATED, SCHEMES, at, layer_of, normal

pytestmark = pytest.mark.usefixtures("poisoned_empty")


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


@pytest.mark.parametrize("name", ["W8A8", "W4A8", "W8A8 static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_passes_as_that_of_the_weight(name, dtype):
    """Rounding has no slope of its own; a residual beside the layer would hide that nothing came through."""
    layer, weight, found = layer_of(PRESETS[name], GROUPS)
    group = at(GROUPS, found.sigmas[0])
    x = found.samples[0][:16].to(dtype).reshape(2, 8, 64).requires_grad_()
    y = quant_linear(x, layer, normal(33, seed=1), *group)
    assert torch.equal(y, quant_linear(x.detach(), layer, normal(33, seed=1), *group))
    grad = normal(*y.shape, seed=2).to(dtype)
    y.backward(grad)
    assert x.grad.dtype is dtype
    # no more than the weight is off: half a step; and three roundings to bf16
    limit = 3**0.5 * (EIGHT if layer.bits == 8 else FOUR) + (3 * 2**-9 if dtype is torch.bfloat16 else 0)
    assert relative_l2(x.grad, grad.float() @ weight) < limit
    with torch.no_grad():
        assert not quant_linear(x, layer, None, *group).requires_grad


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
