"""The Triton W4A8 product against the reference, bit for bit; without a GPU in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from dit_quant.kernels import linear_launch
from dit_quant.kernels.int4_linear import reference, triton_impl, whole_triton
from dit_quant.kernels.int4_linear.triton_impl import room
from dit_quant.kernels.numerics import MULTIPLIER_MAX, decode_int4, pack_int4, pack_levels
from dit_quant.kernels.tiles import EVEN_N, TILES, Tile, candidates
from dit_quant.kernels.triton_device import capability_of
from linear_cases import activations, case, expected, skip_on_other_cards

pytestmark = pytest.mark.usefixtures("poisoned_empty")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def weight(N, K, group, device, symmetric=False):
    """packed [N, K / 2], levels [N, K / group] as an encoder makes them: every product within int8."""
    random = torch.Generator().manual_seed(N * K + group)
    shape = (N, K // group)
    multiplier = torch.randint(1, MULTIPLIER_MAX + 1, shape, generator=random)
    zero = torch.full(shape, 8) if symmetric else torch.randint(0, 16, shape, generator=random)
    reach = (127 // multiplier).repeat_interleave(group, dim=1)
    codes = torch.randint(0, 16, (N, K), generator=random)
    each = zero.repeat_interleave(group, dim=1)
    codes = torch.maximum(torch.minimum(codes, each + reach), each - reach)
    packed, levels = pack_int4(codes.to(torch.uint8)), pack_levels(multiplier.to(torch.uint8), zero.to(torch.uint8))
    return packed.to(device), levels.to(device)


def lookup(device):
    """A table whose products with any multiplier up to 15 stay within int8."""
    return torch.tensor([-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 8], dtype=torch.int8, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K", "group"), [(1, 33, 112, 16), (7, 1, 128, 128), (63, 48, 192, 64), (65, 65, 96, 32)]
)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_equals_the_reference_bit_for_bit(M, N, K, group, full, dtype, device):
    a, (packed, levels) = activations(M, K, device), weight(N, K, group, device)
    epilogue = case(M, N, decode_int4(packed, levels), full=full, dtype=dtype, device=device)
    y = triton_impl.int4_linear(a, packed, levels=levels, **epilogue)
    assert y.dtype is dtype
    assert torch.equal(y, expected(reference.int4_linear, a, packed, levels=levels, **epilogue))


@pytest.mark.parametrize("group", triton_impl.GROUP_SIZES)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "table"])
def test_every_group_size_and_kind_of_levels(group, kind, device):
    """384 = 3 128: whole and half steps along K for the tiles of 64 and 128 columns."""
    a, (packed, levels) = activations(5, 384, device), weight(33, 384, group, device, kind == "symmetric")
    table = lookup(device) if kind == "table" else None
    epilogue = case(5, 33, decode_int4(packed, levels, table), full=True, dtype=torch.float32, device=device)
    y = triton_impl.int4_linear(a, packed, levels=levels, table=table, **epilogue)
    assert torch.equal(y, expected(reference.int4_linear, a, packed, levels=levels, table=table, **epilogue))


def test_wide_rows(device):
    """3072 + 16, as no tile divides it."""
    a, (packed, levels) = activations(7, 3088, device), weight(33, 3088, 16, device)
    epilogue = case(7, 33, decode_int4(packed, levels), full=True, dtype=torch.float32, device=device)
    y = triton_impl.int4_linear(a, packed, levels=levels, **epilogue)
    assert torch.equal(y, expected(reference.int4_linear, a, packed, levels=levels, **epilogue))


def every_product():
    """One row of 16 codes per (multiplier, zero); codes moved to the nearest whose product is within int8."""
    multiplier, zero = torch.meshgrid(torch.arange(1, 16), torch.arange(16), indexing="ij")
    multiplier, zero = multiplier.reshape(-1, 1), zero.reshape(-1, 1)
    codes = torch.arange(16).expand(240, 16)
    codes = torch.maximum(torch.minimum(codes, zero + 127 // multiplier), zero - 127 // multiplier)
    return pack_int4(codes.to(torch.uint8)), pack_levels(multiplier.to(torch.uint8), zero.to(torch.uint8))


@pytest.mark.parametrize("table", [False, True])
def test_decoding_of_every_code_multiplier_and_zero(table, device):
    """The identity as activations shows each decoded weight alone."""
    packed, levels = (part.to(device) for part in every_product())
    entries = lookup(device) if table else None
    ones = torch.ones(16, 1, device=device)
    y = triton_impl.int4_linear(
        torch.eye(16, dtype=torch.int8, device=device),
        packed,
        levels=levels,
        table=entries,
        row_scale=ones,
        column_scale=torch.ones(240, 1, device=device),
        index=torch.zeros(1, dtype=torch.int64, device=device),
        fraction=torch.zeros(1, device=device),
    )
    decoded = decode_int4(packed, levels, entries)
    assert torch.equal(y, decoded.T.float())
    # 9 x 14: 127 is prime and 128 = 8 x 16, beyond a nibble
    assert (int(decoded.min()), int(decoded.max())) == ((-120, 120) if table else (-126, 126))


def permuted(a: int, b: int, selector: int) -> int:
    """PTX prmt.b32 in its default mode: byte i of the result is byte `selector >> 4 i` of the 8 bytes b:a."""
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picked = [(selector >> (4 * i)) & 0xF for i in range(4)]
    assert all(pick < 8 for pick in picked), "bit 3 would replicate the sign"
    return int.from_bytes(bytes(source[pick] for pick in picked), "little")


def test_byte_permutations_of_nvidia_cards_give_the_order_of_the_interpreted_path():
    """The inline instructions cannot run here: their definition, on words of 8 different nibbles."""
    for word in (0x76543210, 0xFEDCBA98, 0x0F1E2D3C):
        even, odd = word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F
        nibbles = bytes((word >> (4 * i)) & 0xF for i in range(8))
        assert permuted(even, odd, 0x5140).to_bytes(4, "little") == nibbles[:4]
        assert permuted(even, odd, 0x7362).to_bytes(4, "little") == nibbles[4:]


def test_table_permutations_of_nvidia_cards_look_up_every_code():
    entries = bytes(range(100, 116))
    words = [int.from_bytes(entries[i : i + 4], "little") for i in range(0, 16, 4)]
    for word in (0x76543210, 0xFEDCBA98, 0x0F1E2D3C):
        three, which = word & 0x77777777, ((word >> 1) & 0x44444444) | 0x32103210
        for half in range(2):
            low = permuted(words[0], words[1], three & 0xFFFF)
            high = permuted(words[2], words[3], three & 0xFFFF)
            found = permuted(low, high, which & 0xFFFF).to_bytes(4, "little")
            assert list(found) == [entries[(word >> (4 * (i + 4 * half))) & 0xF] for i in range(4)]
            three, which = three >> 16, which >> 16


SHIPPED = sorted({tile for (op, _), tiles in TILES.items() if op == "int4_linear" for tile in tiles}, key=str)
# no shipped one takes two products per step
TWO_PRODUCTS = Tile(32, 32, 64, warps=4, stages=2, dots=2)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize(
    "tile", [*SHIPPED, TWO_PRODUCTS], ids=lambda t: f"{t.block_m}x{t.block_n}x{t.block_k}s{t.stages}"
)
def test_every_tile_has_the_same_bits(tile, transposed, monkeypatch, device):
    """More than one tile in both directions, a tail of M and N; whole steps along K, and a half one behind them."""
    if tile != TWO_PRODUCTS:
        skip_on_other_cards(tile, "int4_linear", device)
    monkeypatch.setattr(linear_launch, "tile_for", lambda *_: tile)
    monkeypatch.setattr(triton_impl, "family_of", lambda _: 90 if transposed else 80)
    M, N, step = tile.block_m + 1, tile.block_n + 16, tile.block_k * tile.dots
    groups = triton_impl.GROUP_SIZES if tile.ahead else (16,)
    for K, group in (*((3 * step, group) for group in groups), (step + 32, 16)):
        a, (packed, levels) = activations(M, K, device), weight(N, K, group, device)
        epilogue = case(M, N, decode_int4(packed, levels), full=True, dtype=torch.float16, device=device)
        y = triton_impl.int4_linear(a, packed, levels=levels, **epilogue)
        assert torch.equal(y, expected(reference.int4_linear, a, packed, levels=levels, **epilogue))


@pytest.mark.parametrize("K", [128, 384, 768, 1536])
@pytest.mark.parametrize("group", triton_impl.GROUP_SIZES)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "table"])
def test_a_whole_weight_is_decoded_as_the_reference_does(kind, group, K, device):
    """Steps of 128, 256 and 512 columns; several in both directions."""
    packed, levels = weight(3 * EVEN_N, K, group, device, kind == "symmetric")
    table = lookup(device) if kind == "table" else None
    codes = torch.empty(3 * EVEN_N, K, dtype=torch.int8, device=device)
    whole_triton.decode(packed.view(torch.int32), levels, None if table is None else table.view(torch.int32), codes)
    assert torch.equal(codes, decode_int4(packed, levels, table))


@pytest.mark.parametrize("kind", ["asymmetric", "table"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_with_a_weight_decoded_first_has_the_same_bits(dtype, kind, monkeypatch, device):
    """With the tile that this card would take."""
    tile = candidates("int4_linear", capability_of(device), 8192, 4096, 4096)[0]
    assert tile.decoded
    monkeypatch.setattr(linear_launch, "tile_for", lambda *_: tile)
    asked = []
    monkeypatch.setattr(triton_impl, "room", lambda *size: asked.append(size[:2]) or room(*size))
    a, (packed, levels) = activations(33, 256, device), weight(48, 256, 16, device)
    table = lookup(device) if kind == "table" else None
    epilogue = case(33, 48, decode_int4(packed, levels, table), full=True, dtype=dtype, device=device)
    y = triton_impl.int4_linear(a, packed, levels=levels, table=table, **epilogue)
    assert asked == [(48, 256)]
    assert torch.equal(y, expected(reference.int4_linear, a, packed, levels=levels, table=table, **epilogue))


def test_without_room_for_a_whole_weight_it_is_decoded_in_registers(monkeypatch, device):
    tile = Tile(32, 32, 64, warps=4, stages=2, decoded=True)
    monkeypatch.setattr(linear_launch, "tile_for", lambda *_: tile)
    monkeypatch.setattr(triton_impl, "room", lambda *_: None)
    monkeypatch.setattr(triton_impl, "decode", None)
    a, (packed, levels) = activations(3, 256, device), weight(48, 256, 16, device)
    epilogue = case(3, 48, decode_int4(packed, levels), full=True, dtype=torch.float16, device=device)
    y = triton_impl.int4_linear(a, packed, levels=levels, **epilogue)
    assert torch.equal(y, expected(reference.int4_linear, a, packed, levels=levels, **epilogue))


def test_room_is_not_an_error_where_memory_is_short(monkeypatch):
    def none(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert room(3, 4, torch.device("cpu")).shape == (3, 4)
    monkeypatch.setattr(torch, "empty", none)
    assert room(3, 4, torch.device("cpu")) is None


def test_views_into_a_file_and_empty_batches(device):
    """Codes and levels at addresses that 32-bit words cannot be read from."""
    packed, levels = weight(16, 64, 16, device)
    epilogue = case(3, 16, decode_int4(packed, levels), full=True, dtype=torch.float32, device=device)
    shifted = []
    for part in (packed, levels):
        buffer = torch.empty(part.numel() + 1, dtype=torch.uint8, device=device)
        shifted.append(buffer[1:].view(part.shape).copy_(part))
    a = activations(3, 64, device)
    y = triton_impl.int4_linear(a, shifted[0], levels=shifted[1], **epilogue)
    assert torch.equal(y, expected(reference.int4_linear, a, packed, levels=levels, **epilogue))
    none = case(0, 16, decode_int4(packed, levels), full=True, dtype=torch.float32, device=device)
    assert triton_impl.int4_linear(a[:0], packed, levels=levels, **none).shape == (0, 16)


@pytest.mark.parametrize(("K", "G"), [(100, 5), (64, 1), (64, 2), (48, 2), (64, 64)])
def test_what_is_refused_is_an_error_when_called(K, G, device):
    packed = torch.zeros(3, K // 2, dtype=torch.uint8, device=device)
    levels = torch.zeros(3, G, dtype=torch.uint8, device=device)
    reason = triton_impl.refusal(device, K=K, group_size=K // G)
    epilogue = case(2, 3, torch.zeros(3, K), full=False, dtype=torch.float32, device=device)
    call = lambda: triton_impl.int4_linear(activations(2, K, device), packed, levels=levels, **epilogue)  # noqa: E731
    if K // G in triton_impl.GROUP_SIZES:
        assert reason is None
        assert not call().any()
    else:
        assert reason == f"group size {K // G} is not 16, 32, 64 or 128"
        with pytest.raises(ValueError, match="levels"):
            call()


def test_refusals_name_the_number(monkeypatch, device):
    assert "K = 72 is not divisible by the group size 16" in triton_impl.refusal(device, K=72, group_size=16)
    assert "group size None" in triton_impl.refusal(device, K=64)
    assert "float64" in triton_impl.refusal(device, K=64, group_size=16, dtype=torch.float64)
    assert triton_impl.refusal(torch.device("meta"), K=64, group_size=16) == "no Triton kernels for meta tensors"
