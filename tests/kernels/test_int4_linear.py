"""W4A8 product: nothing but the int8 product of the decoded codes."""

import pytest
import torch
from dit_quant.kernels import int4_linear, int8_linear
from dit_quant.kernels.numerics import decode_int4, pack_int4, pack_levels

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize(("M", "N", "K", "G"), [(1, 1, 4, 1), (7, 33, 100, 5), (33, 63, 256, 16), (63, 7, 1028, 257)])
def test_equals_int8_on_decoded_codes_bit_for_bit(M, N, K, G):
    random = torch.Generator().manual_seed(K)
    a = torch.randint(-127, 128, (M, K), dtype=torch.int8, generator=random)
    packed = pack_int4(torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=random))
    # up to 8, so that every code and zero give a product within int8
    multiplier = torch.randint(1, 9, (N, G), dtype=torch.uint8, generator=random)
    levels = pack_levels(multiplier, torch.randint(0, 16, (N, G), dtype=torch.uint8, generator=random))
    decoded = decode_int4(packed, levels)
    epilogue = {
        "row_scale": torch.rand(M, 1, generator=random),
        "column_scale": torch.rand(N, 1, generator=random),
        "row_zero": torch.randint(-99, 99, (M, 1), generator=random).float(),
        "column_sum": decoded.sum(dim=1, dtype=torch.int32),
        "bias": torch.randn(N, generator=random),
        "correction": torch.randn(3, N, generator=random),
        "index": torch.tensor([1]),
        "fraction": torch.tensor([0.5]),
    }
    assert decoded.shape == (N, K)
    assert torch.equal(int4_linear(a, packed, levels=levels, **epilogue), int8_linear(a, decoded, **epilogue))
