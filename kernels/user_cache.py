"""Where this user's caches are kept."""

import os
import tempfile
from pathlib import Path

CACHE = "DIT_QUANT_CACHE"
WINDOWS = os.name == "nt"


def user_cache() -> Path:
    """$DIT_QUANT_CACHE, else our folder in the platform's cache folder of the user; it may not exist yet. Where the
    user has no home, as in some containers, one among the temporary files."""
    if named := os.environ.get(CACHE):
        return Path(named)
    folder = os.environ.get("LOCALAPPDATA" if WINDOWS else "XDG_CACHE_HOME")
    if folder:
        return Path(folder) / "dit_quant"
    try:
        return Path.home().joinpath(*(("AppData", "Local") if WINDOWS else (".cache",)), "dit_quant")
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"dit_quant-{getattr(os, 'getuid', int)()}"
