"""The workflow converter against a small hand-made object_info."""

import copy
import json

import pytest
from workflow_format import from_prompt, numbered, to_prompt, with_defaults

OBJECT_INFO = {
    "Loader": {
        "input": {"required": {"name": [["a.safetensors", "b.safetensors"], {}]}},
        "input_order": {"required": ["name"]},
        "output": ["MODEL"],
        "output_name": ["model"],
    },
    "Sampler": {
        # input_order, not the dict's own order, decides
        "input": {
            "required": {
                "steps": ["INT", {"default": 20}],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "model": ["MODEL"],
                "strength": ["FLOAT", {"default": 1.0, "forceInput": True}],
            },
            "optional": {
                "latent": ["LATENT"],
                "method": ["COMBO", {"options": ["euler", "heun"]}],
                "points": ["STRING", {"multiline": True}],
            },
            "hidden": {"prompt": "PROMPT"},
        },
        "input_order": {
            "required": ["model", "seed", "steps", "strength"],
            "optional": ["latent", "method", "points"],
            "hidden": ["prompt"],
        },
        "output": ["LATENT", "MODEL"],
        "output_name": ["latent", "model"],
    },
    "Patch": {
        "input": {"required": {"amount": ["FLOAT", {"default": 0.5}], "model": ["MODEL"]}},
        "input_order": {"required": ["amount", "model"]},
        "output": ["MODEL"],
        "output_name": ["model"],
    },
    "Number": {
        # a plain INT called seed also gets the control, unless it declines
        "input": {"required": {"seed": ["INT"], "noise_seed": ["INT", {"control_after_generate": False}]}},
        "input_order": {"required": ["seed", "noise_seed"]},
        "output": ["INT"],
        "output_name": ["value"],
    },
    "Photo": {
        "input": {"required": {"image": [["x.png"], {"image_upload": True}], "channel": [["red", "alpha"]]}},
        "input_order": {"required": ["image", "channel"]},
        "output": ["LATENT"],
        "output_name": ["latent"],
    },
    "Dynamic": {
        "input": {"required": {"mode": ["COMFY_DYNAMICCOMBO_V3", {"options": []}]}},
        "input_order": {"required": ["mode"]},
        "output": [],
        "output_name": [],
    },
}
SAMPLER = {"seed": 7, "steps": 4, "strength": ["3", 0], "method": "heun", "points": "one\ntwo"}
PROMPT = {
    "1": {"class_type": "Loader", "inputs": {"name": "b.safetensors"}},
    "2": {"class_type": "Patch", "inputs": {"amount": 0.25, "model": ["1", 0]}},
    "3": {"class_type": "Number", "inputs": {"seed": 3, "noise_seed": 4}},
    "10": {"class_type": "Sampler", "inputs": {**SAMPLER, "model": ["2", 0]}},
    "7": {"class_type": "Sampler", "inputs": {**SAMPLER, "model": ["10", 1], "latent": ["10", 0], "steps": ["3", 0]}},
    "8": {"class_type": "Photo", "inputs": {"image": "x.png", "channel": "alpha"}},
}


def node_of(workflow, node_id):
    return next(node for node in workflow["nodes"] if node["id"] == node_id)


def saved(nodes, links):
    return {"version": 0.4, "nodes": nodes, "links": links}


def saved_loader(node_id=1, mode=0):
    output = {"name": "model", "type": "MODEL", "links": [1]}
    return {"id": node_id, "type": "Loader", "mode": mode, "outputs": [output], "widgets_values": ["a.safetensors"]}


def saved_patch(node_id, link, *, mode=0, amount_link=None, values=(0.25,)):
    """A Patch as the frontend saves it: an unlinked widget has no slot, a linked one comes last."""
    inputs = [{"name": "model", "type": "MODEL", "link": link}]
    if amount_link is not None:
        inputs.append({"name": "amount", "type": "FLOAT", "widget": {"name": "amount"}, "link": amount_link})
    outputs = [{"name": "model", "type": "MODEL", "links": []}]
    return {
        "id": node_id,
        "type": "Patch",
        "mode": mode,
        "inputs": inputs,
        "outputs": outputs,
        "widgets_values": list(values),
    }


def test_round_trip_is_exact():
    before = copy.deepcopy(PROMPT)
    workflow = json.loads(json.dumps(from_prompt(PROMPT, OBJECT_INFO)))
    assert to_prompt(workflow, OBJECT_INFO) == PROMPT == before


def test_round_trip_completes_left_out_widgets():
    prompt = {"1": {"class_type": "Patch", "inputs": {}}, "2": {"class_type": "Loader", "inputs": {}}}
    completed = with_defaults(prompt, OBJECT_INFO)
    assert completed["1"]["inputs"] == {"amount": 0.5}
    assert completed["2"]["inputs"] == {"name": "a.safetensors"}
    assert to_prompt(from_prompt(prompt, OBJECT_INFO), OBJECT_INFO) == completed


