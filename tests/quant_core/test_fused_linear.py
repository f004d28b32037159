"""The fused layers against the same ops one after the other."""

import pytest
import torch
import torch.nn.functional as F
from dit_quant.kernels import adaln_quantize, dispatch
from dit_quant.quant_core import fused_linear
from dit_quant.quant_core.convert import LayerInput, quantize_weight
from dit_quant.quant_core.fused_linear import quant_adaln_linear, quant_gelu_linear, quant_swiglu_linear
from dit_quant.quant_core.linear import quant_linear, quantizer
from dit_quant.quant_core.metrics import relative_l2
from dit_quant.quant_core.schemes import PRESETS
from dit_quant.quant_core.timesteps import TimestepGroups
from drift import drift
from fused_cases import normal, summation_error
from near_ties import assert_equal_but_ties

pytestmark = pytest.mark.usefixtures("poisoned_empty")

B, L, N, K = 2, 5, 33, 64
GROUPS = TimestepGroups((0.55,), (0.8, 0.3))
AT = (torch.tensor([1]), torch.tensor([0.0]))
BIAS = normal(N, seed=1)
NAMES = ("W8A8", "W4A8", "W8A8 static", "rtn_w8a8")
DIRECTED = PRESETS["W8A8"].with_options(directions=3)
MODULATION = {"modulation_scale": 0.5 * normal(B, K, seed=6), "modulation_shift": normal(B, K, seed=7)}
NORM = {"norm_weight": 1 + 0.3 * normal(K, seed=4), "norm_bias": normal(K, seed=5)}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    dispatch.reset()


@pytest.fixture(scope="module", params=NAMES)
def layer(request):
    found = drift(K, 6)
    source = LayerInput(found.sigmas, found.statistics(K))
    scheme = PRESETS[request.param].with_options(directions=0)  # no fused op keeps any
    return quantize_weight("layer", normal(N, K) / 8, scheme, GROUPS, source)[0]


def modulated(y: torch.Tensor, modulation_scale: torch.Tensor, modulation_shift: torch.Tensor) -> torch.Tensor:
    return y * (1 + modulation_scale[:, None]) + modulation_shift[:, None]


# the same fp32 functions in the same order on both sides: equal bits
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_is_the_composition(layer, approximate, backend):
    x = 2 * normal(B, L, K)
    found = quant_gelu_linear(x, layer, BIAS, *AT, approximate, backend)
    assert torch.equal(found, quant_linear(F.gelu(x, approximate=approximate), layer, BIAS, *AT, backend))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("form", ["two", "halves", "up first"])
def test_swiglu_is_the_composition(layer, form, backend):
    gate, up = 2 * normal(B, L, K), normal(B, L, K, seed=1)
    operands = {
        "two": (gate, up),
        "halves": (torch.cat([gate, up], dim=-1), None),
        "up first": (torch.cat([up, gate], dim=-1), None),
    }[form]
    found = quant_swiglu_linear(*operands, layer, BIAS, *AT, gate_first=form != "up first", backend=backend)
    assert torch.equal(found, quant_linear(F.silu(gate) * up, layer, BIAS, *AT, backend))


