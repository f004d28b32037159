"""Schemes refuse what cannot work, and say what they need."""

import pytest
from dit_quant.quant_core.schemes import (
    PRESETS,
    ActivationArgs,
    Granularity,
    QuantScheme,
    Rounding,
    Scale,
    Shift,
    StaticRange,
    WeightArgs,
    group_size_for,
    hadamard_for,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, "choose 4 or 8"),
        ({"bits": 16}, "choose 4 or 8"),
        ({"bits": 8, "symmetric": False}, "needs bits=4"),
        ({"bits": 4, "group_size": 0}, "multiple of 4"),
        ({"bits": 4, "group_size": 30}, "multiple of 4"),
        ({"bits": 4, "group_size": -4}, "multiple of 4"),
    ],
)
def test_impossible_weights_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WeightArgs(**options)


@pytest.mark.parametrize("granularity", [Granularity.PER_CHANNEL, Granularity.PER_GROUP])
def test_impossible_activations_are_refused(granularity):
    with pytest.raises(ValueError, match=granularity.value):
        ActivationArgs(granularity)


def test_sampled_ranges_are_symmetric():
    with pytest.raises(ValueError, match="sampled activation ranges are symmetric"):
        ActivationArgs(Granularity.PER_TENSOR, symmetric=False, range=StaticRange.SAMPLED)


STATIC = ActivationArgs(Granularity.PER_TENSOR)
SAMPLED = ActivationArgs(Granularity.PER_TENSOR, range=StaticRange.SAMPLED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hadamard": 2}, "power of 4"),
        ({"hadamard": 1024}, "power of 4"),
        ({"hadamard": 64, "activations": STATIC}, "before a rotation"),
        ({"hadamard": 64, "shift": Shift.MIDRANGE}, "use shift mean"),
        ({"directions": -1}, "not 0 to 16"),
        ({"directions": 17}, "not 0 to 16"),
        ({"directions": 4, "activations": SAMPLED}, "fixed ranges"),
        ({"scale_strength": -0.1}, "between 0 and 1"),
        ({"scale_strength": 1.1}, "between 0 and 1"),
    ],
)
def test_combinations_known_to_fail_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QuantScheme("x", **options)
    with pytest.raises(ValueError, match=message):
        QuantScheme("x").with_options(**options)


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({}, False),
        ({"hadamard": 64}, False),
        ({"weights": WeightArgs(4)}, False),
        ({"shift": Shift.MEAN}, True),
        ({"scale": Scale.PAPER}, True),
        ({"activations": STATIC}, True),
        ({"activations": SAMPLED, "hadamard": 64}, True),
        ({"bias_correction": True}, True),
        ({"directions": 1}, True),
        ({"weights": WeightArgs(rounding=Rounding.GPTQ)}, True),
    ],
)
def test_a_calibration_is_needed_for_whatever_is_measured(options, needs):
    assert QuantScheme("x", **options).needs_calibration == needs


def test_granularity_follows_the_bits():
    assert WeightArgs(8).granularity is Granularity.PER_CHANNEL
    assert WeightArgs(4).granularity is Granularity.PER_GROUP
    assert ActivationArgs().dynamic
    assert not STATIC.dynamic


def test_presets_answer_to_their_own_names():
    named = {"W8A8", "W4A8", "W8A8 fast", "W8A8 static", "htg_paper", "rtn_w8a8", "rtn_w4a8"}
    assert named <= set(PRESETS)
    assert all(name == scheme.name for name, scheme in PRESETS.items())


def test_fast_and_static_are_w8a8_without_what_costs_time():
    best = PRESETS["W8A8"].with_options(directions=0)
    assert best != PRESETS["W8A8"]
    assert PRESETS["W8A8 fast"] == best.with_options(name="W8A8 fast", hadamard=1)
    assert PRESETS["W8A8 static"] == best.with_options(
        name="W8A8 static", activations=SAMPLED, scale_strength=0.7, interpolate=True
    )
    assert not PRESETS["W8A8 static"].activations.dynamic


@pytest.mark.parametrize("wanted", [4, 16, 32, 64, 128])
def test_group_sizes_divide_the_width_and_none_is_nearer(wanted):
    def distance(size):
        return max(size / wanted, wanted / size)

    for K in range(1, 400):
        fitting = [size for size in range(4, 2 * wanted + 1) if size % 4 == 0 and K % size == 0]
        found = group_size_for(K, wanted)
        assert (found in fitting) if fitting else (found is None)
        assert all(distance(found) <= distance(size) for size in fitting)
    assert group_size_for(100, 16) == 20


@pytest.mark.parametrize("wanted", [1, 4, 16, 64, 256])
def test_hadamard_blocks_divide_the_width_and_none_larger_would(wanted):
    for K in (*range(1, 400), 4096, 4097, 1536):
        fitting = [order for order in (1, 4, 16, 64, 256) if order <= wanted and K % order == 0]
        assert hadamard_for(K, wanted) == max(fitting)
