"""Quantize DiT: close to full precision, better than plain rounding, and the given MODEL is left alone."""

import host_prompts as p
import pytest
import torch
from dit_quant.quant_core.metrics import relative_l2

pytestmark = pytest.mark.host

BOUNDS = {"W8A8": 0.03, "W4A8": 0.12}


@pytest.mark.parametrize("preset", BOUNDS)
def test_latents_are_close_to_full_precision(presets, preset):
    error = relative_l2(presets.latents[preset], presets.latents["full"])
    assert 0 < error < BOUNDS[preset]


@pytest.mark.parametrize("preset", BOUNDS)
def test_calibrated_is_no_farther_than_rounding(presets, preset):
    full = presets.latents["full"]
    plain = relative_l2(presets.latents[f"rtn_{preset.lower()}"], full)
    assert relative_l2(presets.latents[preset], full) <= plain


def test_every_preset_gives_finite_latents(presets, object_info):
    offered = object_info["DiTQuantQuantize"]["input"]["required"]["preset"]
    offered = offered[1]["options"] if offered[0] == "COMBO" else offered[0]
    # needs gains and a size: test_fit_to_size.py
    assert set(offered) - {"fit to size"} == set(presets.latents) - {"full"}
    for latent in presets.latents.values():
        assert latent.shape == (2, 16, 16, 16)
        assert bool(torch.isfinite(latent).all())


def test_report_names_what_was_skipped(presets):
    text = p.report(presets.history, "W4A8 model")
    assert "W4A8: 29 layers" in text
    assert "kept in floating point (modulation: one token per call, and sensitive): joint_blocks.0" in text
    assert "kept in floating point (outside the transformer blocks)" in text
    assert "context_embedder" in text


def test_report_names_the_artists_own_skips(host_server):
    skipping = p.quantize("rtn_w8a8", calibration=None, skip_layers=r"blocks\.1\..*fc1$" + "\n\nattn.qkv")
    history = host_server.run(p.BASE | skipping | p.save("quantized", "skipping"))
    text = p.report(history, "quantized")
    assert r"kept in floating point (skip_layers blocks\.1\..*fc1$): joint_blocks.1.context_block.mlp.fc1" in text
    assert "kept in floating point (skip_layers attn.qkv): joint_blocks.0.context_block.attn.qkv" in text


def test_quantizing_leaves_the_model_alone(host_server):
    """Full precision is sampled, quantized and sampled again: the same MODEL object, the host's cache defeated."""
    before = host_server.run(p.BASE | p.again(101) | p.sample("again", "before"))
    quantizing = p.again(102) | p.calibrate("again") | p.group() | p.quantize("htg_paper", "again")
    host_server.run(p.BASE | quantizing | p.sample("quantized", "between"))
    after = host_server.run(p.BASE | p.again(103) | p.sample("again", "after"))
    assert {"again", "after sampler"}.isdisjoint(cached(after))
    assert "model" in cached(after)
    assert torch.equal(host_server.latents(before)["before"], host_server.latents(after)["after"])


def cached(history) -> set:
    """Ids of the nodes whose outputs the host took from its own cache."""
    return {node for name, record in history.messages if name == "execution_cached" for node in record["nodes"]}
