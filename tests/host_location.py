"""Where a ComfyUI checkout and its interpreter are, and how this pack gets into its custom_nodes folder."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
PACK_FOLDER = "comfyui-dit-quant"  # a dash, as the registry's folders have: no importable package name
HOST_MODULES = ("aiohttp", "torchaudio", "comfy_kitchen")
VENV_PYTHONS = (
    ".venv/bin/python",
    "venv/bin/python",
    ".venv/Scripts/python.exe",
    "venv/Scripts/python.exe",
    "../python_embeded/python.exe",
)


@dataclass(frozen=True)
class Host:
    """A ComfyUI checkout and the interpreter that has its requirements."""

    root: Path
    python: Path


def find_host() -> Host | None:
    """The host named by COMFYUI_PATH, or the one this pack is installed in, or the one in the home folder."""
    return _search(_settings())[0]


def why_no_host() -> str:
    """Why `find_host` found nothing; empty when it found a host."""
    return _search(_settings())[1]


def _settings() -> tuple[str | None, str | None]:
    return os.environ.get("COMFYUI_PATH"), os.environ.get("COMFYUI_PYTHON")


@functools.cache
def _search(settings: tuple[str | None, str | None]) -> tuple[Host | None, str]:
    named_root, named_python = settings
    root = _host_root(named_root)
    if not (root / "main.py").is_file():
        return None, f"no ComfyUI: {root / 'main.py'} is missing; set COMFYUI_PATH to a checkout"
    if named_python:
        python = Path(named_python).expanduser()
        if not python.is_file():
            return None, f"COMFYUI_PYTHON={named_python} is not a file"
        return Host(root, python), ""
    # never resolved: a virtual environment's interpreter is a symlink and works by its own path
    pythons = [root / name for name in VENV_PYTHONS if (root / name).is_file()]
    if pythons:
        return Host(root, pythons[0]), ""
    missing = [name for name in HOST_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        return None, (
            f"{root} has no virtual environment and this interpreter lacks {', '.join(missing)}; set COMFYUI_PYTHON"
        )
    return Host(root, Path(sys.executable)), ""


def _host_root(named: str | None) -> Path:
    if named:
        return Path(named).expanduser().absolute()
    if ROOT.parent.name == "custom_nodes":
        return ROOT.parent.parent
    return Path.home() / "ComfyUI"


def install_pack(custom_nodes: Path) -> Path:
    """Links this repository into a custom_nodes folder; where links are forbidden, copies what git does not ignore."""
    target = custom_nodes / PACK_FOLDER
    try:
        target.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target / name)
    return target
