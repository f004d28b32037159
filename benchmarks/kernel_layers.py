"""What is timed for one layer: full precision, torch._int_mm by hand, comfy-kitchen, and ours, whole and op by op."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from dit_quant import kernels
from dit_quant.kernels.backends import Shape
from dit_quant.kernels.dispatch import plan
from dit_quant.kernels.numerics import INT8_MAX, safe_scale
from dit_quant.kernels.quantize_activation.reference import transform
from dit_quant.quant_core.linear import QuantizedLinear, codes_of, column_sum, half_if_it_fits, quant_linear
from dit_quant.quant_core.reparam import fold_linear
from dit_quant.quant_core.rounding import round_weight
from dit_quant.quant_core.schemes import PRESETS, QuantScheme, Rounding, group_size_for, hadamard_for
from kernel_checks import ALONG, INT4, INT8, QUANTIZER, Checks, backends, refusal
from kernel_shapes import COPY, Layer
from kernel_timing import Roofline
from rivals import KITCHEN, KitchenLinear
from torch import Tensor, nn
from torch.nn.functional import linear

PRESET_NAMES = ("W8A8", "W8A8 fast", "W8A8 static", "W4A8")
RIVALS = ("native int8", "native int8 + ConvRot", "native asym_w4a8_int8")
GROUPS, GROUP = 8, 3
BF16, FP32 = "bf16 F.linear", "fp32 F.linear"


@dataclass(frozen=True)
class Contender:
    """A call, the backend of each op in it, the least seconds the machine needs, the largest error it may have.

    largest_error: relative L2 distance of its output from the fp32 layer; None where the output is not the layer's.
    """

    run: Callable[[], Tensor]
    backends: dict[str, str] = field(default_factory=dict)
    ideal: float | None = None
    largest_error: float | None = None


@dataclass(frozen=True)
class Problem:
    """One layer with its input: x [M, K] in `dtype`, weight [N, K] and bias [N] in fp32."""

    layer: Layer
    x: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def random(cls, layer: Layer, M: int, dtype: torch.dtype, device: torch.device) -> "Problem":
        random = torch.Generator(device).manual_seed(layer.K + M)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, device=device)

        x = normal(M, layer.K) + 0.3 * normal(1, layer.K)
        return cls(layer, x.to(dtype), normal(layer.N, layer.K) / layer.K**0.5, normal(layer.N))

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device


def at(device: torch.device) -> dict[str, Tensor]:
    return {"index": torch.tensor([GROUP], device=device), "fraction": torch.tensor([0.0], device=device)}


def quantized(problem: Problem, scheme: QuantScheme) -> QuantizedLinear:
    """The layer as the preset makes it; rounded to nearest, which changes no shape and no speed."""
    K = problem.layer.K
    random = torch.Generator(problem.device).manual_seed(K)
    shift = 0.3 * torch.randn(GROUPS, K, generator=random, device=problem.device)
    shift[GROUP] = problem.x.float().mean(dim=0)
    smooth = (torch.rand(K, generator=random, device=problem.device) + 0.5).half()
    shift, order = shift.half(), hadamard_for(K, scheme.hadamard)
    folded = fold_linear(problem.weight, shift, smooth, order)
    args = scheme.weights.with_options(rounding=Rounding.NEAREST, search=False)
    group_size = K if args.bits == 8 else group_size_for(K, args.group_size)
    if group_size is None:
        raise ValueError(f"K={K} has no group size near {args.group_size}")
    rounded = round_weight(folded.weight, args, group_size, None)
    assert folded.correction is not None
    result = QuantizedLinear(
        rounded.qdata,
        rounded.scale,
        levels=rounded.levels,
        smooth=smooth,
        shift=shift,
        correction=half_if_it_fits(folded.correction),
        hadamard=order,
        symmetric=scheme.activations.symmetric,
    )
    tables = {}
    if scheme.directions:
        basis = torch.linalg.qr(torch.randn(K, scheme.directions, generator=random, device=problem.device)).Q
        tables["directions"] = (basis.T * smooth.float()).half()
        tables["responses"] = (tables["directions"].float() @ problem.weight.T.float()).half()
    if not scheme.activations.symmetric:
        tables["column_sum"] = column_sum(codes_of(result))
    if not scheme.activations.dynamic:
        reach = transform(problem.x[:256], shift, smooth, *at(problem.device).values(), order).abs().amax()
        tables["static_scale"] = safe_scale(reach, INT8_MAX).expand(GROUPS).contiguous()
    return QuantizedLinear(**(vars(result) | tables))


def contenders(problem: Problem, checks: Checks, roofline: Roofline) -> tuple[dict[str, Contender], dict[str, str]]:
    """Name -> contender, and name -> why it is absent."""
    found, absent = full_precision(problem, roofline), {}
    if problem.device.type == "cuda":
        found[COPY] = copy(problem)
    for name in RIVALS:
        try:
            found[name] = rival(problem, name)
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {error}"[:200]
    for preset in PRESET_NAMES:
        layer = quantized(problem, PRESETS[preset])
        for backend in ("auto", "torch") if problem.device.type == "cuda" else ("auto",):
            name = preset if backend == "auto" else f"{preset}, {backend}"
            add(found, absent, name, whole(problem, layer, backend, roofline), checks)
        for name, contender in ops(problem, layer, preset, roofline).items():
            add(found, absent, name, contender, checks)
    return found, absent


def add(found: dict, absent: dict, name: str, contender: Contender, checks: Checks) -> None:
    """Refuses to time what did not pass its check."""
    broken = [f"{op} of {b}" for op, b in contender.backends.items() if b != "reference" and not checks.allows(op, b)]
    if broken:
        absent[name] = f"not timed: {', '.join(broken)} failed its check"
    elif "reference" in contender.backends.values():
        absent[name] = "not timed: no backend but the reference runs it"
    else:
        found[name] = contender


def full_precision(problem: Problem, roofline: Roofline) -> dict[str, Contender]:
    M, (N, K) = len(problem.x), problem.weight.shape
    found = {}
    for name, dtype in ((BF16, torch.bfloat16), (FP32, torch.float32)):
        x, w, b = (t.to(dtype) for t in (problem.x, problem.weight, problem.bias))
        ideal = roofline.seconds(2.0 * (M * K + N * K + M * N), 2.0 * M * N * K, roofline.bf16)
        found[name] = Contender(
            lambda x=x, w=w, b=b: linear(x, w, b), ideal=ideal if dtype is torch.bfloat16 else None, largest_error=0.02
        )
    scale = safe_scale(problem.weight.abs().amax(dim=1, keepdim=True), INT8_MAX)
    codes = (problem.weight / scale).round().to(torch.int8)
    b = problem.bias.to(problem.dtype)
    ideal = product_seconds(problem, 8, roofline)
    if M > 16:
        ready = torch.randint(-127, 128, (M, K), dtype=torch.int8, device=problem.device)
        found["torch._int_mm, product alone"] = Contender(lambda: torch._int_mm(ready, codes.t()), ideal=ideal)
        found["torch._int_mm, eager quantizer and epilogue"] = Contender(
            lambda: eager_linear(problem.x, codes, scale, b),
            ideal=ideal + quantizer_seconds(problem, roofline),
            largest_error=0.05,
        )
    return found


def copy(problem: Problem) -> Contender:
    """As many bytes read and written as a quantizer reads of x and writes of codes: with few tokens that takes a card
    longer than its rate of copying large tensors says."""
    source = torch.zeros((problem.x.nbytes + problem.x.numel()) // 2, dtype=torch.uint8, device=problem.device)
    target = torch.empty_like(source)
    return Contender(lambda: target.copy_(source))


def eager_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Plain W8A8 as one writes it: per token, symmetric, no rotation."""
    row_scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / INT8_MAX
    a = (x.float() / row_scale).round().to(torch.int8)
    y = torch._int_mm(a, codes.t()).float() * row_scale * scale.t()
    return (y + bias).to(x.dtype)


