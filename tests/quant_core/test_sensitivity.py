"""Gains: what noise in a layer does to the result; and the error of a format on the row samples."""

import pytest
import torch
from dit_quant.quant_core.convert import LayerInput, quantize_weight
from dit_quant.quant_core.linear import dequantize
from dit_quant.quant_core.schemes import PRESETS, Rounding
from dit_quant.quant_core.sensitivity import (
    GAIN_PROMPTS,
    STRENGTH,
    disturbed,
    inverse_scale,
    measure_gains,
    output_error,
    relative_energy,
    weight_noise,
)
from dit_quant.quant_core.timesteps import SINGLE_GROUP
from drift import calibration_of
from torch import nn


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chain(*scales: float) -> nn.Sequential:
    """Linears whose outputs are multiplied by `scales` before they are added up by `total`."""
    model = nn.Sequential(*(nn.Linear(64, 48) for _ in scales)).requires_grad_(False)
    for i, layer in enumerate(model):
        layer.weight.copy_(normal(48, 64, seed=i))
    return model


def total(model: nn.Sequential, x: torch.Tensor, scales) -> torch.Tensor:
    return sum(scale * layer(x) for layer, scale in zip(model, scales, strict=True))


def test_noise_is_relative_to_every_channel_and_always_the_same():
    weight = normal(48, 4096) * torch.logspace(-3, 3, 48)[:, None]
    noise = weight_noise(weight)
    # rms of 4096 normal numbers: within 5 standard errors of 1 / sqrt(2 * 4096)
    ratio = noise.square().mean(dim=1).sqrt() / weight.square().mean(dim=1).sqrt()
    assert ((ratio / STRENGTH - 1).abs() < 5 / (2 * 4096) ** 0.5).all()
    assert torch.equal(noise, weight_noise(weight))


def test_disturbance_counts_what_it_adds_and_goes_away():
    layer, x = chain(1.0)[0], normal(3, 5, 64, seed=9) + 7
    before = layer(x)
    with disturbed(layer, layer.weight) as disturbance:
        change = layer(x) - before
    assert torch.equal(layer(x), before)
    assert disturbance.energy == pytest.approx(float(change.square().mean()), rel=1e-4)
    # the mean that all tokens share is taken off, as a shift does
    assert change.flatten(0, 1).mean(dim=0).abs().max() < 1e-4 * change.abs().max()
    with pytest.raises(KeyError), disturbed(layer, layer.weight):
        raise KeyError
    assert torch.equal(layer(x), before)


def test_one_wide_input_does_not_take_all_the_noise():
    """Rounding happens behind the balanced scale: every input channel contributes as rms x column."""
    columns, rms = normal(64, seed=1).exp(), normal(64, seed=2).exp()
    rms[5] *= 1000
    unscale = inverse_scale(columns, rms)
    share = (unscale * rms).square() / (columns * rms)
    torch.testing.assert_close(share, share[:1].expand(64))
    # as much as noise of the columns' own size would give
    expected = (columns * rms).square().sum() / columns.square().mean()
    torch.testing.assert_close((unscale * rms).square().sum(), expected)
    assert torch.isfinite(inverse_scale(columns, torch.zeros(64))).all()


def test_gain_is_the_square_of_what_an_output_is_multiplied_by():
    scales = (1.0, 0.1, 5.0, 0.0)
    model, x = chain(*scales), normal(200, 64, seed=5)
    layers = {str(i): layer for i, layer in enumerate(model)}
    weights = {name: layer.weight.detach for name, layer in layers.items()}

    def sample():
        return total(model, x, scales)[None]

    gains = dict(measure_gains(layers, weights, sample, {}))
    unit = x.shape[0] * 48 / float(sample().square().sum())
    # the floor that a tiny disturbance leaves takes (1e-3 / 0.3)² of the first layer's effect off
    assert [gains[str(i)] / unit for i in range(4)] == pytest.approx([1, 0.01, 25, 0], rel=0.02, abs=1e-9)
    assert dict(measure_gains(layers, weights, sample, {})) == gains


def test_only_unknown_layers_are_sampled():
    model, x = chain(1.0, 1.0, 1.0), normal(20, 64)
    layers = {str(i): layer for i, layer in enumerate(model)}
    weights = {name: layer.weight.detach for name, layer in layers.items()}
    calls = []

    def sample():
        calls.append(1)
        return total(model, x, (1.0, 1.0, 1.0))[None]

    assert [name for name, _ in measure_gains(layers, weights, sample, {"0": 1.0, "2": 1.0})] == ["1"]
    assert len(calls) == 3  # reference, floor, one layer
    assert list(measure_gains(layers, weights, sample, dict.fromkeys(layers, 1.0))) == []
    assert len(calls) == 3


