"""Where this user's caches are kept."""

import os
from pathlib import Path

CACHE = "DIT_QUANT_CACHE"
WINDOWS = os.name == "nt"


def user_cache() -> Path:
    """$DIT_QUANT_CACHE, else our folder in the platform's cache folder of the user; it may not exist yet."""
    if named := os.environ.get(CACHE):
        return Path(named)
    if WINDOWS:
        folder = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "dit_quant"