def rival(problem: Problem, name: str) -> Contender:
    """comfy-kitchen's own layout and dispatch. Raises what it raises for a shape that it does not take."""
    layer = nn.Linear(problem.layer.K, problem.layer.N, device="meta")
    layer.weight = nn.Parameter(problem.weight.to(problem.dtype), requires_grad=False)
    layer.bias = nn.Parameter(problem.bias.to(problem.dtype), requires_grad=False)
    twin = KitchenLinear(layer, *KITCHEN[name])
    twin(problem.x)
    return Contender(lambda: twin(problem.x), largest_error=0.15 if "w4" in name else 0.05)


def whole(problem: Problem, layer: QuantizedLinear, backend: str, roofline: Roofline) -> Contender:
    """Quantizer and product, as a layer calls them."""
    where, bias = at(problem.device), problem.bias.to(problem.dtype)

    def run() -> Tensor:
        return quant_linear(problem.x, layer, bias, where["index"], where["fraction"], backend)

    run()
    return Contender(
        run,
        {op: choice(problem, layer, op, backend) for op in ops_of(layer)},
        quantizer_seconds(problem, roofline) + product_seconds(problem, layer.bits, roofline),
        0.05 if layer.bits == 8 else 0.15,
    )


def ops(problem: Problem, layer: QuantizedLinear, preset: str, roofline: Roofline) -> dict[str, Contender]:
    """The ops of the layer apart, on every backend that takes them."""
    where, x, (quantizer, product) = at(problem.device), problem.x, ops_of(layer)
    tables = {name: getattr(layer, name) for name in ("shift", "smooth", "static_scale", "hadamard", "symmetric")}
    quantize = kernels.quantize_activation
    if layer.directions is not None:
        quantize, tables = kernels.quantize_along, tables | {"directions": layer.directions}
        tables.pop("static_scale")
    codes, row_scale, row_zero, *rest = quantize(x, **tables, **where)
    epilogue = {
        "row_scale": row_scale,
        "column_scale": layer.scale,
        "row_zero": row_zero,
        "column_sum": layer.column_sum,
        "bias": problem.bias.to(problem.dtype),
        "correction": layer.correction,
        "coordinates": rest[0] if rest else None,
        "responses": layer.responses,
        "dtype": problem.dtype,
        **where,
    }
    if layer.levels is None:
        multiply = kernels.int8_linear
    else:
        multiply, epilogue = kernels.int4_linear, epilogue | {"levels": layer.levels}
    runs = {
        quantizer: lambda backend: quantize(x, **tables, **where, backend=backend)[0],
        product: lambda backend: multiply(codes, layer.qdata, **epilogue, backend=backend),
    }
    ideal = {quantizer: quantizer_seconds(problem, roofline), product: product_seconds(problem, layer.bits, roofline)}
    found = {}
    for op, run in runs.items():
        for backend in backends(problem.device):
            if refusal(shape_of(problem, layer, op), backend) is None:
                run(backend)
                found[f"{op} of {preset}, {backend}"] = Contender(
                    lambda run=run, backend=backend: run(backend), {op: choice(problem, layer, op, backend)}, ideal[op]
                )
    return found