def test_a_layer_that_never_runs_has_no_gain():
    model, x = chain(1.0, 1.0), normal(20, 64)
    layers = {"runs": model[0], "silent": model[1]}
    weights = {name: layer.weight.detach for name, layer in layers.items()}
    assert dict(measure_gains(layers, weights, lambda: model[0](x)[None], {})).keys() == {"runs"}


def test_a_layer_that_cannot_be_judged_has_no_gain():
    """One token is its own mean, and a latent beyond all numbers tells nothing: neither is a reason for few bits."""
    model, x = chain(1.0, 1.0, 1.0), normal(20, 64)
    layers = {"judged": model[0], "one token": model[1], "overflows": model[2]}
    weights = {name: layer.weight.detach for name, layer in layers.items()}
    reference = model[2](x)

    def sample():
        beyond = 1.0 if torch.equal(model[2](x), reference) else float("nan")
        return ((model[0](x) + model[1](x[:1])) * beyond)[None]

    assert [name for name, _ in measure_gains(layers, weights, sample, {})] == ["judged"]


def test_the_rounding_of_the_model_itself_is_taken_off():
    """In bf16 a layer that does nothing moves the result as far as any change does: no gain."""
    model, x = chain(1.0, 1e-4).bfloat16(), normal(400, 64).bfloat16()
    layers = {"strong": model[0], "weak": model[1]}
    weights = {name: layer.weight.detach for name, layer in layers.items()}
    gains = dict(measure_gains(layers, weights, lambda: total(model, x, (1.0, 1e-4))[None], {}))
    assert gains["weak"] < 1e-4 * gains["strong"]


def test_relative_energy_is_the_mean_over_prompts():
    reference = torch.ones(GAIN_PROMPTS, 3, 4)
    changed = reference.clone()
    changed[0] += 0.5
    assert relative_energy(changed, reference) == pytest.approx(0.25 / GAIN_PROMPTS)


@pytest.mark.parametrize("name", ["rtn_w8a8", "rtn_w4a8"])
def test_output_error_is_that_of_the_weight(name):
    """Against a dense product in fp64: the activations' own rounding, at most half a step, is all that differs."""
    weight = normal(32, 64) / 8
    calibration = calibration_of({"l": weight})
    source = LayerInput(calibration.sigmas, calibration.layers["l"])
    layer, _ = quantize_weight("l", weight, PRESETS[name], SINGLE_GROUP, source)
    found = output_error(weight, layer, source.statistics, calibration.sigmas)
    per_bin = []
    for t in range(len(calibration.sigmas)):
        x = source.statistics.rows[source.statistics.row_bin == t].double()
        per_bin.append(float((x @ (dequantize(layer).double() - weight.double()).T).square().mean()))
    expected = sum(per_bin) / len(per_bin)
    if name == "rtn_w4a8":
        assert found == pytest.approx(expected, rel=0.1)
    else:
        assert expected < found < 6 * expected


def test_better_formats_have_smaller_errors():
    weight = normal(32, 256) / 16
    calibration = calibration_of({"l": weight}, covariance=256)
    source = LayerInput(calibration.sigmas, calibration.layers["l"])
    errors = []
    for bits, size in ((8, 16), (4, 16), (4, 32), (4, 64)):
        scheme = PRESETS[f"W{bits}A8"]
        args = scheme.weights.with_options(group_size=size, rounding=Rounding.NEAREST)
        layer, _ = quantize_weight("l", weight, scheme.with_options(weights=args), SINGLE_GROUP, source)
        errors.append(output_error(weight, layer, source.statistics, calibration.sigmas))
    assert errors == sorted(errors)
    assert errors[0] < errors[1] / 10
    assert errors[3] > 1.3 * errors[1]


def test_statistics_without_rows_are_refused():
    from dataclasses import replace

    weight = normal(8, 64)
    calibration = calibration_of({"l": weight})
    statistics = replace(calibration.layers["l"], rows=None, row_bin=None)
    layer, _ = quantize_weight("l", weight, PRESETS["rtn_w8a8"], SINGLE_GROUP, None)
    with pytest.raises(ValueError, match="without row samples"):
        output_error(weight, layer, statistics, calibration.sigmas)