def test_round_trip_of_a_list_value():
    prompt = {"1": {"class_type": "Patch", "inputs": {"amount": {"__value__": [1, 2]}}}}
    workflow = from_prompt(prompt, OBJECT_INFO)
    assert workflow["nodes"][0]["widgets_values"] == [[1, 2]]
    assert to_prompt(workflow, OBJECT_INFO) == prompt


def test_seed_is_followed_by_its_control():
    workflow = from_prompt(PROMPT, OBJECT_INFO)
    assert node_of(workflow, 10)["widgets_values"] == [7, "fixed", 4, "heun", "one\ntwo"]
    assert node_of(workflow, 3)["widgets_values"] == [3, "fixed", 4]
    assert node_of(workflow, 8)["widgets_values"] == ["x.png", "alpha", "image"]


def test_linked_widget_keeps_a_default_value():
    """The frontend maps widgets_values by place: a linked widget must still hold its place."""
    node = node_of(from_prompt(PROMPT, OBJECT_INFO), 7)
    assert node["widgets_values"] == [7, "fixed", 20, "heun", "one\ntwo"]
    steps = next(slot for slot in node["inputs"] if slot["name"] == "steps")
    assert steps["widget"] == {"name": "steps"}
    assert steps["link"] is not None


def test_slots_are_sockets_first_and_forced_inputs_are_sockets():
    inputs = node_of(from_prompt(PROMPT, OBJECT_INFO), 10)["inputs"]
    assert [slot["name"] for slot in inputs] == ["model", "strength", "latent", "seed", "steps", "method", "points"]
    assert ["widget" in slot for slot in inputs] == [False] * 3 + [True] * 4
    assert [slot.get("shape") for slot in inputs] == [None, None, 7, None, None, 7, 7]


def test_links_agree_at_both_ends():
    workflow = from_prompt(PROMPT, OBJECT_INFO)
    assert [link[0] for link in workflow["links"]] == list(range(1, workflow["last_link_id"] + 1))
    for link_id, origin, origin_slot, target, target_slot, kind in workflow["links"]:
        output = node_of(workflow, origin)["outputs"][origin_slot]
        assert link_id in output["links"]
        assert output["type"] == kind
        assert node_of(workflow, target)["inputs"][target_slot]["link"] == link_id
    ends = sum(len(output["links"] or []) for node in workflow["nodes"] for output in node["outputs"])
    assert ends == len(workflow["links"]) == 7
    assert workflow["last_node_id"] == 10


def test_layout_goes_left_to_right_without_overlap():
    nodes = from_prompt(PROMPT, OBJECT_INFO)["nodes"]
    by_id = {node["id"]: node for node in nodes}
    assert [by_id[key]["pos"][0] for key in (1, 2, 10, 7)] == [100, 500, 900, 1300]
    assert [node["order"] for node in nodes] == list(range(len(nodes)))
    for place, node in enumerate(nodes):
        for other in nodes[:place]:
            apart = [abs(node["pos"][axis] - other["pos"][axis]) for axis in (0, 1)]
            assert apart[0] >= max(node["size"][0], other["size"][0]) or apart[1] >= min(
                node["size"][1], other["size"][1]
            )


def test_positions_and_titles():
    prompt = copy.deepcopy(PROMPT)
    prompt["2"]["_meta"] = {"title": "from the prompt"}
    workflow = from_prompt(prompt, OBJECT_INFO, positions={"1": (5, 6)}, titles={"1": "The model"})
    assert node_of(workflow, 1)["pos"] == [5, 6]
    assert node_of(workflow, 1)["title"] == "The model"
    assert node_of(workflow, 2)["title"] == "from the prompt"
    assert "title" not in node_of(workflow, 3)
    assert to_prompt(workflow, OBJECT_INFO) == PROMPT


def test_numbered_renames_nodes_and_links():
    named = {
        "patch": {"class_type": "Patch", "inputs": {"amount": 1.0, "model": ["loader", 0]}},
        "loader": {"class_type": "Loader", "inputs": {"name": "a.safetensors"}},
    }
    assert numbered(named) == {
        "1": {"class_type": "Patch", "inputs": {"amount": 1.0, "model": ["2", 0]}},
        "2": {"class_type": "Loader", "inputs": {"name": "a.safetensors"}},
    }
    with pytest.raises(ValueError, match="numbered"):
        from_prompt(named, OBJECT_INFO)


def test_saved_node_without_widget_slots():
    workflow = saved([saved_loader(), saved_patch(2, 1)], [[1, 1, 0, 2, 0, "MODEL"]])
    assert to_prompt(workflow, OBJECT_INFO)["2"]["inputs"] == {"amount": 0.25, "model": ["1", 0]}


