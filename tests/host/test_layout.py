"""Our layout of the host's quantized tensors, where no node shows it."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.host

SCRIPT = Path(__file__).with_name("compare_layout.py")


@pytest.mark.parametrize("preset", ["rtn_w8a8", "rtn_w4a8"])
def test_a_lora_is_worked_in_where_the_changed_weight_is(comparison, preset):
    """The host brings that to the card while the layer is still in main memory. The device of this test has none."""
    assert comparison[preset] == {"worked on": ["meta"], "back": ["meta"]}
