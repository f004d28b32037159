"""Every shipped workflow opens, agrees with tests/shipped_workflows.py, and gives pictures."""

import json

import numpy as np
import pytest
import shipped_workflows
from PIL import Image
from workflow_format import numbered, to_prompt, with_defaults

pytestmark = pytest.mark.host

NAMES = tuple(shipped_workflows.workflows())


def read(name: str) -> dict:
    return json.loads((shipped_workflows.FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def pictures(server, history) -> list[np.ndarray]:
    entries = [entry for output in history.outputs.values() for entry in output.get("images", ())]
    return [
        np.asarray(Image.open(server.output / entry["subfolder"] / entry["filename"]))
        for entry in entries
        if entry["type"] == "output"
    ]


def with_the_bundled_model(prompt: dict) -> dict:
    """The same nodes around the emoji DiT, whose prompts are words and whose latents need no VAE, and smaller."""
    loader = next([key, 0] for key, node in prompt.items() if node["class_type"] == "UNETLoader")
    texts = {node["inputs"]["text"]: [key, 0] for key, node in prompt.items() if "text" in node["inputs"]}
    found = {}
    for key, node in prompt.items():
        kind, inputs = node["class_type"], dict(node["inputs"])
        if kind == "UNETLoader":
            kind, inputs = "DiTQuantLoadEmoji", {}
        elif kind == "CLIPTextEncode":
            words = "lion face" if inputs["text"] else ""
            kind, inputs = "DiTQuantEmojiPrompts", {"prompts": words, "first": 0, "count": 0}
        elif kind == "VAEDecode":
            kind, inputs = "DiTQuantDecodeEmoji", {"samples": inputs["samples"], "model": loader, "zoom": 8}
        elif kind == "DiTQuantCalibrate":
            del inputs["clip"]
            inputs |= {"prompts": "", "sizes": "128x128", "positive": texts[max(texts)], "negative": texts[""]}
        elif kind == "EmptySD3LatentImage":
            inputs |= {"width": 128, "height": 128, "batch_size": 4}
        if kind not in ("CLIPLoader", "VAELoader"):
            found[key] = {**node, "class_type": kind, "inputs": inputs}
    return found


@pytest.fixture(scope="module")
def results(host_server, object_info) -> dict[str, list]:
    """Pictures by workflow. In the shipped order: the second loads what the first saves."""
    prompts = {name: to_prompt(read(name), object_info) for name in NAMES}
    prompts["quantize_your_model"] = with_the_bundled_model(prompts["quantize_your_model"])
    return {name: pictures(host_server, host_server.run(prompt, 600)) for name, prompt in prompts.items()}


def test_nothing_else_is_shipped():
    assert {path.stem for path in shipped_workflows.FOLDER.glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_file_agrees_with_its_specification(object_info, name):
    expected = with_defaults(numbered(shipped_workflows.workflows()[name]), object_info)
    assert to_prompt(read(name), object_info) == expected


@pytest.mark.parametrize("name", NAMES)
def test_workflow_gives_pictures(results, name):
    assert len(results[name]) == 4
    for picture in results[name]:
        assert picture.shape == (256, 256, 3)
        assert picture.std() > 10, "the picture is flat"


def test_loaded_model_gives_the_same_pictures(results):
    """What was quantized and what was loaded from its file sample the same seed to the same pixels."""
    quantized, loaded = results["calibrate_quantize_sample"], results["load_quantized_sample"]
    assert all(np.array_equal(a, b) for a, b in zip(quantized, loaded, strict=True))
