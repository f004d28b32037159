"""SwiGLU and quantizer in one kernel, against the two one after the other."""

import pytest
import torch
import torch.nn.functional as F
from dit_quant.kernels.quantize_activation.reference import quantize_activation
from dit_quant.kernels.swiglu_quantize.reference import swiglu_quantize as reference
from near_ties import assert_equal_but_ties

pytest.importorskip("triton")
from dit_quant.kernels.swiglu_quantize.triton_impl import swiglu_quantize

pytestmark = pytest.mark.usefixtures("poisoned_empty")

RANGES = [{"symmetric": True}, {"symmetric": False}, {"static_scale": torch.tensor([0.02, 0.08])}]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(device, index=0, fraction=0.0):
    return {"index": torch.tensor([index], device=device), "fraction": torch.tensor([fraction], device=device)}


@pytest.mark.parametrize("ranges", RANGES, ids=["symmetric", "asymmetric", "static"])
@pytest.mark.parametrize(
    ("M", "K", "order"), [(1, 100, 4), (7, 3088, 16), (63, 256, 1), (7, 1024, 256), (1, 16640, 256)]
)
def test_codes_are_the_reference_s_but_for_ties(M, K, order, ranges, device):
    dtype = torch.bfloat16 if M > 1 else torch.float32
    gate, up = (2 * normal(M, K)).to(device, dtype), normal(M, K, seed=3).to(device, dtype)
    keywords = {name: v.to(device) if torch.is_tensor(v) else v for name, v in ranges.items()}
    keywords |= {"hadamard": order, **at(device, 0, 0.25)}
    if RANGES.index(ranges) != 1 or order == 256:
        keywords |= {"shift": normal(2, K, seed=1).half().to(device), "smooth": normal(K, seed=2).exp().to(device)}
    y = F.silu(gate.float()) * up.float()
    # exp is off by 2 units in the last place and by its rounded argument, |gate| u; sum, quotient and product add one
    # each, on both sides
    error = 2**-23 * (6 + gate.float().abs()) * y.abs()
    assert_equal_but_ties(swiglu_quantize(gate, up, **keywords), y, error, **keywords)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_where_silu_is_the_identity_the_bits_are_equal(symmetric, device):
    """silu(x) = x in fp32 from 18 on, and 0 at 0."""
    gate, up = (normal(7, 1024).abs() + 18).to(device), normal(7, 1024, seed=1).to(device)
    gate[:, ::3] = 0
    found = swiglu_quantize(gate, up, symmetric=symmetric, hadamard=64, **at(device))
    expected = quantize_activation(gate * up, symmetric=symmetric, hadamard=64, **at(device))
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("op", [reference, swiglu_quantize], ids=["reference", "triton"])
def test_one_tensor_of_both_halves(op, gate_first, device):
    gate, up = normal(7, 100).to(device), normal(7, 100, seed=1).to(device)
    both = torch.cat([gate, up] if gate_first else [up, gate], dim=1)
    found = op(both, gate_first=gate_first, symmetric=False, **at(device))
    for a, b in zip(found, op(gate, up, symmetric=False, **at(device)), strict=True):
        assert torch.equal(a, b)


def test_odd_columns_are_named(device):
    with pytest.raises(ValueError, match="101 columns cannot hold a gate and an up half"):
        swiglu_quantize(normal(7, 101), **at("cpu"))
