"""Converts between the frontend's saved workflows (version 0.4) and the server's API prompts.

`to_prompt` follows the frontend's graphToPrompt (1.47) for what our workflows use: widgets, links into widgets,
reroutes, primitives, muted and bypassed nodes. Subgraphs, dynamic combos and autogrow inputs raise ValueError.
"""

from dataclasses import dataclass
from typing import Any

ALWAYS, NEVER, BYPASS = 0, 2, 4  # LiteGraph's modes; 2 is "mute"
NOTES = ("Note", "MarkdownNote")
VIRTUAL = (*NOTES, "Reroute", "PrimitiveNode")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "MARKDOWN", "TEXTAREA", "BOUNDING_BOX", "CURVE")
DYNAMIC_TYPES = ("COMFY_DYNAMICCOMBO_V3", "COMFY_AUTOGROW_V3", "COMFY_DYNAMICSLOT_V3")
UPLOADS = ("image_upload", "animated_image_upload", "video_upload")
EMPTY = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}
OPTIONAL_SHAPE = 7  # the hollow circle of an optional socket

COLUMN_WIDTH, TOP, GAP = 400, 100, 60
NODE_WIDTH, SLOT_HEIGHT, WIDGET_HEIGHT, TEXT_HEIGHT = 320, 20, 24, 120


@dataclass(frozen=True)
class InputSpec:
    """One input of a node type, as object_info describes it."""

    name: str
    type: str
    options: dict
    optional: bool
    choices: tuple = ()

    @property
    def is_widget(self) -> bool:
        forced = self.options.get("forceInput") or self.options.get("defaultInput")
        return self.options.get("widgetType", self.type) in WIDGET_TYPES and not forced

    @property
    def default(self) -> Any:
        """The value a new node's widget shows."""
        first = self.choices[0] if self.choices else EMPTY.get(self.type)
        return self.options.get("default", first)

    @property
    def control_values(self) -> tuple:
        """Values the frontend saves after this widget's own: what to do with a seed once a run is queued."""
        control = self.options.get("control_after_generate")
        if control is None and self.type == "INT":
            control = self.name in ("seed", "noise_seed")
        if not control or self.type not in ("INT", "COMBO"):
            return ()
        return ("fixed", "") if self.type == "COMBO" else ("fixed",)


def input_specs(node_type: str, object_info: dict) -> list[InputSpec]:
    """A node type's visible inputs in the frontend's order: required before optional, each by `input_order`."""
    if node_type not in object_info:
        raise ValueError(f"{node_type}: not a node type of this host")
    info = object_info[node_type]
    specs = []
    for section in ("required", "optional"):
        declared = info["input"].get(section, {})
        for name in info.get("input_order", {}).get(section, declared):
            kind, options = (*declared[name], {})[:2]
            if kind in DYNAMIC_TYPES:
                raise ValueError(f"{node_type}.{name}: {kind} inputs are not supported by this converter")
            choices = kind if isinstance(kind, list) else options.get("options", [])
            kind = "COMBO" if isinstance(kind, list) else kind
            specs.append(InputSpec(name, kind, options, section == "optional", tuple(choices)))
    return specs


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """A saved workflow -> the API prompt the frontend would queue for it (without the titles in `_meta`)."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in VIRTUAL or node.get("mode", ALWAYS) in (NEVER, BYPASS):
            continue
        inputs = _widget_inputs(node, input_specs(node["type"], object_info))
        for slot in node.get("inputs", ()):
            source = _source(slot.get("link"), nodes, links)
            if source is not None:
                inputs[slot["name"]] = source
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    for node in prompt.values():
        # a muted node takes the links that leave it with it
        node["inputs"] = {
            name: value for name, value in node["inputs"].items() if not _is_link(value) or value[0] in prompt
        }
    return prompt


def _widget_inputs(node: dict, specs: list[InputSpec]) -> dict:
    values = node.get("widgets_values") or []
    widgets = [spec for spec in specs if spec.is_widget]
    if isinstance(values, dict):
        return {spec.name: _wrap(values.get(spec.name, spec.default)) for spec in widgets}
    inputs, at = {}, 0
    for spec in widgets:
        # like the frontend: a value missing at the end is the widget's default, a superfluous one is ignored
        inputs[spec.name] = _wrap(values[at] if at < len(values) else spec.default)
        at += 1 + len(spec.control_values)
    return inputs


def _wrap(value: Any) -> Any:
    """The frontend marks a list that is a value, for a bare pair would be read as a link."""
    return {"__value__": value} if isinstance(value, list) else value


def _unwrap(value: Any) -> Any:
    return value["__value__"] if isinstance(value, dict) and "__value__" in value else value


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _source(link_id: int | None, nodes: dict, links: dict) -> Any:
    """What arrives over a link: `[node id, slot]`, a primitive's value, or None where nothing does."""
    while link_id is not None:
        _, origin, slot, *_, kind = links[link_id]
        node = nodes[origin]
        bypassed = node.get("mode", ALWAYS) == BYPASS
        if node["type"] == "Reroute" or bypassed:
            link_id = _passed_through(node, slot, kind)
        elif node["type"] == "PrimitiveNode":
            return _wrap(node["widgets_values"][0])
        else:
            return [str(origin), slot]
    return None


