"""One real ComfyUI server for all host tests of a run, and what several files look at."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import host_prompts as p
import pytest
import torch
from host_location import ROOT
from host_lora import write_lora
from host_server import History, HostServer, find_host, why_no_host

NODES = Path(__file__).with_name("nodes_for_tests.py")
PRESETS = ("W8A8", "W4A8", "W8A8 fast", "W8A8 static", "htg_paper", "rtn_w8a8", "rtn_w4a8")
LORA = "emoji_lora.safetensors"
LORA_LAYERS = {
    "joint_blocks.0.x_block.attn.qkv": (768, 256),
    "joint_blocks.1.context_block.mlp.fc1": (1024, 256),
    "joint_blocks.2.x_block.mlp.fc2": (256, 1024),
    "joint_blocks.3.x_block.adaLN_modulation.1": (1536, 256),
}


@pytest.fixture(scope="module")
def comparison(request) -> dict:
    """What the test module's SCRIPT prints, run by the host's own interpreter in the host's folder."""
    host = find_host()
    if host is None:
        pytest.skip(f"HOST TESTS SKIPPED: {why_no_host()}")
    done = subprocess.run(
        [str(host.python), str(request.module.SCRIPT), str(ROOT)],
        cwd=host.root,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def start(base: Path, **options) -> HostServer:
    """A server that has the test nodes."""
    host = find_host()
    if host is None:
        pytest.skip(f"HOST TESTS SKIPPED: {why_no_host()}")
    (base / "custom_nodes").mkdir()
    shutil.copy(NODES, base / "custom_nodes")
    return HostServer(host, base, **options)


@pytest.fixture(scope="session")
def host_server(tmp_path_factory):
    """A running HostServer with this pack installed; its base folder is kept by pytest for a look after a failure."""
    with start(tmp_path_factory.mktemp("host")) as server:
        yield server


@pytest.fixture(scope="session")
def fresh_server(host_server, tmp_path_factory):
    """Another process that shares nothing with `host_server` but its output folder and calibration caches."""
    base = tmp_path_factory.mktemp("fresh")
    server = start(base, extra_args=("--output-directory", str(host_server.output)))
    with server:
        server.output = host_server.output
        yield server


@pytest.fixture(scope="session")
def object_info(host_server):
    """The server's node descriptions, for `workflow_format`."""
    return host_server.object_info()


@dataclass(frozen=True)
class PresetRun:
    """Every preset quantized, sampled and saved in one prompt; keys are presets, and "full"."""

    history: History
    latents: dict[str, torch.Tensor]
    folder: Path

    def file(self, preset: str) -> Path:
        return self.folder / p.saved_name(preset)


@pytest.fixture(scope="session")
def presets(host_server) -> PresetRun:
    prompt = p.BASE | p.calibrate() | p.group() | p.sample("model", "full")
    for preset in PRESETS:
        calibration = None if preset.startswith("rtn") else "groups"
        prompt |= p.quantize(preset, calibration=calibration, name=f"{preset} model")
        prompt |= p.sample(f"{preset} model", preset) | p.save(f"{preset} model", preset)
    history = host_server.run(prompt)
    return PresetRun(history, host_server.latents(history), host_server.output / "diffusion_models")


@pytest.fixture(scope="session")
def lora(host_server) -> str:
    """Name of a random rank-4 LoRA on attention, MLP and modulation Linears of the bundled DiT."""
    write_lora(host_server.models / "loras" / LORA, LORA_LAYERS, 0.1)
    return LORA
