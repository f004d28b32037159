"""Shared by all tests: the package under its name, poisoned memory, and a loud line when no host was found."""

import importlib.util
import sys

import pytest
from host_location import ROOT, find_host, why_no_host

HOST_TESTS = pytest.StashKey[int]()


def _bind_package() -> None:
    """Makes `import dit_quant` work where the package is not installed: the checkout's folder has another name."""
    if importlib.util.find_spec("dit_quant") is not None:
        return
    spec = importlib.util.spec_from_file_location(
        "dit_quant", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["dit_quant"] = module
    spec.loader.exec_module(module)


_bind_package()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    config.stash[HOST_TESTS] = sum(item.get_closest_marker("host") is not None for item in items)


def pytest_terminal_summary(terminalreporter, config):
    skipped = terminalreporter.stats.get("skipped", [])
    # where workers collect, only their reports come here
    count = config.stash.get(HOST_TESTS, 0) or sum("host" in report.keywords for report in skipped)
    if count and find_host() is None:
        terminalreporter.write_line(
            f"HOST TESTS SKIPPED: {count} tests need ComfyUI; {why_no_host()}", red=True, bold=True
        )


def poison(tensor):
    """Fills fresh memory with values that no correct result holds, so that reading it unwritten shows."""
    import torch

    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        value = float("nan")
    elif tensor.dtype is torch.bool:
        value = True
    else:
        # our quantizers clamp to +-127: -128 cannot be a code
        value = -128 if tensor.dtype is torch.int8 else 0xA5
    with torch.no_grad():
        return tensor.fill_(value)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """`torch.empty`, `torch.empty_like` and `Tensor.new_empty` return NaN, -128 (int8) or 0xA5 (other integers)."""
    import torch

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(allocate):
    return lambda *args, **kwargs: poison(allocate(*args, **kwargs))
