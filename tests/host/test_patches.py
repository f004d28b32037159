"""What the host does to a MODEL works on a quantized one: LoRAs, sampling shifts, CFG nodes, merges."""

import host_prompts as p
import pytest
import torch
from dit_quant.quant_core.metrics import relative_l2
from host_server import PromptFailed

pytestmark = pytest.mark.host

REBUILT = {
    "rebuilt": p.node("DiTQuantTestRebuild", model=p.link("quantized")),
    "rebuilt with LoRA": p.node("DiTQuantTestRebuild", model=p.link("live LoRA")),
}
PATCHES = {
    "shifted": p.node("ModelSamplingSD3", model=p.link("quantized"), shift=1.0),
    "rescaled": p.node("RescaleCFG", model=p.link("quantized"), multiplier=0.7),
    "zero star": p.node("CFGZeroStar", model=p.link("quantized")),
    "merged into full": p.node("ModelMergeSimple", model1=p.link("model"), model2=p.link("quantized"), ratio=0.5),
    "full merged in": p.node("ModelMergeSimple", model1=p.link("quantized"), model2=p.link("model"), ratio=0.5),
    "two merged": p.node("ModelMergeSimple", model1=p.link("quantized"), model2=p.link("other"), ratio=0.5),
}


@pytest.fixture(scope="module")
def patched(host_server, lora) -> dict[str, torch.Tensor]:
    """Latents of one quantized model under every patch, all clones of it alive in one prompt."""
    prompt = (
        p.BASE | p.calibrate(**p.NO_COVARIANCE) | p.group() | p.quantize() | p.quantize("W4A8", name="other") | PATCHES
    )
    prompt |= p.lora(lora, name="full with LoRA") | p.lora(lora, "quantized", "live LoRA")
    prompt |= p.lora(lora, "quantized", "no strength", strength=0.0) | p.lora(lora, "other", "live LoRA on 4 bits")
    prompt |= {"full shifted": p.node("ModelSamplingSD3", model=p.link("model"), shift=1.0)}
    prompt |= p.calibrate("full shifted", "shifted calibration", **p.NO_COVARIANCE)
    prompt |= p.quantize(model="full shifted", calibration="shifted calibration", name="shifted before")
    names = [*PATCHES, "model", "quantized", "other", "full with LoRA", "live LoRA", "no strength"]
    for name in [*names, "live LoRA on 4 bits", "full shifted", "shifted before"]:
        prompt |= p.sample(name, f"{name} latents")
    prompt |= (
        REBUILT | p.sample("rebuilt", "rebuilt latents") | p.sample("rebuilt with LoRA", "rebuilt with LoRA latents")
    )
    for name in ("live LoRA", "live LoRA on 4 bits", "full merged in"):
        prompt |= p.save(name, f"saved {name}")
    latents = host_server.latents(host_server.run(prompt, timeout=600))
    return {name.removesuffix(" latents"): latent for name, latent in latents.items()}


@pytest.mark.parametrize("name", PATCHES)
def test_patch_changes_finite_latents(patched, name):
    assert bool(torch.isfinite(patched[name]).all())
    assert not torch.equal(patched[name], patched["quantized"])


@pytest.mark.parametrize("name", ["merged into full", "full merged in", "two merged"])
def test_merge_lies_near_its_parents(patched, name):
    """Both parents are roundings of one model, so every merge of them is close to it."""
    assert relative_l2(patched[name], patched["model"]) < 0.1


def test_lora_after_quantize(patched):
    with_lora = patched["full with LoRA"]
    without = relative_l2(patched["quantized"], with_lora)
    assert without > 0.1, "the LoRA is too weak to show"
    assert relative_l2(patched["live LoRA"], with_lora) < without / 2
    assert relative_l2(patched["live LoRA on 4 bits"], with_lora) < relative_l2(patched["other"], with_lora)


@pytest.mark.parametrize(("name", "original"), [("rebuilt", "quantized"), ("rebuilt with LoRA", "live LoRA")])
def test_copy_from_the_factory_is_the_same_model(patched, name, original):
    assert torch.equal(patched[name], patched[original])


def test_a_copy_has_nothing_of_what_is_patched_into_the_model(host_server, lora, patched):
    """The LoRA's clone was sampled last, so that the host has its weights in place of the model's."""
    prompt = p.BASE | p.calibrate(**p.NO_COVARIANCE) | p.group() | p.quantize()
    host_server.run(prompt | p.lora(lora, "quantized", "live LoRA") | p.sample("live LoRA", "patched in", seed=5))
    latents = host_server.latents(
        host_server.run(prompt | {"rebuilt": REBUILT["rebuilt"]} | p.sample("rebuilt", "clean"))
    )
    assert torch.equal(latents["clean"], patched["quantized"])


def test_weights_that_were_moved_are_not_kept(host_server):
    """Quantize DiT holds on to no second copy of the model, and copies are made from where the weights are now."""
    prompt = p.BASE | p.quantize("rtn_w8a8", calibration=None, group_size=32)
    prompt |= {"moved": p.node("DiTQuantTestMoved", model=p.link("quantized"))}
    prompt |= {"copy": p.node("DiTQuantTestRebuild", model=p.link("moved"))}
    latents = host_server.latents(host_server.run(prompt | p.sample("moved", "here") | p.sample("copy", "there")))
    assert torch.equal(latents["here"], latents["there"])


def test_lora_without_strength_changes_nothing(patched):
    assert torch.equal(patched["no strength"], patched["quantized"])


def test_patches_attached_before_quantize_survive(patched):
    full, shifted = patched["model"], patched["full shifted"]
    assert relative_l2(patched["shifted before"], shifted) < relative_l2(full, shifted) / 2


def test_lora_before_quantize_is_merged(host_server, lora, patched):
    prompt = p.BASE | p.lora(lora) | p.calibrate("lora", **p.NO_COVARIANCE) | p.group() | p.quantize(model="lora")
    merged = host_server.latents(host_server.run(prompt | p.sample("quantized", "merged")))["merged"]
    with_lora = patched["full with LoRA"]
    assert relative_l2(merged, with_lora) < relative_l2(patched["quantized"], with_lora) / 2


def test_calibration_without_the_lora_is_refused(host_server, lora):
    prompt = p.BASE | p.lora(lora) | p.calibrate("model", **p.NO_COVARIANCE) | p.group() | p.quantize(model="lora")
    with pytest.raises(
        PromptFailed, match=r"LoRAs added or removed.*run Calibrate DiT on exactly this model"
    ) as failure:
        host_server.run(prompt | p.sample("quantized", "refused"))
    assert failure.value.node_type == "DiTQuantQuantize"


@pytest.mark.parametrize("name", ["live LoRA", "live LoRA on 4 bits", "full merged in"])
def test_saving_keeps_what_was_live(host_server, patched, name):
    """LoRAs and merges on top of a quantized MODEL are worked into the file with the very same rounding."""
    history = host_server.run(p.texts() | p.load(f"saved {name}") | p.sample("quantized", "reloaded"))
    assert torch.equal(host_server.latents(history)["reloaded"], patched[name])