def _passed_through(node: dict, slot: int, kind: str) -> int | None:
    """The link that a reroute or a bypassed node hands on: its input at the same place, else the first of the type."""
    inputs = node.get("inputs", [])
    if node["type"] == "Reroute":
        return inputs[0].get("link")
    wanted = node["outputs"][slot]["type"] if kind == "*" else kind
    same_place = inputs[slot : slot + 1]
    for candidate in (*same_place, *inputs):
        if candidate["type"] in (wanted, "*"):
            return candidate.get("link")
    return None


def with_defaults(prompt: dict, object_info: dict) -> dict:
    """The prompt with every widget that it leaves out at its default, as the frontend always sends them."""
    completed = {}
    for node_id, node in prompt.items():
        specs = input_specs(node["class_type"], object_info)
        unknown = node["inputs"].keys() - {spec.name for spec in specs}
        if unknown:
            raise ValueError(f"node {node_id} ({node['class_type']}) has no input {', '.join(sorted(unknown))}")
        defaults = {spec.name: _wrap(spec.default) for spec in specs if spec.is_widget}
        completed[node_id] = {**node, "inputs": {**defaults, **node["inputs"]}}
    return completed


def numbered(prompt: dict) -> dict:
    """The prompt with its node ids replaced by "1", "2", ... in its own order: lets a script name its nodes."""
    new_ids = {node_id: str(place) for place, node_id in enumerate(prompt, start=1)}
    return {
        new_ids[node_id]: {
            **node,
            "inputs": {
                name: [new_ids[value[0]], value[1]] if _is_link(value) else value
                for name, value in node["inputs"].items()
            },
        }
        for node_id, node in prompt.items()
    }


