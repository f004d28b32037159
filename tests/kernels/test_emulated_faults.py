"""On an emulated card a compiled kernel without its barriers, or without waiting for its copies, does not pass."""

import re

import emulated_card
import pytest
import torch

pytest.importorskip("triton")

from dit_quant.kernels.int8_linear.triton_impl import int8_linear
from dit_quant.kernels.quantize_activation.triton_impl import quantize_activation
from linear_cases import activations, case

pytestmark = pytest.mark.skipif(not emulated_card.CARD, reason="no emulated card: DIT_QUANT_EMULATED_CARD is not set")


def quantize(device) -> None:
    # a row is a program's own, and comes through shared memory
    x = activations(12, 3840, device).bfloat16()
    index, fraction = torch.tensor([0]), torch.tensor([0.0])
    quantize_activation(x, index=index, fraction=fraction, hadamard=64)


def multiply(device) -> None:
    codes = activations(160, 256, device)
    int8_linear(
        activations(63, 256, device), codes, **case(63, 160, codes, full=True, dtype=torch.bfloat16, device=device)
    )


@pytest.mark.parametrize("call", [quantize, multiply])
@pytest.mark.parametrize("instruction", ["bar.sync", "cp.async.wait_group"])
def test_what_is_missing_is_noticed(call, instruction, device, monkeypatch):
    from ptx import driver
    from ptx.memory import Fault

    call(device)
    without = {key: re.sub(rf"\n\s*{re.escape(instruction)}\b[^;]*;", "\n", ptx) for key, ptx in driver.KERNELS.items()}
    assert without != driver.KERNELS
    monkeypatch.setattr(driver, "KERNELS", without)
    with pytest.raises(Fault, match="shared memory"):
        call(device)