def ops_of(layer: QuantizedLinear) -> tuple[str, str]:
    return QUANTIZER if layer.directions is None else ALONG, INT8 if layer.levels is None else INT4


def choice(problem: Problem, layer: QuantizedLinear, op: str, backend: str) -> str:
    """The backend that runs, which is another one where `backend` refuses or failed at launch."""
    return plan(shape_of(problem, layer, op), backend).backend


def shape_of(problem: Problem, layer: QuantizedLinear, op: str) -> Shape:
    shape = {"op": op, "device": problem.device, "dtype": problem.dtype, "M": len(problem.x), "K": problem.layer.K}
    if op in (QUANTIZER, ALONG):
        static = layer.static_scale is not None
        shape |= {"hadamard": layer.hadamard, "symmetric": layer.symmetric, "static": static}
    else:
        shape |= {"N": problem.layer.N, "group_size": None if layer.levels is None else layer.group_size}
        shape["symmetric"] = layer.symmetric
    return Shape(**shape)


def quantizer_seconds(problem: Problem, roofline: Roofline) -> float:
    """x is read once, its codes are written once."""
    return roofline.seconds(problem.x.numel() * (problem.x.element_size() + 1))


def product_seconds(problem: Problem, bits: int, roofline: Roofline) -> float:
    M, (N, K) = len(problem.x), problem.weight.shape
    nbytes = M * K + N * K * (1 if bits == 8 else 0.5 + 1 / 16) + M * N * problem.x.element_size()
    return roofline.seconds(nbytes, 2.0 * M * N * K, roofline.int8)
