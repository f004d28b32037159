"""The fused quantizers through the dispatcher and as registered ops: opcheck, one graph, fallback, the reference."""

import inspect
from dataclasses import replace

import pytest
import torch
from dit_quant import kernels
from dit_quant.kernels import backends, dispatch, fused_ops
from dit_quant.kernels.backends import BACKENDS, Implementation, Shape
from dit_quant.quant_core.timesteps import TimestepGroups, TimestepState
from fused_cases import CASES, normal

L, K, T = 2, 64, 3
M = 3 * L
INDEX, FRACTION = torch.tensor([1]), torch.tensor([0.25])
SHIFT, SMOOTH = normal(T, K, seed=1).half(), normal(K, seed=2).exp()
RANGES = {
    "dynamic": {},
    "shifted": {"shift": SHIFT, "smooth": SMOOTH, "hadamard": 16, "symmetric": False},
    "static": {"static_scale": torch.tensor([0.02, 0.04, 0.03])},
    "static zero": {"static_scale": torch.tensor([0.02, 0.04, 0.03]), "static_zero": torch.tensor([3.0, 20.4, 5.0])},
}
QUANTIZERS = {"adaln_quantize": fused_ops.ADALN, "gelu_quantize": fused_ops.GELU, "swiglu_quantize": fused_ops.SWIGLU}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    dispatch.reset()
    yield
    dispatch.reset()


@pytest.fixture(params=[name for name in BACKENDS if name != "comfy_kitchen"])
def backend(request):
    """Each that can run here: Triton where its interpreter or a GPU is."""
    yield request.param
    for choice in dispatch.recorded().values():
        if choice.backend != request.param:
            name, reason = choice.refusals[0]
            assert "failed at launch" not in reason
            pytest.skip(f"{choice.op}: {name}: {reason}")


def positional(case, ranges: dict, backend: str) -> tuple:
    """The arguments in the order of the schema."""
    named = {"index": INDEX, "fraction": FRACTION, "hadamard": 1, "symmetric": True, "backend": backend}
    named = {**case.prologue, **named, **ranges}
    arguments = inspect.signature(getattr(kernels, case.op)).parameters
    return *case.operands, *(named.get(name) for name in list(arguments)[len(case.operands) :])


@pytest.mark.parametrize("op", QUANTIZERS)
def test_arguments_are_the_reference_s_and_a_backend(op):
    found = backends.load(op, "reference")
    assert isinstance(found, Implementation)
    public = inspect.signature(getattr(kernels, op)).parameters
    *expected, last = public.values()
    assert expected == list(inspect.signature(found.function).parameters.values())
    assert (last.name, last.default) == ("backend", "auto")
    schema = getattr(torch.ops.dit_quant, op).default._schema
    assert [argument.name for argument in schema.arguments] == list(public)


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, ranges, backend):
    case = CASES[name](L, K, torch.float32)
    torch.library.opcheck(getattr(torch.ops.dit_quant, case.op).default, positional(case, RANGES[ranges], backend))


@pytest.mark.parametrize("layout", ["transposed", "slice", "row"])
@pytest.mark.parametrize("name", CASES)
def test_opcheck_of_strided_operands(name, layout, backend):
    case = CASES[name](1 if layout == "row" else L, K, torch.float32)

    def strided(x):
        return x.mT.contiguous().mT if layout == "transposed" else x.repeat_interleave(2, dim=0)[::2]

    case = replace(case, operands=tuple(x if x is None else strided(x) for x in case.operands))
    torch.library.opcheck(getattr(torch.ops.dit_quant, case.op).default, positional(case, {}, backend))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_reference(name, ranges, compiled):
    torch._dynamo.reset()
    case = CASES[name](L, K, torch.bfloat16)
    keywords = {**case.prologue, **RANGES[ranges], "index": INDEX, "fraction": FRACTION}

    def call(*operands):
        return getattr(kernels, case.op)(*operands, backend="reference", **keywords)

    call_ = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    reference = backends.load(case.op, "reference")
    assert isinstance(reference, Implementation)
    for a, b in zip(call_(*case.operands), reference.function(*case.operands, **keywords), strict=True):
        assert a is b is None or (a.shape == b.shape and torch.equal(a, b))
    assert [choice.backend for choice in dispatch.recorded().values()] == ["reference"]


@pytest.mark.parametrize("shape", [(0, K), (2, 0, K), (0, 7, K)], ids=str)
def test_no_tokens(shape):
    at = {"index": INDEX, "fraction": FRACTION, "shift": SHIFT}
    modulation = {"modulation_scale": normal(shape[0], K)} if len(shape) == 3 else {}
    codes, scale, zero = kernels.adaln_quantize(torch.empty(shape), symmetric=False, **modulation, **at)
    assert (codes.shape, scale.shape, zero.shape) == ((0, K), (0, 1), (0, 1))
    if len(shape) == 2:
        assert kernels.gelu_quantize(torch.empty(shape), **at)[0].shape == (0, K)
        assert kernels.swiglu_quantize(torch.empty(0, 2 * K), **at)[0].shape == (0, K)


GROUPS = TimestepGroups(edges=(0.7, 0.3), centres=(0.85, 0.5, 0.15))
SMOOTH_GROUPS = TimestepGroups(edges=(0.7, 0.3), centres=(0.85, 0.5, 0.15), interpolate=True)