def from_prompt(
    prompt: dict,
    object_info: dict,
    positions: dict | None = None,
    titles: dict | None = None,
    room: dict | None = None,
) -> dict:
    """An API prompt -> a workflow that the frontend opens.

    `positions` maps node ids to [x, y]; nodes without one are laid out left to right by depth. `titles` maps node ids
    to titles (default: the prompt's `_meta`), `room` types to pixels for what they show after a run. `to_prompt` of the
    result is `with_defaults(prompt)` without `_meta`: the prompt itself, where it names every widget.
    """
    positions, titles, room = positions or {}, titles or {}, room or {}
    if not all(node_id.isdecimal() for node_id in prompt):
        raise ValueError("workflow node ids are integers; pass the prompt through numbered() first")
    prompt = with_defaults(prompt, object_info)
    depths = _depths(prompt)
    ids = sorted(prompt, key=lambda node_id: (depths[node_id], int(node_id)))
    nodes = {node_id: _node(node_id, prompt[node_id], object_info) for node_id in ids}
    links = _connect(nodes, prompt)
    bottoms: dict[int, int] = {}
    for order, node_id in enumerate(ids):
        node, column = nodes[node_id], depths[node_id]
        y = bottoms.get(column, TOP)
        node["size"][1] += room.get(node["type"], 0)
        bottoms[column] = y + node["size"][1] + GAP
        node["pos"] = list(positions.get(node_id, (TOP + column * COLUMN_WIDTH, y)))
        node["order"] = order
        title = titles.get(node_id, prompt[node_id].get("_meta", {}).get("title"))
        if title is not None:
            node["title"] = title
    return {
        "last_node_id": max(map(int, ids), default=0),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _depths(prompt: dict) -> dict[str, int]:
    """Node id -> the number of links on the longest way to it."""
    depths: dict[str, int] = {}

    def depth(node_id: str, path: tuple) -> int:
        if node_id not in prompt:
            raise ValueError(f"node {path[-1]} is linked to node {node_id}, which does not exist")
        if node_id in path:
            raise ValueError(f"prompt has a cycle through node {node_id}")
        if node_id not in depths:
            sources = [value[0] for value in prompt[node_id]["inputs"].values() if _is_link(value)]
            depths[node_id] = max((1 + depth(source, (*path, node_id)) for source in sources), default=0)
        return depths[node_id]

    for node_id in prompt:
        depth(node_id, ())
    return depths


def _node(node_id: str, node: dict, object_info: dict) -> dict:
    """One workflow node, still without links and place."""
    kind, info = node["class_type"], object_info[node["class_type"]]
    specs = input_specs(kind, object_info)
    widgets = [spec for spec in specs if spec.is_widget]
    sockets = [spec for spec in specs if not spec.is_widget]
    inputs = [_socket(spec) for spec in sockets]
    # a widget that is no socket keeps its value only in widgets_values
    inputs += [_socket(spec) for spec in widgets if not spec.options.get("socketless")]
    values = []
    for spec in widgets:
        value = node["inputs"][spec.name]
        values += [spec.default if _is_link(value) else _unwrap(value), *spec.control_values]
    # the upload button follows the other widgets and saves a value of its own
    values += ["image" for spec in widgets if any(spec.options.get(upload) for upload in UPLOADS)]
    types = ["COMBO" if isinstance(output, list) else output for output in info["output"]]
    outputs = [
        {"name": name, "type": output, "links": None, "slot_index": slot}
        for slot, (name, output) in enumerate(zip(info.get("output_name") or types, types, strict=True))
    ]
    texts = sum(1 for spec in widgets if spec.options.get("multiline"))
    height = SLOT_HEIGHT * max(len(sockets), len(outputs)) + WIDGET_HEIGHT * len(values) + TEXT_HEIGHT * texts
    return {
        "id": int(node_id),
        "type": kind,
        "pos": [0, 0],
        "size": [NODE_WIDTH, height + 10],
        "flags": {},
        "order": 0,
        "mode": ALWAYS,
        "inputs": inputs,
        "outputs": outputs,
        "properties": {"Node name for S&R": kind},
        "widgets_values": values,
    }


def _socket(spec: InputSpec) -> dict:
    socket: dict[str, Any] = {"name": spec.name, "type": spec.type, "link": None}
    if spec.optional:
        socket["shape"] = OPTIONAL_SHAPE
    if spec.is_widget:
        socket["widget"] = {"name": spec.name}
    return socket


def _connect(nodes: dict, prompt: dict) -> list[list]:
    """Enters the prompt's links at both their ends; returns the workflow's list of links."""
    links: list[list] = []
    for node_id, node in nodes.items():
        for slot, socket in enumerate(node["inputs"]):
            value = prompt[node_id]["inputs"].get(socket["name"])
            if not _is_link(value):
                continue
            origin, origin_slot = value
            output = nodes[origin]["outputs"][origin_slot]
            links.append([len(links) + 1, int(origin), origin_slot, node["id"], slot, output["type"]])
            socket["link"] = len(links)
            output["links"] = [*(output["links"] or []), len(links)]
    return links
