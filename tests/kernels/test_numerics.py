"""Scale, rounding, interpolation, nibbles and rotation: the laws every operator rests on."""

import itertools

import pytest
import torch
from dit_quant.kernels.numerics import (
    decode_int4,
    hadamard,
    lerp_rows,
    pack_int4,
    pack_levels,
    rotate,
    round_clamp,
    safe_scale,
    unpack_int4,
    unpack_levels,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def pair(index: int, fraction: float):
    return torch.tensor([index]), torch.tensor([fraction])


def test_scale_is_positive_and_covers_the_extent():
    extent = torch.tensor([0.0, 1e-45, 1e-38, 1e-30, 0.3, 127.0, 3e38])
    scale = safe_scale(extent, 127)
    assert (scale > 0).all()
    assert torch.isfinite(1 / scale).all()
    # one division rounds once
    assert (extent / scale <= 127 * (1 + 2**-23)).all()
    assert scale[0] == 1


def test_rounding_is_ties_to_even_and_clamped():
    ties = torch.tensor([-200.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 200.0])
    assert round_clamp(ties, -127, 127).tolist() == [-127, -2, -2, 0, 0, 2, 2, 126, 127, 127]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("T", [1, 2, 7])
def test_lerp_is_linear_between_rows(T, dtype):
    table = torch.randn(T, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    for row, fraction in itertools.product(range(T), (0.0, 0.25, 1 / 3, 1.0)):
        found = lerp_rows(table, *pair(row, fraction))
        low, high = table[row].double(), table[min(row + 1, T - 1)].double()
        exact = low + torch.tensor(fraction).double() * (high - low)
        assert found.dtype is torch.float32
        # a difference, a product and a sum round once each
        assert ((found - exact).abs() <= 3 * 2**-24 * (low.abs() + high.abs())).all()
        if fraction == 0:
            assert torch.equal(found, table[row].float())


@pytest.mark.parametrize("shape", [(1, 2), (7, 4), (33, 100), (63, 62)])
def test_nibbles_round_trip_with_even_columns_low(shape):
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    packed = pack_int4(codes)
    assert packed.shape == (shape[0], shape[1] // 2)
    assert torch.equal(unpack_int4(packed), codes)
    assert torch.equal(packed & 0xF, codes[:, 0::2])


def test_levels_round_trip_with_zero_low():
    """All 15 multipliers x 16 zeros."""
    multiplier, zero = (
        torch.cartesian_prod(torch.arange(1, 16), torch.arange(16)).to(torch.uint8).unflatten(0, (15, 16)).unbind(-1)
    )
    levels = pack_levels(multiplier, zero)
    assert levels.dtype is torch.uint8
    assert levels.tolist() == [[16 * m + z for z in range(16)] for m in range(1, 16)]
    assert torch.equal(torch.stack(unpack_levels(levels)), torch.stack([multiplier, zero]))


def test_decode_is_integer_arithmetic_for_every_code_within_int8():
    """Against Python integers; 4 columns of one group per case."""
    cases = [
        (code, m, z)
        for code, m, z in itertools.product(range(16), range(1, 16), range(16))
        if abs((code - z) * m) <= 127
    ]
    code, multiplier, zero = torch.tensor(cases, dtype=torch.uint8)[:, :, None].unbind(1)
    decoded = decode_int4(pack_int4(code.repeat(1, 4)), pack_levels(multiplier, zero))
    assert decoded.dtype is torch.int8
    assert decoded.tolist() == [[(code - z) * m] * 4 for code, m, z in cases]


@pytest.mark.parametrize(("N", "groups", "size"), [(1, 1, 4), (7, 3, 4), (33, 5, 20)])
def test_every_group_of_a_row_has_its_own_levels(N, groups, size):
    random = torch.Generator().manual_seed(2)
    draw = lambda low, high, *shape: torch.randint(low, high, shape, dtype=torch.uint8, generator=random)  # noqa: E731
    codes, multiplier, zero = draw(0, 16, N, groups * size), draw(1, 9, N, groups), draw(0, 16, N, groups)
    decoded = decode_int4(pack_int4(codes), pack_levels(multiplier, zero))
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        expected = (codes[:, part].int() - zero[:, g : g + 1].int()) * multiplier[:, g : g + 1].int()
        assert torch.equal(decoded[:, part].int(), expected)


@pytest.mark.parametrize("order", [1, 4, 16, 64, 256])
def test_hadamard_is_orthogonal_symmetric_and_spreads_the_mean(order):
    H = hadamard(order, torch.float64)
    assert torch.equal(H, H.T)
    # entries are powers of two, sums of `order` of them are exact
    assert torch.equal(H @ H, torch.eye(order, dtype=torch.float64))
    # regular: a constant block stays constant instead of piling up in one coefficient
    assert torch.equal(H.sum(dim=0), torch.ones(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [0, 2, 3, 8, 100])
def test_hadamard_refuses_other_orders(order):
    with pytest.raises(ValueError, match="power of 4"):
        hadamard(order)


@pytest.mark.parametrize(("K", "order"), [(1, 1), (100, 4), (48, 16), (192, 64)])
def test_rotation_is_block_diagonal_and_its_own_inverse(K, order):
    x = torch.randn(3, 7, K, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    full = torch.kron(torch.eye(K // order, dtype=torch.float64), hadamard(order, torch.float64))
    # sums of up to 64 terms in float64
    torch.testing.assert_close(rotate(x, order), x @ full, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotate(rotate(x, order), order), x, rtol=0, atol=1e-13)
