"""Tokens less what they do along a few directions: every backend's codes are the definition's for its coordinates."""

import pytest
import torch
from dit_quant.kernels import autotune, dispatch, int4_linear, int8_linear, quantize_along, quantize_rows
from dit_quant.kernels.directions import MOST, along
from dit_quant.kernels.native.library import library
from dit_quant.kernels.quantize_activation import reference as quantizer
from dit_quant.kernels.quantize_along import native_impl, reference, torch_impl
from dit_quant.kernels.row_tiles import plan
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# rows in pairs and alone, portions of them; one register of columns, part of one, several; R around a pass of sums
CASES = [(1, 16, 1), (63, 100, 3), (7, 3088, 4), (17, 33, 5), (34, 256, 16), (2, 1, 1)]


def implementation(name: str, M: int, K: int):
    if name == "native":
        if isinstance(library(), str):
            pytest.skip(f"native: {library()}")
        return native_impl
    if name == "triton":
        return pytest.importorskip("dit_quant.kernels.quantize_along.triton_impl")
    return {"torch": torch_impl, "reference": reference}[name]


@pytest.fixture
def place(request, device) -> torch.device:
    """Where a test's tensors belong: those of C, and of tests that name no backend, on the CPU."""
    backend = getattr(request.node, "callspec", None)
    return torch.device("cpu") if backend is None or backend.params.get("backend") == "native" else device


def tables(K: int, R: int, seed: int = 0, device="cpu") -> dict[str, Tensor]:
    """Directions that are orthonormal once divided by `smooth`, and the group that all tests look up."""
    random = torch.Generator().manual_seed(seed + K)
    smooth = (torch.rand(K, generator=random) + 0.5).half()
    basis = torch.linalg.qr(torch.randn(K, R, generator=random, dtype=torch.float64)).Q.T
    found = {
        "directions": (basis * smooth).half() if K >= R else torch.randn(R, K, generator=random).half(),
        "shift": torch.randn(3, K, generator=random).half(),
        "smooth": smooth,
        "index": torch.tensor([1]),
        "fraction": torch.tensor([0.3]),
    }
    return {name: value.to(device) for name, value in found.items()}


def tokens(M: int, K: int, given: dict[str, Tensor], dtype=torch.float32) -> Tensor:
    """Far along the directions, off centre by the shift."""
    random = torch.Generator().manual_seed(M)
    R = len(given["directions"])
    x = (
        torch.randn(M, K, generator=random)
        + 10 * torch.randn(M, R, generator=random) @ given["directions"].float().cpu()
    )
    return (x + given["shift"][1].float().cpu()).to(dtype).to(given["directions"].device)


