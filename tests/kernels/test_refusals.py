"""What each backend says of shapes and cards, and what comfy-kitchen is trusted with."""

import importlib.util
import inspect
from dataclasses import replace

import pytest
import torch
from dit_quant.kernels import backends, dispatch, fused_ops, kitchen, ops, triton_device
from dit_quant.kernels.backends import Implementation, Shape
from dit_quant.kernels.int8_linear import kitchen_impl, reference
from dit_quant.kernels.quantizer_op import QUANTIZER

QUANTIZERS = {
    "quantize_activation": ops.QUANTIZE_ACTIVATION,
    "adaln_quantize": fused_ops.ADALN,
    "gelu_quantize": fused_ops.GELU,
    "swiglu_quantize": fused_ops.SWIGLU,
}
OPERANDS = {"int8_linear": "aw", "int4_linear": "aw"} | {name: op.operands for name, op in QUANTIZERS.items()}
KEYWORDS = {name: {*op.prologue, *QUANTIZER} for name, op in QUANTIZERS.items()} | {
    "int8_linear": set(ops.EPILOGUE) - {"backend"},
    "int4_linear": {"levels", "table", *ops.EPILOGUE} - {"backend"},
}
CUDA = Shape("int8_linear", torch.device("cuda", 0), torch.bfloat16, 4096, 3072, 3072)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    dispatch.reset()
    yield
    dispatch.reset()


@pytest.fixture
def card(monkeypatch):
    """Pretends that a CUDA device has a compute capability; what modules remember of it is forgotten."""

    def forget():
        for module in (triton_device, kitchen):
            for function in vars(module).values():
                getattr(function, "cache_clear", lambda: None)()

    def pretend(major: int, minor: int):
        forget()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    yield pretend
    forget()


@pytest.mark.parametrize(
    ("symmetric", "refusal"), [(True, None), (False, "its epilogue has no zero point")], ids=["symmetric", "asymmetric"]
)
def test_turing_has_a_path(card, monkeypatch, symmetric, refusal):
    """The real modules and their refusals, on a card that is not here."""
    card(7, 5)
    monkeypatch.setattr(kitchen, "_extension_refusal", lambda: None)
    choice = dispatch.plan(replace(CUDA, symmetric=symmetric))
    refusals = dict(choice.refusals)
    assert refusals["triton"] == "compute capability 7.5 < 8.0"
    assert refusals.get("comfy_kitchen") == refusal
    assert choice.backend == ("comfy_kitchen" if symmetric else "torch")


@pytest.mark.parametrize("op", KEYWORDS)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_every_module_there_is_answers(op, device, card):
    """Each implementation has the op's function, takes its arguments by name, and knows what it refuses."""
    card(9, 0)
    shape = replace(CUDA, op=op, device=torch.device(device), group_size=16, hadamard=256)
    for name in backends.BACKENDS:
        found = backends.load(op, name)
        if isinstance(found, str):
            assert name != "reference", found
        else:
            assert found.function.__name__ == op
            inspect.signature(found.function).bind(*OPERANDS[op], **dict.fromkeys(KEYWORDS[op]))
            assert found.refusal(shape) is None or isinstance(found.refusal(shape), str)


def test_comfy_kitchen_says_what_it_cannot_express(card, monkeypatch):
    """On a card and a build where its kernels are at hand."""
    card(8, 6)
    monkeypatch.setattr(kitchen, "_extension_refusal", lambda: None)

    def refusal(op, **changes):
        found = backends.load(op, "comfy_kitchen")
        assert isinstance(found, Implementation)
        return found.refusal(replace(CUDA, op=op, **changes))

    assert "scale" in refusal("quantize_activation")
    assert "zero point" in refusal("quantize_activation", symmetric=False)
    assert "fixed ranges" in refusal("quantize_activation", static=True)
    for op in ("int8_linear", "int4_linear"):
        assert refusal(op) is None
        assert "zero point" in refusal(op, symmetric=False)
        assert "K=100" in refusal(op, K=100)
        assert "N=33" in refusal(op, N=33)
        assert "float64" in refusal(op, dtype=torch.float64)
    card(7, 0)
    assert refusal("int8_linear") == "compute capability 7.0 < 7.5"


@pytest.mark.skipif(importlib.util.find_spec("comfy_kitchen") is None, reason="comfy-kitchen is not installed")
def test_the_product_that_comfy_kitchen_is_asked_for_exists():
    """A private name of another project: it must be noticed when it goes."""
    assert callable(kitchen.codes_product())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", [(), ("bias",), ("bias", "correction")], ids=str)
def test_the_epilogue_after_comfy_kitchens_product(monkeypatch, dtype, extras):
    """Its kernel's arithmetic (acc x row scale x column scale in fp32, one rounding) played by torch: same bits."""

    def product(a, w, row_scale, column_scale, bias, dtype):
        assert bias is None
        return (reference.int8_matmul(a, w).float() * row_scale.reshape(-1, 1) * column_scale.reshape(1, -1)).to(dtype)

    monkeypatch.setattr(kitchen_impl, "codes_product", lambda: product)
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (7, 64), dtype=torch.int8, generator=generator)
    w = torch.randint(-127, 128, (24, 64), dtype=torch.int8, generator=generator)
    given = {
        "row_scale": torch.rand(7, 1, generator=generator),
        "column_scale": torch.rand(24, 1, generator=generator),
        "index": torch.tensor([1]),
        "fraction": torch.tensor([0.25]),
        "dtype": dtype,
    }
    tables = {"bias": torch.randn(24, generator=generator), "correction": torch.randn(3, 24, generator=generator)}
    given |= {name: tables[name] for name in extras}
    assert torch.equal(kitchen_impl.int8_linear(a, w, **given), reference.int8_linear(a, w, **given))
