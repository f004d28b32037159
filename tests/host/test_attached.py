"""What other nodes attach to a MODEL: it comes along, or is refused with the remedy before anything is changed."""

import host_prompts as p
import pytest
import torch
from host_server import PromptFailed

pytestmark = pytest.mark.host

QUANTIZED = p.quantize("rtn_w8a8", calibration=None)
ROPE = {f"{kind}_{axis}": float(kind == "scale") for kind in ("scale", "shift") for axis in "xyt"}
SHOWN = p.node("PreviewAny", source=p.link("calibration", 1))
nonces = iter(range(7000, 8000))


def hooked(conditioning: str) -> dict:
    return p.node(
        "ConditioningSetProperties",
        cond_NEW=p.link(conditioning),
        strength=1.0,
        set_cond_area="default",
        hooks=p.link("hook"),
    )


@pytest.mark.parametrize("where", ["both", "positive"])
def test_a_lora_hooked_to_a_conditioning_is_refused_and_leaves_the_model_as_it_was(host_server, lora, where):
    """The host takes such a LoRA off by copying into the weight, which a quantized one does not survive."""
    model = p.BASE | p.again(next(nonces)) | p.quantize("rtn_w8a8", "again", None)
    before = host_server.latents(host_server.run(model | p.sample("quantized", "before hooks")))["before hooks"]
    hook = p.node("CreateHookLora", lora_name=lora, strength_model=1.0, strength_clip=0.0)
    prompt = model | {"hook": hook, "hooked positive": hooked("positive"), "hooked negative": hooked("negative")}
    conditions = {"positive": p.link("hooked positive")}
    if where == "both":
        conditions["negative"] = p.link("hooked negative")
    with pytest.raises(PromptFailed, match=r"hooked to a conditioning.*use Load LoRA") as failure:
        host_server.run(prompt | p.sample("quantized", "hooked", **conditions))
    assert failure.value.node_type == "KSampler"
    # the same MODEL: the host has it in its cache of outputs
    after = host_server.run(
        model | p.sample("quantized", "after hooks", seed=7) | p.save("quantized", f"hooks_{where}")
    )
    assert torch.equal(host_server.latents(after)["after hooks"], before)
    loaded = host_server.run(p.texts() | p.load(f"hooks_{where}") | p.sample("quantized", "loaded"))
    assert torch.equal(host_server.latents(loaded)["loaded"], before)


def test_a_hooked_conditioning_is_not_calibrated_on(host_server, lora):
    """With dynamic VRAM the host would run another copy of the model for it."""
    hook = p.node("CreateHookLora", lora_name=lora, strength_model=1.0, strength_clip=0.0)
    prompt = p.BASE | {"hook": hook, "hooked": hooked("calibration_prompts"), "shown": SHOWN}
    for where in ("positive", "negative"):
        with pytest.raises(PromptFailed, match=r"a hook is on one of the conditionings.*Load LoRA before Calibrate"):
            host_server.run(prompt | p.calibrate(**{where: p.link("hooked")}))


def test_a_node_that_works_on_the_float_network_is_refused(host_server):
    held = {"held": p.node("DiTQuantTestHolder", model=p.link("model"))}
    with pytest.raises(PromptFailed, match=r"modules of this very model \(model_function_wrapper.*behind Quantize DiT"):
        host_server.run(p.BASE | held | p.quantize("rtn_w8a8", "held", None) | p.sample("quantized", "of held"))
    behind = {"held": p.node("DiTQuantTestHolder", model=p.link("quantized"))}
    latents = host_server.latents(host_server.run(p.BASE | QUANTIZED | behind | p.sample("held", "behind", steps=1)))
    assert bool(torch.isfinite(latents["behind"]).all())


def compiled(model: str) -> dict:
    return {"compiled": p.node("TorchCompileModel", model=p.link(model), backend="inductor")}


def test_a_compiled_model_is_refused_since_the_float_model_would_run(host_server):
    prompt = p.BASE | compiled("model") | p.quantize("rtn_w8a8", "compiled", None)
    with pytest.raises(PromptFailed, match="Quantize DiT before TorchCompileModel") as failure:
        host_server.run(prompt | p.sample("quantized", "of compiled"))
    assert failure.value.node_type == "DiTQuantQuantize"


def test_a_compiled_model_is_calibrated_uncompiled(host_server):
    prompt = p.BASE | p.again(next(nonces)) | compiled("again")
    calibrated = p.calibrate("compiled", seed=1) | {"shown": SHOWN}
    assert "29 layers" in p.report(host_server.run(prompt | calibrated), "shown")


def bypass(model: str, lora: str) -> dict:
    inputs = {"model": p.link(model), "lora_name": lora, "strength_model": 1.0}
    return {"bypassed": p.node("LoraLoaderBypassModelOnly", **inputs)}


@pytest.mark.parametrize("node", ["DiTQuantQuantize", "DiTQuantCalibrate", "DiTQuantSave"])
def test_a_lora_that_is_not_in_the_weights_is_refused(host_server, lora, node):
    prompt = {
        "DiTQuantQuantize": lambda: p.quantize("rtn_w8a8", "bypassed", None) | p.sample("quantized", "bypass"),
        "DiTQuantCalibrate": lambda: p.calibrate("bypassed") | {"shown": SHOWN},
        "DiTQuantSave": lambda: QUANTIZED | p.save("bypassed", "bypass"),
    }[node]()
    source = "quantized" if node == "DiTQuantSave" else "model"
    with pytest.raises(PromptFailed, match=r"bypass LoRA is connected.*Load LoRA in its place") as failure:
        host_server.run(p.BASE | bypass(source, lora) | prompt)
    assert failure.value.node_type == node