@pytest.mark.parametrize("groups", [GROUPS, SMOOTH_GROUPS], ids=["steps", "interpolated"])
@pytest.mark.parametrize("ranges", ["shifted", "static zero"])
def test_one_graph_for_all_groups(ranges, groups):
    torch._dynamo.reset()
    cases, graphs = [CASES[name](L, K, torch.float32) for name in ("layer, modulated", "gelu tanh", "swiglu")], []

    def counting(module, inputs):
        graphs.append(module)
        return module

    def call(*operands):
        index, fraction = state.select(0)
        x, y, gate, up = operands
        given = RANGES[ranges] | {"index": index, "fraction": fraction}
        return (
            *kernels.adaln_quantize(x, **cases[0].prologue, **given),
            *kernels.gelu_quantize(y, **given),
            *kernels.swiglu_quantize(gate, up, **given),
        )

    state = TimestepState([groups])
    compiled = torch.compile(call, backend=counting, fullgraph=True)
    operands, outputs = [x for case in cases for x in case.operands], []
    for sigma in (0.9, 0.75, 0.5, 0.4, 0.1):
        state.update(torch.tensor([sigma]))
        found = compiled(*operands)
        assert all(torch.equal(a, b) for a, b in zip(found, call(*operands), strict=True)), sigma
        outputs.append(found[0::3])
    assert len(graphs) == 1
    for early, late in ((0, 2), (2, 4)):
        pairs = zip(outputs[early], outputs[late], strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs), "the group must matter, or the test proves nothing"
    names = {str(node.target) for node in graphs[0].graph.nodes if "dit_quant" in str(node.target)}
    assert names == {f"dit_quant.{op}" for op in QUANTIZERS}


@pytest.mark.parametrize("name", CASES)
def test_fakes_need_no_memory(name):
    case = CASES[name](L, K, torch.bfloat16)
    given = positional(case, {"symmetric": False}, "auto")
    moved = (value.to("meta") if torch.is_tensor(value) else value for value in given)
    codes, scale, zero = getattr(torch.ops.dit_quant, case.op)(*moved)
    assert [(tuple(r.shape), r.dtype) for r in (codes, scale, zero)] == [
        ((M, K), torch.int8),
        ((M, 1), torch.float32),
        ((M, 1), torch.float32),
    ]


@pytest.mark.parametrize("name", CASES)
def test_the_class_of_shapes_is_that_of_the_codes(name):
    """Whatever the shape of the operands: two halves side by side, samples in a dimension of their own."""
    case = CASES[name](7, K, torch.bfloat16)
    keywords = case.prologue | RANGES["shifted"] | {"index": INDEX, "fraction": FRACTION}
    getattr(kernels, case.op)(*case.operands, **keywords)
    shape = Shape(case.op, torch.device("cpu"), torch.bfloat16, 32, K, None, None, 16, False, False)
    assert {shape: "torch"} == {shape: choice.backend for shape, choice in dispatch.recorded().items()}


def test_comfy_kitchen_has_none_of_them():
    """comfy-kitchen has no such op: a refusal with that reason, not an error."""
    for op in QUANTIZERS:
        shape = Shape(op, torch.device("cpu"), torch.bfloat16, 4096, 3072, hadamard=256)
        assert dispatch.plan(shape).backend == "torch"
        choice = dispatch.plan(shape, "comfy_kitchen")
        reasons = (("comfy_kitchen", f"no {op}"), ("native", f"no {op}"))
        assert (choice.backend, choice.refusals) == ("torch", reasons)


def test_a_row_too_wide_for_triton_s_norm_falls_back():
    pytest.importorskip("triton")
    x, at = normal(3, 12544), {"index": INDEX, "fraction": FRACTION}
    found = kernels.adaln_quantize(x, backend="triton", **at)
    (choice,) = dispatch.recorded().values()
    expected = kernels.adaln_quantize(x, backend="torch", **at)
    assert all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))
    assert choice.backend == "torch"
    assert dict(choice.refusals)["triton"] == "K=12544 > 12288: the norm needs the whole row at once"


@pytest.mark.parametrize("name", CASES)
def test_a_failed_launch_is_replaced(name, monkeypatch):
    case, at = CASES[name](L, K, torch.float32), {"index": INDEX, "fraction": FRACTION}
    load = dispatch.load

    def broken(*args, **kwargs):
        raise RuntimeError("out of resource: shared memory")

    def first_breaks(op, backend):
        return Implementation(broken, lambda shape: None) if backend == "torch" else load(op, backend)

    monkeypatch.setattr(dispatch, "load", first_breaks)
    found = getattr(kernels, case.op)(*case.operands, **case.prologue, **at)
    (choice,) = dispatch.recorded().values()
    assert choice.backend == "reference"
    assert choice.refusals[-1] == ("torch", "failed at launch: RuntimeError: out of resource: shared memory")
    expected = getattr(kernels, case.op)(*case.operands, backend="reference", **case.prologue, **at)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_wrong_arguments_are_named(backend):
    """By the first that ran; nobody is held responsible."""
    at = {"index": INDEX, "fraction": FRACTION, "backend": backend}
    with pytest.raises(ValueError, match="7 rows are not divisible by the 2 rows"):
        kernels.adaln_quantize(normal(7, K), modulation_scale=normal(2, K), **at)
    with pytest.raises(ValueError, match="norm 'batch' is not known"):
        kernels.adaln_quantize(normal(7, K), kind="batch", **at)
    with pytest.raises((ValueError, RuntimeError), match="tanh"):
        kernels.gelu_quantize(normal(7, K), approximate="quick", **at)
    with pytest.raises(ValueError, match="101 columns cannot hold"):
        kernels.swiglu_quantize(normal(7, 101), **at)
    assert dispatch.recorded() == {}
