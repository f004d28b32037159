"""The Triton W8A8 product against the reference, bit for bit; without a GPU in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from dit_quant.kernels import linear_launch
from dit_quant.kernels.int8_linear import reference, triton_impl
from dit_quant.kernels.tiles import TILES, Tile
from linear_cases import activations, case, expected, skip_on_other_cards

pytestmark = pytest.mark.usefixtures("poisoned_empty")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def weight(N, K, device):
    random = torch.Generator().manual_seed(N + K)
    return torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=random).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1, 1), (1, 33, 100), (7, 48, 3088), (63, 65, 101), (65, 33, 128), (130, 144, 256)]
)
def test_equals_the_reference_bit_for_bit(M, N, K, full, dtype, device):
    a, w = activations(M, K, device), weight(N, K, device)
    epilogue = case(M, N, w, full=full, dtype=dtype, device=device)
    y = triton_impl.int8_linear(a, w, **epilogue)
    assert y.dtype is dtype
    assert torch.equal(y, expected(reference.int8_linear, a, w, **epilogue))


@pytest.mark.parametrize("M", [1, 63])
def test_integer_part_at_the_ends_of_the_range(M, device):
    """+-127 everywhere at K = 4096: sums of 6.6e7, which fp32 would not hold exactly in between."""
    a = torch.full((M, 4096), -127, dtype=torch.int8, device=device)
    w = torch.full((33, 4096), 127, dtype=torch.int8, device=device)
    w[::2] = -127
    w[:, 0] = 1
    epilogue = case(M, 33, w, full=False, dtype=torch.float32, device=device)
    epilogue |= {"row_scale": torch.ones(M, 1, device=device), "column_scale": torch.ones(33, 1, device=device)}
    y = triton_impl.int8_linear(a, w, **epilogue)
    assert torch.equal(y, reference.int8_matmul(a, w).float())
    assert float(y.abs().max()) > 2**24


OPTIONAL = ("row_zero", "bias", "correction", "coordinates")


@pytest.mark.parametrize("absent", [*OPTIONAL, None], ids=lambda name: f"no-{name}")
def test_every_operand_matters_and_may_be_absent(absent, device):
    a, w = activations(7, 48, device), weight(33, 48, device)
    epilogue = case(7, 33, w, full=True, dtype=torch.float32, device=device)
    full = triton_impl.int8_linear(a, w, **epilogue)
    if absent is not None:
        epilogue[absent] = None
    if absent == "coordinates":
        epilogue["responses"] = None
    y = triton_impl.int8_linear(a, w, **epilogue)
    assert torch.equal(y, expected(reference.int8_linear, a, w, **epilogue))
    assert torch.equal(y, full) == (absent is None)


@pytest.mark.parametrize("T", [1, 2, 30])
@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_correction_of_every_group_from_the_device(T, fraction, device):
    a, w = activations(3, 32, device), weight(17, 32, device)
    epilogue = case(3, 17, w, full=True, dtype=torch.float32, device=device, T=T)
    epilogue["fraction"] = torch.tensor([fraction], device=device)
    for group in {0, T // 2, T - 1}:
        epilogue["index"] = torch.tensor([group], device=device)
        y = triton_impl.int8_linear(a, w, **epilogue)
        assert torch.equal(y, expected(reference.int8_linear, a, w, **epilogue))


def test_static_ranges_are_one_expanded_value(device):
    a, w = activations(7, 32, device), weight(33, 32, device)
    epilogue = case(7, 33, w, full=True, dtype=torch.float32, device=device)
    epilogue["row_scale"] = torch.tensor([[0.5]], device=device).expand(7, 1)
    epilogue["row_zero"] = torch.tensor([[-9.0]], device=device).expand(7, 1)
    y = triton_impl.int8_linear(a, w, **epilogue)
    assert torch.equal(y, expected(reference.int8_linear, a, w, **epilogue))


TILE_IDS = sorted({tile for (op, _), tiles in TILES.items() if op == "int8_linear" for tile in tiles}, key=str)


@pytest.mark.parametrize(
    "tile", TILE_IDS, ids=lambda t: f"{t.block_m}x{t.block_n}x{t.block_k}d{t.dots}p{t.parts}" + "tma" * t.descriptors
)
def test_every_tile_has_the_same_bits(tile, monkeypatch, device):
    """More than one tile in both directions, a tail of M and N, and whole and half steps along K."""
    skip_on_other_cards(tile, "int8_linear", device)
    monkeypatch.setattr(linear_launch, "tile_for", lambda *_: tile)
    M, N = tile.block_m + 1, tile.block_n + 16
    for K in (3 * tile.block_k * tile.dots, tile.block_k * tile.dots + 16):
        a, w = activations(M, K, device), weight(N, K, device)
        epilogue = case(M, N, w, full=True, dtype=torch.float16, device=device)
        y = triton_impl.int8_linear(a, w, **epilogue)
        assert torch.equal(y, expected(reference.int8_linear, a, w, **epilogue))


def test_more_rows_of_tiles_than_a_group_walks(monkeypatch, device):
    """19 rows of tiles in groups of 4: every tile is visited once, the last group is short."""
    monkeypatch.setattr(linear_launch, "tile_for", lambda *_: Tile(16, 16, 64, warps=1, stages=1, group_m=4))
    a, w = activations(19 * 16 - 5, 64, device), weight(41, 64, device)
    epilogue = case(a.shape[0], 41, w, full=False, dtype=torch.float32, device=device)
    y = triton_impl.int8_linear(a, w, **epilogue)
    assert torch.equal(y, expected(reference.int8_linear, a, w, **epilogue))


def test_views_and_empty_batches(device):
    """Every other row, and codes at an odd address, as a view into a file's buffer may have."""
    a, w = activations(6, 64, device), weight(33, 64, device)
    epilogue = case(3, 33, w, full=True, dtype=torch.float32, device=device)
    y = triton_impl.int8_linear(a[::2], w, **epilogue)
    assert torch.equal(y, expected(reference.int8_linear, a[::2].contiguous(), w, **epilogue))
    odd = torch.empty(w.numel() + 1, dtype=torch.int8, device=device)[1:].view(w.shape).copy_(w)
    assert torch.equal(triton_impl.int8_linear(a[::2], odd, **epilogue), y)
    none = case(0, 33, w, full=True, dtype=torch.float32, device=device)
    assert triton_impl.int8_linear(a[:0], w, **none).shape == (0, 33)


def test_wrong_shapes_are_named(device):
    epilogue = case(2, 3, torch.zeros(3, 32), full=False, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="a has 16 columns, w 32"):
        triton_impl.int8_linear(activations(2, 16, device), weight(3, 32, device), **epilogue)
    epilogue["row_zero"] = epilogue["row_scale"]
    with pytest.raises(ValueError, match="column sums"):
        triton_impl.int8_linear(activations(2, 32, device), weight(3, 32, device), **epilogue)


def test_refusals_name_the_number(monkeypatch, device):
    assert triton_impl.refusal(device, K=3072) is None
    assert "K = 131073 > 131072" in triton_impl.refusal(device, K=2**17 + 1)
    assert "float64" in triton_impl.refusal(device, K=64, dtype=torch.float64)
    assert triton_impl.refusal(torch.device("meta"), K=64) == "no Triton kernels for meta tensors"
    monkeypatch.setattr(triton_impl, "device_refusal", lambda _: "compute capability 7.5 < 8.0")
    assert triton_impl.refusal(device, K=64) == "compute capability 7.5 < 8.0"
