"""Curvatures of the host's own model classes, probed in its inference mode, are those of plain autograd."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.host

SCRIPT = Path(__file__).with_name("compare_probes.py")
FAMILIES = ("sd3", "flux", "wan", "z_image", "qwen_image", "wan, dynamic VRAM")
# the last block's text stream ends in layers whose output nothing reads
UNREAD = {"qwen_image": ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")}


@pytest.mark.parametrize("family", FAMILIES)
def test_curvatures_are_those_of_autograd(comparison, family):
    """fp32 on both sides; sums over tokens in another order at most."""
    found = comparison[family]
    assert found["notes"] == []
    assert found["probes"] == 1
    assert found["missing"] == [f"transformer_blocks.1.{name}" for name in UNREAD.get(family, ())]
    assert found["layers"] >= 13
    assert found["worst"] < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probe_leaves_no_trace(comparison, family):
    """The model computes the same afterwards, with its own tensors, and no input is counted twice."""
    assert comparison[family]["restored"]
    assert comparison[family]["recorded_once"]
