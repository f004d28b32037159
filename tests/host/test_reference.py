"""The demo's readable EmojiDiT and the host's own class are one model: the same file gives the same output."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.host

SCRIPT = Path(__file__).with_name("compare_reference.py")


def test_one_call_agrees(comparison):
    """fp32 on both sides: what is left is the order of additions."""
    assert comparison["dtype"] == "torch.float32"
    assert len(comparison["errors"]) == 9
    assert max(comparison["errors"].values()) < 1e-5, comparison["errors"]


def test_eight_euler_steps_agree(comparison):
    assert comparison["latent_is_used"] > 0.1
    assert comparison["euler"] < 1e-4


def test_schedule_is_the_hosts(comparison):
    assert comparison["schedule"] < 1e-6