def test_a_bypass_lora_behind_quantize_works(host_server, lora):
    prompt = p.BASE | QUANTIZED | bypass("quantized", lora)
    latents = host_server.latents(host_server.run(prompt | p.sample("quantized", "q") | p.sample("bypassed", "b")))
    assert bool(torch.isfinite(latents["b"]).all())
    assert not torch.equal(latents["q"], latents["b"])


def test_saving_names_what_is_no_part_of_the_weights(host_server):
    shifted = {
        "shifted": p.node("ModelSamplingSD3", model=p.link("model"), shift=6.0),
        "scaled": p.node("ScaleROPE", model=p.link("shifted"), **ROPE),
        "overridden": p.node("CFGOverride", model=p.link("scaled"), cfg=2.0, start_percent=0.0, end_percent=1.0),
        "star": p.node("CFGZeroStar", model=p.link("overridden")),
    }
    prompt = p.BASE | shifted | p.quantize("rtn_w8a8", "star", None) | p.save("quantized", "shifted")
    text = p.report(host_server.run(prompt), "shifted file")
    assert "not in the file, to be connected again behind Load Quantized DiT" in text
    assert "model_sampling" in text
    # a wrapper without a name of its own, and what blocks look at
    assert "predict_noise" in text
    assert "rope_options" in text
    assert "sampler_post_cfg_function" in text
    plain = host_server.run(p.BASE | QUANTIZED | p.save("quantized", "nothing_attached"))
    assert "not in the file" not in p.report(plain, "nothing_attached file")


def calibrated(server, prompt: dict, model: str = "model", **changes) -> str:
    """What the node says: whether it sampled."""
    prompt = p.BASE | prompt | p.again(next(nonces), model)
    prompt |= p.calibrate("again", steps=3, seed=31, **p.NO_COVARIANCE, **changes)
    return p.report(server.run(prompt | {"shown": SHOWN}), "shown")


def references(value: float) -> dict:
    reference = p.node("ReferenceLatent", conditioning=p.link("calibration_prompts"), latent=p.link("painted"))
    return {"painted": p.node("DiTQuantTestLatent", value=value), "referenced": reference}


def test_everything_that_reaches_the_sampling_is_part_of_the_caches_key(host_server):
    """Taken from the cache only where the same is asked for again."""

    def taken(*given, **changes) -> bool:
        return "taken from the cache" in calibrated(host_server, *given, **changes)

    modulation = {
        "lora": p.node("DiTQuantTestScaled", model=p.link("model"), name="final_layer.linear.bias", factor=3.0)
    }
    star = {"star": p.node("CFGZeroStar", model=p.link("model"))}
    rescaled = {"rescaled": p.node("RescaleCFG", model=p.link("model"), multiplier=0.7)}
    other = {"rescaled": p.node("RescaleCFG", model=p.link("model"), multiplier=0.3)}
    cases = [
        ({}, "model", {}),
        (modulation, "lora", {}),
        (star, "star", {}),
        (rescaled, "rescaled", {}),
        (other, "rescaled", {}),
        (references(0.1), "model", {"positive": p.link("referenced")}),
        (references(0.9), "model", {"positive": p.link("referenced")}),
    ]
    for prompt, model, changes in cases:
        assert not taken(prompt, model, **changes), prompt
    for prompt, model, changes in cases:
        assert taken(prompt, model, **changes), prompt


def test_the_last_seed_of_all_has_one_after_it(host_server):
    prompt = p.BASE | p.calibrate(steps=2, **(p.NO_COVARIANCE | {"seed": 2**64 - 1}))
    text = p.report(host_server.run(prompt | {"shown": SHOWN}), "shown")
    assert f"{p.CALIBRATION_PROMPTS} prompts" in text


def test_a_prefix_that_ends_like_a_folder_overwrites_nothing(host_server):
    paths = []
    for preset in ("rtn_w8a8", "rtn_w4a8"):
        quantized = p.quantize(preset, calibration=None)
        saved = {"file": p.node("DiTQuantSave", model=p.link("quantized"), filename_prefix="diffusion_models/slash/")}
        paths.append(p.report(host_server.run(p.BASE | quantized | saved), "file"))
    assert paths[0] != paths[1]
    assert len(list((host_server.output / "diffusion_models").glob("slash*.safetensors"))) == 2


def test_patterns_that_match_nothing_are_told(host_server):
    prompt = p.BASE | p.quantize("rtn_w8a8", calibration=None, skip_layers="double_blocks\nfc1")
    text = p.report(host_server.run(prompt | p.sample("quantized", "patterns", steps=1)), "quantized")
    assert "skip_layers: 'double_blocks' matches none of 29 layers" in text
    assert "'fc1' matches none" not in text


def test_notes_of_many_layers_are_one_line(host_server):
    prompt = p.BASE | p.quantize("rtn_w4a8", calibration=None, group_size=48)
    text = p.report(host_server.run(prompt | p.sample("quantized", "grouped", steps=1)), "quantized")
    lines = [line for line in text.splitlines() if "is not divisible by group size 48" in line]
    # one for each width
    assert 1 <= len(lines) <= 3
    assert " more: K=" in lines[0]
