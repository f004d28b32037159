"""Who may import whom: nodes -> quant_core -> kernels, and only nodes know the host."""

import ast

import pytest
from host_location import ROOT

HOST = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "comfy_kitchen",
    "folder_paths",
    "nodes",
    "server",
    "execution",
}
OURS = ("kernels", "quant_core", "nodes", "demo")
# layer -> layers of ours that it may import
ALLOWED = {
    "kernels": {"kernels"},
    "quant_core": {"quant_core", "kernels"},
    "demo": {"demo", "quant_core", "kernels"},
    "nodes": set(OURS),
}
TRITON_FILES = ("triton_impl.py", "_triton.py")
# the one file of the kernels that may import comfy-kitchen, when a CUDA device asks for it
KITCHEN_FILE = "kernels/kitchen.py"


def imports(source: str, package: tuple[str, ...]):
    """Absolute dotted names of everything that a file in `package` imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = (*base, *([node.module] if node.module else []))
            yield from (".".join((*prefix, alias.name)) for alias in node.names)


def violations(path: str, source: str) -> list[str]:
    """path relative to the pack's root, as quant_core/linear.py."""
    *folders, file = path.split("/")
    layer, found = folders[0], []
    for name in imports(source, ("dit_quant", *folders)):
        top, *rest = name.split(".")
        if top == "dit_quant" and rest and rest[0] in OURS and rest[0] not in ALLOWED[layer]:
            found.append(f"{path} imports {name}")
        if top in HOST and layer != "nodes" and (top, path) != ("comfy_kitchen", KITCHEN_FILE):
            found.append(f"{path} imports the host's {name}")
        if top == "triton" and not file.endswith(TRITON_FILES):
            found.append(f"{path} imports {name}")
    return found


def sources():
    return [path for layer in OURS for path in sorted((ROOT / layer).rglob("*.py"))]


@pytest.mark.parametrize("path", [str(p.relative_to(ROOT)).replace("\\", "/") for p in sources()])
def test_imports_point_one_way(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_there_is_something_to_check():
    checked = {path.relative_to(ROOT).parts[0] for path in sources()}
    assert {"kernels", "quant_core", "nodes"} <= checked
    assert len(sources()) > 20


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("quant_core/linear.py", "import comfy.ops"),
        ("quant_core/linear.py", "from comfy import ops"),
        ("quant_core/linear.py", "def f():\n    import folder_paths"),
        ("quant_core/linear.py", "from ..nodes import calibrate"),
        ("quant_core/linear.py", "from .. import nodes"),
        ("quant_core/linear.py", "from ..demo.sampler import sample"),
        ("quant_core/linear.py", "import triton"),
        ("quant_core/architectures/sd3.py", "from ...demo import sampler"),
        ("kernels/numerics.py", "from ..quant_core.schemes import Shift"),
        ("kernels/int8_linear/reference.py", "from ...quant_core import schemes"),
        ("kernels/int8_linear/reference.py", "import triton.language as tl"),
        ("kernels/numerics.py", "import dit_quant.quant_core.linear"),
        ("kernels/numerics.py", "import comfy_kitchen"),
        ("kernels/int8_linear/kitchen_impl.py", "from comfy_kitchen.backends import cuda"),
        ("kernels/kitchen.py", "import comfy.ops"),
        ("kernels/dispatch.py", "import triton"),
        ("demo/sampler.py", "from ..nodes.host import paths"),
        ("demo/sampler.py", "import comfy.samplers"),
    ],
)
def test_planted_violations_are_caught(path, source):
    """Negative control."""
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nodes/calibrate.py", "import comfy.sample\nfrom ..quant_core import linear"),
        ("quant_core/linear.py", "from ..kernels.numerics import rotate\nfrom .architectures import sd3\nimport torch"),
        ("kernels/int8_linear/triton_impl.py", "import triton\nfrom ..numerics import rotate"),
        ("kernels/quantizing_triton.py", "import triton.language as tl"),
        ("kernels/kitchen.py", "from comfy_kitchen.backends import cuda"),
        ("quant_core/linear.py", "from torch import nodes"),
    ],
)
def test_legal_imports_pass(path, source):
    assert violations(path, source) == []
