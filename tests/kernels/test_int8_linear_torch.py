"""The torch int8 product: exact sums on any CPU, and the epilogue of the definition within its roundings."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from dit_quant.kernels import dispatch
from dit_quant.kernels.int8_linear import matmul, reference, torch_impl
from host_location import ROOT

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SHAPES = [(1, 1, 1), (7, 33, 100), (63, 33, 3088), (63, 7, 8), (300, 128, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[(2**21, 256), (1, 20)], ids=["one block", "blocks"])
def blocks(request, monkeypatch):
    for name, value in zip(("CPU_BLOCK", "LEAST_ROWS"), request.param, strict=True):
        monkeypatch.setattr(torch_impl, name, value)


def codes(*shape, extreme=False, seed=0):
    random = torch.Generator().manual_seed(seed)
    if extreme:
        return (127 - 254 * torch.randint(0, 2, shape, generator=random)).to(torch.int8)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=random)


def epilogue(M, N, w, parts, seed=1):
    """Keywords of an epilogue with the named parts."""
    random = torch.Generator().manual_seed(seed)
    known = {
        "zero": {"row_zero": torch.randint(-99, 99, (M, 1), generator=random).float(), "column_sum": w.sum(1).int()},
        "bias": {"bias": torch.randn(N, generator=random)},
        "correction": {"correction": torch.randn(3, N, generator=random).half()},
        "directions": {
            "coordinates": torch.randn(M, 3, generator=random).bfloat16(),
            "responses": torch.randn(3, N, generator=random).half(),
        },
    }
    options = {
        "row_scale": torch.rand(M, 1, generator=random),
        # outputs within fp16
        "column_scale": torch.rand(N, 1, generator=random) / 4096,
        "index": torch.tensor([1]),
        "fraction": torch.tensor([0.25]),
    }
    for part in parts:
        options |= known[part]
    return options


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("exact", [True, False], ids=["int_mm", "fp32 product"])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_integer_sums_are_exact(M, N, K, exact, monkeypatch):
    """Unit scales: the output is the sum itself. Extremes of one sign would pass 2**24, where fp32 rounds."""
    for module in (torch_impl, matmul):
        monkeypatch.setattr(module, "int_mm_is_exact", lambda device: exact)
    a, w = codes(M, K, extreme=True), codes(N, K, extreme=True, seed=2)
    unit = {"row_scale": torch.ones(M, 1), "column_scale": torch.ones(N, 1)}
    y = torch_impl.int8_linear(a, w, **unit, index=torch.tensor([0]), fraction=torch.tensor([0.0]))
    assert torch.equal(y.double(), (a.double() @ w.double().T))


def test_float_product_is_exact_at_its_worst():
    a, w = torch.full((3, 3088), 127, dtype=torch.int8), torch.full((5, 3088), -127, dtype=torch.int8)
    assert (matmul.float_product(a, w) == -3088 * 127**2).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert (matmul.float_product(a, w) == -3088 * 127**2).all()


@pytest.mark.parametrize(("M", "N", "K"), [(1, 8, 1), (7, 33, 1), (63, 2, 1), (3, 5, 7), (40, 40, 8)])
@pytest.mark.parametrize("expanded", ["neither", "a", "w"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_columns_and_rows_that_are_one_row(M, N, K, expanded, dtype):
    """oneDNN takes such matrices for vectors of another stride."""
    a, w = codes(M, K), codes(N, K, seed=2)
    a, w = (t[:1].expand(len(t), K) if name == expanded else t for name, t in (("a", a), ("w", w)))
    unit = {"row_scale": torch.full((M, 1), 2.0**-10), "column_scale": torch.ones(N, 1)}
    at = {"index": torch.tensor([0]), "fraction": torch.tensor([0.0])}
    expected = (a.double() @ w.double().T * 2.0**-10).to(dtype)
    assert torch.equal(torch_impl.int8_linear(a, w, **unit, **at, dtype=dtype), expected)
    assert torch.equal(reference.int8_linear(a, w, **unit, **at, dtype=dtype), expected)


def test_the_reference_is_exact_on_a_cpu_that_saturates(monkeypatch):
    monkeypatch.setattr(matmul, "int_mm_is_exact", lambda device: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    a, w = torch.full((3, 100), 127, dtype=torch.int8), torch.full((5, 100), -127, dtype=torch.int8)
    assert (matmul.int8_matmul(a, w) == -100 * 127**2).all()


@pytest.mark.parametrize(("arch", "tried"), [("gfx90a:sramecc+", True), ("gfx942", True), ("gfx1030", False)])
def test_only_amd_cards_that_have_the_product_are_asked_for_it(arch, tried, monkeypatch):
    """On others it raises, or ends the process."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=arch))
    matmul.int_mm_is_exact.cache_clear()
    assert matmul.int_mm_is_exact(torch.device("cuda", 0)) == tried
    matmul.int_mm_is_exact.cache_clear()


class ElsewhereThan(torch.Tensor):
    """A CPU tensor that says it lies on a card."""

    device = torch.device("cuda", 0)


