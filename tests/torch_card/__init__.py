"""A card that is not here, for a host: torch's CUDA device in host memory (card.cpp), and ComfyUI's dynamic VRAM on it.

The host then goes the ways that it goes on a card (what is on which device, what is offloaded, patched, streamed, in
which type it computes), with its own code. It says nothing of speed, and no kernel runs on it: layers fall back to
torch's operations.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from host_server import Host

HERE = Path(__file__).parent
SOURCE = HERE / "card.cpp"


def why_not() -> str:
    """Why there can be no card here; empty where there can."""
    if sys.platform != "linux":
        return "the emulated card is for Linux"
    if torch.version.cuda or torch.version.hip:
        return f"torch {torch.__version__} has a CUDA of its own; the emulated card needs a CPU build"
    if shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "g++ or Python's headers are not installed, which the emulated card is compiled with"
    return ""


@functools.cache
def library() -> Path:
    """card.cpp compiled for the torch of this interpreter: in half a minute, and kept where other builds are."""
    package = Path(torch.__file__).parent
    identity = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode() + sys.version.encode()).hexdigest()
    cache = Path(os.environ.get("DIT_QUANT_CACHE") or tempfile.gettempdir())
    path = cache / f"torch_card_{identity[:16]}.so"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        includes = [package / "include", package / "include/torch/csrc/api/include", sysconfig.get_path("include")]
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / "torch_card.so"
            subprocess.run(
                ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-DTORCH_EXTENSION_NAME=torch_card"]
                + [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
                + [f"-I{each}" for each in includes]
                + [str(SOURCE), "-o", str(built), f"-L{package / 'lib'}", f"-Wl,-rpath,{package / 'lib'}"]
                + ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"],
                check=True,
            )
            built.replace(path)
    return path


def packages(host: Host) -> list[str]:
    """Where the host's own interpreter finds its requirements."""
    found = subprocess.run(
        [str(host.python), "-c", "import site; print('\\n'.join(site.getsitepackages()))"],
        check=True,
        capture_output=True,
        text=True,
    )
    return found.stdout.split()


def environment(host: Host, dynamic: bool) -> dict[str, str]:
    """For this interpreter, running `host`: its torch has a card, with or without dynamic VRAM."""
    paths = [HERE / "site", *([HERE / "aimdo"] if dynamic else [])]
    return {
        "DIT_QUANT_TORCH_CARD": str(library()),
        "DIT_QUANT_HOST_PACKAGES": os.pathsep.join(packages(host)),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
