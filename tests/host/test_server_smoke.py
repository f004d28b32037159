"""The real server starts with this pack in it and runs prompts over HTTP."""

import time

import pytest
import torch
from host_location import PACK_FOLDER
from host_server import PromptFailed, PromptInterrupted
from workflow_format import from_prompt, to_prompt, with_defaults

pytestmark = pytest.mark.host

LATENT_PROMPT = {
    "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 96, "height": 64, "batch_size": 3}},
    "2": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "latents/smoke"}},
}


def test_pack_loads(host_server):
    """The host logs one import-time line per pack; a failed one says so, and its entry point logs a warning."""
    lines = [line for line in host_server.log_text().splitlines() if PACK_FOLDER in line]
    imported = [line for line in lines if " seconds" in line]
    assert len(imported) == 1, host_server.log_text()
    assert "IMPORT FAILED" not in imported[0], "\n".join(lines)


def test_pack_registers_nodes(object_info):
    modules = [info["python_module"] for info in object_info.values()]
    assert f"custom_nodes.{PACK_FOLDER}" in modules


def test_prompt_runs_and_latent_reads_back(host_server):
    history = host_server.run(LATENT_PROMPT)
    assert history.status == "success"
    assert history.outputs["2"]["latents"][0]["subfolder"] == "latents"
    assert [name for name, _ in history.messages][-1] == "execution_success"
    latents = host_server.latents(history)
    assert list(latents) == ["2"]
    assert torch.equal(latents["2"], torch.zeros(3, 4, 8, 12))


def test_workflow_of_host_nodes_round_trips(object_info):
    """The converter against real node descriptions: seeds, combos of both forms, optional inputs."""
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "model.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "RandomNoise", "inputs": {"noise_seed": 7}},
        "3": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "4": {"class_type": "BasicScheduler", "inputs": {"model": ["1", 0], "scheduler": "simple", "steps": 4}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64}},
        "6": {"class_type": "BasicGuider", "inputs": {"model": ["1", 0]}},
        "7": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["2", 0],
                "guider": ["6", 0],
                "sampler": ["3", 0],
                "sigmas": ["4", 0],
                "latent_image": ["5", 0],
            },
        },
        "8": {"class_type": "SaveLatent", "inputs": {"samples": ["7", 0]}},
    }
    expected = with_defaults(prompt, object_info)
    assert expected["4"]["inputs"]["denoise"] == 1.0
    workflow = from_prompt(prompt, object_info)
    assert workflow["nodes"][1]["widgets_values"] == [7, "fixed"]
    assert to_prompt(workflow, object_info) == expected


def test_invalid_input_is_refused(host_server):
    bad = {**LATENT_PROMPT, "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 96, "height": -64}}}
    with pytest.raises(PromptFailed, match="height") as failure:
        host_server.run(bad)
    assert failure.value.node_type == "EmptyLatentImage"
    assert failure.value.details["node_errors"]["1"]["errors"]


def test_unknown_node_is_refused(host_server):
    with pytest.raises(PromptFailed, match="NoSuchNode"):
        host_server.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_partly_invalid_prompt_is_refused(host_server):
    """The host would run the valid output and drop the other in silence."""
    both = {
        **LATENT_PROMPT,
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 1, "height": 64, "batch_size": 1}},
        "4": {"class_type": "SaveLatent", "inputs": {"samples": ["3", 0], "filename_prefix": "latents/smoke"}},
    }
    with pytest.raises(PromptFailed, match="width"):
        host_server.run(both)


def test_raising_node_is_reported(host_server):
    (host_server.input / "corrupt.latent").write_bytes(b"\xff" * 64)
    prompt = {
        "1": {"class_type": "LoadLatent", "inputs": {"latent": "corrupt.latent"}},
        "2": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "latents/smoke"}},
    }
    with pytest.raises(PromptFailed, match="header") as failure:
        host_server.run(prompt)
    assert failure.value.node_type == "LoadLatent"
    assert failure.value.details["traceback"]


def test_interrupt_ends_the_running_prompt(host_server):
    """The host looks at the flag before each node, and clears it when a prompt starts: hence asked for repeatedly."""
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 512, "height": 512, "batch_size": 8, "color": 0}},
        "2": {"class_type": "ImageBlur", "inputs": {"image": ["1", 0], "blur_radius": 31, "sigma": 9.0}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "slow"}},
    }
    prompt_id = host_server.submit(prompt)
    deadline = time.monotonic() + 60
    while any(host_server.queue().values()) and time.monotonic() < deadline:
        host_server.interrupt()
        time.sleep(0.05)
    with pytest.raises(PromptInterrupted):
        host_server.wait(prompt_id)
