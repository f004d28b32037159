"""The fused quantizers in torch ops against their definitions: the same codes, but next to a tie."""

import pytest
import torch
from dit_quant.kernels import backends
from dit_quant.kernels.backends import Implementation
from dit_quant.kernels.quantize_activation import torch_impl
from fused_cases import CASES, normal
from near_ties import assert_equal_but_ties

pytestmark = pytest.mark.usefixtures("poisoned_empty")

AT = {"index": torch.tensor([0]), "fraction": torch.tensor([0.25])}
RANGES = {
    "symmetric": {"symmetric": True},
    "asymmetric": {"symmetric": False},
    "static": {"static_scale": torch.tensor([0.02, 0.04])},
    "static, zero": {"static_scale": torch.tensor([0.02, 0.04]), "static_zero": torch.tensor([3.0, 20.4])},
}


@pytest.fixture(params=[2**20, 500], ids=["one block", "blocks"])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(torch_impl, "CPU_BLOCK", request.param)


def implementation(op: str, backend: str = "torch"):
    found = backends.load(op, backend)
    assert isinstance(found, Implementation), found
    return found.function


def reordering_error(y, order, shift=None, smooth=None, **_):
    """A rotation on CPU begins with sums of 16 in any order: 15 roundings of at most 16 / 4 times the largest, as if
    every value were off by 15 u of it, u = 2**-24."""
    if order == 1:
        return torch.zeros_like(y)
    s = torch.ones(y.shape[1]) if smooth is None else smooth
    size = (y.abs() + (0 if shift is None else shift.float().abs().amax(dim=0))) / s
    return 2**-20 * size.amax(dim=1, keepdim=True) * s


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize(("L", "K", "order"), [(1, 100, 4), (21, 256, 256), (3, 1152, 64), (7, 33, 1)])
@pytest.mark.parametrize("name", CASES)
def test_codes_are_the_reference_s_but_for_ties(name, L, K, order, ranges):
    case = CASES[name](L, K, torch.bfloat16 if L > 1 else torch.float32)
    keywords = {"hadamard": order, **RANGES[ranges], **AT}
    if ranges != "asymmetric" or order == 256:
        keywords |= {"shift": normal(2, K, seed=1).half(), "smooth": normal(K, seed=2).exp()}
    found = implementation(case.op)(*case.operands, **case.prologue, **keywords)
    assert_equal_but_ties(found, case.y, case.error + reordering_error(case.y, order, **keywords), **keywords)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("name", CASES)
def test_operands_that_need_gradients_or_lie_apart(name, ranges, monkeypatch):
    """Parameters, and every second column: torch takes other code paths, and keeps no graph."""
    case = CASES[name](5, 100, torch.float32)
    wide = [None if x is None else x.repeat_interleave(2, dim=-1).requires_grad_()[..., ::2] for x in case.operands]
    tables = {k: v.clone().requires_grad_() if torch.is_tensor(v) else v for k, v in case.prologue.items()}
    quantize, seen = torch_impl.quantize_activation, []
    monkeypatch.setattr(torch_impl, "quantize_activation", lambda y, **k: seen.append(y) or quantize(y, **k))
    found = implementation(case.op)(*wide, **tables, **RANGES[ranges], **AT)
    assert_equal_but_ties(found, case.y, case.error, **RANGES[ranges], **AT)
    assert seen
    assert not any(a is not None and a.requires_grad for a in (*seen, *found))


def test_operands_are_left_alone():
    for build in CASES.values():
        case = build(2, 64, torch.float32)
        given = [x for x in (*case.operands, *case.prologue.values()) if torch.is_tensor(x)]
        before = [x.clone() for x in given]
        implementation(case.op)(*case.operands, **case.prologue, **AT)
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_one_scale_for_all_rows_is_one_value(monkeypatch):
    """The products read an expanded scale once."""
    monkeypatch.setattr(torch_impl, "CPU_BLOCK", 500)
    case = CASES["gelu tanh"](7, 100, torch.float32)
    _, scale, zero = implementation(case.op)(*case.operands, **case.prologue, **RANGES["static, zero"], **AT)
    assert scale.shape == zero.shape == (21, 1)
    assert scale.stride(0) == zero.stride(0) == 0


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_wrong_arguments_are_named(backend):
    adaln, swiglu = implementation("adaln_quantize", backend), implementation("swiglu_quantize", backend)
    with pytest.raises(ValueError, match="7 rows are not divisible by the 2 rows"):
        adaln(normal(7, 64), modulation_scale=normal(2, 64), **AT)
    with pytest.raises(ValueError, match="norm 'batch' is not known"):
        adaln(normal(7, 64), kind="batch", **AT)
    with pytest.raises(ValueError, match="101 columns cannot hold"):
        swiglu(normal(7, 101), **AT)