def test_a_routine_that_cannot_be_launched_is_replaced_with_one_warning(monkeypatch, caplog):
    def lacking(a, w):
        raise RuntimeError("HIPBLAS_STATUS_NOT_SUPPORTED when calling hipblasLtMatmulAlgoGetHeuristic")

    monkeypatch.setattr(matmul, "int_mm_is_exact", lambda device: True)
    monkeypatch.setattr(matmul, "padded_product", lacking)
    monkeypatch.setattr(matmul, "float_product", lambda a, w: "exact")
    a = torch.zeros(3, 16, dtype=torch.int8).as_subclass(ElsewhereThan)
    dispatch.reset()
    assert [matmul.int8_matmul(a, a) for _ in range(2)] == ["exact"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "torch has no int8 product on cuda:0 (HIPBLAS_STATUS_NOT_SUPPORTED when calling "
        "hipblasLtMatmulAlgoGetHeuristic); fp32 products run instead, which is slow"
    ]


def test_an_error_of_an_earlier_kernel_is_not_hidden(monkeypatch):
    def failing(a, w):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr(matmul, "int_mm_is_exact", lambda device: True)
    monkeypatch.setattr(matmul, "padded_product", failing)
    a = torch.zeros(3, 16, dtype=torch.int8).as_subclass(ElsewhereThan)
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_EXECUTION_FAILED"):
        matmul.int8_matmul(a, a)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "parts", [(), ("zero",), ("bias",), ("correction",), ("zero", "bias", "correction"), ("directions",)], ids="+".join
)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_epilogue_is_the_definition_within_its_roundings(M, N, K, parts, dtype):
    a, w = codes(M, K), codes(N, K, seed=2)
    options = epilogue(M, N, w, parts)
    found, expected = (f.int8_linear(a, w, **options, dtype=dtype) for f in (torch_impl, reference))
    assert found.dtype is dtype
    scale = options["row_scale"].double() * options["column_scale"].double().T
    terms = (a.double() @ w.double().T).abs() * scale
    if "zero" in parts:
        terms = terms + (options["row_zero"].double() * options["column_sum"].double()).abs() * scale
    for name in ("bias", "correction"):
        if name in parts:
            terms = terms + options[name].double().abs().amax(dim=0)
    if "directions" in parts:
        terms = terms + options["coordinates"].double().abs() @ options["responses"].double().abs()
    # six roundings each, of parts of the sum that are no larger than `terms`; then one to the output's type
    bound = 2 * 6 * 2**-24 * terms
    if dtype is not torch.float32:
        bound = bound + torch.finfo(dtype).eps * expected.double().abs() + 2**-24
    assert ((found.double() - expected.double()).abs() <= bound).all()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_two_leave_the_same_bits(dtype):
    """No rounding but the last: the order of the sums cannot show."""
    M, N, K = 63, 33, 100
    a, w = codes(M, K), codes(N, K, seed=2)
    options = epilogue(M, N, w, ("zero",)) | {
        "row_scale": torch.full((M, 1), 2.0**-8),
        "column_scale": torch.full((N, 1), 0.5),
        "bias": torch.arange(N).float(),
        "correction": torch.arange(3 * N).view(3, N).half(),
    }
    found, expected = (f.int8_linear(a, w, **options, dtype=dtype) for f in (torch_impl, reference))
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("blocks")
def test_expanded_rows_parameters_and_views_are_taken():
    M, N, K = 63, 33, 100
    a, w = codes(2 * M, K)[::2], codes(N, 2 * K, seed=2)[:, ::2]
    options = epilogue(M, N, w, ("zero", "bias", "correction"))
    options |= {"row_scale": torch.tensor([[0.3]]).expand(M, 1), "row_zero": torch.tensor([[5.0]]).expand(M, 1)}
    plain = {name: value.clone() for name, value in options.items()}
    options["bias"] = torch.nn.Parameter(options["bias"])
    assert torch.equal(torch_impl.int8_linear(a, w, **options), torch_impl.int8_linear(a.clone(), w.clone(), **plain))


def test_zero_point_without_column_sums_is_refused():
    a, w = codes(7, 16), codes(5, 16)
    options = epilogue(7, 5, w, ("zero",)) | {"column_sum": None}
    with pytest.raises(ValueError, match="column sums"):
        torch_impl.int8_linear(a, w, **options)


SATURATION = """
import sys
sys.path.insert(0, "tests")
import conftest
import torch
from dit_quant.kernels.int8_linear import torch_impl
a, w = (torch.full((n, 128), 127, dtype=torch.int8) for n in (33, 16))
unit = dict(row_scale=torch.ones(33, 1), column_scale=torch.ones(16, 1))
y = torch_impl.int8_linear(a, w, **unit, index=torch.tensor([0]), fraction=torch.tensor([0.0]))
assert (y == 128 * 127**2).all(), y
"""


def test_sums_are_exact_where_the_cpu_adds_in_16_bits():
    """oneDNN held to AVX2, which adds pairs of 8-bit products with saturation."""
    subprocess.run(
        [sys.executable, "-c", SATURATION], cwd=ROOT, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}, check=True
    )


def test_runs_anywhere():
    assert torch_impl.refusal(torch.device("cpu")) is None
