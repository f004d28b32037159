"""The registered ops: opcheck, one graph for all timestep groups, and no value read back to the host."""

import pytest
import torch
from dit_quant.kernels import dispatch, int4_linear, int8_linear, ops, quantize_activation
from dit_quant.kernels.backends import BACKENDS
from dit_quant.kernels.int4_linear.reference import int4_linear as int4_reference
from dit_quant.kernels.int8_linear.reference import int8_linear as int8_reference
from dit_quant.kernels.int8_linear.torch_impl import int_mm_is_exact
from dit_quant.kernels.numerics import pack_int4, pack_levels
from dit_quant.kernels.quantize_activation.reference import quantize_activation as quantize_reference
from dit_quant.quant_core.linear import QuantizedLinear, QuantLinear
from dit_quant.quant_core.timesteps import TimestepGroups, TimestepState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

M, K, N, T, G = 7, 64, 33, 3, 4
GENERATOR = torch.Generator().manual_seed(0)
INDEX, FRACTION = torch.tensor([1]), torch.tensor([0.25])
QUANTIZER = {
    "dynamic": {},
    "asymmetric": {"symmetric": False},
    "shifted": {
        "shift": torch.randn(T, K, generator=GENERATOR).half(),
        "smooth": torch.rand(K, generator=GENERATOR) + 0.5,
        "hadamard": 16,
        "symmetric": False,
    },
    "along": {
        "directions": torch.randn(2, K, generator=GENERATOR).half(),
        "coordinates": torch.randn(M, 2, generator=GENERATOR).bfloat16(),
    },
    "static": {"static_scale": torch.rand(T, generator=GENERATOR) + 0.1},
    "static zero": {"static_scale": torch.rand(T, generator=GENERATOR) + 0.1, "static_zero": torch.ones(T)},
}
EPILOGUE = {
    "plain": {},
    "zero point": {
        "row_zero": torch.randint(-9, 9, (M, 1), generator=GENERATOR).float(),
        "column_sum": torch.randint(-99, 99, (N,), generator=GENERATOR, dtype=torch.int32),
        "bias": torch.randn(N, generator=GENERATOR),
        "correction": torch.randn(T, N, generator=GENERATOR).half(),
        "coordinates": torch.randn(M, 2, generator=GENERATOR).bfloat16(),
        "responses": torch.randn(2, N, generator=GENERATOR).half(),
        "dtype": torch.bfloat16,
    },
    "one scale for all": {"row_scale": torch.tensor([0.5]).expand(M, 1)},
}


OPTIONAL = ("row_zero", "column_sum", "bias", "correction", "coordinates", "responses")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    dispatch.reset()


def x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(2)).to(torch.int8)


def weight4() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    packed = pack_int4(torch.randint(0, 16, (N, K), generator=generator).to(torch.uint8))
    multiplier = torch.randint(1, 9, (N, G), generator=generator).to(torch.uint8)
    return packed, pack_levels(multiplier, torch.full((N, G), 8, dtype=torch.uint8))


def epilogue(name: str) -> dict:
    scales = {
        "row_scale": torch.rand(M, 1, generator=torch.Generator().manual_seed(4)),
        "column_scale": torch.ones(N, 1),
    }
    return scales | {"index": INDEX, "fraction": FRACTION} | EPILOGUE[name]


def positional(name: str, backend: str = "reference") -> tuple:
    """The epilogue in the order of the schema."""
    given = epilogue(name)
    optional = (given.get(key) for key in OPTIONAL)
    first = (given[key] for key in ("row_scale", "column_scale", "index", "fraction"))
    return *first, *optional, given.get("dtype", torch.float32), backend


@pytest.fixture(params=[name for name in BACKENDS if name != "comfy_kitchen"])
def backend(request):
    """Each that can run here: Triton where its interpreter or a GPU is."""
    yield request.param
    for choice in dispatch.recorded().values():
        if choice.backend != request.param:
            name, reason = choice.refusals[0]
            assert "failed at launch" not in reason
            pytest.skip(f"{choice.op}: {name}: {reason}")