@pytest.mark.parametrize("control", ["fixed", "randomize", "increment"])
def test_any_control_value_is_skipped(control):
    node = {"id": 4, "type": "Number", "widgets_values": [11, control, 12]}
    assert to_prompt(saved([node], []), OBJECT_INFO)["4"]["inputs"] == {"seed": 11, "noise_seed": 12}


def test_too_few_and_too_many_values():
    nodes = [saved_patch(1, None, values=()), saved_patch(2, None, values=(0.75, "stray"))]
    prompt = to_prompt(saved(nodes, []), OBJECT_INFO)
    assert prompt["1"]["inputs"] == {"amount": 0.5}
    assert prompt["2"]["inputs"] == {"amount": 0.75}


def test_notes_are_skipped():
    notes = [{"id": 2, "type": "Note", "widgets_values": ["hi"]}, {"id": 3, "type": "MarkdownNote"}]
    assert list(to_prompt(saved([saved_loader(), *notes], []), OBJECT_INFO)) == ["1"]


def test_reroutes_are_followed():
    reroutes = [
        {
            "id": key,
            "type": "Reroute",
            "inputs": [{"name": "", "type": "*", "link": key - 1}],
            "outputs": [{"type": "*"}],
        }
        for key in (2, 3)
    ]
    links = [[1, 1, 0, 2, 0, "*"], [2, 2, 0, 3, 0, "*"], [3, 3, 0, 4, 0, "MODEL"]]
    prompt = to_prompt(saved([saved_loader(), *reroutes, saved_patch(4, 3)], links), OBJECT_INFO)
    assert list(prompt) == ["1", "4"]
    assert prompt["4"]["inputs"]["model"] == ["1", 0]


def test_primitive_gives_its_value():
    primitive = {"id": 9, "type": "PrimitiveNode", "widgets_values": [0.125, "fixed"], "outputs": [{"type": "FLOAT"}]}
    nodes = [saved_loader(), primitive, saved_patch(2, 1, amount_link=2)]
    prompt = to_prompt(saved(nodes, [[1, 1, 0, 2, 0, "MODEL"], [2, 9, 0, 2, 1, "FLOAT"]]), OBJECT_INFO)
    assert list(prompt) == ["1", "2"]
    assert prompt["2"]["inputs"] == {"amount": 0.125, "model": ["1", 0]}


def test_bypassed_node_hands_its_input_on():
    """Patch saved with its linked widget first: the handed-on input is found by type, not by place."""
    bypassed = saved_patch(2, 1, mode=4, amount_link=9)
    bypassed["inputs"].reverse()
    number = {"id": 5, "type": "Number", "widgets_values": [1, "fixed", 2], "outputs": [{"type": "INT"}]}
    links = [[1, 1, 0, 2, 1, "MODEL"], [2, 2, 0, 3, 0, "MODEL"], [9, 5, 0, 2, 0, "FLOAT"]]
    prompt = to_prompt(saved([saved_loader(), number, bypassed, saved_patch(3, 2)], links), OBJECT_INFO)
    assert list(prompt) == ["1", "5", "3"]
    assert prompt["3"]["inputs"]["model"] == ["1", 0]


def test_bypassed_source_gives_nothing():
    prompt = to_prompt(saved([saved_loader(mode=4), saved_patch(2, 1)], [[1, 1, 0, 2, 0, "MODEL"]]), OBJECT_INFO)
    assert prompt == {"2": {"class_type": "Patch", "inputs": {"amount": 0.25}}}


def test_muted_node_takes_its_links_with_it():
    """Also a link into a widget: the frontend drops the input, it does not fall back to the widget's value."""
    muted = {"id": 9, "type": "Number", "mode": 2, "widgets_values": [1, "fixed", 2], "outputs": [{"type": "INT"}]}
    nodes = [saved_loader(), muted, saved_patch(2, 1, amount_link=2)]
    prompt = to_prompt(saved(nodes, [[1, 1, 0, 2, 0, "MODEL"], [2, 9, 0, 2, 1, "INT"]]), OBJECT_INFO)
    assert list(prompt) == ["1", "2"]
    assert prompt["2"]["inputs"] == {"model": ["1", 0]}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"1": {"class_type": "Missing", "inputs": {}}}, "Missing"),
        ({"1": {"class_type": "Dynamic", "inputs": {}}}, "COMFY_DYNAMICCOMBO_V3"),
        ({"1": {"class_type": "Patch", "inputs": {"typo": 1}}}, "typo"),
        ({"1": {"class_type": "Patch", "inputs": {"model": ["1", 0]}}}, "cycle"),
        ({"1": {"class_type": "Patch", "inputs": {"model": ["5", 0]}}}, "node 5"),
    ],
)
def test_impossible_prompts_are_named(prompt, message):
    with pytest.raises(ValueError, match=message):
        from_prompt(prompt, OBJECT_INFO)
