"""Which backends a quantized model will use on a device, why not others, and whether that is worth having."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..kernels.backends import Shape
from ..kernels.dispatch import Choice, plan
from .linear import QuantizedLinear, quant_linear
from .report import WARNING, QuantReport
from .timesteps import TimestepState

# tokens of a picture of 1024 x 1024
TOKENS = 4096
CPU_TOKENS = 256
# seconds that each side of a comparison may take; one run is made in any case
BUDGET = 0.15
REPEATS = 7
# a factor below this is noise of the measurement
SLOWER = 1.05
# on a GPU these are what is left when every fast kernel refused
FALLBACKS = ("torch", "reference")


@dataclass(frozen=True)
class LayerPlan:
    """The backends of one layer."""

    quantizer: Choice
    product: Choice

    def __str__(self) -> str:
        first, second = self.quantizer.backend, self.product.backend
        return second if first == second else f"{second}, quantizer {first}"


@dataclass(frozen=True)
class Comparison:
    """The largest layer against the linear it replaces: seconds of the one / seconds of the other."""

    name: str
    tokens: int
    factor: float
    plan: LayerPlan
    dtype: torch.dtype

    @property
    def is_slower(self) -> bool:
        # as it is told
        return round(self.factor, 2) > SLOWER

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        warning = f"{WARNING}slower than full precision: " if self.is_slower else ""
        return (
            f"{warning}{self.name} takes {self.factor:.2f} times as long on backend {self.plan} as in {dtype} "
            f"({self.tokens} tokens, measured)"
        )


def shapes_of(
    layer: QuantizedLinear, device: torch.device, dtype: torch.dtype, tokens: int | None = None
) -> tuple[Shape, Shape]:
    """What `quant_linear` asks for, of the quantizer and of the product; input and output are of `dtype`."""
    N, K = layer.features
    tokens = tokens or tokens_on(device)
    static = layer.static_scale is not None
    symmetric = layer.static_zero is None if static else layer.symmetric
    op = "quantize_activation" if layer.directions is None else "quantize_along"
    quantizer = Shape(op, device, dtype, tokens, K, None, None, layer.hadamard, symmetric, static)
    op, group_size = ("int8_linear", None) if layer.levels is None else ("int4_linear", layer.group_size)
    return quantizer, Shape(op, device, dtype, tokens, K, N, group_size, 1, symmetric)


def plan_layer(
    layer: QuantizedLinear, device: torch.device, dtype: torch.dtype, backend: str = "auto", tokens: int | None = None
) -> LayerPlan:
    """The backends of a layer whose input and output are of `dtype`."""
    quantizer, product = shapes_of(layer, device, dtype, tokens)
    return LayerPlan(plan(quantizer, backend), plan(product, backend))


def tokens_on(device: torch.device) -> int:
    """What is planned for and measured there."""
    return CPU_TOKENS if device.type == "cpu" else TOKENS


def plan_layers(
    layers: Mapping[str, QuantizedLinear], device: torch.device, dtype: torch.dtype, backend: str = "auto"
) -> dict[str, LayerPlan]:
    return {name: plan_layer(layer, device, dtype, backend) for name, layer in layers.items()}


def describe(plans: Mapping[str, LayerPlan], device: torch.device) -> list[str]:
    """One line for every (op, backend, refusals), with the number of layers."""
    groups: dict[Choice, int] = {}
    for layer in plans.values():
        for choice in (layer.quantizer, layer.product):
            groups[choice] = groups.get(choice, 0) + 1
    lines = []
    for choice, count in sorted(groups.items(), key=lambda item: (item[0].op, -item[1])):
        refused = "".join(f"; {name}: {reason}" for name, reason in choice.refusals)
        layers = f"{count} layer{'s' if count != 1 else ''}"
        lines.append(f"{choice.op} on {device}: {choice.backend}, {layers}{refused}")
    return lines


def with_backends(report: QuantReport, plans: Mapping[str, LayerPlan], lines: list[str]) -> QuantReport:
    """The report with the planned backend of every layer, and `lines` among its notes."""
    layers = tuple(replace(layer, backend=str(plans[layer.name])) for layer in report.layers)
    return replace(report, layers=layers, notes=(*report.notes, *lines))


def compare_largest(
    layers: Mapping[str, QuantizedLinear],
    plans: Mapping[str, LayerPlan],
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
) -> Comparison | None:
    """Times the largest layer against F.linear in `dtype`: of those with a fallback, where there are any.

    Afterwards it is known whether its kernels can be launched, and plans made then tell; where one cannot be, layers
    of every other kind are run as well, for most reasons hold for all. Under a second, and the compilation that the
    first step would wait for. None without layers, without memory to measure, or where the device has no such product.
    """
    slow = [name for name in layers if {plans[name].quantizer.backend, plans[name].product.backend} & {*FALLBACKS}]
    name = max(slow or layers, key=lambda n: (layers[n].features[0] * layers[n].features[1], n), default=None)
    if name is None:
        return None
    tokens = tokens_on(device)
    try:
        factor = _factor(layers[name], device, dtype, tokens, backend)
        ran = plan_layer(layers[name], device, dtype, backend)
        if ran != plans[name]:
            kinds = {shapes_of(layer, device, dtype): layer for layer in layers.values()}
            for layer in kinds.values():
                _caller(layer, *_inputs(layer, device, dtype, tokens), backend)()
    except (torch.OutOfMemoryError, NotImplementedError):
        return None
    return Comparison(name, tokens, factor, ran, dtype)


def _factor(layer: QuantizedLinear, device: torch.device, dtype: torch.dtype, tokens: int, backend: str) -> float:
    """Seconds of the quantized layer / seconds of F.linear."""
    N, K = layer.features
    x, bias = _inputs(layer, device, dtype, tokens)

    def full_precision() -> float:
        # its weight is gone when the other is measured; not of ones, on which a card is faster
        weight = torch.randn(1, K, device=device, dtype=dtype).expand(N, K).contiguous()
        return _seconds(lambda: nn.functional.linear(x, weight, bias), device)

    full = full_precision()
    return _seconds(_caller(layer, x, bias, backend), device) / full


def _inputs(layer: QuantizedLinear, device: torch.device, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor]:
    """x [tokens, K] and a bias [N]."""
    N, K = layer.features
    return torch.randn(tokens, K, device=device, dtype=dtype), torch.zeros(N, device=device, dtype=dtype)


def _caller(layer: QuantizedLinear, x: Tensor, bias: Tensor, backend: str) -> Callable[[], Tensor]:
    """The layer on the device of x, in its first timestep group."""
    moved = layer.map(lambda tensor: tensor.to(x.device))
    state = TimestepState([layer.groups])
    state.to(x.device)
    return lambda: quant_linear(x, moved, bias, *state.select(0), backend)


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Median of a few runs after one that warms up; only that one where a run is long."""
    times: list[float] = []
    if device.type == "cuda":
        # kernels are compiled at their first call
        call()
    while len(times) <= REPEATS and (not times or sum(times) < BUDGET):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    later = sorted(times[1:]) or times
    return later[len(later) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
