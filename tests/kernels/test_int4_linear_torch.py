"""The torch W4A8 product: decoding in machine words, then nothing but the int8 product."""

import itertools

import pytest
import torch
from dit_quant.kernels.int4_linear import torch_impl
from dit_quant.kernels.int8_linear.torch_impl import int8_linear
from dit_quant.kernels.numerics import decode_int4, pack_int4, pack_levels

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# N, K, G: groups of 16, 32, 64, 128, of whole words of 4 bytes, of none
WEIGHTS = [
    (33, 3088, 193),
    (33, 96, 3),
    (130, 128, 2),
    (63, 256, 2),
    (7, 100, 5),
    (5, 1028, 257),
    (9, 12, 2),
    (1, 4, 1),
]


def weight(N, K, G, seed=0):
    random = torch.Generator().manual_seed(seed)
    packed = pack_int4(torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=random))
    # up to 8, so that every code and zero give a product within int8
    multiplier = torch.randint(1, 9, (N, G), dtype=torch.uint8, generator=random)
    return packed, pack_levels(multiplier, torch.randint(0, 16, (N, G), dtype=torch.uint8, generator=random))


@pytest.mark.parametrize(("N", "K", "G"), WEIGHTS)
def test_words_decode_to_the_definition(N, K, G):
    packed, levels = weight(N, K, G)
    assert torch.equal(torch_impl.decode(packed, levels), decode_int4(packed, levels))


@pytest.mark.parametrize("size", [4, 8])
def test_every_code_zero_and_multiplier_within_int8(size):
    """One group for each, its neighbours at the ends of the range: a carry would show."""
    triples = [
        (code, zero, multiplier)
        for code, zero, multiplier in itertools.product(range(16), range(16), range(1, 16))
        if abs((code - zero) * multiplier) <= 127
    ]
    code, zero, multiplier = torch.tensor(triples, dtype=torch.uint8).T.contiguous()
    ends = torch.stack([code, zero, code, code, zero, zero, code, zero], dim=1)[:, :size]
    packed, levels = pack_int4(ends), pack_levels(multiplier[:, None], zero[:, None])
    expected = (ends.int() - zero[:, None].int()) * multiplier[:, None].int()
    assert torch.equal(torch_impl.decode(packed, levels).int(), expected)


def test_table_takes_the_place_of_the_zeros():
    packed, levels = weight(33, 96, 6)
    table = torch.tensor([-15, -12, -10, -8, -6, -4, -2, -1, 0, 1, 3, 5, 7, 9, 12, 15], dtype=torch.int8)
    assert torch.equal(torch_impl.decode(packed, levels, table), decode_int4(packed, levels, table))


@pytest.mark.parametrize("with_table", [False, True], ids=["levels", "table"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [2**22, 1], ids=["one block", "blocks"])
@pytest.mark.parametrize(
    ("M", "N", "K", "G"), [(1, 1, 4, 1), (7, 33, 100, 5), (33, 200, 256, 16), (63, 130, 3088, 193)]
)
def test_equals_int8_on_decoded_codes_bit_for_bit(M, N, K, G, block, dtype, with_table, monkeypatch):
    monkeypatch.setattr(torch_impl, "CPU_BLOCK", block)
    random = torch.Generator().manual_seed(K)
    a = torch.randint(-127, 128, (M, K), dtype=torch.int8, generator=random)
    packed, levels = weight(N, K, G)
    table = torch.arange(-8, 8, dtype=torch.int8) if with_table else None
    decoded = decode_int4(packed, levels, table)
    epilogue = {
        "row_scale": torch.rand(M, 1, generator=random),
        "column_scale": torch.rand(N, 1, generator=random),
        "row_zero": torch.randint(-99, 99, (M, 1), generator=random).float(),
        "column_sum": decoded.sum(dim=1, dtype=torch.int32),
        "bias": torch.randn(N, generator=random),
        "correction": torch.randn(3, N, generator=random),
        "index": torch.tensor([1]),
        "fraction": torch.tensor([0.5]),
        "dtype": dtype,
    }
    found = torch_impl.int4_linear(a, packed, levels=levels, table=table, **epilogue)
    assert torch.equal(found, int8_linear(a, decoded, **epilogue))


def test_runs_anywhere():
    assert torch_impl.refusal(torch.device("cpu")) is None
