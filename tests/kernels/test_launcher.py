"""A kernel launched again is the one that Triton would take, with the arguments that it would get."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ahead_of_time import nvidia_tool
from benchmark_scripts import load
from dit_quant.kernels import launcher
from dit_quant.kernels.launcher import kind
from dit_quant.kernels.triton_device import installed
from host_location import ROOT

dry = load("dry_launches")
OLDEST = os.environ.get("DIT_QUANT_OLDEST_TRITON", "")


class Kernel:
    """Counts what Triton is asked for; every kind of operands has a compiled kernel of its own."""

    def __init__(self, *arg_names):
        self.arg_names = list(arg_names or ("x_ptr", "M", "WIDTH", "NAME"))
        self.asked, self.again = [], []

    def __getitem__(self, grid):
        def run(*given, **options):
            self.asked.append((grid, given, options))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *given: self.kernel.again.append((grid, given))


def test_triton_is_asked_once_for_operands_of_the_same_kinds(monkeypatch):
    monkeypatch.setattr(launcher, "checked", lambda: True)
    kernel, x = Kernel(), torch.zeros(4)
    launch = launcher.launcher(kernel, 89, NAME="a", num_warps=4, WIDTH=16)
    launch(3, x, 5)
    launch(2, torch.ones(8), 7)
    launch(2, x, 16)
    # constexprs in the kernel's order, options by name
    assert [(grid, given[1:], options) for grid, given, options in kernel.asked] == [
        ((3,), (5, 16, "a"), {"num_warps": 4}),
        ((2,), (16, 16, "a"), {"num_warps": 4}),
    ]
    ((grid, given),) = kernel.again
    assert grid == (2, 1, 1)
    assert given[1:] == (7, 16, "a")
    assert torch.equal(given[0], torch.ones(8))


@pytest.mark.parametrize(("capability", "checked"), [(0, True), (89, False)])
def test_without_known_rules_triton_is_always_asked(capability, checked, monkeypatch):
    """AMD's backend, the interpreter, and a Triton newer than those whose rules were read."""
    monkeypatch.setattr(launcher, "checked", lambda: checked)
    kernel, x = Kernel(), torch.zeros(4)
    launch = launcher.launcher(kernel, capability, WIDTH=16, NAME="a")
    launch(1, x, 5)
    launch(1, x, 5)
    assert len(kernel.asked) == 2
    assert not kernel.again


@pytest.mark.skipif(not installed(), reason="Triton is not installed")
@pytest.mark.parametrize(
    ("version", "known"), [("3.3.1", False), ("3.4.0", True), ("3.9.0+git", True), ("3.10.0", False), ("4.0", False)]
)
def test_tritons_whose_rules_were_read(version, known, monkeypatch):
    from dit_quant.kernels import version_triton

    monkeypatch.setattr(version_triton, "VERSION", version)
    launcher.checked.cache_clear()
    try:
        assert launcher.checked() == known
    finally:
        launcher.checked.cache_clear()


def test_constexprs_in_front_of_operands_are_refused():
    kernel = Kernel("WIDTH", "x_ptr")
    with pytest.raises(ValueError, match=r"\['WIDTH', 'x_ptr'\] do not end with \['WIDTH'\]"):
        launcher.launcher(kernel, 89, WIDTH=16)


def test_kinds_tell_apart_what_kernels_are_compiled_for():
    memory = torch.zeros(64, dtype=torch.uint8)
    tensors = memory[:32].view(torch.int32), memory[:32].view(torch.float32), memory[4:36].view(torch.int32), None
    assert len({kind(x) for x in tensors}) == 4
    numbers = 1, 2, 16, 2**31, 2**31 + 1, 0.5
    assert len({kind(x) for x in numbers}) == len(numbers)
    assert kind(2) == kind(3) == kind(-1)
    assert kind(16) == kind(0) == kind(-32)


@pytest.mark.skipif(
    not installed() or shutil.which(nvidia_tool("cuobjdump")) is None, reason="no Triton that compiles for NVIDIA cards"
)
@pytest.mark.parametrize("triton", ["installed", "oldest"])
@pytest.mark.parametrize("capability", [86, 90])
def test_it_launches_what_triton_would(capability, triton):
    """Operands of every sort; layers of every preset, on Hopper with tensor descriptors."""
    if triton == "oldest" and not OLDEST:
        pytest.skip("DIT_QUANT_OLDEST_TRITON is not set: make oldest-triton")
    script, folder = Path(ROOT) / "tests" / "launched_twice.py", Path(OLDEST) if triton == "oldest" else None
    environment = dry.compiling(None, folder)
    done = subprocess.run(
        [sys.executable, str(script), str(capability)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["operands"] == []
    assert set(found["layers"]) == {"W8A8", "W8A8 fast", "W8A8 static", "W4A8"}
    for asked, faults in found["layers"].values():
        assert faults == []
        assert asked == [2, 0, 2, 0]
    for slots in found["slots"].values():
        # wherever a layer's group lies: no kernel is compiled for that alone
        assert all(functions == slots[0] for functions in slots)
