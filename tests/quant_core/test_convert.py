"""From weights and a calibration to layers: fallbacks, refusals, and HTG as published."""

import math
from dataclasses import replace

import pytest
import torch
from dit_quant.quant_core.architectures import FAMILIES, family_of
from dit_quant.quant_core.architectures.sd3 import SD3
from dit_quant.quant_core.calibration import Calibration
from dit_quant.quant_core.checkpoint import CONFIG_KEY, layer_tensors
from dit_quant.quant_core.convert import CannotQuantize, install, quantize_model
from dit_quant.quant_core.grouping import AUTO_UNEXPLAINED_BESIDE_DIRECTIONS, group_model
from dit_quant.quant_core.linear import QuantLinear, dequantize, quant_linear
from dit_quant.quant_core.metrics import relative_l2
from dit_quant.quant_core.schemes import PRESETS, Partition, Rounding
from drift import calibration_of, drift
from torch import nn

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BLOCK = "joint_blocks.0.x_block."


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of(shapes):
    return {name: normal(*shape, seed=i) / shape[1] ** 0.5 for i, (name, shape) in enumerate(shapes.items())}


def quantize(weights, preset, calibration=None, **options):
    scheme = PRESETS[preset] if isinstance(preset, str) else preset
    loaders = {name: (lambda value=value: value) for name, value in weights.items()}
    return quantize_model(loaders, scheme=scheme, calibration=calibration, family=SD3, **options)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_quantizes_ugly_widths(preset):
    weights = weights_of({f"l{K}": (7, K) for K in (33, 36, 63, 64, 100, 256, 516)})
    layers, report = quantize(weights, preset, calibration_of(weights, covariance=128))
    # 4-bit codes come in groups of at least 4
    expected = set(weights) - ({"l33", "l63"} if PRESETS[preset].weights.bits == 4 else set())
    assert set(layers) == expected
    for name, layer in layers.items():
        assert layer.features == tuple(weights[name].shape)
        assert all(torch.isfinite(value.float()).all() for value in layer.tensors().values())
    assert {entry.name for entry in report.layers} == expected
    assert {entry.name for entry in report.skipped} == set(weights) - expected


def test_fallbacks_are_noted_and_impossible_widths_listed():
    weights = weights_of({"good": (7, 256), "smaller": (7, 100), "impossible": (7, 33)})
    layers, report = quantize(weights, "W4A8", calibration_of(weights, covariance=256))
    notes = {entry.name: entry.note for entry in report.layers}
    assert notes["good"] == ""
    assert "K=100 is not divisible by group size 16; 20 was used" in notes["smaller"]
    assert "Hadamard blocks of 4" in notes["smaller"]
    assert layers["good"].group_size == 16
    assert layers["smaller"].group_size == 20
    assert layers["smaller"].hadamard == 4
    assert [entry.name for entry in report.skipped] == ["impossible"]
    assert "K=33" in report.skipped[0].reason
    text = report.text()
    assert "smaller: K=100" in text
    assert "impossible" in text


@pytest.mark.parametrize("preset", PRESETS)
def test_zero_range_channels_and_far_means_survive(preset):
    """Dead, constant and far-off-centre inputs, zero rows and columns of the weight: finite, and still accurate."""
    weights = weights_of({f"{BLOCK}mlp.fc1": (33, 64)})
    W = weights[f"{BLOCK}mlp.fc1"]
    W[3] = 0
    W[:, 9] = 0
    found = drift(64, 6)
    for x in found.samples:
        x[:, 5] = 0
        x[:, 6] = 3.7
        x[:, 20:40] += 3000
    fingerprints = calibration_of(weights).fingerprints
    calibration = Calibration(found.sigmas, {f"{BLOCK}mlp.fc1": found.statistics(64)}, fingerprints, {}, True, {})
    layers, report = quantize(weights, preset, calibration)
    layer = layers[f"{BLOCK}mlp.fc1"]
    assert all(torch.isfinite(value.float()).all() for value in layer.tensors().values())
    assert math.isfinite(report.layers[0].weight_error)
    x, sigma = found.samples[2], found.sigmas[2]
    row, fraction = layer.groups.locate(sigma)
    y = quant_linear(x, layer, None, torch.tensor([row]), torch.tensor([fraction]))
    assert torch.isfinite(y).all()
    if PRESETS[preset].shift.value == "mean":
        # the far mean is taken off in full precision, what is left is of ordinary size
        centred = x @ W.T - (x @ W.T).mean(dim=0)
        assert (y - x @ W.T).norm() < 0.3 * centred.norm()


