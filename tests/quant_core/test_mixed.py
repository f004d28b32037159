"""Plans: bytes as they will be, the sensitive layers first, what cannot be chosen left alone."""

from dataclasses import replace

import pytest
import torch
from dit_quant.quant_core import mixed
from dit_quant.quant_core.architectures.sd3 import SD3
from dit_quant.quant_core.budget import OverBudget
from dit_quant.quant_core.checkpoint import layer_tensors
from dit_quant.quant_core.convert import KEPT_BY_BUDGET, CannotQuantize, quantize_model
from dit_quant.quant_core.files import write_tensors
from dit_quant.quant_core.mixed import KEPT, formats, plan_formats, price
from dit_quant.quant_core.schemes import PRESETS
from dit_quant.quant_core.timesteps import SINGLE_GROUP
from drift import calibration_of

SHAPES = {"ugly": (200, 36), "square": (160, 256), "wide": (96, 512), "tall": (300, 128)}
BF16 = 2 * sum(n * k for n, k in SHAPES.values())


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator) / shape[1] ** 0.5 for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def loaders(weights):
    return {name: (lambda value=value: value) for name, value in weights.items()}


@pytest.fixture(scope="module")
def calibration(weights):
    return replace(calibration_of(weights, covariance=512), gains=dict.fromkeys(weights, 1.0))


def quantized(loaders, calibration, plan):
    return quantize_model(loaders, scheme=PRESETS["W8A8"], schemes=plan.schemes, calibration=calibration, family=SD3)


@pytest.mark.parametrize("share", [0.35, 0.45, 0.6, 0.9])
def test_the_model_takes_the_bytes_of_its_plan(weights, loaders, calibration, share):
    plan = plan_formats(loaders, calibration, int(share * BF16))
    layers, report = quantized(loaders, calibration, plan)
    for name, choice in plan.choices.items():
        assert choice.nbytes == (layers[name].nbytes if name in layers else 2 * weights[name].numel())
    kept = {name for name, choice in plan.choices.items() if choice.format == KEPT}
    assert set(layers) == set(weights) - kept
    assert {entry.name for entry in report.skipped if entry.reason == KEPT_BY_BUDGET} == kept
    assert {entry.name: entry.format for entry in report.layers} == {
        name: choice.format for name, choice in plan.choices.items() if name in layers
    }
    assert plan.nbytes == sum(choice.nbytes for choice in plan.choices.values()) <= share * BF16


def test_a_file_holds_no_more_than_planned(tmp_path, weights, loaders, calibration):
    plan = plan_formats(loaders, calibration, int(0.55 * BF16), fixed=1000, in_file=True)
    layers, _ = quantized(loaders, calibration, plan)
    state = {f"{name}.weight": weight.bfloat16() for name, weight in weights.items() if name not in layers}
    for name, layer in layers.items():
        state |= layer_tensors(name, layer)
    write_tensors(tmp_path / "model.safetensors", state, {})
    size = (tmp_path / "model.safetensors").stat().st_size
    # the bound on the header's entries leaves some of the planned bytes over
    assert 0.9 * plan.nbytes < size <= plan.nbytes <= 0.55 * BF16


def test_correction_beyond_fp16_is_priced(weights, loaders, calibration):
    """One channel outside the rounded part makes the whole table fp32."""
    name = "tall"
    weight = weights[name].clone()
    weight[1] *= 1e6  # channel 1 is not among the 128 that are judged
    assert 1 not in (torch.arange(mixed.CHANNELS) * 300 // mixed.CHANNELS).tolist()
    own = replace(calibration_of({name: weight}, covariance=128), gains={name: 1.0})
    plan = plan_formats({name: lambda: weight}, own, int(0.6 * 2 * weight.numel()))
    layers, _ = quantized({name: lambda: weight}, own, plan)
    assert layers[name].correction.dtype == torch.float32
    assert plan.choices[name].nbytes == layers[name].nbytes


def test_a_few_wide_channels_are_not_missed():
    """Channel 1 of 300 is judged through the others: its error goes with its energy."""
    weight = torch.randn(300, 128, generator=torch.Generator().manual_seed(3)) / 11
    wide = weight.clone()
    wide[1] *= 100
    errors = []
    for value in (weight, wide):
        own = replace(calibration_of({"l": value}, covariance=128), gains={"l": 1.0})
        errors.append(price("l", value, PRESETS["rtn_w4a8"], own, SINGLE_GROUP, in_file=False).error)
    # energies: 300 channels of 1, against 299 of 1 and one of 10,000
    assert errors[1] / errors[0] == pytest.approx((299 + 10_000) / 300, rel=0.3)


def test_bytes_go_where_the_gain_is(loaders, calibration):
    budget = int(0.45 * BF16)
    widths = {}
    for name in ("square", "wide"):
        plan = plan_formats(loaders, replace(calibration, gains=calibration.gains | {name: 1e4}), budget)
        widths[name] = plan.choices
    order = [KEPT, *formats()]
    for name, other in (("square", "wide"), ("wide", "square")):
        assert order.index(widths[name][name].format) < order.index(widths[other][name].format)


def test_more_bytes_less_error_and_the_same_every_time(loaders, calibration):
    plans = [plan_formats(loaders, calibration, int(share * BF16)) for share in (0.4, 0.5, 0.7, 0.7)]
    assert plans[0].error > plans[1].error > plans[2].error
    assert plans[2] == plans[3]


def test_a_layer_without_gain_or_statistics_stays(loaders, calibration):
    gains = {name: gain for name, gain in calibration.gains.items() if name != "wide"}
    seen = {name: statistics for name, statistics in calibration.layers.items() if name != "tall"}
    plan = plan_formats(loaders, replace(calibration, gains=gains, layers=seen), int(0.85 * BF16))
    assert plan.choices["wide"].format == plan.choices["tall"].format == KEPT
    assert plan.schemes["wide"] is None


def test_report_lists_the_choice(loaders, calibration):
    plan = plan_formats(loaders, calibration, int(0.5 * BF16))
    _, report = quantized(loaders, calibration, plan)
    report = plan.report(report)
    assert str(plan) in report.text()
    assert report.to_json()["choices"]["wide"]["format"] == plan.choices["wide"].format
    for name in {choice.format for choice in plan.choices.values()}:
        assert f"{name}: " in str(plan)


def test_refusals_name_the_remedy(loaders, calibration):
    with pytest.raises(CannotQuantize, match="measure_sensitivity on"):
        plan_formats(loaders, replace(calibration, gains=None), BF16)
    with pytest.raises(OverBudget, match="the smallest choice needs"):
        plan_formats(loaders, calibration, BF16 // 8)
    with pytest.raises(CannotQuantize, match="fits as it is"):
        plan_formats(loaders, calibration, BF16 + 1)
    blind = {name: replace(found, rows=None, row_bin=None) for name, found in calibration.layers.items()}
    with pytest.raises(CannotQuantize, match="ugly: calibrated without row samples"):
        plan_formats(loaders, replace(calibration, layers=blind), BF16 // 2)
