"""Layers of every scheme over drifting inputs, for the tests of what is done with a quantized layer."""

import torch
from dit_quant.quant_core.convert import LayerInput, quantize_weight
from dit_quant.quant_core.schemes import PRESETS, ActivationArgs, Granularity, Rounding, Shift, WeightArgs
from dit_quant.quant_core.timesteps import TimestepGroups
from drift import drift

# a step of range / levels leaves step / sqrt(12): 5 rms a side in 127 steps, groups of 16 span 4.5 rms in 15 steps
EIGHT = 5 / 127 / 12**0.5
FOUR = 4.5 / 15 / 12**0.5

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
