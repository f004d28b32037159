"""The scripts of benchmarks/ as modules: their folder is on the path only while one loads."""

import importlib
import sys

from host_location import ROOT

BENCHMARKS = ROOT / "benchmarks"


def load(name: str):
    """A script of benchmarks/, the same module for all tests."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))