def test_calibrated_presets_need_a_calibration_and_rtn_does_not():
    weights = weights_of({"a": (7, 64)})
    for preset, scheme in PRESETS.items():
        if scheme.needs_calibration:
            with pytest.raises(CannotQuantize, match="connect Calibrate DiT"):
                quantize(weights, preset)
        else:
            layers, _ = quantize(weights, preset)
            x = normal(9, 64, seed=9)
            zero = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
            assert relative_l2(quant_linear(x, layers["a"], None, *zero), x @ weights["a"].T) < 0.15


def test_a_calibration_of_other_weights_is_refused():
    weights = weights_of({"a": (7, 64), "b": (7, 64)})
    calibration = calibration_of(weights, covariance=64)
    changed = weights | {"b": weights["b"] + 0.1 * normal(7, 64, seed=5)}
    with pytest.raises(CannotQuantize, match="b: the weight changed since calibration"):
        quantize(changed, "W8A8", calibration)


def test_a_calibration_of_another_shape_is_refused():
    calibration = calibration_of(weights_of({"a": (7, 64)}), covariance=64)
    with pytest.raises(CannotQuantize, match="a: calibrated with K=64, the model has K=100"):
        quantize(weights_of({"a": (7, 100)}), "W8A8", calibration)


def test_a_calibration_of_another_model_is_refused():
    calibration = calibration_of(weights_of({"a": (7, 64)}), covariance=64)
    with pytest.raises(CannotQuantize, match="belongs to another model"):
        quantize(weights_of({"z": (7, 64)}), "W8A8", calibration)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("preset", ["W8A8", "rtn_w8a8", "rtn_w4a8"])
def test_a_damaged_weight_is_refused_not_skipped(preset, bad):
    weights = weights_of({"good": (7, 64), "blocks.3.fc1": (7, 64)})
    weights["blocks.3.fc1"][2, 3] = bad
    calibration = calibration_of(weights, covariance=64) if preset == "W8A8" else None
    with pytest.raises(CannotQuantize, match=r"blocks\.3\.fc1.*NaN or infinity"):
        quantize(weights, preset, calibration)


def test_a_model_with_nothing_to_round_is_refused():
    with pytest.raises(CannotQuantize, match="no DiT blocks"):
        quantize({}, "rtn_w4a8")
    weights = weights_of({"a": (7, 64), "b": (7, 33), "c": (7, 35)})
    with pytest.raises(CannotQuantize) as refusal:
        quantize(weights, "rtn_w4a8", skip={"a": "outside", "c": "outside"})
    assert str(refusal.value) == (
        "no layer of this model was quantized: a, c: outside; "
        "b: K=33 is not divisible by any group size; skip this layer"
    )


def test_presets_that_need_no_calibration_take_no_notice_of_one():
    weights, other = weights_of({"a": (7, 64)}), weights_of({"z": (7, 64)})
    layers, report = quantize(weights, "rtn_w8a8", calibration_of(other, covariance=64))
    alone, expected = quantize(weights, "rtn_w8a8")
    assert report == expected
    assert torch.equal(layers["a"].qdata, alone["a"].qdata)


