"""Layers on disk: bit-identical back, and every defect refused by name."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from dit_quant.quant_core.checkpoint import (
    CONFIG_KEY,
    POSITIVE,
    SUFFIXES,
    check_layer,
    is_ours,
    layer_from_tensors,
    layer_tensors,
    parse_config,
)
from dit_quant.quant_core.convert import LayerInput, quantize_weight
from dit_quant.quant_core.files import DamagedFile, read_tensors, write_tensors
from dit_quant.quant_core.schemes import PRESETS, ActivationArgs, Granularity, Scale, Shift, WeightArgs
from dit_quant.quant_core.timesteps import TimestepGroups
from drift import drift

N, K = 7, 192
NAME = "joint_blocks.0.x_block.attn.qkv"
GROUPS = TimestepGroups((0.7, 0.3), (0.9, 0.5, 0.1))
FULL = PRESETS["W4A8"].with_options(scale=Scale.PAPER)
SCHEMES = PRESETS | {
    "W4A8 symmetric weights": PRESETS["W4A8"].with_options(weights=WeightArgs(4, 32)),
    "W4A8 scaled": FULL,
    "directions": PRESETS["W8A8"].with_options(directions=3),
    "static symmetric": PRESETS["htg_paper"].with_options(activations=ActivationArgs(Granularity.PER_TENSOR)),
    "bias corrected": PRESETS["W4A8"].with_options(shift=Shift.NONE, bias_correction=True),
}


def layer_of(scheme, groups=GROUPS):
    found = drift(K, 6)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    return quantize_weight(NAME, weight, scheme, groups, LayerInput(found.sigmas, found.statistics(64)))[0]


def assert_same(a, b):
    assert a.tensors().keys() == b.tensors().keys()
    for name, value in a.tensors().items():
        other = getattr(b, name)
        assert other.dtype is value.dtype
        assert torch.equal(other, value)
    assert (a.hadamard, a.symmetric, a.groups) == (b.hadamard, b.symmetric, b.groups)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_round_trip_through_a_file_is_bit_identical(scheme, tmp_path):
    layer = layer_of(scheme)
    write_tensors(tmp_path / "m.safetensors", layer_tensors(NAME, layer), {})
    tensors, _ = read_tensors(tmp_path / "m.safetensors")
    assert is_ours(tensors[f"{NAME}.{CONFIG_KEY}"])
    assert_same(layer_from_tensors(NAME, tensors, (N, K)), layer)


def test_interpolated_groups_round_trip():
    groups = TimestepGroups((0.7000000000000001, 0.3), (0.9, 0.5, 1 / 3), False, True)
    layer = layer_of(PRESETS["W8A8"], groups)
    assert_same(layer_from_tensors(NAME, layer_tensors(NAME, layer), (N, K)), layer)


def test_a_stock_loader_finds_an_unknown_format():
    config = json.loads(layer_tensors(NAME, layer_of(FULL))[f"{NAME}.{CONFIG_KEY}"].numpy().tobytes())
    assert config["format"] == "dit_quant_w4a8"


def fields_of(scheme):
    return list(layer_of(scheme).tensors())


ALL_FIELDS = [(name, f) for name in ("W4A8 scaled", "htg_paper", "directions") for f in fields_of(SCHEMES[name])]


@pytest.mark.parametrize(("scheme", "field"), ALL_FIELDS)
def test_a_missing_tensor_is_refused_by_name(scheme, field):
    tensors = layer_tensors(NAME, layer_of(SCHEMES[scheme]))
    key = f"{NAME}.{SUFFIXES[field]}"
    del tensors[key]
    with pytest.raises(DamagedFile, match=f"{key} is missing"):
        layer_from_tensors(NAME, tensors, (N, K))


DAMAGE = {
    "one row less": lambda t: t[:-1],
    # not one: 4 weight groups would divide K too
    "two columns more": lambda t: torch.cat([t, t[..., :1], t[..., :1]], dim=-1),
    "flat": lambda t: t.reshape(-1)[:, None, None],
    "scalar": lambda t: t.reshape(-1)[0],
    "float64": lambda t: t.double(),
    "int16": lambda t: t.to(torch.int16),
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("scheme", "field"), ALL_FIELDS)
def test_a_wrong_shape_or_dtype_is_refused_by_name(scheme, field, damage):
    tensors = layer_tensors(NAME, layer_of(SCHEMES[scheme]))
    key = f"{NAME}.{SUFFIXES[field]}"
    tensors[key] = DAMAGE[damage](tensors[key])
    with pytest.raises(DamagedFile) as refusal:
        layer_from_tensors(NAME, tensors, (N, K))
    assert key in str(refusal.value)


@pytest.mark.parametrize("features", [(N + 1, K), (N, K + 64), (K, N)])
def test_a_layer_of_another_model_is_refused(features):
    for scheme in ("W8A8", "W4A8 scaled", "directions"):
        with pytest.raises(DamagedFile, match=NAME):
            layer_from_tensors(NAME, layer_tensors(NAME, layer_of(SCHEMES[scheme])), features)


def edited(scheme=FULL, **changes):
    tensors = layer_tensors(NAME, layer_of(scheme))
    config = json.loads(tensors[f"{NAME}.{CONFIG_KEY}"].numpy().tobytes())
    config.update(changes)
    config = {key: value for key, value in config.items() if value is not None}
    raw = json.dumps(config).encode()
    return tensors | {f"{NAME}.{CONFIG_KEY}": torch.frombuffer(bytearray(raw), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "version 1, this pack reads 2; quantize the model again"),
        ({"version": 3}, "version 3, this pack reads 2"),
        ({"version": None}, "version None"),
        ({"format": "dit_quant_w8a8"}, "declared dit_quant_w8a8"),
        ({"format": "int8_tensorwise"}, "declared int8_tensorwise"),
        ({"groups": None}, "incomplete"),
        ({"groups": []}, "incomplete"),
        ({"groups": {"edges": [0.1, 0.2], "centres": [3, 2, 1], "flow": True, "interpolate": False}}, "decrease"),
        ({"groups": TimestepGroups((), (1.0,)).to_json()}, "expected"),
        ({"hadamard": "many"}, "incomplete"),
        ({"hadamard": 3}, "Hadamard blocks of 3"),
        ({"hadamard": 256}, "do not fit K=192"),
        ({"hadamard": 0}, "Hadamard blocks of 0"),
        ({"tensors": None}, "incomplete"),
        ({"tensors": ["qdata", "magic"]}, "incomplete"),
        ({"tensors": ["qdata", "scale", "multiplier", "zero"]}, "incomplete"),
        ({"tensors": ["qdata", "scale", "levels", "smooth", "shift"]}, "does not name the tensor .*weight_correction"),
        ({"tensors": ["qdata", "scale", "smooth"]}, "does not name the tensor .*weight_levels"),
        ({"hadamard": 64.0}, "wrong"),
        ({"hadamard": True}, "wrong"),
        ({"hadamard": math.inf}, "wrong"),
        ({"symmetric": "false"}, "wrong"),
        ({"groups": {"edges": [0.1], "centres": [10**400, 0], "flow": True, "interpolate": False}}, "wrong"),
        ({"symmetric": False}, "weight_column_sum"),
    ],
    ids=itertools.count(),
)
def test_a_wrong_config_is_refused(changes, message):
    with pytest.raises(DamagedFile, match=message) as refusal:
        layer_from_tensors(NAME, edited(**changes), (N, K))
    assert NAME in str(refusal.value)


@pytest.mark.parametrize("missing", ["directions", "responses"])
def test_directions_without_their_responses_are_refused(missing):
    fields = [field for field in fields_of(SCHEMES["directions"]) if field != missing]
    with pytest.raises(DamagedFile, match=f"weight_{missing}"):
        layer_from_tensors(NAME, edited(SCHEMES["directions"], tensors=fields), (N, K))


@pytest.mark.parametrize("zero", [0, 8, 15])
def test_a_weight_group_with_multiplier_0_is_refused(zero):
    """All of its weights would be 0; the quantizer never writes one."""
    tensors = layer_tensors(NAME, layer_of(PRESETS["W4A8"]))
    assert (tensors[f"{NAME}.weight_levels"] >= 16).all()
    tensors[f"{NAME}.weight_levels"][3, 2] = zero
    with pytest.raises(DamagedFile, match=f"{NAME}.weight_levels: a weight group has multiplier 0"):
        layer_from_tensors(NAME, tensors, (N, K))


def test_a_4_bit_layer_costs_4_and_a_half_bits_and_its_tables():
    """One byte per 16 weights beside the codes: what format version 2 is for."""
    tensors = layer_tensors(NAME, layer_of(PRESETS["W4A8"]))
    assert tensors[f"{NAME}.weight"].nbytes == N * K // 2
    assert tensors[f"{NAME}.weight_levels"].nbytes == N * K // 16


@pytest.mark.parametrize("raw", [b"", b"not json", b"[1]", b"\xff\xfe", b"null"])
def test_a_config_that_is_no_json_object_is_refused_and_not_ours(raw):
    config = torch.tensor(list(raw), dtype=torch.uint8)
    assert not is_ours(config)
    tensors = layer_tensors(NAME, layer_of(FULL)) | {f"{NAME}.{CONFIG_KEY}": config}
    with pytest.raises(DamagedFile, match=NAME):
        layer_from_tensors(NAME, tensors, (N, K))


def test_without_its_config_a_layer_is_refused():
    tensors = layer_tensors(NAME, layer_of(FULL))
    del tensors[f"{NAME}.{CONFIG_KEY}"]
    with pytest.raises(DamagedFile, match=f"{NAME}.{CONFIG_KEY} is missing"):
        layer_from_tensors(NAME, tensors, (N, K))


TABLES = [(s, field) for s, field in ALL_FIELDS if getattr(layer_of(SCHEMES[s]), field).is_floating_point()]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("scheme", "field"), TABLES)
def test_a_table_that_is_not_finite_is_refused_by_name(scheme, field, value):
    tensors = layer_tensors(NAME, layer_of(SCHEMES[scheme]))
    key = f"{NAME}.{SUFFIXES[field]}"
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[-1] = value
    with pytest.raises(DamagedFile, match=f"{key}: holds NaN or infinity"):
        layer_from_tensors(NAME, tensors, (N, K))


@pytest.mark.parametrize("value", [0.0, -0.5, 1e-44])
@pytest.mark.parametrize(("scheme", "field"), [case for case in TABLES if case[1] in POSITIVE])
def test_a_scale_that_is_not_positive_is_refused_by_name(scheme, field, value):
    """Or has no reciprocal."""
    tensors = layer_tensors(NAME, layer_of(SCHEMES[scheme]))
    key = f"{NAME}.{SUFFIXES[field]}"
    # as it is stored, or in a type that can hold the value
    tensors[key] = tensors[key].float() if 0 < value < 1e-8 else tensors[key].clone()
    tensors[key].view(-1)[0] = value
    with pytest.raises(DamagedFile, match=f"{key}: holds {float(tensors[key].min()):g}, but scales are positive"):
        layer_from_tensors(NAME, tensors, (N, K))


@pytest.mark.parametrize(("lost", "message"), [("static_scale", "fixed zero points"), ("static_zero", "fixed ranges")])
def test_half_of_a_fixed_range_is_refused(lost, message):
    tensors = edited(SCHEMES["htg_paper"], tensors=[f for f in fields_of(SCHEMES["htg_paper"]) if f != lost])
    del tensors[f"{NAME}.{SUFFIXES[lost]}"]
    with pytest.raises(DamagedFile, match=message):
        layer_from_tensors(NAME, tensors, (N, K))


def test_fixed_ranges_with_what_they_do_without_are_refused():
    """Zero points without the column sums that they multiply; directions, with which the ranges would be ignored."""
    static, along = layer_of(SCHEMES["htg_paper"]), layer_of(SCHEMES["directions"])
    with pytest.raises(DamagedFile, match=r"need .*weight_column_sum"):
        check_layer(NAME, replace(static, symmetric=True, column_sum=None), (N, K), "dit_quant_w8a8")
    tables = {"directions": along.directions, "responses": along.responses}
    with pytest.raises(DamagedFile, match="fixed ranges and directions"):
        check_layer(NAME, replace(static, **tables), (N, K), "dit_quant_w8a8")


def test_an_odd_width_does_not_pass_for_the_even_one_below():
    one_group = replace(layer_of(FULL), levels=torch.full((N, 1), 24, dtype=torch.uint8))
    with pytest.raises(DamagedFile, match=f"K={K + 1} is odd"):
        check_layer(NAME, one_group, (N, K + 1), "dit_quant_w4a8")


def test_json_that_is_nested_without_end_is_refused():
    raw = torch.frombuffer(bytearray(b"[" * 200_000), dtype=torch.uint8)
    assert not is_ours(raw)
    with pytest.raises(DamagedFile, match="is not JSON"):
        parse_config(NAME, raw)
