"""The measuring parts of benchmarks/quality.py, and that planted models are the same function."""

import numpy as np
import pytest
import torch
from benchmark_scripts import load
from dit_quant.demo.emoji_dit import EmojiDiT
from dit_quant.demo.experiment import (
    Prompts,
    Sampling,
    calibrate,
    quantizable,
    quantized_copy,
    reference_velocities,
    update_with,
)
from dit_quant.quant_core.collector import Collector
from dit_quant.quant_core.schemes import PRESETS


@pytest.fixture(scope="module")
def quality():
    return load("quality")


@pytest.fixture(scope="module")
def planted():
    return load("planted")


@pytest.fixture
def model() -> EmojiDiT:
    torch.manual_seed(0)
    return EmojiDiT().eval().requires_grad_(False)


def test_ssim_is_one_for_equal_pictures_and_less_for_others(quality):
    a = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(quality.ssim(a, a), torch.ones(3))
    little, much = quality.ssim(a, (a + 0.02).clamp(0, 1)), quality.ssim(a, a.flip(3))
    assert (little < 1).all()
    assert (much < little).all()


def test_relative_rows_judges_every_prompt_by_itself(quality):
    reference = torch.ones(2, 4)
    value = torch.stack([torch.ones(4), torch.full((4,), 1.5)])
    assert quality.relative_rows(value, reference).tolist() == [0.0, 0.5]


def test_interval_is_paired(quality):
    """Half of a wildly varying baseline is half of it in every resample."""
    baseline = np.random.default_rng(0).lognormal(size=40)
    assert quality.ratio_interval(baseline / 2, baseline) == pytest.approx([0.5, 0.5, 0.5])
    mean, low, high = quality.ratio_interval(np.random.default_rng(1).lognormal(size=40), baseline)
    assert low < mean < high


def test_planted_outliers_keep_the_function(planted, model):
    twin = planted.plant(model, planted.mean_and_variance(model))
    # fp32 with gains of 50 and offsets of 40: a few hundred roundings of 6e-8
    assert planted.function_difference(model, twin) < 1e-5
    qkv = "joint_blocks.0.x_block.attn.qkv.weight"
    assert not torch.equal(model.state_dict()[qkv], twin.state_dict()[qkv])


def test_difference_is_seen(planted, model):
    twin = planted.plant(model, planted.mean_and_variance(model))
    twin.joint_blocks[0].x_block.attn.qkv.bias.add_(1.0)
    assert planted.function_difference(model, twin) > 1e-3


@pytest.fixture(scope="module")
def wan(emoji_wan):
    """Every parameter random: a table or a norm that was left out would otherwise not show."""
    torch.manual_seed(0)
    model = emoji_wan.EmojiWan(emoji_wan.WanConfig(depth=2)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def emoji_wan():
    return load("emoji_wan")


def test_planted_wan_keeps_the_function_and_widens_every_input_but_those_behind_gelu(planted, wan):
    twin = planted.plant_wan(wan)
    assert planted.function_difference(wan, twin) < 1e-5
    before, after = widest_inputs(wan), widest_inputs(twin)
    assert all(after[name] > 3 * before[name] for name in before if not name.endswith("ffn.2"))
    assert all(after[name] == pytest.approx(before[name], rel=1e-3) for name in before if name.endswith("ffn.2"))


def widest_inputs(model) -> dict[str, float]:
    """Largest magnitude at the input of every Linear of the blocks, on one random call."""
    layers, _ = quantizable(model)
    collector = Collector({name: layer.in_features for name, layer in layers.items()}, flow=True, covariance=None)
    collector.at(0.5)
    with collector.attached(layers):
        generator = torch.Generator().manual_seed(0)
        x, context = torch.randn(2, 16, 8, 8, generator=generator), torch.randn(2, 8, 64, generator=generator)
        model(x, torch.full((2,), 0.5), context, None)
    seen = collector.results()[1]
    return {name: float(torch.maximum(-row.minimum, row.maximum).max()) for name, row in seen.items()}


def test_a_model_is_not_planted_in_the_other_family(quality, model, wan):
    for name, base in (("emoji_wan", model), ("emoji_wan_outliers", model), ("emoji", wan), ("emoji_drift", wan)):
        with pytest.raises(ValueError, match="not planted in"):
            quality.planted_model(name, base, None)
    with pytest.raises(ValueError, match="no model emoji_other"):
        quality.planted_model("emoji_other", model, None)


def test_both_families_are_measured_alike(quality, wan):
    """Calibrated, rounded by us and by a rival, and run in bf16: each is a little off, none is broken."""
    generator = torch.Generator().manual_seed(1)
    context, pooled = torch.randn(3, 8, 64, generator=generator), torch.randn(3, 64, generator=generator)
    noise = torch.randn(2, 16, 8, 8, generator=generator)
    prompts = Prompts(("a", "b"), context[:2], pooled[:2], noise, (context[2:], pooled[2:]))
    sampling = Sampling(steps=3)
    calibration, latents = calibrate(wan, prompts, sampling)
    setting = quality.Setting(prompts, sampling, latents, reference_velocities(wan, prompts, sampling, probes=2))
    twin, state, report = quantized_copy(wan, calibration, PRESETS["W8A8"])
    assert report.notes == ("family Wan",)
    assert len(report.layers) == 2 * 10
    errors = {
        "ours": quality.measure(twin, update_with(state), setting),
        "rival": quality.measure(load("rivals").smoothquant(wan, calibration).model, None, setting),
        "bf16": quality.measure(quality.bf16(wan), None, setting),
    }
    for name, found in errors.items():
        assert (found["velocity"] > 0).all(), name
        assert (found["velocity"] < 0.05).all(), name
    assert next(wan.parameters()).dtype is torch.float32


def test_methods_are_chosen_by_parts_of_their_names(quality):
    names = ("native int8", "native int8 + ConvRot", "W8A8", "W8A8 static", "W4A8")
    assert [name for name in names if quality.wanted(name, "")] == list(names)
    assert [name for name in names if quality.wanted(name, "static/ConvRot")] == [names[1], names[3]]
    assert [name for name in names if quality.wanted(name, "=W8A8/=native int8")] == [names[0], names[2]]


def test_an_update_replaces_rows_of_the_same_measurement_only(quality):
    def result(**rows):
        same = {"model": "m", "versions": {"torch": "1"}, "machine": {"torch_threads": 1}, "settings": {"steps": 28}}
        return same | {"rows": [{"method": method, "velocity": velocity} for method, velocity in rows.items()]}

    found = quality.updated(result(a=1, b=2), result(b=3, c=4))
    assert found == result(a=1, b=3, c=4)
    for key, other in (("model", "n"), ("versions", {"torch": "2"}), ("machine", {}), ("settings", {"steps": 8})):
        with pytest.raises(ValueError, match=f"{key} differ"):
            quality.updated(result(a=1) | {key: other}, result(b=3))
