"""Importing the pack costs nothing and changes nothing: the host imports every pack at every start."""

import json
import subprocess
import sys

import pytest
from host_location import ROOT

PROBE = """
import importlib.util, json, logging, os, sys
root = sys.argv[1]
before, environment, handlers = set(sys.modules), dict(os.environ), list(logging.getLogger().handlers)
level = logging.getLogger().level
spec = importlib.util.spec_from_file_location("a_dashed-name", root + "/__init__.py", submodule_search_locations=[root])
module = importlib.util.module_from_spec(spec)
sys.modules["a_dashed-name"] = module
spec.loader.exec_module(module)
exec(sys.argv[2])
print(json.dumps({
    "modules": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "logging": logging.getLogger().handlers == handlers and logging.getLogger().level == level,
    "environment": dict(os.environ) == environment,
    "entry": callable(module.comfy_entrypoint),
    "path": root not in sys.path,
}))
"""
HEAVY = {"torch", "numpy", "scipy", "einops", "safetensors", "comfy", "comfy_api", "triton", "PIL", "nodes"}


def probe(extra: str = "") -> dict:
    run = subprocess.run(
        [sys.executable, "-c", PROBE, str(ROOT), extra],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd="/",
    )
    assert run.stderr == ""
    return json.loads(run.stdout)


def test_importing_the_pack_imports_nothing_heavy_and_configures_nothing():
    found = probe()
    assert not HEAVY & set(found["modules"])
    assert found["logging"]
    assert found["environment"]
    assert found["entry"]
    assert found["path"]


@pytest.mark.parametrize(
    ("planted", "seen"),
    [
        ("import safetensors", lambda found: HEAVY & set(found["modules"])),
        ("logging.basicConfig(level=10)", lambda found: not found["logging"]),
        ("os.environ['DIT_QUANT_PLANTED'] = '1'", lambda found: not found["environment"]),
    ],
)
def test_planted_effects_are_seen(planted, seen):
    """Negative control."""
    assert seen(probe(planted))


def test_the_core_needs_neither_host_nor_triton():
    """quant_core and kernels in an interpreter where importing comfy, comfy_kitchen or triton fails."""
    names = ("comfy", "comfy_kitchen", "triton", "nodes", "folder_paths")
    block = f"import sys; sys.modules.update({', '.join(f'{name}=None' for name in names)}); "
    modules = [
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for layer in ("kernels", "quant_core")
        for path in (ROOT / layer).rglob("*.py")
        if path.name != "__init__.py" and not path.name.endswith(("triton_impl.py", "_triton.py"))
    ]
    load = "import importlib; " + "; ".join(f"importlib.import_module('a_dashed-name.{name}')" for name in modules)
    assert "torch" in probe(block + load)["modules"]
