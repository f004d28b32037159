"""The pack as the frontend sees it: names, tooltips, help."""

import json
import re

import pytest
from host_location import PACK_FOLDER, ROOT

pytestmark = pytest.mark.host

NODES = {
    "DiTQuantCalibrate": "Calibrate DiT",
    "DiTQuantGroupTimesteps": "Group Timesteps",
    "DiTQuantQuantize": "Quantize DiT",
    "DiTQuantSave": "Save Quantized DiT",
    "DiTQuantLoad": "Load Quantized DiT",
    "DiTQuantLoadEmoji": "Load Emoji DiT (demo)",
    "DiTQuantEmojiPrompts": "Emoji Prompts (demo)",
    "DiTQuantDecodeEmoji": "Decode Emoji (demo)",
}


def test_nodes_are_registered_under_their_names(object_info):
    ours = {
        name: info["display_name"]
        for name, info in object_info.items()
        if info["python_module"] == f"custom_nodes.{PACK_FOLDER}"
    }
    assert ours == NODES


@pytest.mark.parametrize("name", NODES)
def test_every_input_has_a_tooltip(object_info, name):
    inputs = object_info[name]["input"]
    entries = {**inputs.get("required", {}), **inputs.get("optional", {})}
    assert [key for key, (_, *options) in entries.items() if not (options and options[0].get("tooltip"))] == []


@pytest.mark.parametrize("name", NODES)
def test_node_is_described_and_found(object_info, name):
    info = object_info[name]
    assert info["description"].endswith(".")
    assert info["category"].startswith("model/")
    assert info["search_aliases"]


@pytest.mark.parametrize("name", NODES)
def test_help_page_is_served(host_server, name):
    """Under the folder's name, where the frontend looks for it."""
    page = host_server.read(f"/extensions/{PACK_FOLDER}/docs/{name}.md").decode()
    assert NODES[name].removesuffix(" (demo)") in page
    assert len(page) > 100


def test_the_frontend_is_given_the_script_that_shows_reports(host_server):
    path = f"/extensions/{PACK_FOLDER}/report.js"
    assert path in json.loads(host_server.read("/extensions"))
    script = host_server.read(path).decode()
    assert all(name.startswith(re.search(r'PREFIX = "(\w+)"', script)[1]) for name in NODES)


def test_nodes_are_v3():
    """Old-style mappings would make the host ignore the V3 entry point."""
    import dit_quant

    assert callable(dit_quant.comfy_entrypoint)
    assert not hasattr(dit_quant, "NODE_CLASS_MAPPINGS")
    assert not any("NODE_CLASS_MAPPINGS" in path.read_text("utf-8") for path in (ROOT / "nodes").rglob("*.py"))