@pytest.mark.parametrize("name", QUANTIZER)
def test_opcheck_of_the_quantizer(name, backend):
    given = QUANTIZER[name]
    torch.library.opcheck(
        torch.ops.dit_quant.quantize_activation.default,
        (
            x(), given.get("directions"), given.get("coordinates"), INDEX, FRACTION, given.get("shift"),
            given.get("smooth"), given.get("hadamard", 1), given.get("symmetric", True), given.get("static_scale"),
            given.get("static_zero"), backend,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck_of_tokens_along_directions(symmetric, backend):
    shift, smooth = QUANTIZER["shifted"]["shift"], QUANTIZER["shifted"]["smooth"]
    given = (x(), QUANTIZER["along"]["directions"], INDEX, FRACTION, shift, smooth, 16, symmetric, backend)
    torch.library.opcheck(torch.ops.dit_quant.quantize_along.default, given)


@pytest.mark.parametrize("values", [x().T.contiguous().T, x().repeat(1, 2)[:, :K], x()[:1]], ids=["T", "slice", "row"])
def test_opcheck_of_strided_tokens(values, backend):
    given = (values, None, None, INDEX, FRACTION, None, None, 1, True, None, None, backend)
    torch.library.opcheck(torch.ops.dit_quant.quantize_activation.default, given)


@pytest.mark.parametrize("name", EPILOGUE)
def test_opcheck_of_the_products(name, backend):
    given = positional(name, backend)
    torch.library.opcheck(torch.ops.dit_quant.int8_linear.default, (codes(M, K), codes(N, K), *given))
    torch.library.opcheck(torch.ops.dit_quant.int4_linear.default, (codes(M, K), *weight4(), None, *given))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", QUANTIZER)
def test_quantizer_is_the_reference(name, compiled):
    def call(values):
        return quantize_activation(values, index=INDEX, fraction=FRACTION, backend="reference", **QUANTIZER[name])

    found = torch.compile(call, backend="aot_eager", fullgraph=True)(x()) if compiled else call(x())
    expected = quantize_reference(x(), index=INDEX, fraction=FRACTION, **QUANTIZER[name])
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.shape == b.shape and torch.equal(a, b))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", EPILOGUE)
def test_products_are_the_reference(name, compiled):
    (packed, levels), given = weight4(), epilogue(name)

    def call(a, w):
        first = int8_linear(a, w, backend="reference", **given)
        return first, int4_linear(a, packed, levels=levels, backend="reference", **given)

    call_ = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    found = call_(codes(M, K), codes(N, K))
    assert torch.equal(found[0], int8_reference(codes(M, K), codes(N, K), **epilogue(name)))
    assert torch.equal(found[1], int4_reference(codes(M, K), packed, levels=levels, **epilogue(name)))


def test_the_wish_reaches_the_dispatcher_from_a_compiled_graph():
    given = {"index": INDEX, "fraction": FRACTION, "backend": "reference"}
    torch.compile(lambda v: quantize_activation(v, **given), backend="aot_eager", fullgraph=True)(x())
    assert [choice.backend for choice in dispatch.recorded().values()] == ["reference"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_table_of_levels_passes_through(compiled):
    (packed, levels), given = weight4(), epilogue("plain")
    table = torch.arange(-8, 8, dtype=torch.int8).roll(3)

    def call(a):
        return int4_linear(a, packed, levels=levels, table=table, backend="reference", **given)

    found = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(codes(M, K))
    assert torch.equal(found, int4_reference(codes(M, K), packed, levels=levels, table=table, **given))
    assert not torch.equal(found, int4_reference(codes(M, K), packed, levels=levels, **given))


class NothingReadBack(TorchDispatchMode):
    """Fails where a tensor's value is asked for by the host: `.item()`, `bool(tensor)`, a size that depends on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"):
            # no Exception: the dispatcher would take that for a backend that cannot be launched
            pytest.fail(f"{func} reads a value back to the host")
        return func(*args, **(kwargs or {}))


GROUPS = TimestepGroups(edges=(0.7, 0.3), centres=(0.85, 0.5, 0.15))
SMOOTH_GROUPS = TimestepGroups(edges=(0.7, 0.3), centres=(0.85, 0.5, 0.15), interpolate=True)
LAYERS = ("int8 asymmetric", "int8 directions", "int4 symmetric", "int8 static")


def layer(kind: str, groups: TimestepGroups) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(5)
    packed, levels = weight4()
    qdata = packed if kind.startswith("int4") else codes(N, K)
    symmetric = kind not in ("int8 asymmetric", "int8 directions")
    return QuantizedLinear(
        qdata=qdata,
        scale=torch.rand(N, 1, generator=generator),
        levels=levels if kind.startswith("int4") else None,
        column_sum=None if symmetric else qdata.sum(dim=1, dtype=torch.int32),
        shift=torch.randn(T, K, generator=generator).half(),
        smooth=torch.rand(K, generator=generator).half() + 0.5,
        correction=torch.randn(T, N, generator=generator).half(),
        static_scale=torch.tensor([0.1, 0.2, 0.3]) if kind == "int8 static" else None,
        hadamard=64,
        symmetric=symmetric,
        directions=torch.randn(2, K, generator=generator).half() if kind == "int8 directions" else None,
        responses=torch.randn(2, N, generator=generator).half() if kind == "int8 directions" else None,
        groups=groups,
    )


@pytest.mark.parametrize("groups", [GROUPS, SMOOTH_GROUPS], ids=["steps", "interpolated"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_one_graph_for_all_groups(compiler, kind, groups):
    torch._dynamo.reset()
    graphs = []

    def counting(module, inputs):
        graphs.append(module)
        return torch._dynamo.lookup_backend(compiler)(module, inputs)

    state = TimestepState([groups])
    eager = QuantLinear(layer(kind, groups), torch.ones(N), state, 0)
    compiled = torch.compile(eager, backend=counting, fullgraph=True)
    outputs = []
    for sigma in (0.9, 0.75, 0.5, 0.4, 0.1):
        state.update(torch.tensor([sigma]))
        found = compiled(x()[None])
        assert torch.equal(found, eager(x()[None])), sigma
        outputs.append(found)
    assert len(graphs) == 1
    assert not torch.equal(outputs[0], outputs[2]), "the group must matter, or the test proves nothing"
    assert not torch.equal(outputs[2], outputs[4])
    names = {str(node.target) for node in graphs[0].graph.nodes if "dit_quant" in str(node.target)}
    product = "int4_linear" if kind.startswith("int4") else "int8_linear"
    quantizer = "quantize_along" if kind == "int8 directions" else "quantize_activation"
    wanted = {f"dit_quant.{product}", f"dit_quant.{quantizer}"}
    assert names in (wanted, {f"{name}.default" for name in wanted})


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_read_back(kind, dtype):
    state = TimestepState([SMOOTH_GROUPS])
    # on a CPU, where nothing waits, the torch quantizer looks whether an asymmetric code passed 127
    backend = "reference" if kind in ("int8 asymmetric", "int8 directions") else "torch"
    module = QuantLinear(layer(kind, SMOOTH_GROUPS), torch.ones(N, dtype=dtype), state, 0, backend)
    # once per process it is looked whether torch's product is exact
    int_mm_is_exact(torch.device("cpu"))
    with NothingReadBack():
        for sigma in (torch.tensor([0.9]), torch.tensor([0.2])):
            state.update(sigma)
            assert module(x(dtype)).dtype == dtype


def test_reading_back_is_noticed():
    """Negative control."""
    with pytest.raises(pytest.fail.Exception, match="reads a value back"), NothingReadBack():
        bool(torch.ones(1) > 0)


@pytest.mark.parametrize("op", ops.OPS)
def test_fakes_need_no_memory(op):
    """On the meta device, as when a model is traced without its weights."""
    meta = torch.device("meta")
    given = positional("zero point")
    inputs = {
        "quantize_activation": (x(), None, None, INDEX, FRACTION, None, None, 1, False, None, None, "auto"),
        "quantize_along": (x(), torch.zeros(2, K).half(), INDEX, FRACTION, None, None, 1, False, "auto"),
        "int8_linear": (codes(M, K), codes(N, K), *given),
        "int4_linear": (codes(M, K), *weight4(), None, *given),
    }[op]
    moved = (value.to(meta) if isinstance(value, Tensor) else value for value in inputs)
    result = getattr(torch.ops.dit_quant, op)(*moved)
    shapes = [tuple(r.shape) for r in result] if isinstance(result, tuple) else [tuple(result.shape)]
    quantized = [(M, K), (M, 1), (M, 1)]
    wanted = {"quantize_activation": quantized, "quantize_along": [*quantized, (M, 2)]}
    assert shapes == wanted.get(op, [(M, N)])
