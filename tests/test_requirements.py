"""Installing the pack must leave the artist's torch, triton and numpy alone."""

import re

import pytest
from host_location import ROOT

OWNED_BY_THE_HOST = {"torch", "torchvision", "torchaudio", "torchsde", "triton", "triton-windows", "numpy", "xformers"}


def names(requirements):
    """['scipy>=1', '# no'] -> {'scipy'}, normalized as package indexes do."""
    found = set()
    for line in requirements:
        text = line.split("#")[0].strip()
        if text:
            name = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", text)
            assert name, f"{text!r} is not a plain requirement: options and URLs can replace anything"
            found.add(re.sub(r"[-_.]+", "-", name[0]).lower())
    return found


def in_requirements_txt():
    return names((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())


def in_pyproject():
    tomllib = pytest.importorskip("tomllib")
    return names(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"])


@pytest.mark.parametrize("listed", [in_requirements_txt, in_pyproject])
def test_host_packages_are_never_named(listed):
    assert not listed() & OWNED_BY_THE_HOST


def test_both_lists_agree():
    assert in_requirements_txt() == in_pyproject()


def test_names_are_read():
    """The check itself: a forbidden name is seen in every spelling, an option is refused."""
    assert names(["Torch >= 2.7 # fast", "", "# numpy", "triton_windows[all]"]) == {"torch", "triton-windows"}
    with pytest.raises(AssertionError, match="plain requirement"):
        names(["--index-url https://example.org"])


def test_every_package_is_installed():
    """A folder that pyproject does not name works from a checkout and is missing from an installed pack."""
    tomllib = pytest.importorskip("tomllib")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"dit_quant"}
    for top in ("demo", "kernels", "nodes", "quant_core"):
        for path in (ROOT / top).rglob("__init__.py"):
            found.add(".".join(("dit_quant", *path.parent.relative_to(ROOT).parts)))
    assert listed == found
