"""Save Quantized DiT and Load Quantized DiT: the same bits in another process, small files, clear refusals."""

import json
import shutil
import struct
from math import prod

import host_prompts as p
import pytest
import torch
from host_location import ROOT
from host_server import PromptFailed
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.host

ASSETS = ROOT / "demo" / "assets"
SIZES = {"W8A8": 0.55, "W4A8": 0.35}


def header(path) -> dict:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


@pytest.fixture(scope="module")
def reloading(presets, fresh_server):
    """The saved presets loaded and sampled in a process that has never seen them."""
    names = ("W8A8", "W4A8", "htg_paper")
    prompt = p.texts()
    for name in names:
        prompt |= p.load(name, f"{name} model") | p.sample(f"{name} model", f"{name} reloaded")
    return fresh_server.run(prompt)


@pytest.mark.parametrize("preset", ["W8A8", "W4A8", "htg_paper"])
def test_fresh_process_gives_the_same_bits(presets, fresh_server, reloading, preset):
    latents = fresh_server.latents(reloading)
    assert torch.equal(latents[f"{preset} reloaded"], presets.latents[preset])


def test_load_says_what_runs_on_this_machine(reloading):
    """Whoever was given a file has no other report."""
    first, *lines = p.report(reloading, "W4A8 model").splitlines()
    assert first == "29 quantized layers"
    assert any(line.startswith("int4_linear on cpu: ") for line in lines)
    assert sum("times as long" in line for line in lines) == 1


@pytest.mark.parametrize("preset", SIZES)
def test_layers_are_as_small_as_their_bits_say(presets, preset):
    original = header(ASSETS / "emoji_dit.safetensors")
    saved = header(presets.file(preset))
    layers = [key.removesuffix(".comfy_quant") for key in saved if key.endswith(".comfy_quant")]
    assert len(layers) == 29
    ours = bf16 = 0
    for name in layers:
        parts = {key.removeprefix(f"{name}."): entry for key, entry in saved.items() if key.startswith(f"{name}.")}
        parts.pop("bias")
        assert all(part in ("weight", "comfy_quant") or part.startswith("weight_") for part in parts)
        ours += sum(end - begin for begin, end in (entry["data_offsets"] for entry in parts.values()))
        bf16 += 2 * prod(original[f"{name}.weight"]["shape"])
    assert ours <= SIZES[preset] * bf16
    floats = {key for key in saved if key.partition(".weight")[0].removesuffix(".bias") not in layers}
    assert floats - {"__metadata__"} - {f"{name}.comfy_quant" for name in layers} == {
        key for key in original if key.rpartition(".")[0] not in layers
    } - {"__metadata__"}


def test_a_copy_of_a_loaded_model_reads_the_file_again(host_server, presets):
    """What the host makes for compiled and multi-GPU copies; the file is not kept in memory for it."""
    prompt = p.texts() | p.load("W8A8") | {"copy": p.node("DiTQuantTestRebuild", model=p.link("quantized"))}
    latents = host_server.latents(host_server.run(prompt | p.sample("copy", "of the copy")))
    assert torch.equal(latents["of the copy"], presets.latents["W8A8"])


def test_a_name_that_a_loader_would_find_elsewhere_is_not_taken(host_server, presets):
    """An artist moved the first file to models/diffusion_models, and saves the next one."""
    shutil.copy(presets.file("W8A8"), host_server.models / "diffusion_models" / p.saved_name("moved"))
    host_server.run(p.load("W4A8") | p.save("quantized", "moved"))
    assert [path.name for path in presets.folder.glob("moved*")] == ["moved_00002_.safetensors"]


def test_file_carries_its_recipe(presets):
    metadata = header(presets.file("W8A8"))["__metadata__"]
    assert json.loads(metadata["dit_quant"])["layers"] == 29
    assert json.loads(metadata["prompt"])["calibration"]["class_type"] == "DiTQuantCalibrate"


def test_stock_loader_refuses(presets, host_server):
    """A KeyError of the host's is fine, a picture is not."""
    prompt = p.texts() | {"model": p.node("UNETLoader", unet_name=p.saved_name("W8A8"), weight_dtype="default")}
    with pytest.raises(PromptFailed, match="dit_quant_w8a8"):
        host_server.run(prompt | p.sample("model", "stock"))
    assert not list((host_server.output / "latents").glob("stock*"))


