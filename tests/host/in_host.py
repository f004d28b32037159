"""Imported before all else by scripts that the host's own interpreter runs in the host's folder, PACK_ROOT their first
argument: the host's path and arguments, and this pack as `dit_quant`."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT, ARGUMENTS = Path(sys.argv[1]), sys.argv[2:]
# the host reads its arguments while it is imported
sys.argv[1:] = ["--cpu"]
sys.path[0] = str(Path.cwd())

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()


def bind(name: str, path: Path, **options) -> ModuleType:
    """A file as the module `name`."""
    spec = importlib.util.spec_from_file_location(name, path, **options)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bind("dit_quant", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
