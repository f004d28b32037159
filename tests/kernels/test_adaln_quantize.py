"""Norm, modulation and quantizer in one kernel, against the three one after the other."""

import pytest
import torch
import torch.nn.functional as F
from dit_quant.kernels.adaln_quantize.reference import adaln
from dit_quant.kernels.adaln_quantize.reference import adaln_quantize as reference
from dit_quant.kernels.quantize_activation.reference import quantize_activation
from fused_cases import summation_error
from near_ties import assert_equal_but_ties

pytest.importorskip("triton")
from dit_quant.kernels.adaln_quantize.triton_impl import adaln_quantize, refusal

pytestmark = pytest.mark.usefixtures("poisoned_empty")

RANGES = [{"symmetric": True}, {"symmetric": False}, {"static_scale": torch.tensor([0.02, 0.04])}]
# which of weight, bias, modulation scale and shift are there
PARTS = ["", "wb", "sh", "h", "wbsh"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(device, index=0, fraction=0.0):
    return {"index": torch.tensor([index], device=device), "fraction": torch.tensor([fraction], device=device)}


def parts(names, B, K, device):
    whole = {
        "weight": 1 + 0.3 * normal(K, seed=4),
        "bias": normal(K, seed=5),
        "modulation_scale": 0.5 * normal(B, K, seed=6).bfloat16(),
        "modulation_shift": normal(B, K, seed=7).bfloat16(),
    }
    letters = dict(zip("wbsh", whole, strict=True))
    return {letters[name]: whole[letters[name]].to(device) for name in names}


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("ranges", RANGES, ids=["symmetric", "asymmetric", "static"])
@pytest.mark.parametrize(
    ("B", "L", "K", "order"), [(1, 1, 100, 4), (3, 21, 256, 256), (2, 3, 1152, 64), (1, 7, 3088, 16), (7, 1, 1024, 1)]
)
def test_codes_are_the_reference_s_but_for_ties(B, L, K, order, ranges, kind, device):
    case = B + len(ranges) + RANGES.index(ranges) + (kind == "rms")
    names = PARTS[case % len(PARTS)]
    x = (2 * normal(B * L, K) + 0.5).to(device, (torch.float32, torch.bfloat16, torch.float16)[case % 3])
    extra = parts(names, B, K, device)
    keywords = {name: v.to(device) if torch.is_tensor(v) else v for name, v in ranges.items()}
    keywords |= {"hadamard": order, **at(device, 0, 0.25)}
    if case % 2:
        keywords |= {"shift": normal(2, K, seed=1).half().to(device), "smooth": normal(K, seed=2).exp().to(device)}
    full = {name: extra.get(name) for name in ("weight", "bias", "modulation_scale", "modulation_shift")}
    y = adaln(x, kind, 1e-6, **full)
    found = adaln_quantize(x.view(B, L, K), kind=kind, **extra, **keywords)
    assert_equal_but_ties(found, y, summation_error(x, kind, **extra), **keywords)


@pytest.mark.parametrize("names", PARTS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_where_the_norm_is_exact_the_bits_are_equal(names, symmetric, device):
    """Rows of +-1 with as many of each: mean 0, variance 1, whatever the order of the sums. K is a power of two, so
    that the last division is exact too."""
    B, L, K = 2, 4, 1024
    x = (
        (1 - 2 * (torch.rand(B * L, K, generator=torch.Generator().manual_seed(0)).argsort(dim=1) % 2))
        .float()
        .to(device)
    )
    extra = parts(names, B, K, device)
    full = {name: extra.get(name) for name in ("weight", "bias", "modulation_scale", "modulation_shift")}
    for kind in ("layer", "rms"):
        found = adaln_quantize(x, kind=kind, eps=0.0, symmetric=symmetric, hadamard=64, **extra, **at(device))
        y = adaln(x, kind, 0.0, **full)
        for a, b in zip(found, quantize_activation(y, symmetric=symmetric, hadamard=64, **at(device)), strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_reference_is_the_norm_of_torch(kind):
    x, weight, bias = normal(7, 100) + 3, normal(100, seed=1), normal(100, seed=2)
    scale, shift = normal(7, 100, seed=3), normal(7, 100, seed=4)
    exact = (
        F.layer_norm(x.double(), (100,), weight.double(), bias.double(), 1e-5)
        if kind == "layer"
        else F.rms_norm(x.double(), (100,), weight.double(), 1e-5) + bias
    )
    y = adaln(x, kind, 1e-5, weight, bias, scale, shift)
    # fp32 throughout: a hundred roundings of numbers around 10
    assert (y - (exact * (1 + scale.double()) + shift)).abs().max() < 1e-4


def test_samples_do_not_share_their_modulation(device):
    """Sample by sample, or all at once."""
    B, L, K = 3, 5, 100
    x = normal(B, L, K).to(device, torch.bfloat16)
    extra = parts("sh", B, K, device)
    codes, scale, zero = adaln_quantize(x, symmetric=False, **extra, **at(device))
    for b in range(B):
        own = {name: table[b : b + 1] for name, table in extra.items()}
        rows = slice(b * L, (b + 1) * L)
        for a, part in zip(
            (codes, scale, zero), adaln_quantize(x[b], symmetric=False, **own, **at(device)), strict=True
        ):
            assert torch.equal(a[rows], part)


@pytest.mark.parametrize("op", [reference, adaln_quantize], ids=["reference", "triton"])
def test_wrong_arguments_are_named(op):
    x = normal(7, 64)
    with pytest.raises(ValueError, match="7 rows are not divisible by the 2 rows"):
        op(x, modulation_scale=normal(2, 64), **at("cpu"))
    with pytest.raises(ValueError, match="norm 'batch' is not known"):
        op(x, kind="batch", **at("cpu"))


def test_refuses_rows_that_no_program_holds(device):
    assert refusal(device, K=12288) is None
    assert refusal(device, K=12544) == "K=12544 > 12288: the norm needs the whole row at once"
    with pytest.raises(ValueError, match="K=12544 > 12288"):
        adaln_quantize(normal(1, 12544).to(device), **at(device))