@pytest.mark.parametrize("tables", [{}, NORM, MODULATION, NORM | MODULATION], ids=["", "norm", "modulation", "all"])
def test_adaln_is_the_composition(layer, tables):
    """In torch ops both norms are torch's own."""
    x = 2 * normal(B, L, K) + 0.5
    y = F.layer_norm(x, (K,), tables.get("norm_weight"), tables.get("norm_bias"), 1e-5)
    y = modulated(y, **MODULATION) if "modulation_scale" in tables else y
    found = quant_adaln_linear(x, layer, BIAS, *AT, eps=1e-5, backend="torch", **tables)
    assert torch.equal(found, quant_linear(y, layer, BIAS, *AT, "torch"))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_reference_s_norm_differs_from_torch_s_next_to_ties_only(layer, kind, monkeypatch):
    """Its sums have another order: the product's codes may differ where a value lies as close to a tie as that."""
    seen = []

    def watched(*args, **kwargs):
        seen.append(adaln_quantize(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(fused_linear, "adaln_quantize", watched)
    x = 2 * normal(B, L, K) + 0.5
    y = F.layer_norm(x, (K,), eps=1e-6) if kind == "layer" else F.rms_norm(x, (K,), eps=1e-6)
    y = modulated(y, **MODULATION)
    found = quant_adaln_linear(x, layer, BIAS, *AT, kind=kind, backend="reference", **MODULATION)
    error = summation_error(x.flatten(0, 1), kind, modulation_scale=MODULATION["modulation_scale"])
    where = {"index": AT[0], "fraction": AT[1]}
    assert_equal_but_ties(seen[0], y.flatten(0, 1), error, **quantizer(layer), **where)
    # a tie is rare, and one code more or less among K moves a row by a step at most
    assert relative_l2(found, quant_linear(y, layer, BIAS, *AT, "reference")) < 1e-2


def calls(layer, shape, dtype=torch.float32):
    """The three layers on x of a shape, and what they compute in float64 before the linear."""
    x, up = (2 * normal(*shape)).to(dtype), normal(*shape, seed=1).to(dtype)
    exact, wide = x.double(), up.double()
    return {
        "gelu": (quant_gelu_linear(x, layer, BIAS, *AT), F.gelu(exact, approximate="tanh")),
        "swiglu": (quant_swiglu_linear(x, up, layer, BIAS, *AT), F.silu(exact) * wide),
        "adaln": (quant_adaln_linear(x, layer, BIAS, *AT), F.layer_norm(exact, (K,), eps=1e-6)),
    }


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, 5, K), (0, K), (2, 0, K)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shape_and_dtype_are_kept(layer, shape, dtype):
    for y, _ in calls(layer, shape, dtype).values():
        assert y.shape == (*shape[:-1], N)
        assert y.dtype is dtype


def test_nothing_is_rounded_in_between(layer):
    """bf16 in, bf16 out: as near to the fp32 composition as the rounding of the output, 2**-9 of each value."""
    for name, (y, exact) in calls(layer, (B, L, K), torch.bfloat16).items():
        whole = quant_linear(exact.float(), layer, BIAS, *AT)
        rounded = quant_linear(exact.bfloat16(), layer, BIAS, *AT)
        assert relative_l2(y, whole) < 2**-9, name
        # negative control: rounding before the quantizer as well is seen
        assert relative_l2(rounded, whole) > relative_l2(y, whole), name


def test_the_group_and_the_backend_are_passed_on(layer):
    x = 2 * normal(B, L, K)
    given = [(quant_gelu_linear, (x,)), (quant_swiglu_linear, (x, x)), (quant_adaln_linear, (x,))]
    for function, operands in given:
        dispatch.reset()
        first, second = (
            function(*operands, layer, BIAS, torch.tensor([i]), AT[1], backend="reference") for i in (0, 1)
        )
        assert torch.equal(first, second) == (layer.shift is None and layer.static_scale is None)
        assert {choice.backend for choice in dispatch.recorded().values()} == {"reference"}
        assert len(dispatch.recorded()) == 2


def test_a_layer_with_directions_reads_what_stands_before_it():
    """Nothing is fused: the composition in fp32, in the type of the input."""
    found = drift(K, 6)
    source = LayerInput(found.sigmas, found.statistics(K))
    directed = quantize_weight("layer", normal(N, K) / 8, DIRECTED, GROUPS, source)[0]
    assert directed.directions is not None
    x, both = normal(B, L, K).bfloat16(), normal(B, L, 2 * K, seed=3).bfloat16()
    gate, up = both.float().chunk(2, dim=-1)
    norm = F.layer_norm(x.float(), (K,), NORM["norm_weight"], NORM["norm_bias"], 1e-6)
    pairs = [
        (quant_gelu_linear(x, directed, BIAS, *AT, "none"), F.gelu(x.float())),
        (quant_swiglu_linear(both, None, directed, BIAS, *AT), F.silu(gate) * up),
        (quant_adaln_linear(x, directed, BIAS, *AT, **NORM, **MODULATION), modulated(norm, **MODULATION)),
    ]
    for y, before in pairs:
        assert y.dtype is torch.bfloat16
        expected = quant_linear(before, directed, BIAS, *AT)
        # bf16 of the output, and codes next to a tie
        assert relative_l2(y, expected) < 2**-8
