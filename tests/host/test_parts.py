"""A model that samples a part of the steps is calibrated on these, behind what samples the others."""

from pathlib import Path

import host_prompts as p
import pytest
from dit_quant.quant_core.metrics import relative_l2

pytestmark = pytest.mark.host

SCRIPT = Path(__file__).with_name("compare_parts.py")
PROMPTS, START, END = 2, 3, 6


def test_latents_are_those_of_two_advanced_samplers(comparison):
    """Bit by bit, whether the two models share their memory or not; and the one before matters."""
    assert comparison["chain"] == {"shared": True, "apart": True, "without": False}


def test_only_its_own_steps_are_recorded(comparison):
    assert comparison["sigmas"] == pytest.approx(comparison["expected_sigmas"], rel=1e-6)
    assert len(comparison["sigmas"]) == END - START


def test_what_comes_before_samples_its_steps_once_per_prompt(comparison):
    """Not again for the sensitivities, nor for a second pass."""
    assert comparison["calls"] == comparison["expected_calls"]
    assert len(comparison["calls"]) == PROMPTS * START
    assert "2 passes" in comparison["passes"]
    assert comparison["calls_in_passes"] == PROMPTS * START


def test_progress_counts_all_steps(comparison):
    assert comparison["progress"] == list(range(1, PROMPTS * END + 1))


def test_sensitivity_is_measured_on_its_own_steps(comparison):
    assert len(comparison["gains"]) == comparison["layers"] > 0


def test_alone_it_sees_what_it_sees_on_the_way_through_all_steps(comparison):
    """fp32; the latent is handed on scaled and back. Behind another model it sees something else."""
    assert comparison["on_the_way"] < 1e-6
    assert comparison["behind_another"] > 1e-3


def test_quantized_models_come_before_and_are_told_apart(comparison):
    """The coarser one leads farther from what the float one leads to, and neither finds the other's cache."""
    assert 0 < comparison["rtn_w8a8"] < 0.3 * comparison["rtn_w4a8"]
    assert comparison["rtn_w4a8"] < 0.02
    assert comparison["new_files"] == 2


def part(model: str, name: str, latent: str, **changes) -> dict:
    """KSampler (Advanced) on a part of the steps; noise is left in its latent where steps are left."""
    inputs = {
        **{key: p.link(key) for key in ("positive", "negative")},
        "model": p.link(model),
        "latent_image": p.link(latent),
        "add_noise": "enable" if latent == "latent" else "disable",
        "noise_seed": 7,
        **p.SAMPLING,
        "start_at_step": 0,
        "end_at_step": 10000,
        "return_with_leftover_noise": "enable" if latent == "latent" else "disable",
        **changes,
    }
    return {name: p.node("KSamplerAdvanced", **inputs)}


def in_two_parts(first: str, second: str, name: str) -> dict:
    """Sampled by one MODEL up to START, then by the other; `name` is the node id of the saved latents."""
    begun, done = f"{name} begun", f"{name} done"
    parts = part(first, begun, "latent", end_at_step=START) | part(second, done, begun, start_at_step=START)
    return parts | {name: p.node("SaveLatent", samples=p.link(done), filename_prefix=f"latents/{name}")}


def test_a_workflow_of_two_models(host_server, lora):
    """As for Wan 2.2: each is calibrated on its steps, the second behind the first one quantized."""
    high = p.calibrate("lora", "high seen", end_at_step=START) | p.quantize("W8A8", "lora", "high seen", "high")
    behind = {"start_at_step": START, "model_before": p.link("high")}
    low = p.calibrate("model", "low seen", **behind) | p.quantize("W8A8", "model", "low seen", "low")
    chains = in_two_parts("lora", "model", "full") | in_two_parts("high", "low", "rounded")
    models = p.BASE | p.lora(lora, strength=8.0)
    history = host_server.run(models | high | low | chains | p.sample("model", "one model"))
    assert f"{START} noise levels" in p.report(history, "high seen")
    assert f"{p.STEPS - START} noise levels" in p.report(history, "low seen")
    latents = host_server.latents(history)
    apart = relative_l2(latents["one model"], latents["full"])
    assert apart > 0.03, "the two models are too much alike"
    assert relative_l2(latents["rounded"], latents["full"]) < 0.02