BAD_FILES = {
    "truncated": "cut off",
    "oversized header": "claims a header of 18446744073709551615 bytes",
    "text": "not a safetensors file",
    "short": "too few for a safetensors file",
    "plain": "not a quantized DiT of this pack",
    "older": "format version 1, this pack reads 2; quantize the model again",
    "newer": "format version 3, this pack reads 2; update the pack",
    "metadata is a list": "its dit_quant entry is not a JSON object",
    "layer lost": "28 quantized layers of 29",
    "block lost": "21 quantized layers of 29",
    "bias lost": r"1 tensors are missing, such as joint_blocks\.1\.x_block\.mlp\.fc1\.bias",
    "embedder lost": "the host cannot read it|does not recognise|tensors are missing",
    "float weight lost": r"1 tensors are missing, such as final_layer\.linear\.weight",
    "bias of another length": r"joint_blocks\.1\.x_block\.mlp\.fc1\.bias: \[7\] torch\.bfloat16, not \[1024\]",
    "NaN in a bias": r"joint_blocks\.1\.x_block\.mlp\.fc1\.bias holds NaN",
    "NaN outside the blocks": r"final_layer\.linear\.weight holds NaN",
    "another node's": "another node wrote this quantized model.*Save Quantized DiT",
}
LOST = {
    "layer lost": "joint_blocks.1.x_block.mlp.fc1.comfy_quant",
    "block lost": "joint_blocks.2.",
    "bias lost": "joint_blocks.1.x_block.mlp.fc1.bias",
    "embedder lost": "x_embedder.proj.weight",
    "float weight lost": "final_layer.linear.weight",
}


CHANGED = {
    "bias of another length": (LOST["bias lost"], lambda bias: bias[:7].to(torch.bfloat16)),
    "NaN in a bias": (LOST["bias lost"], lambda bias: bias * torch.nan),
    "NaN outside the blocks": (LOST["float weight lost"], lambda weight: weight * torch.nan),
}


def edited(path, target, lost: str = "\0", changed: dict | None = None, **metadata) -> None:
    """A copy without the tensors whose names begin with `lost`, with `changed` ones, and with other metadata; None
    takes an entry out."""
    kept = {key: value for key, value in load_file(path).items() if not key.startswith(lost)} | (changed or {})
    described = header(path)["__metadata__"] | metadata
    save_file(kept, target, {key: value for key, value in described.items() if value is not None})


@pytest.fixture(scope="module")
def bad_files(presets, host_server):
    good = presets.file("W8A8").read_bytes()
    contents = {
        "truncated": good[: len(good) // 2],
        "oversized header": b"\xff" * 8 + good[8:],
        "text": b"This is a text file, whatever its name says.\n" * 20,
        "short": b"\x00" * 5,
        "plain": (ASSETS / "emoji_dit.safetensors").read_bytes(),
    }
    folder = host_server.models / "diffusion_models"
    for name, content in contents.items():
        (folder / p.saved_name(name)).write_bytes(content)
    source = presets.file("W8A8")
    for name, lost in LOST.items():
        edited(source, folder / p.saved_name(name), lost)
    for name, (key, change) in CHANGED.items():
        edited(source, folder / p.saved_name(name), changed={key: change(load_file(source)[key])})
    for name, version in (("older", 1), ("newer", 3)):
        edited(source, folder / p.saved_name(name), dit_quant=json.dumps({"version": version}))
    edited(source, folder / p.saved_name("metadata is a list"), dit_quant="[1]")
    edited(source, folder / p.saved_name("another node's"), dit_quant=None)


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_has_its_own_error(bad_files, host_server, name):
    with pytest.raises(PromptFailed, match=BAD_FILES[name]) as failure:
        host_server.run(p.texts() | p.load(name) | p.sample("quantized", "bad"))
    assert failure.value.node_type == "DiTQuantLoad"
    assert p.saved_name(name) in failure.value.exception_message


def test_server_works_after_bad_files(bad_files, presets, host_server):
    history = host_server.run(p.texts() | p.load("W8A8") | p.sample("quantized", "recovered"))
    assert torch.equal(host_server.latents(history)["recovered"], presets.latents["W8A8"])