def test_layers_missing_from_the_calibration_are_listed():
    weights = weights_of({"a": (7, 64), "b": (7, 64), "c": (7, 64)})
    calibration = replace(
        calibration_of({"a": weights["a"]}, covariance=64), silent={"b": "never ran during calibration"}
    )
    layers, report = quantize(weights, "W8A8", calibration)
    assert set(layers) == {"a"}
    assert {s.name: s.reason for s in report.skipped} == {
        "b": "never ran during calibration",
        "c": "not in the calibration",
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_report_counts_every_table(preset):
    weights = weights_of({f"{BLOCK}mlp.fc1": (64, 256), f"{BLOCK}mlp.fc2": (33, 100)})
    layers, report = quantize(weights, preset, calibration_of(weights, covariance=256))
    stored = sum(
        value.nbytes
        for name, layer in layers.items()
        for key, value in layer_tensors(name, layer).items()
        if not key.endswith(CONFIG_KEY)
    )
    count = sum(weight.numel() for weight in weights.values())
    assert report.nbytes == stored
    assert report.bits_per_weight == pytest.approx(8 * stored / count)
    assert report.bits_per_weight > PRESETS[preset].weights.bits
    assert report.to_json()["bits_per_weight"] == pytest.approx(8 * stored / count, abs=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_quantization_is_deterministic_and_leaves_its_inputs_alone(preset):
    weights = weights_of({f"{BLOCK}mlp.fc1": (33, 64)})
    before = {name: value.clone() for name, value in weights.items()}
    calibration = calibration_of(weights, covariance=64)
    (one, _), (two, _) = quantize(weights, preset, calibration), quantize(weights, preset, calibration)
    for name, layer in one.items():
        assert torch.equal(weights[name], before[name])
        assert all(torch.equal(value, getattr(two[name], field)) for field, value in layer.tensors().items())


def test_progress_counts_to_the_end():
    weights = weights_of({"a": (7, 64), "b": (7, 33), "c": (7, 64)})
    seen = []
    quantize(weights, "rtn_w4a8", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_chosen_partition_is_used_and_auto_without_one():
    weights = weights_of({"a": (7, 64)})
    plain = calibration_of(weights, timesteps=9, covariance=64)
    grouping = group_model(plain.sigmas, plain.layers, groups=4)
    chosen = calibration_of(weights, timesteps=9, covariance=64, grouping=grouping)
    assert quantize(weights, "W8A8", chosen)[0]["a"].groups == grouping.groups
    auto = group_model(plain.sigmas, plain.layers).groups
    assert quantize(weights, PRESETS["W8A8"].with_options(directions=0), plain)[0]["a"].groups == auto
    # directions pick up what these leave
    fewer = group_model(plain.sigmas, plain.layers, unexplained=AUTO_UNEXPLAINED_BESIDE_DIRECTIONS).groups
    assert quantize(weights, "W8A8", plain)[0]["a"].groups == fewer
    assert 1 < len(fewer) < len(auto)
    assert len(quantize(weights, "rtn_w8a8", chosen)[0]["a"].groups) == 1
    single = PRESETS["W8A8"].with_options(partition=Partition.SINGLE)
    assert len(quantize(weights, single, chosen)[0]["a"].groups) == 1


@pytest.mark.parametrize("preset", ["W8A8", "W4A8"])
def test_gptq_presets_use_their_hessian(preset):
    """Negative control for a Hessian that got lost: the codes must differ from plain rounding, and be better."""
    weights = weights_of({"a": (33, 64)})
    calibration, found = calibration_of(weights, covariance=64), drift(64, 6, seed=0)
    scheme = PRESETS[preset]
    nearest = scheme.with_options(weights=scheme.weights.with_options(rounding=Rounding.NEAREST))
    errors = []
    for used in (scheme, nearest):
        layer = quantize(weights, used, calibration)[0]["a"]
        total = 0.0
        for sigma, x in zip(found.sigmas, found.samples, strict=True):
            row, fraction = layer.groups.locate(sigma)
            y = quant_linear(x, layer, None, torch.tensor([row]), torch.tensor([fraction]))
            total += float((y - x @ weights["a"].T).square().sum())
        errors.append(total)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("preset", ["W8A8", "W8A8 fast", "W8A8 static", "W4A8"])
def test_presets_use_the_curvature_where_it_is_known(preset):
    """It changes codes, and lowers the loss that it measures; without it plain GPTQ rounds, and the report says so."""
    weights = weights_of({"a": (64, 64), "b": (64, 64)})
    plain = calibration_of(weights, covariance=64)
    g = normal(500, 64, seed=5) @ normal(64, 64, seed=6)
    known = replace(plain, curvature={"a": (g.T @ g)[None]})
    scheme = PRESETS[preset]
    alone = scheme.with_options(weights=scheme.weights.with_options(rounding=Rounding.GPTQ))
    (guided, report), (unknown, blind), (gptq, quiet) = (
        quantize(weights, used, source) for used, source in ((scheme, known), (scheme, plain), (alone, known))
    )
    assert not torch.equal(guided["a"].qdata, gptq["a"].qdata)
    assert torch.equal(guided["b"].qdata, gptq["b"].qdata)
    assert torch.equal(unknown["a"].qdata, gptq["a"].qdata)
    losses = []
    for layers in (guided, gptq):
        x = torch.cat(drift(64, 6, seed=0).samples).double()
        error = (dequantize(layers["a"]).double() - weights["a"].double()) @ (x - x.mean(dim=0)).T
        losses.append(float((g.double() @ error).square().sum()))
    assert losses[0] < losses[1]
    assert "1 of 2 layers without a measured curvature" in report.text()
    assert "2 of 2 layers without a measured curvature" in blind.text()
    assert "curvature" not in quiet.text()


def test_static_ranges_of_one_sided_inputs_hold_zero():
    """A padded token is all zeros: it must not be clamped to the least value of calibration."""
    name = f"{BLOCK}mlp.fc2"
    weights = weights_of({name: (33, 64)})
    found = drift(64, 6)
    found = type(found)(found.sigmas, tuple(x.abs() + 3 for x in found.samples))
    fingerprints = calibration_of(weights).fingerprints
    calibration = Calibration(found.sigmas, {name: found.statistics()}, fingerprints, {}, True, {})
    layer = quantize(weights, "htg_paper", calibration)[0][name]
    high = max(float(x.amax()) for x in found.samples)
    assert layer.static_scale[0].item() == pytest.approx(high / 254, rel=1e-6)
    where = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    assert (quant_linear(torch.zeros(2, 64), layer, None, *where) == 0).all()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64, bias=i > 0), nn.GELU()) for i in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_installed_layers_answer_for_the_model():
    net = Net().requires_grad_(False)
    weights = {f"blocks.{i}.0": net.blocks[i][0].weight for i in (0, 2)}
    layers, _ = quantize(weights, "rtn_w8a8")
    x = normal(9, 64)
    expected = net(x)
    state = install(net, layers)
    state.update(torch.tensor([0.5]))
    assert [type(net.blocks[i][0]) for i in range(3)] == [QuantLinear, nn.Linear, QuantLinear]
    assert net.blocks[0][0].bias is None
    assert 0 < relative_l2(net(x), expected) < 0.02


def test_layers_of_different_partitions_keep_their_own_groups():
    weights = weights_of({f"{BLOCK}mlp.fc1": (33, 64), f"{BLOCK}attn.proj": (33, 64), f"{BLOCK}mlp.fc2": (33, 64)})
    calibration = calibration_of(weights, timesteps=20)
    layers, report = quantize(weights, "htg_paper", calibration)
    model = nn.Module()
    for name, weight in weights.items():
        parent = model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(*reversed(weight.shape)))
    state = install(model, layers)
    assert report.groups == 2
    for sigma in calibration.sigmas:
        state.update(torch.tensor([sigma]))
        for name, layer in layers.items():
            module = model.get_submodule(name)
            index, _ = state.select(module.slot)
            assert int(index) == layer.groups.index(sigma)


def test_family_is_found_by_its_marker():
    assert family_of(["joint_blocks.0.context_block.attn.qkv.weight"], FAMILIES) is SD3


def test_what_rounded_to_nearest_is_not_called_gptq():
    weights = weights_of({"a": (7, 64), "b": (7, 64)})
    _, report = quantize(weights, "W8A8", calibration_of(weights))
    assert "2 of 2 layers without covariances: rounded to nearest" in report.text()
    assert "GPTQ" not in report.text()


def test_a_grouping_that_is_not_used_is_told():
    weights = weights_of({"a": (7, 64)})
    found = calibration_of(weights)
    grouped = replace(found, grouping=group_model(found.sigmas, found.layers, groups=3))
    for calibration, told in ((found, False), (grouped, True)):
        _, report = quantize(weights, "htg_paper", calibration)
        assert ("Group Timesteps is not used" in report.text()) == told
