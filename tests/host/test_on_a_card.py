"""The nodes where the host has a card, an emulated one: whole in its memory, and streamed through too little of it by
dynamic VRAM. What differs from a CPU is the host's doing: devices, types, offloading, who patches a weight and when."""

import sys
from dataclasses import dataclass
from pathlib import Path

import host_prompts as p
import pytest
import torch
import torch_card
from dit_quant.quant_core.metrics import relative_l2
from host_lora import write_lora
from host_server import History, Host, HostServer, find_host, why_no_host

pytestmark = pytest.mark.host

LORA = "on_a_card.safetensors"
LORA_LAYERS = {"joint_blocks.0.x_block.attn.qkv": (768, 256), "joint_blocks.2.x_block.mlp.fc2": (256, 1024)}
# of a model of 17 MB in fp16; and of what there is, everything is lost now and then
PRESSED = {"DIT_QUANT_VBAR_MB": "6", "DIT_QUANT_VBAR_LOSE": "40"}
MODES = {"legacy": {}, "dynamic": {}, "dynamic, pressed": PRESSED}
PRESETS = ("W8A8", "W4A8")


@dataclass(frozen=True)
class Run:
    """What one mode gave: the history, the latents, and those of the files that it saved."""

    history: History
    latents: dict[str, torch.Tensor]
    reloaded: dict[str, torch.Tensor]
    log: str


def run(host: Host, mode: str, base: Path) -> Run:
    """Calibrates, rounds, puts a LoRA behind that, samples all, saves all; then loads and samples the files."""
    options = {**torch_card.environment(host, dynamic=mode != "legacy"), **MODES[mode]}
    prompt = p.BASE | p.calibrate() | p.group() | p.sample("model", "full")
    for preset in PRESETS:
        prompt |= p.quantize(preset, name=preset) | p.lora(LORA, preset, f"{preset} LoRA")
        for name in (preset, f"{preset} LoRA"):
            prompt |= p.sample(name, f"{name} latents") | p.save(name, name)
    prompt |= p.lora(LORA, name="LoRA") | p.sample("LoRA", "LoRA latents")
    again = p.texts()
    for name in (name for preset in PRESETS for name in (preset, f"{preset} LoRA")):
        again |= p.load(name, name=f"{name} loaded") | p.sample(f"{name} loaded", name)
    with HostServer(Host(host.root, Path(sys.executable)), base, device_args=(), environment=options) as server:
        write_lora(server.models / "loras" / LORA, LORA_LAYERS, 0.05)
        history = server.run(prompt, 600)
        return Run(history, server.latents(history), server.latents(server.run(again, 600)), server.log_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    host = find_host()
    if host is None:
        pytest.skip(f"HOST TESTS SKIPPED: {why_no_host()}")
    if reason := torch_card.why_not():
        pytest.skip(f"no emulated card: {reason}")
    return {mode: run(host, mode, tmp_path_factory.mktemp("card")) for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
def test_the_host_has_the_card(runs, mode):
    assert "Device: cuda:0 emulated card" in runs[mode].log
    assert ("DynamicVRAM support detected and enabled" in runs[mode].log) == (mode != "legacy")


@pytest.mark.parametrize("mode", MODES)
def test_curvature_is_measured(runs, mode):
    assert "curvature measured in 2 calls" in p.report(runs[mode].history, "calibration")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_report_is_about_the_card(runs, mode, preset):
    """No kernel can be launched on it, which is known of all layers before any is sampled."""
    report = p.report(runs[mode].history, preset)
    product = "int8_linear" if preset == "W8A8" else "int4_linear"
    assert f"{product} on cuda:0: torch, 29 layers; triton: " in report
    assert "takes" in report
    assert "on backend torch as in float16 (4096 tokens, measured)" in report


@pytest.mark.parametrize("mode", MODES)
def test_latents_are_close_to_full_precision(runs, mode):
    latents = runs[mode].latents
    assert relative_l2(latents["W8A8 latents"], latents["full"]) < 0.02
    assert relative_l2(latents["W4A8 latents"], latents["full"]) < 0.08


@pytest.mark.parametrize("mode", MODES)
def test_a_lora_behind_is_worked_in(runs, mode):
    latents = runs[mode].latents
    wanted = latents["LoRA latents"]
    without = relative_l2(latents["W8A8 latents"], wanted)
    assert without > 0.02, "the LoRA is too weak to show"
    assert relative_l2(latents["W8A8 LoRA latents"], wanted) < 0.75 * without


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*PRESETS, *(f"{preset} LoRA" for preset in PRESETS)])
def test_files_give_the_same_bits(runs, mode, name):
    """With a LoRA behind Quantize DiT too: the file has the codes that the host had rounded as it loaded."""
    assert torch.equal(runs[mode].reloaded[name], runs[mode].latents[f"{name} latents"])


def test_memory_that_is_too_small_changes_no_bit(runs):
    whole, pressed = runs["dynamic"].latents, runs["dynamic, pressed"].latents
    assert whole.keys() == pressed.keys()
    assert [name for name in whole if not torch.equal(whole[name], pressed[name])] == []
