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


@pytest.fixture(scope="module")
def results(host_server, object_info, lora) -> dict[str, list]:
    """Pictures by workflow. In the shipped order: the second loads what the first saves."""
    return {name: pictures(host_server, host_server.run(to_prompt(read(name), object_info), 600)) for name in NAMES}


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