def assert_codes_fit_their_coordinates(found, x: Tensor, given: dict, **options) -> None:
    codes, scale, zero, p = found
    expected = quantizer.quantize_activation(x, **given, **options, coordinates=p)
    for a, b in zip((codes, scale, zero), expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "torch", "native", "triton"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K", "R"), CASES)
def test_codes_fit_the_coordinates_and_these_the_definition(M, K, R, dtype, symmetric, backend, place):
    run, given = implementation(backend, M, K), tables(K, R, device=place)
    x = tokens(M, K, given, dtype)
    found = run.quantize_along(x, **given, symmetric=symmetric)
    assert_codes_fit_their_coordinates(found, x, given, symmetric=symmetric)
    p, wanted = found[3].double(), reference.coordinates(x, **given).double()
    assert found[3].dtype is torch.bfloat16
    # products of TF32 at the least, sums of K of them; the result's own rounding, either side
    size = (x.double().abs() + 4) @ reference.dual(given["directions"], given["smooth"]).double().abs().T
    assert ((p - wanted).abs() <= 2**-10 * size + 2**-7 * wanted.abs()).all()


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize(("K", "order"), [(100, 4), (48, 16), (192, 64), (512, 256)])
def test_rotations_have_the_definitions_bits(K, order, backend, place):
    run, given = implementation(backend, 9, K), tables(K, 3, device=place)
    x = tokens(9, K, given)
    assert_codes_fit_their_coordinates(
        run.quantize_along(x, **given, hadamard=order, symmetric=False), x, given, hadamard=order, symmetric=False
    )


@pytest.mark.parametrize("absent", ["shift", "smooth"])
@pytest.mark.parametrize("backend", ["reference", "torch", "native", "triton"])
def test_shift_and_scale_may_be_absent(backend, absent, place):
    run, given = implementation(backend, 9, 48), tables(48, 2, device=place)
    given.pop(absent)
    x = torch.randn(9, 48, generator=torch.Generator().manual_seed(0)).to(place)
    found = run.quantize_along(x, **given)
    assert_codes_fit_their_coordinates(found, x, given)
    wanted = reference.coordinates(x, given["directions"], given.get("shift"), given.get("smooth"), *_group(given))
    torch.testing.assert_close(found[3].float(), wanted.float(), rtol=2**-6, atol=2**-6)


def _group(given):
    return given["index"], given["fraction"]


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_a_row_too_long_for_registers_and_rows_apart(backend, place):
    run = implementation(backend, 3, 15872)
    given = tables(15872, 2, device=place)
    x = tokens(6, 15872, given, torch.bfloat16)[::2]
    assert_codes_fit_their_coordinates(run.quantize_along(x, **given, symmetric=False), x, given, symmetric=False)


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_token_spoils_only_itself(backend, bad):
    run, given = implementation(backend, 8, 64), tables(64, 2)
    x = tokens(8, 64, given)
    clean = run.quantize_along(x, **given, symmetric=False)
    x[3, 5] = bad
    found = run.quantize_along(x, **given, symmetric=False)
    others = torch.arange(8) != 3
    assert all(torch.equal(a[others], b[others]) for a, b in zip(found, clean, strict=True))
    assert not bool(torch.isfinite(found[3][3].float() * found[1][3]).all())


def test_what_lies_along_the_directions_costs_no_range():
    """x = z + p V with p of bf16: nothing is left but what fp16 took from V."""
    given = tables(256, 4)
    p = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    z = given["shift"][1].float() + 0.3 * (given["shift"][2].float() - given["shift"][1].float())
    x = along(z.expand(9, -1), p, given["directions"])
    codes, scale, zero, found = reference.quantize_along(x, **given)
    assert zero is None
    assert codes.abs().max() <= 127
    torch.testing.assert_close(found.float(), p.float(), rtol=2**-7, atol=2**-7)
    plain = {name: value for name, value in given.items() if name != "directions"}
    assert (scale < quantizer.quantize_activation(x, **plain)[1] / 50).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_quantizer_and_product_together_are_the_linear(backend, bits):
    """y = p (W V) + r Wᵀ: within a step of the codes times the weight's norm."""
    if backend == "native" and isinstance(library(), str):
        pytest.skip(f"native: {library()}")
    dispatch.reset()
    given, random = tables(128, 4), torch.Generator().manual_seed(5)
    x = tokens(33, 128, given)
    group = {"index": given["index"], "fraction": given["fraction"], "backend": backend}
    w = torch.randint(-7, 8, (40, 128), generator=random).to(torch.int8)
    codes, scale, zero, p = quantize_along(x, **given, backend=backend)
    assert zero is None
    W = w.double() / given["smooth"].double()
    shift = given["shift"][1].double() + 0.3 * (given["shift"][2].double() - given["shift"][1].double())
    epilogue = {
        "row_scale": scale,
        "column_scale": torch.ones(40, 1),
        "coordinates": p,
        "responses": (given["directions"].double() @ W.T).half(),
        **group,
    }
    if bits == 8:
        y = int8_linear(codes, w, **epilogue)
    else:
        packed = ((w[:, 0::2] + 8) | ((w[:, 1::2] + 8) << 4)).to(torch.uint8)
        y = int4_linear(codes, packed, levels=torch.full((40, 8), 0x18, dtype=torch.uint8), **epilogue)
    exact = (x.double() - shift) @ W.T
    # half a step per column; fp16 of the responses, ten wide along four directions
    bound = scale.double() / 2 * w.double().abs().sum(1) + 60 * 2**-10 * epilogue["responses"].double().abs().amax()
    assert ((y - exact).abs() <= bound).all()
    assert (y - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("missing", ["coordinates", "responses"])
def test_one_without_the_other_is_refused(missing):
    given = {"coordinates": torch.zeros(2, 1).bfloat16(), "responses": torch.zeros(1, 3).half()}
    given.pop(missing)
    with pytest.raises(ValueError, match="come together"):
        int8_linear(
            torch.zeros(2, 16, dtype=torch.int8),
            torch.zeros(3, 16, dtype=torch.int8),
            row_scale=torch.ones(2, 1),
            column_scale=torch.ones(3, 1),
            index=torch.tensor([0]),
            fraction=torch.tensor([0.0]),
            backend="reference",
            **given,
        )


@pytest.mark.parametrize(
    ("coordinates", "directions", "message"),
    [
        (torch.zeros(2, 1), torch.zeros(1, 16).half(), "bf16"),
        (torch.zeros(2, 1).bfloat16(), torch.zeros(1, 16), "fp16"),
        (torch.zeros(3, 1).bfloat16(), torch.zeros(1, 16).half(), r"\(3, 1\)"),
        (torch.zeros(2, 1).bfloat16(), torch.zeros(1, 17).half(), r"\(1, 17\)"),
        (torch.zeros(2, MOST + 1).bfloat16(), torch.zeros(MOST + 1, 16).half(), "more than"),
    ],
    ids=["coordinates", "directions", "tokens", "columns", "too many"],
)
@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_types_and_sizes_that_would_round_or_read_too_far_are_refused(coordinates, directions, message, backend):
    from dit_quant.kernels.quantize_activation import native_impl, torch_impl

    if backend == "native" and isinstance(library(), str):
        pytest.skip(f"native: {library()}")
    run = {"reference": quantizer, "torch": torch_impl, "native": native_impl}[backend]
    group = {"index": torch.tensor([0]), "fraction": torch.tensor([0.0])}
    with pytest.raises(ValueError, match=message):
        run.quantize_activation(torch.zeros(2, 16), directions=directions, coordinates=coordinates, **group)


class Trying:
    """Stands for kernels/autotune.py: chooses one tile after the other of those it is offered."""

    def __init__(self):
        self.key_of, self.offered, self.turn = autotune.key_of, (), 0

    def enabled(self, device):
        return True

    def tuned_tile(self, key, options, usual, launch, device):
        self.offered = options
        assert usual == options[0]
        return options[self.turn]


@pytest.mark.parametrize("find", [False, True])
def test_every_tile_that_is_compared_has_the_same_bits(find, monkeypatch, device):
    """DIT_QUANT_AUTOTUNE=1: with directions and without, a row and a part of one past what fits the tiles."""
    triton_impl, K = implementation("triton", 3, 1600), 1600
    given = tables(K, 4, device=device)
    x = tokens(3, K, given, torch.bfloat16)
    trying = Trying()
    monkeypatch.setattr(quantize_rows, "autotune", trying)
    while trying.turn == 0 or trying.turn < len(trying.offered):
        if find:
            found = triton_impl.quantize_along(x, **given, hadamard=64, symmetric=False)
            assert_codes_fit_their_coordinates(found, x, given, hadamard=64, symmetric=False)
        else:
            columns = {name: value for name, value in given.items() if name != "directions"}
            found = triton_impl.quantize_activation(x, **columns, hadamard=64, symmetric=False)
            expected = quantizer.quantize_activation(x, **columns, hadamard=64, symmetric=False)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        trying.turn += 1
    assert len(set(trying.offered)) == len(trying.offered) > 3


@pytest.mark.parametrize(("K", "order"), [(3072, 256), (2304, 256)])
def test_one_kernel_and_two_find_the_same(K, order, monkeypatch, device):
    """With the shift read anew for every row and with the shift in registers."""
    triton_impl = implementation("triton", 5, K)
    given = tables(K, 4, device=device)
    x = tokens(5, K, given, torch.bfloat16)
    held = {K: plan(K, order, 2, 2, "plain", True, find=True).hold_shift for K in (3072, 2304)}
    assert held == {3072: True, 2304: False}
    one = triton_impl.quantize_along(x, **given, hadamard=order, symmetric=False)
    monkeypatch.setattr(triton_impl, "finds", lambda *_: False)
    two = triton_impl.quantize_along(x, **given, hadamard=order, symmetric=False)
    for found in (one, two):
        assert_codes_fit_their_coordinates(found, x, given, hadamard=order, symmetric=False)
    # the same sum in another order, then a rounding to bf16
    torch.testing.assert_close(one[3].float(), two[3].float(), rtol=2**-7, atol=2**-7)
