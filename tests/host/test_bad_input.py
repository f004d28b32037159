"""Wrong input ends in an error that names the thing and the remedy, at the node that got it."""

import host_prompts as p
import pytest
import torch
from host_location import ROOT
from host_server import PromptFailed
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.host

GROUPED = p.calibrate() | p.group()
MODULE = "joint_blocks.1.x_block.mlp.fc1.weight"


def loader(name: str) -> dict:
    return {"model": p.node("UNETLoader", unet_name=f"{name}.safetensors", weight_dtype="default")}


@pytest.fixture(scope="module", autouse=True)
def variants(host_server):
    """Copies of the bundled checkpoint: one broken, one slightly other, one with dead channels."""
    original = load_file(ROOT / "demo" / "assets" / "emoji_dit.safetensors")
    folder = host_server.models / "diffusion_models"
    infinite = original[MODULE].clone()
    infinite[3, 5] = torch.inf
    save_file(original | {MODULE: infinite}, folder / "infinite.safetensors")
    save_file(original | {MODULE: original[MODULE] * 1.5}, folder / "other.safetensors")
    dead, dead_bias = original[MODULE].clone(), original[MODULE.replace("weight", "bias")].clone()
    dead[:64], dead_bias[:64] = 0, 0
    save_file(
        original | {MODULE: dead, MODULE.replace("weight", "bias"): dead_bias}, folder / "dead_channels.safetensors"
    )


CASES = {
    "no prompts": (p.calibrate(positive=None), "no calibration prompts: write at least one"),
    "no negative": (p.calibrate(negative=None), "connect `negative`"),
    "prompts without CLIP": (p.calibrate(prompts="a lion"), "no CLIP is connected; connect one"),
    "size": (p.calibrate(sizes="128x128, wide"), "'wide' is not WIDTHxHEIGHT.*write for example"),
    "no size": (p.calibrate(sizes=" , "), "no latent size given"),
    "tiny size": (p.calibrate(sizes="8x8"), "'8x8' is not WIDTHxHEIGHT of 16x16 to"),
    "huge size": (p.calibrate(sizes="99999x99999"), "'99999x99999' is not WIDTHxHEIGHT of 16x16 to 16384x16384"),
    "endless size": (p.calibrate(sizes="1" * 5000 + "x16"), "is not WIDTHxHEIGHT"),
    "no step of its own": (
        p.calibrate(start_at_step=8),
        r"start_at_step 8 leaves no step to calibrate of 8 up to end_at_step 10000; take .* KSampler \(Advanced\)",
    ),
    "nothing before": (
        p.calibrate(model_before=p.link("model")),
        "model_before is connected, but start_at_step is 0: it would sample nothing; set start_at_step",
    ),
    "too many groups": (p.calibrate() | p.group(groups=64), "64 groups do not fit 8 timesteps; choose 1 to 8"),
    "regular expression": (
        GROUPED | p.quantize(skip_layers="fine\nqkv("),
        r"skip_layers: 'qkv\(' is not a regular expression",
    ),
    "no calibration": (
        p.quantize("W8A8", calibration=None),
        "W8A8 needs a calibration; connect Calibrate DiT, or choose an rtn preset",
    ),
    "paper without calibration": (p.quantize("htg_paper", calibration=None), "htg_paper needs a calibration"),
    "quantized twice": (
        p.quantize("rtn_w8a8", calibration=None, name="once") | p.quantize("rtn_w8a8", "once", None),
        "quantized already; connect the full-precision model",
    ),
    "everything skipped": (
        p.quantize("rtn_w8a8", calibration=None, skip_layers="."),
        r"no layer of this model was quantized: .* and 23 more: skip_layers \.",
    ),
    "float model saved": (p.save("model", "float"), "not quantized: connect the output of Quantize DiT"),
    "infinite activations": (
        loader("infinite")
        | p.calibrate(seed=2),  # one element escapes the fingerprint: not the cache of the sound model
        r"joint_blocks\.1\.x_block\.mlp\.fc2: the input holds NaN or infinity at sigma",
    ),
    "infinite weight": (
        loader("infinite") | p.quantize("rtn_w4a8", calibration=None),
        r"joint_blocks\.1\.x_block\.mlp\.fc1: the weight holds NaN or infinity; the checkpoint is damaged",
    ),
    "calibration of other weights": (
        loader("other") | p.bundled("bundled") | p.calibrate("bundled") | p.quantize(calibration="calibration"),
        r"joint_blocks\.1\.x_block\.mlp\.fc1: the weight changed since calibration .*run Calibrate DiT",
    ),
    "layer with a scaled input": (
        {"scaled": p.node("DiTQuantTestInputScaled", model=p.link("model"), name=MODULE.removesuffix(".weight"))}
        | p.quantize("rtn_w8a8", "scaled", None),
        r"joint_blocks\.1\.x_block\.mlp\.fc1: this checkpoint scales the layer's input .*in 16 bits",
    ),
    "UNet quantized": (
        {"model": p.node("DiTQuantTestUNet")} | p.quantize("rtn_w8a8", calibration=None),
        "this is a UNet.*load a DiT",
    ),
    "UNet calibrated": ({"model": p.node("DiTQuantTestUNet")} | p.calibrate(), "this is a UNet.*load a DiT"),
}


def sink(fragment: dict) -> dict:
    """Something that asks for the last node's output."""
    *_, (name, last) = fragment.items()
    if last["class_type"] == "DiTQuantQuantize":
        return p.sample(name, "bad")
    if last["class_type"] == "DiTQuantSave":
        return {}
    return {"shown": p.node("PreviewAny", source=p.link(name))}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_has_its_own_error(host_server, case):
    fragment, message = CASES[case]
    with pytest.raises(PromptFailed, match=message) as failure:
        host_server.run(p.BASE | fragment | sink(fragment))
    *_, last = fragment.values()
    assert failure.value.node_type == last["class_type"]
    assert failure.value.message == "node raised"


@pytest.mark.parametrize("preset", ["W8A8", "W4A8", "htg_paper"])
def test_channels_without_range_are_harmless(host_server, preset):
    """64 dead channels in front of a GELU: their activations are always 0."""
    prompt = p.BASE | loader("dead_channels") | GROUPED | p.quantize(preset, skip_layers=r"blocks\.[023]")
    latents = host_server.latents(host_server.run(prompt | p.sample("model", "full") | p.sample("quantized", "dead")))
    assert bool(torch.isfinite(latents["dead"]).all())
    assert (latents["dead"] - latents["full"]).norm() < 0.3 * latents["full"].norm()
