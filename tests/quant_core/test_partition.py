"""Which timestep groups a layer gets: shared, its own, or none."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from dit_quant.quant_core.architectures.sd3 import SD3
from dit_quant.quant_core.calibration import Calibration
from dit_quant.quant_core.convert import layer_groups, quantize_model, shared_groups
from dit_quant.quant_core.grouping import (
    AUTO_NEGLIGIBLE,
    AUTO_NEGLIGIBLE_W4,
    AUTO_UNEXPLAINED,
    AUTO_UNEXPLAINED_BESIDE_DIRECTIONS,
    Linkage,
    group_layer_paper,
    group_model,
    merge_tree,
    model_features,
)
from dit_quant.quant_core.observers import LayerStatistics
from dit_quant.quant_core.schemes import PRESETS, Partition
from dit_quant.quant_core.timesteps import SINGLE_GROUP
from drift import calibration_of

# directions ask for fewer groups
PLAIN = PRESETS["W8A8"].with_options(directions=0)

K = 8
SIGMAS = tuple((12 - t) / 12 for t in range(12))


def layer(levels):
    """Statistics of half-range 1 whose mean is levels[t] in every channel."""
    mean = torch.tensor(levels)[:, None].expand(len(levels), K).clone()
    bound = torch.ones(len(levels), K)
    return LayerStatistics(torch.ones(len(levels), dtype=torch.float64), mean, -bound, bound)


def calibration(**layers):
    return Calibration(SIGMAS, {name: layer(levels) for name, levels in layers.items()}, {}, {}, True, {})


def steps(size, cut):
    """A mean that jumps by `size` at timestep `cut`: its root-mean-square drift is at most size / 2."""
    return [size * (t >= cut) for t in range(12)]


def drift_of(found):
    return merge_tree(
        np.concatenate([*model_features(found.layers)], axis=1), group_model(SIGMAS, found.layers).linkage
    ).drift


def test_layers_of_their_own_groups_get_those_of_auto_on_each_alone():
    found = calibration(early=steps(0.8, 3), late=steps(0.8, 9), still=steps(0.0, 6))
    scheme = PLAIN.with_options(partition=Partition.LAYER)
    shared = shared_groups(scheme, found)
    assert len(shared) == 3
    own = {name: layer_groups(name, scheme, found, shared) for name in found.layers}
    assert {name: len(groups) for name, groups in own.items()} == {"early": 2, "late": 2, "still": 1}
    for name, cut in (("early", 3), ("late", 9)):
        assert [own[name].index(sigma) for sigma in SIGMAS] == [int(t >= cut) for t in range(12)]
    every = PLAIN
    assert {layer_groups(name, every, found, shared) for name in found.layers} == {shared}


@pytest.mark.parametrize(
    ("drift", "groups"),
    [(0.9 * AUTO_NEGLIGIBLE, (1, 1, 2)), (1.1 * AUTO_NEGLIGIBLE, (2, 1, 2)), (1.1 * AUTO_NEGLIGIBLE_W4, (2, 2, 2))],
    ids=["below W8", "between", "above W4"],
)
@pytest.mark.parametrize("partition", [Partition.CALIBRATION, Partition.LAYER])
def test_drift_that_4_bits_cannot_see_gets_no_groups_but_fixed_ranges_always_do(drift, groups, partition):
    found = calibration(a=steps(2 * drift**0.5, 6))
    # statistics are fp32
    assert drift_of(found) == pytest.approx(drift, rel=1e-5)
    for preset, expected in zip(("W8A8", "W4A8", "W8A8 static"), groups, strict=True):
        scheme = PRESETS[preset].with_options(partition=partition)
        assert len(layer_groups("a", scheme, found, shared_groups(scheme, found))) == expected


def test_a_static_scheme_gets_groups_for_the_smallest_drift():
    scheme, found = PRESETS["W8A8 static"], calibration(a=steps(1e-6, 6))
    assert len(shared_groups(scheme, found)) == 2
    assert len(shared_groups(PLAIN, found)) == 1


def test_a_chosen_grouping_overrules_auto_but_not_a_layer_of_its_own():
    found = calibration(a=steps(0.8, 3))
    chosen = replace(found, grouping=group_model(SIGMAS, found.layers, groups=5))
    for preset in ("W8A8", "W4A8", "W8A8 static"):
        scheme = PRESETS[preset]
        shared = shared_groups(scheme, chosen)
        # fixed ranges follow sigma from one to the next of the groups that were asked for, too
        assert shared == replace(chosen.grouping.groups, interpolate=scheme.interpolate)
        assert layer_groups("a", scheme, chosen, shared) == shared
        assert len(layer_groups("a", scheme.with_options(partition=Partition.LAYER), chosen, shared)) == 2
        assert layer_groups("a", scheme.with_options(partition=Partition.SINGLE), chosen, shared) == SINGLE_GROUP


def test_a_grouping_left_to_the_tree_is_cut_to_the_schemes_needs():
    """Group Timesteps with 0 groups decides how runs are compared and blended, not how many a scheme pays for."""
    found = calibration(a=[t * (t - 4) / 80 for t in range(12)])
    for linkage in Linkage:
        chosen = replace(found, grouping=group_model(SIGMAS, found.layers, linkage=linkage, interpolate=True))
        for preset, unexplained in (("W8A8", AUTO_UNEXPLAINED_BESIDE_DIRECTIONS), ("W8A8 static", AUTO_UNEXPLAINED)):
            expected = group_model(SIGMAS, found.layers, linkage=linkage, interpolate=True, unexplained=unexplained)
            assert shared_groups(PRESETS[preset], chosen) == expected.groups
    few, many = (len(shared_groups(PRESETS[name], chosen)) for name in ("W8A8", "W8A8 static"))
    assert few < many


def test_interpolation_is_passed_on():
    found = calibration(a=steps(0.8, 3))
    for partition in (Partition.CALIBRATION, Partition.LAYER):
        for interpolate in (False, True):
            scheme = PLAIN.with_options(partition=partition, interpolate=interpolate)
            assert layer_groups("a", scheme, found, shared_groups(scheme, found)).interpolate == interpolate


def test_the_paper_groups_each_layer_its_own_way():
    found = calibration(a=steps(0.8, 3), b=steps(0.8, 9))
    for name in found.layers:
        groups = layer_groups(name, PRESETS["htg_paper"], found, SINGLE_GROUP)
        assert groups == group_layer_paper(SIGMAS, found.layers[name], True)


def test_without_a_calibration_there_is_one_group():
    for scheme in PRESETS.values():
        assert shared_groups(scheme, None) == SINGLE_GROUP
        assert layer_groups("a", scheme, None, SINGLE_GROUP) == SINGLE_GROUP


def test_quantized_layers_carry_their_own_groups():
    """Through quantize_model: layers fed by different drifts are cut differently, tables and all."""
    random = torch.Generator().manual_seed(0)
    weights = {f"joint_blocks.{i}.x_block.mlp.fc1": torch.randn(7, 64, generator=random) for i in range(4)}
    found = calibration_of(weights, timesteps=12, covariance=64)
    scheme = PLAIN.with_options(partition=Partition.LAYER)
    loaders = {name: (lambda value=value: value) for name, value in weights.items()}
    layers, _ = quantize_model(loaders, scheme=scheme, calibration=found, family=SD3)
    for name, quantized in layers.items():
        assert quantized.groups == group_model(found.sigmas, {name: found.layers[name]}).groups
        assert len(quantized.shift) == len(quantized.correction) == len(quantized.groups)
    assert len({quantized.groups for quantized in layers.values()}) > 1
    assert all(len(quantized.groups) > 1 for quantized in layers.values())
