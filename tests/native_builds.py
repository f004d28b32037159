"""The builds of the C that tests run: those for other CPUs too."""

import tempfile
from functools import lru_cache
from pathlib import Path

from dit_quant.kernels.native import build, library

EMULATION = Path(__file__).with_name("amx_emulation.h")
BUILDS = {
    "VNNI": library.OPTIONS,
    "AMX": (*library.OPTIONS, *library.AMX_OPTIONS),
    "AMX emulated": (*library.OPTIONS, "-include", str(EMULATION)),
}


@lru_cache(maxsize=len(BUILDS))
def built(name: str) -> library.Library:
    """Compiled once for all modules."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        build.compile_to(str(path), BUILDS[name])
        return library.loaded(path, library.thread_team())
