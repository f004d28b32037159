"""Where Triton kernels may run, and the reason where they may not."""

from contextlib import contextmanager

import pytest
import torch
from dit_quant.kernels import triton_device

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Makes this a machine with a card of that capability."""

    def pretend(capability=(8, 6), installed=True, interpreted=False, hip=None):
        monkeypatch.setattr(triton_device, "installed", lambda: installed)
        monkeypatch.setattr(triton_device, "interpreted", lambda: interpreted)
        monkeypatch.setattr(triton_device, "_capability", lambda _: 10 * capability[0] + capability[1])
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(triton_device, "too_old", lambda: None)

    return pretend


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_cards_since_ampere(machine, capability):
    machine(capability)
    assert triton_device.device_refusal(CUDA) is None
    assert triton_device.capability_of(CUDA) == 10 * capability[0] + capability[1]


@pytest.mark.parametrize(("capability", "shown"), [((7, 5), "7.5"), ((6, 1), "6.1")])
def test_older_cards_are_named(machine, capability, shown):
    machine(capability)
    assert triton_device.device_refusal(CUDA) == f"compute capability {shown} < 8.0"


def test_amd_cards_have_no_such_number(machine):
    machine((7, 5), hip="6.2")
    assert triton_device.device_refusal(CUDA) is None
    assert triton_device.capability_of(CUDA) == 0


def test_cpu_tensors_only_in_the_interpreter(machine):
    machine()
    assert triton_device.device_refusal(CPU) == "no Triton kernels for cpu tensors"
    machine(interpreted=True)
    assert triton_device.device_refusal(CPU) is None


@pytest.mark.parametrize("current", [0, 1])
def test_the_device_is_changed_where_it_is_another_one(current, monkeypatch):
    changes = []

    @contextmanager
    def change(device):
        changes.append(device)
        yield
        changes.append("back")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", change)
    with triton_device.selected(CUDA), triton_device.selected(CPU):
        assert changes == [CUDA] * current
    assert changes == [CUDA, "back"] * current


def test_missing_triton_comes_first(machine):
    machine((7, 5), installed=False)
    assert triton_device.device_refusal(CUDA) == triton_device.NOT_INSTALLED
    assert triton_device.NOT_INSTALLED.startswith("triton is not installed; ")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3.3.1", "triton 3.3.1 < 3.4: update torch to 2.8 or newer"),
        ("2.1.0+git", "triton 2.1.0+git < 3.4: update torch to 2.8 or newer"),
        ("3.4.0", None),
        ("3.10.0.post2", None),
    ],
)
def test_older_triton_is_named(monkeypatch, version, reason):
    pytest.importorskip("triton")
    from dit_quant.kernels import version_triton

    monkeypatch.setattr(version_triton, "VERSION", version)
    triton_device.too_old.cache_clear()
    assert triton_device.too_old() == reason
    triton_device.too_old.cache_clear()
