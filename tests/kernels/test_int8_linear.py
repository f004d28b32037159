"""W8A8 product: exact integers, then one epilogue."""

import pytest
import torch
from dit_quant.kernels import int8_linear, int8_matmul
from dit_quant.kernels.numerics import lerp_rows

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SHAPES = [(1, 1, 1), (1, 7, 33), (7, 1, 63), (33, 63, 100), (100, 33, 7), (31, 64, 256), (63, 100, 4097)]


def integers(*shape, seed=0, limit=127):
    return torch.randint(-limit, limit + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def single():
    return {"index": torch.tensor([0]), "fraction": torch.tensor([0.0])}


@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_accumulation_is_exact(M, N, K):
    a, w = integers(M, K), integers(N, K, seed=1)
    found = int8_matmul(a, w)
    assert found.dtype is torch.int32
    assert torch.equal(found.long(), a.long() @ w.long().T)


@pytest.mark.parametrize(("sign_a", "sign_w"), [(1, 1), (1, -1), (-1, -1)])
@pytest.mark.parametrize("K", [1, 33, 4097])
def test_extreme_codes_do_not_saturate(K, sign_a, sign_w):
    """Neither int16 pairs (127 * 127 * 2 > 2**14) nor fp32 (beyond 2**24) would survive."""
    a = torch.full((7, K), 127 * sign_a, dtype=torch.int8)
    w = torch.full((33, K), 127 * sign_w, dtype=torch.int8)
    assert (int8_matmul(a, w) == 127 * 127 * K * sign_a * sign_w).all()


def test_views_multiply_like_copies():
    a, w = integers(33, 100)[::2, 1:64], integers(126, 63, seed=1).view(63, 126)[:, 63:]
    assert torch.equal(int8_matmul(a, w).long(), a.long() @ w.long().T)


def epilogue_inputs(M, N, T, seed=2):
    random = torch.Generator().manual_seed(seed)
    return {
        "row_scale": torch.rand(M, 1, generator=random) + 0.01,
        "column_scale": torch.rand(N, 1, generator=random) + 0.01,
        "bias": torch.randn(N, generator=random),
        "correction": torch.randn(T, N, generator=random).half(),
    }


@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_epilogue_is_its_formula(M, N, K, asymmetric):
    a, w, T = integers(M, K), integers(N, K, seed=1), 3
    inputs = epilogue_inputs(M, N, T)
    where = {"index": torch.tensor([1]), "fraction": torch.tensor([0.25])}
    zero = torch.randint(-300, 300, (M, 1), generator=torch.Generator().manual_seed(3)).float()
    extra = {"row_zero": zero, "column_sum": w.sum(dim=1, dtype=torch.int32)} if asymmetric else {}
    found = int8_linear(a, w, **inputs, **extra, **where)
    shifted = a.double() - (zero.double() if asymmetric else 0)
    scale = inputs["row_scale"].double() * inputs["column_scale"].double().T
    correction = lerp_rows(inputs["correction"], **where).double()
    exact = shifted @ w.double().T * scale + inputs["bias"].double() + correction
    product = (a.double() @ w.double().T).abs() + (zero.double() * w.double().sum(dim=1)).abs() * asymmetric
    size = product * scale + inputs["bias"].double().abs() + correction.abs()
    # at most 8 fp32 roundings, each relative to a partial result no larger than `size`
    assert ((found - exact).abs() <= 8 * 2**-24 * size).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_is_rounded_once(dtype):
    a, w = integers(7, 33), integers(33, 33, seed=1)
    inputs = epilogue_inputs(7, 33, 1)
    found = int8_linear(a, w, **inputs, **single(), dtype=dtype)
    assert torch.equal(found, int8_linear(a, w, **inputs, **single()).to(dtype))


def test_zero_point_without_column_sums_is_refused():
    inputs = epilogue_inputs(7, 33, 1)
    with pytest.raises(ValueError, match="column sums"):
        int8_linear(integers(7, 33), integers(33, 33), **inputs, **single(), row_zero=torch.ones(7, 1))
