"""GELU and quantizer in one kernel, against the two one after the other."""

import pytest
import torch
import torch.nn.functional as F
from dit_quant.kernels.gelu_quantize.reference import gelu_quantize as reference
from dit_quant.kernels.quantize_activation.reference import quantize_activation
from near_ties import assert_equal_but_ties

pytest.importorskip("triton")
from dit_quant.kernels.gelu_quantize.triton_impl import gelu_quantize

pytestmark = pytest.mark.usefixtures("poisoned_empty")

RANGES = [{"symmetric": True}, {"symmetric": False}, {"static_scale": torch.tensor([0.01, 0.02])}]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(index=0, fraction=0.0):
    return {"index": torch.tensor([index]), "fraction": torch.tensor([fraction])}


def to(device, keywords):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in keywords.items()}


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("ranges", RANGES, ids=["symmetric", "asymmetric", "static"])
@pytest.mark.parametrize(("M", "K", "order"), [(1, 100, 4), (7, 3088, 16), (63, 256, 1), (7, 1024, 256)])
def test_codes_are_the_reference_s_but_for_ties(M, K, order, ranges, approximate, device):
    x = (2 * normal(M, K)).to(device, torch.bfloat16 if M > 1 else torch.float16)
    keywords = {"hadamard": order, **ranges, **at(0, 0.25)}
    if RANGES.index(ranges) != 1 or order == 256:
        keywords |= {"shift": normal(2, K, seed=1).half(), "smooth": normal(K, seed=2).exp()}
    keywords = to(device, keywords)
    y = F.gelu(x.float(), approximate=approximate)
    # tanh, erf and exp: 2 units in the last place of a value up to 1, times x / 2 on both sides; their argument is
    # rounded four times, which |u| tanh'(u) < 1/2 damps. Together < 8 u |x|, u = 2**-24
    assert_equal_but_ties(
        gelu_quantize(x, approximate=approximate, **keywords), y, 2**-21 * x.float().abs(), **keywords
    )


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_where_gelu_is_the_identity_the_bits_are_equal(approximate, symmetric, device):
    """gelu(x) = x in fp32 from 6 on, and 0 at 0: nothing is left but the quantizer."""
    x = (normal(7, 1024).abs() + 6).to(device)
    x[:, ::3] = 0
    where = to(device, at())
    found = gelu_quantize(x, approximate=approximate, symmetric=symmetric, hadamard=64, **where)
    expected = quantize_activation(x, symmetric=symmetric, hadamard=64, **where)
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_extremes_are_finite(device):
    """exp overflows at -90 and the cube at 1e13; gelu does not."""
    x = torch.tensor([[-1e4, -90.0, -1e-3, 0.0, 1e-3, 90.0, 1e4, 5.0]]).to(device)
    where = to(device, at())
    for approximate in ("tanh", "none"):
        for a, b in zip(
            gelu_quantize(x, approximate=approximate, **where)[:2],
            reference(x, approximate=approximate, **where)[:2],
            strict=True,
        ):
            assert torch.equal(a, b)


def test_reference_is_gelu_then_quantizer():
    x = normal(7, 100).bfloat16()
    found = reference(x, approximate="none", symmetric=False, **at())
    exact = F.gelu(x.double())
    codes, scale, zero = found
    assert ((scale.double() * (codes - zero) - exact).abs() <= 0.501 * scale).all()
