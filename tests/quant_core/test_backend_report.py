"""Planned backends in the report, and the measured factor of a slow one."""

import json
from dataclasses import replace

import pytest
import torch
from dit_quant.kernels import dispatch
from dit_quant.kernels.backends import Implementation
from dit_quant.kernels.dispatch import Choice
from dit_quant.quant_core import backend_report
from dit_quant.quant_core.backend_report import (
    Comparison,
    LayerPlan,
    compare_largest,
    describe,
    plan_layer,
    plan_layers,
    with_backends,
)
from dit_quant.quant_core.convert import quantize_weight
from dit_quant.quant_core.linear import QuantizedLinear, QuantLinear
from dit_quant.quant_core.report import QuantReport
from dit_quant.quant_core.schemes import PRESETS
from dit_quant.quant_core.timesteps import SINGLE_GROUP, TimestepState

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
REFUSALS = {"triton": "compute capability 7.5 < 8.0", "comfy_kitchen": "its epilogue has no zero point"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    dispatch.reset()
    yield
    dispatch.reset()


@pytest.fixture
def turing(monkeypatch):
    """Backends of a card that is not here: nothing is run."""

    def load(op, backend):
        refusal = REFUSALS.get(backend) if op == "int8_linear" or backend == "triton" else None
        return Implementation(lambda: None, lambda shape: refusal)

    monkeypatch.setattr(dispatch, "load", load)


def layer(preset: str, N: int = 48, K: int = 64) -> tuple[QuantizedLinear, QuantReport]:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    quantized, report = quantize_weight("a", weight, PRESETS[preset], SINGLE_GROUP, None)
    return quantized, QuantReport(preset, (report,), ())


STATIC = {"static_scale": torch.ones(1)}
CHANGES = {
    "symmetric": {},
    "asymmetric": {"symmetric": False, "column_sum": torch.zeros(48, dtype=torch.int32)},
    "static": STATIC,
    "static, asymmetric": STATIC
    | {"static_zero": torch.ones(1), "symmetric": False, "column_sum": torch.zeros(48, dtype=torch.int32)},
    "rotated": {"hadamard": 64},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("preset", ["rtn_w8a8", "rtn_w4a8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_is_what_runs(preset, change, dtype):
    """Planned shapes are the very ones that a forward pass asks for."""
    quantized = replace(layer(preset)[0], **CHANGES[change])
    planned = plan_layer(quantized, CPU, dtype, tokens=dispatch.bucket(7))
    shapes = {key[:-1] for key in dispatch._choices}
    QuantLinear(quantized, None, TimestepState([SINGLE_GROUP]), 0)(torch.ones(7, 64, dtype=dtype))
    ran = dispatch.recorded()
    assert {tuple(getattr(shape, name) for name in shape.__dataclass_fields__) for shape in ran} == shapes
    assert set(ran.values()) == {planned.quantizer, planned.product}


def test_a_wish_is_planned():
    planned = plan_layer(layer("rtn_w8a8")[0], CPU, torch.float32, "reference")
    assert (planned.quantizer.backend, planned.product.backend) == ("reference", "reference")


def test_lines_group_layers_by_backend_and_refusals(turing):
    layers = {f"{preset} {i}": layer(preset)[0] for preset in ("rtn_w8a8", "rtn_w4a8") for i in range(2)}
    assert describe(plan_layers(layers, CUDA, torch.bfloat16), CUDA) == [
        "int4_linear on cuda:0: comfy_kitchen, 2 layers; triton: compute capability 7.5 < 8.0",
        "int8_linear on cuda:0: torch, 2 layers; triton: compute capability 7.5 < 8.0; "
        "comfy_kitchen: its epilogue has no zero point",
        "quantize_activation on cuda:0: comfy_kitchen, 4 layers; triton: compute capability 7.5 < 8.0",
    ]


def test_report_names_the_backend_of_every_layer(turing):
    quantized, report = layer("rtn_w8a8")
    plans = plan_layers({"a": quantized}, CUDA, torch.bfloat16)
    full = with_backends(report, plans, ["a line"])
    assert full.layers[0].backend == "torch, quantizer comfy_kitchen"
    assert json.loads(json.dumps(full.to_json()))["layers"][0]["backend"] == full.layers[0].backend
    assert full.text().endswith("\na line")


def plans_of(backend: str, layers) -> dict[str, LayerPlan]:
    return {name: LayerPlan(Choice("quantize_activation", backend), Choice("int8_linear", backend)) for name in layers}


@pytest.mark.parametrize(
    ("device", "backend"), [(CUDA, "triton"), (CUDA, "comfy_kitchen"), (CUDA, "torch"), (CPU, "torch")], ids=str
)
def test_the_largest_layer_is_measured(monkeypatch, device, backend):
    """On fast backends too: small layers on a fast card do not gain."""
    layers = {"small": layer("rtn_w8a8", 16)[0], "large": layer("rtn_w8a8", 64)[0]}
    asked = []
    monkeypatch.setattr(backend_report, "_factor", lambda *given: asked.append(given) or 2.5)
    plans = plans_of(backend, layers)
    # what a plan says once the layer has run
    monkeypatch.setattr(backend_report, "plan_layer", lambda *given: plans["large"])
    found = compare_largest(layers, plans, device, torch.bfloat16)
    (given,) = asked
    assert given[0] is layers["large"]
    tokens = 256 if device is CPU else 4096
    assert str(found) == (
        f"warning: slower than full precision: large takes 2.50 times as long on backend {backend} as in bfloat16 "
        f"({tokens} tokens, measured)"
    )
    assert compare_largest({}, {}, device, torch.bfloat16) is None


@pytest.mark.parametrize(("factor", "warns"), [(0.5, False), (1.04, False), (1.06, True)])
def test_only_slower_is_a_warning(factor, warns):
    plan = plans_of("torch", "a")["a"]
    comparison = Comparison("a", 256, factor, plan, torch.float32)
    assert comparison.is_slower == warns == str(comparison).startswith("warning: ")


def test_a_layer_without_a_fast_kernel_is_measured_first(monkeypatch):
    """The largest layer may have a fast kernel where a smaller one has none."""
    layers = {"odd": layer("rtn_w8a8", 16)[0], "large": layer("rtn_w8a8", 64)[0]}
    plans = plans_of("triton", ["large"]) | plans_of("torch", ["odd"])
    monkeypatch.setattr(backend_report, "_factor", lambda *given: 2.5)
    monkeypatch.setattr(backend_report, "plan_layer", lambda *given: plans["odd"])
    found = compare_largest(layers, plans, CUDA, torch.bfloat16)
    assert found is not None
    assert found.name == "odd"


def test_a_backend_that_fails_at_launch_is_not_the_one_that_is_told(monkeypatch):
    """Whether a kernel can be compiled is known when it has been launched, which the comparison does: for all kinds of
    layers, where the largest could not be, since one without a compiler can launch none."""
    real = dispatch.load

    def fails(*args, **kwargs):
        raise RuntimeError("no compiler")

    def load(op, backend):
        return Implementation(fails, lambda shape: None) if backend == "torch" else real(op, backend)

    monkeypatch.setattr(dispatch, "load", load)
    layers = {"a": layer("rtn_w8a8")[0], "as a": layer("rtn_w8a8")[0], "small": layer("rtn_w8a8", 48, 32)[0]}
    given = (CPU, torch.float32, "torch")
    plans = plan_layers(layers, *given)
    assert {str(each) for each in plans.values()} == {"torch"}
    ran = []
    real_linear = backend_report.quant_linear
    monkeypatch.setattr(backend_report, "quant_linear", lambda x, *more: ran.append(x.shape) or real_linear(x, *more))
    found = compare_largest(layers, plans, *given)
    assert found is not None
    assert "torch" not in str(found.plan)
    line, _ = describe(plan_layers(layers, *given), CPU)
    assert line == f"int8_linear on cpu: {found.plan}, 3 layers; torch: failed at launch: RuntimeError: no compiler"
    # one of each kind
    assert len(set(ran)) == 2
    assert [shape[1] for shape in ran].count(layers["small"].features[1]) == 1


def test_no_memory_to_measure(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    layers = {"a": layer("rtn_w8a8")[0]}
    monkeypatch.setattr(backend_report, "_factor", fail)
    assert compare_largest(layers, plans_of("torch", layers), CUDA, torch.bfloat16) is None


@pytest.mark.parametrize("slow", ["linear", "quant_linear"])
def test_the_factor_is_quantized_over_full_precision(monkeypatch, slow):
    """Whichever of the two sleeps shows in the factor."""
    import time

    owner = backend_report if slow == "quant_linear" else torch.nn.functional
    real = getattr(owner, slow)
    monkeypatch.setattr(owner, slow, lambda *given: (time.sleep(0.05), real(*given))[1])
    layers = {"a": layer("rtn_w4a8", 256, 256)[0]}
    found = compare_largest(layers, plan_layers(layers, CPU, torch.float32), CPU, torch.float32)
    assert found is not None
    assert found.factor > 2 if slow == "quant_linear" else found.factor < 0.5


def test_measuring_is_short():
    """A feed-forward layer of a large DiT."""
    import time

    weight = QuantizedLinear(torch.ones(12288, 3072, dtype=torch.int8), torch.ones(12288, 1))
    plans = plan_layers({"a": weight}, CPU, torch.float32)
    start = time.perf_counter()
    assert compare_largest({"a": weight}, plans, CPU, torch.float32) is not None
    # a second on a free machine of two cores; a crowded one is given more
    assert time.perf_counter() - start < 10
