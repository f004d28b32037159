"""HTG as published (arXiv 2503.06930), derived again from raw activations, against the preset htg_paper."""

import itertools

import numpy as np
import pytest
import torch
from dit_quant.quant_core.architectures.sd3 import SD3
from dit_quant.quant_core.convert import quantize_model
from dit_quant.quant_core.schemes import PRESETS
from drift import calibration_of, drift

BLOCK = "joint_blocks.0.x_block."


def paper(raw, sigmas, W, plain):
    """HTG (arXiv 2503.06930) for one layer, in numpy, from raw activations. -> groups, z, s, c, codes, ranges."""
    T = len(raw)
    z_t = np.stack([(x.max(axis=0) + x.min(axis=0)) / 2 for x in raw])  # eq. 2
    runs = [[t] for t in range(T)]
    while len(runs) > max(1, T // 10):  # algorithm 1, centroid linkage
        centres = [z_t[run].mean(axis=0) for run in runs]
        gaps = [((a - b) ** 2).sum() for a, b in itertools.pairwise(centres)]
        at = int(np.argmin(gaps))
        runs[at : at + 2] = [runs[at] + runs[at + 1]]
    z = np.stack([z_t[run].mean(axis=0) for run in runs]).astype(np.float16)  # eq. 4, stored in 16 bits
    shift, s = z.astype(np.float64), np.ones(W.shape[1], dtype=np.float32)
    if plain:
        shift = np.zeros_like(shift)
    else:
        m = None  # eq. 7, from the noisiest step
        for run, centre in zip(runs, shift, strict=True):
            for t in run:
                peak = np.abs(raw[t] - centre).max(axis=0)
                m = peak if m is None else 0.99 * m + 0.01 * peak
        s = np.sqrt(m / np.abs(W).max(axis=0)).astype(np.float32)
    folded = (W.astype(np.float64) * s.astype(np.float64)).astype(np.float32)  # eq. 6
    step = np.abs(folded).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.rint(folded / step)
    ranges = []
    for run, centre in zip(runs, shift, strict=True):
        moved = np.concatenate([(raw[t] - centre) / s.astype(np.float64) for t in run])
        ranges.append((min(moved.min(), 0), max(moved.max(), 0)))
    return runs, z, s, shift @ W.astype(np.float64).T, codes, step, ranges


@pytest.mark.parametrize("T", [7, 20, 35])
@pytest.mark.parametrize("name", ["attn.qkv", "mlp.fc1", "attn.proj", "mlp.fc2"])
def test_published_method_is_reproduced_from_raw_activations(name, T):
    name = BLOCK + name
    weight = torch.randn(33, 63, generator=torch.Generator().manual_seed(0)) / 8
    found = drift(63, T, seed=0)
    calibration = calibration_of({name: weight}, timesteps=T)
    loaders = {name: lambda: weight}
    layers, _ = quantize_model(loaders, scheme=PRESETS["htg_paper"], calibration=calibration, family=SD3)
    layer = layers[name]
    raw = [x.double().numpy() for x in found.samples]
    plain = name.endswith("fc2")
    runs, z, s, c, codes, step, ranges = paper(raw, found.sigmas, weight.numpy(), plain)
    assert [layer.groups.index(sigma) for sigma in found.sigmas] == [g for g, run in enumerate(runs) for _ in run]
    assert (layer.qdata.numpy() == codes).all()
    np.testing.assert_array_equal(layer.scale.numpy(), step)
    if plain:
        assert layer.shift is None
        assert layer.smooth is None
        assert layer.correction is None
    else:
        np.testing.assert_array_equal(layer.shift.numpy(), z)
        np.testing.assert_array_equal(layer.smooth.numpy(), s)
        # c comes from the unrounded weight, and is stored in 16 bits
        np.testing.assert_allclose(layer.correction.double().numpy(), c, rtol=2**-10, atol=1e-6)
    for g, (low, high) in enumerate(ranges):
        scale = (high - low) / 254
        assert layer.static_scale[g].item() == pytest.approx(scale, rel=1e-6)
        # a tie may round to either neighbour
        assert abs(layer.static_zero[g].item() - (-127 - low / scale)) <= 0.5001
