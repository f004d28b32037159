"""The correction takes the mean error that weight rounding leaves, group by group."""

import pytest
import torch
from dit_quant.kernels.numerics import rotate
from dit_quant.quant_core.convert import LayerInput, quantize_weight
from dit_quant.quant_core.grouping import members
from dit_quant.quant_core.linear import folded_weight
from dit_quant.quant_core.schemes import PRESETS, Scale, Shift, WeightArgs
from dit_quant.quant_core.timesteps import TimestepGroups
from drift import drift

pytestmark = pytest.mark.usefixtures("poisoned_empty")

N, K = 33, 64
GROUPS = TimestepGroups((0.7, 0.4), (0.9, 0.5, 0.2))
SCHEMES = {
    "mid-range": PRESETS["htg_paper"],
    "mid-range, 4 bits": PRESETS["htg_paper"].with_options(weights=WeightArgs(4, symmetric=False)),
    "no shift": PRESETS["rtn_w8a8"],
    "no shift, 4 bits": PRESETS["rtn_w4a8"],
    "no shift, rotated and scaled": PRESETS["W4A8"].with_options(shift=Shift.NONE),
    "mean": PRESETS["W4A8"],
    "static": PRESETS["W8A8 static"].with_options(shift=Shift.NONE, scale=Scale.NONE),
}


@pytest.fixture(scope="module")
def found():
    return drift(K, 6)


def layer_of(found, scheme):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) / 8
    layer, _ = quantize_weight("layer", weight, scheme, GROUPS, LayerInput(found.sigmas, found.statistics(K)))
    return layer, weight


def mean_errors(layer, weight, found):
    """Mean output error [T, N] of each group's own tokens, activations unrounded, in float64."""
    errors = []
    for g, rows in enumerate(members(found.sigmas, GROUPS)):
        x = torch.cat([found.samples[t] for t in rows]).double()
        moved = x if layer.shift is None else x - layer.shift[g].double()
        moved = rotate(moved if layer.smooth is None else moved / layer.smooth.double(), layer.hadamard)
        y = moved @ folded_weight(layer).double().T
        y = y if layer.correction is None else y + layer.correction[g].double()
        errors.append((y - x @ weight.double().T).mean(dim=0))
    return torch.stack(errors)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_mean_error_of_every_group_vanishes(found, scheme):
    """Up to fp16 storage of the correction, and fp32 storage of the group means."""
    layer, weight = layer_of(found, scheme.with_options(bias_correction=True))
    stored = layer.correction.double().abs()
    assert layer.correction.dtype is torch.float16
    assert stored.shape == (3, N)
    error = mean_errors(layer, weight, found).abs()
    largest = max(float(x.abs().amax()) for x in found.samples)
    # half a unit of 11 bits of mantissa; subnormal below 2**-14; fp32 sums over K terms
    assert (error <= 2**-11 * stored + 2**-25 + K * 2**-24 * largest * weight.abs().amax()).all()


@pytest.mark.parametrize("name", ["mid-range", "mid-range, 4 bits", "no shift", "no shift, 4 bits"])
def test_without_it_the_mean_error_stays(found, name):
    """Negative control: the law above is not true of every layer."""
    plain, weight = layer_of(found, SCHEMES[name])
    corrected, _ = layer_of(found, SCHEMES[name].with_options(bias_correction=True))
    # at 8 bits, fp16 storage of the correction leaves an eighth
    assert mean_errors(corrected, weight, found).norm() < 0.2 * mean_errors(plain, weight, found).norm()


@pytest.mark.parametrize("name", SCHEMES)
def test_nothing_but_the_correction_changes(found, name):
    plain, _ = layer_of(found, SCHEMES[name])
    corrected, _ = layer_of(found, SCHEMES[name].with_options(bias_correction=True))
    assert set(corrected.tensors()) == set(plain.tensors()) | {"correction"}
    for field, value in plain.tensors().items():
        if field != "correction":
            assert torch.equal(getattr(corrected, field), value)


def test_a_mean_shift_has_nothing_left_to_correct(found):
    """Its tokens are centred: what is left is the fp16 rounding of z, seen through the rounding of W."""
    plain, _ = layer_of(found, PRESETS["W4A8"])
    corrected, _ = layer_of(found, PRESETS["W4A8"].with_options(bias_correction=True))
    # both stored in fp16
    torch.testing.assert_close(corrected.correction, plain.correction, rtol=2**-9, atol=1e-3)
