"""The Triton quantizer has the reference's bits: codes, scale and zero."""

import emulated_card
import pytest
import torch
from dit_quant.kernels.quantize_activation.reference import quantize_activation as reference
from dit_quant.kernels.row_tiles import LONGEST_ROW

pytest.importorskip("triton")
from dit_quant.kernels.quantize_activation.triton_impl import quantize_activation, refusal

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RANGES = ["symmetric", "asymmetric", "static", "static_zero"]
# every K with the largest block that divides it, and with none
SHAPES = [
    (1, 1, 1),
    (1, 100, 4),
    (63, 100, 4),
    (7, 64, 64),
    (63, 64, 1),
    (63, 256, 256),
    (7, 1024, 16),
    (7, 1024, 256),
    (1, 1152, 64),
    (7, 3088, 16),
    (7, 3088, 1),
    (1, 12288, 256),
]


def columns(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[1])


ROWS = {
    "one-sided": lambda x: x.abs() + 3,
    "constant": lambda x: torch.full_like(x, -2.7),
    "zero": torch.zeros_like,
    "tiny": lambda x: x * 1e-42,
    "far": lambda x: x * 1e-3 + 1e4,
    "far, constant but one": lambda x: 1e6 + 0.0625 * (columns(x) == 5).expand(x.shape),
    "outlier": lambda x: x + 1e4 * (columns(x) == 0),
    "ladder": lambda x: x * torch.logspace(-8, 8, x.shape[0])[:, None],
    "ties": lambda x: (x * 20).round() / 2 + 127 * (columns(x) == 3),
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(device, index=0, fraction=0.0):
    return {"index": torch.tensor([index], device=device), "fraction": torch.tensor([fraction], device=device)}


def ranges(kind, T, device):
    if kind in ("symmetric", "asymmetric"):
        return {"symmetric": kind == "symmetric"}
    scale = torch.linspace(0.01, 0.03, T, device=device)
    if kind == "static":
        return {"static_scale": scale}
    return {"symmetric": False, "static_scale": scale, "static_zero": torch.linspace(-150, 90, T, device=device)}


def assert_same_bits(x, **keywords):
    found, expected = quantize_activation(x, **keywords), reference(x, **keywords)
    for name, a, b in zip(
        ("scale", "zero", "codes"), (*found[1:], found[0]), (*expected[1:], expected[0]), strict=True
    ):
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name
        assert a is None or (a.dtype, a.shape) == (b.dtype, b.shape), name


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize(("M", "K", "order"), SHAPES)
def test_shapes_and_ranges(M, K, order, kind, device):
    """Dtypes, table dtypes and group positions rotate through the cases."""
    case = SHAPES.index((M, K, order)) + RANGES.index(kind)
    T = (1, 3, 3)[case % 3]
    x = (3 * normal(M, K)).to(device, DTYPES[case % 3])
    shift = normal(T, K, seed=1).to(device, (torch.float16, torch.float32)[case % 2])
    smooth = normal(K, seed=2).exp().to(device, (torch.float32, torch.float16)[case // 2 % 2])
    where = at(device, min(case % 4, T - 1), (0.0, 0.3, 0.75)[case % 3])
    assert_same_bits(x, shift=shift, smooth=smooth, hadamard=order, **ranges(kind, T, device), **where)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shifted", "smoothed", "order"), [(0, 0, 1), (1, 0, 1), (0, 1, 16), (1, 1, 64), (0, 0, 64)])
@pytest.mark.parametrize("kind", RANGES)
def test_flags(shifted, smoothed, order, kind, dtype, device):
    M, K, T = 7, 192, 3
    keywords = ranges(kind, T, device)
    if shifted:
        keywords["shift"] = normal(T, K, seed=1).to(device).half()
    if smoothed:
        keywords["smooth"] = normal(K, seed=2).exp().to(device)
    assert_same_bits((3 * normal(M, K)).to(device, dtype), hadamard=order, **keywords, **at(device, 1, 0.25))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("order", [1, 4])
@pytest.mark.parametrize("rows", ROWS)
def test_odd_rows(rows, order, symmetric, device):
    x = ROWS[rows](normal(7, 100)).to(device)
    assert_same_bits(x, hadamard=order, symmetric=symmetric, **at(device))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("K", "order"), [(100, 1), (100, 4), (192, 64), (1024, 256), (3088, 16), (16640, 256), (16400, 1)]
)
def test_what_is_not_finite_reaches_the_output(K, order, symmetric, bad, device):
    """One value is enough, wherever it stands: a token of plausible numbers would hide that a model overflowed."""
    x = normal(5, K)
    x[1, K // 2], x[3] = bad, bad
    x = x.to(device)
    options = {"hadamard": order, "symmetric": symmetric, **at(device)}
    codes, scale, zero = quantize_activation(x, **options)
    finite = torch.isfinite(scale) if zero is None else torch.isfinite(scale) & torch.isfinite(zero)
    assert finite.flatten().tolist() == [True, False, True, False, True]
    good = [0, 2, 4]
    expected = reference(x, **options)
    assert torch.equal(codes[good], expected[0][good])
    assert torch.equal(scale[good], expected[1][good])
    assert not torch.isfinite(expected[1][[1, 3]]).any()


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize(("K", "order"), [(16640, 256), (16400, 1)])
def test_rows_longer_than_a_program_holds(K, order, kind, device):
    assert K > LONGEST_ROW
    shift, smooth = normal(2, K, seed=1).to(device), normal(K, seed=2).exp().to(device)
    x = (normal(2, K) + 1).to(device, torch.bfloat16)
    assert_same_bits(x, shift=shift, smooth=smooth, hadamard=order, **ranges(kind, 2, device), **at(device, 0, 0.5))


@pytest.mark.parametrize(("index", "fraction"), [(0, 0.0), (0, 0.3), (1, 0.75), (2, 0.0), (2, 0.6), (1, 1.0)])
def test_groups_and_fractions(index, fraction, device):
    K, T = 100, 3
    tables = {"shift": normal(T, K, seed=1).to(device).half(), **ranges("static_zero", T, device)}
    assert_same_bits(normal(7, K).to(device), **tables, **at(device, index, fraction))


def test_a_whole_group_is_not_touched_by_its_neighbour(device):
    """Fraction 0 reads one row of the table: an infinity in the next one cannot leak."""
    shift = torch.stack([normal(64), torch.full((64,), float("inf"))]).to(device)
    x = normal(7, 64).to(device)
    found = quantize_activation(x, shift=shift, **at(device))
    for a, b in zip(found[:2], reference(x, shift=shift[:1], **at(device))[:2], strict=True):
        assert torch.equal(a, b)


def test_rows_may_lie_apart(device):
    """A slice of columns, every second row, a transposed tensor."""
    wide = normal(14, 300).to(device, torch.bfloat16)
    for x in (wide[:, 100:200], wide[::2, :192], wide[:, :7].T):
        assert_same_bits(x, symmetric=False, **at(device))


def test_static_ranges_write_no_rows(device):
    _, scale, zero = quantize_activation(normal(7, 64).to(device), **ranges("static_zero", 2, device), **at(device))
    assert scale.stride() == (0, 1)
    assert zero.stride() == (0, 1)


def test_no_rows(device):
    codes, scale, zero = quantize_activation(torch.empty(0, 64, device=device), symmetric=False, **at(device))
    assert codes.shape == (0, 64)
    assert scale.shape == zero.shape == (0, 1)


def test_a_wrong_block_is_named(device):
    with pytest.raises(ValueError, match="K=100 cannot be rotated in Hadamard blocks of 16"):
        quantize_activation(normal(7, 100), hadamard=16, **at("cpu"))
    assert refusal(device, K=100, hadamard=16) == "K=100 is not divisible by the Hadamard block 16"
    assert refusal(device, K=64, hadamard=32) == "Hadamard block 32 is not 1, 4, 16, 64 or 256"
    assert refusal(device, K=64, dtype=torch.float64) == "torch.float64 is not float32, float16 or bfloat16"
    assert refusal(device, K=64, hadamard=64) is None


@pytest.mark.skipif(emulated_card.CARD > 0, reason="here the CPU is a card")
def test_other_devices_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert refusal(torch.device("cpu"), K=64) == "no Triton kernels for cpu tensors"
    monkeypatch.setattr("dit_quant.kernels.triton_device.capability_of", lambda device: 75)
    assert refusal(torch.device("cuda"), K=64) == "compute capability 7.5 < 8.0"
    monkeypatch.setattr("dit_quant.kernels.triton_device.capability_of", lambda device: 86)
    assert refusal(torch.device("cuda"), K=64) is None
