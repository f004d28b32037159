"""The harness's own promises: where it looks for a host, and what poisoned memory holds."""

import math
import sys

import pytest
import torch
from host_location import ROOT, Host, find_host, install_pack, why_no_host


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that passes for a ComfyUI checkout, named by COMFYUI_PATH."""
    (tmp_path / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    return tmp_path


def test_package_is_importable():
    import dit_quant

    assert dit_quant.WEB_DIRECTORY == "./web"


def test_named_folder_without_host_is_no_host(tmp_path, monkeypatch):
    """A wrong COMFYUI_PATH must not fall through to another host on the machine."""
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert find_host() is None
    assert str(tmp_path / "main.py") in why_no_host()


def test_virtual_environment_is_preferred(checkout):
    python = checkout / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert find_host() == Host(checkout, python)
    assert why_no_host() == ""


def test_named_python_wins_and_must_exist(checkout, monkeypatch):
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    assert str(find_host().python) == sys.executable
    monkeypatch.setenv("COMFYUI_PYTHON", str(checkout / "nothing"))
    assert find_host() is None
    assert "COMFYUI_PYTHON" in why_no_host()


def test_pack_is_linked_or_copied(tmp_path, monkeypatch):
    linked = install_pack(tmp_path)
    assert linked.resolve() == ROOT.resolve()
    (tmp_path / "other").mkdir()

    def refuse(*_args, **_kwargs):
        raise OSError("links need a privilege here")

    monkeypatch.setattr(type(tmp_path), "symlink_to", refuse)
    copied = install_pack(tmp_path / "other")
    assert not copied.is_symlink()
    assert (copied / "__init__.py").read_bytes() == (ROOT / "__init__.py").read_bytes()
    assert not (copied / ".git").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.usefixtures("poisoned_empty")
def test_fresh_floats_are_nan(dtype):
    known = torch.zeros(3, dtype=dtype)
    for fresh in (torch.empty(3, dtype=dtype), torch.empty_like(known), known.new_empty(3)):
        assert fresh.float().isnan().all()


@pytest.mark.parametrize(("dtype", "value"), [(torch.int8, -128), (torch.uint8, 0xA5), (torch.int32, 0xA5)])
@pytest.mark.usefixtures("poisoned_empty")
def test_fresh_integers_are_no_codes(dtype, value):
    known = torch.zeros(3, dtype=dtype)
    for fresh in (torch.empty(3, dtype=dtype), torch.empty_like(known), known.new_empty(3)):
        assert (fresh == value).all()


@pytest.mark.usefixtures("poisoned_empty")
def test_leaves_may_be_poisoned():
    assert math.isnan(torch.empty(1, requires_grad=True).item())
