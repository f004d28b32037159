"""The gate before any timing: every backend of every op against its reference, on small odd shapes and a large one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from dit_quant.kernels.backends import Implementation, Shape, load, order
from dit_quant.kernels.int4_linear import reference as int4_reference
from dit_quant.kernels.int8_linear import reference as int8_reference
from dit_quant.kernels.numerics import decode_int4, pack_int4, pack_levels
from dit_quant.kernels.quantize_activation import reference as quantizer_reference
from dit_quant.kernels.quantize_along import reference as along_reference
from torch import Tensor

QUANTIZER, ALONG, INT8, INT4 = OPS = ("quantize_activation", "quantize_along", "int8_linear", "int4_linear")
# directions
R = 3
# M, K, N
SHAPES = ((7, 256, 33), (63, 1088, 136))
# on a GPU: the tiles for many tokens too, which are what is timed there
LARGE = (2049, 3072, 8192)
# of codes next to a tie, which another order of the rotation's sums may round the other way
FEW = 1e-3


@dataclass(frozen=True)
class Checks:
    """(op, backend) that passed; refusals before the check and failures in it, by op and backend."""

    passed: frozenset[tuple[str, str]]
    refused: dict[str, str]
    failed: dict[str, str]

    def allows(self, op: str, backend: str) -> bool:
        return (op, backend) in self.passed


def check_all(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Checks:
    """Every backend but the reference, of every op."""
    passed, refused, failed = set(), {}, {}
    for op in OPS:
        for backend in backends(device):
            label, reasons = f"{op}, {backend}", []
            runs = [(dtype, shape) for dtype in dtypes for shape in shapes(device)]
            taken = [run for run in runs if refusal(shape_of(op, device, *run), backend) is None]
            for dtype, shape in taken:
                reasons.append(check(op, backend, device, dtype, shape))
            if not taken:
                refused[label] = refusal(shape_of(op, device, *runs[-1]), backend)
            elif any(reasons):
                failed[label] = next(filter(None, reasons))
            else:
                passed.add((op, backend))
    return Checks(frozenset(passed), refused, failed)


def shapes(device: torch.device) -> tuple[tuple[int, int, int], ...]:
    return (*SHAPES, LARGE) if device.type == "cuda" else SHAPES


def backends(device: torch.device) -> tuple[str, ...]:
    return tuple(name for name in order(device) if name != "reference")


def refusal(shape: Shape, backend: str) -> str | None:
    """None, or why the backend does not take the shape."""
    found = load(shape.op, backend)
    return found.refusal(shape) if isinstance(found, Implementation) else found


def shape_of(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], symmetric=True) -> Shape:
    M, K, N = shape
    if op in (QUANTIZER, ALONG):
        return Shape(op, device, dtype, M, K, hadamard=64, symmetric=symmetric)
    return Shape(op, device, dtype, M, K, N, 16 if op == "int4_linear" else None, symmetric=symmetric)


def function(op: str, backend: str) -> Callable:
    """The implementation itself: the dispatcher would let another one take over where it cannot be launched."""
    found = load(op, backend)
    assert isinstance(found, Implementation)
    return found.function


def check(op: str, backend: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> str | None:
    """None, or what is wrong with the op's results."""
    try:
        return CHECKS[op](backend, device, dtype, shape)
    except Exception as error:
        return f"M, K, N {shape}, {dtype}: {type(error).__name__}: {error}"[:300]


def at(device: torch.device) -> dict[str, Tensor]:
    return {"index": torch.tensor([1], device=device), "fraction": torch.tensor([0.0], device=device)}


def check_quantizer(backend, device, dtype, shape) -> str | None:
    M, K, _ = shape
    random = torch.Generator().manual_seed(K)
    x = (3 * torch.randn(M, K, generator=random)).to(device, dtype)
    tables = {
        "shift": torch.randn(3, K, generator=random).half().to(device),
        "smooth": (torch.rand(K, generator=random) + 0.5).half().to(device),
        "directions": (torch.randn(R, K, generator=random) / K**0.5).half().to(device),
        "coordinates": torch.randn(M, R, generator=random).bfloat16().to(device),
    }
    ranges = [{"symmetric": True}, {"symmetric": False}, {"static_scale": torch.full((3,), 0.1, device=device)}]
    quantize = function("quantize_activation", backend)
    zeros = refusal(shape_of("quantize_activation", device, dtype, shape, symmetric=False), backend) is None
    for hadamard in (1, 64):
        for options in ranges:
            if not options.get("symmetric", True) and not zeros:
                continue
            given = {**tables, **options, "hadamard": hadamard, **at(device)}
            codes, scale, zero = quantize(x, **given)
            expected, scale2, zero2 = quantizer_reference.quantize_activation(x, **given)
            off = (codes.int() - expected.int()).abs()
            if off.max() > 1 or (off > 0).float().mean() > FEW:
                return f"M, K {M, K}, {dtype}, {options}: codes are off by up to {int(off.max())}"
            # sums of `hadamard` numbers in another order
            if not torch.allclose(scale, scale2, rtol=hadamard * 2**-23, atol=0):
                return f"M, K {M, K}, {dtype}, {options}: wrong scales"
            if zero is not None and (zero - zero2).abs().max() > 1:
                return f"M, K {M, K}, {dtype}, {options}: wrong zero points"
    return None


def check_product(op: str, expected: Callable, weight: Callable) -> Callable:
    def run(backend, device, dtype, shape) -> str | None:
        M, K, N = shape
        random = torch.Generator().manual_seed(N)
        a = torch.randint(-127, 128, (M, K), dtype=torch.int8, generator=random).to(device)
        w, options, codes = weight(N, K, random, device)
        options |= {
            "row_scale": torch.rand(M, 1, generator=random).to(device) / 256,
            "column_scale": torch.rand(N, 1, generator=random).to(device) / 256,
            "bias": torch.randn(N, generator=random).to(device, dtype),
            "correction": torch.randn(3, N, generator=random).half().to(device),
            "coordinates": torch.randn(M, R, generator=random).bfloat16().to(device),
            "responses": torch.randn(R, N, generator=random).half().to(device),
            "dtype": dtype,
            **at(device),
        }
        for zero in (False, True):
            if zero and refusal(shape_of(op, device, dtype, shape, symmetric=False), backend) is not None:
                continue
            if zero:
                options["row_zero"] = torch.randint(-99, 99, (M, 1), generator=random).float().to(device)
                options["column_sum"] = codes.sum(dim=1, dtype=torch.int32)
            y = function(op, backend)(a, w, **options).double()
            wanted = expected(a, w, **options).double()
            size = (codes.double().abs().sum(dim=1) * 227 + 1) * options["row_scale"] * options["column_scale"].T + 4
            # fp32 sums in another order, then two units in the last place of the output
            bound = 2**-20 * size + 2 * torch.finfo(dtype).eps * wanted.abs()
            if not ((y - wanted).abs() <= bound).all():
                return f"M, K, N {shape}, {dtype}, zero point {zero}: off by {float((y - wanted).abs().max()):.3g}"
        return None

    return run


def int8_weight(N, K, random, device):
    w = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=random).to(device)
    return w, {}, w


def int4_weight(N, K, random, device):
    packed = pack_int4(torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=random))
    multiplier = torch.randint(1, 9, (N, K // 16), dtype=torch.uint8, generator=random)
    levels = pack_levels(multiplier, torch.randint(0, 16, (N, K // 16), dtype=torch.uint8, generator=random))
    return packed.to(device), {"levels": levels.to(device)}, decode_int4(packed, levels).to(device)


def check_along(backend, device, dtype, shape) -> str | None:
    M, K, _ = shape
    random = torch.Generator().manual_seed(K)
    x = torch.randn(M, K, generator=random).to(device, dtype)
    tables = {
        "directions": (torch.randn(R, K, generator=random) / K**0.5).half().to(device),
        "shift": torch.randn(3, K, generator=random).half().to(device),
        "smooth": (torch.rand(K, generator=random) + 0.5).half().to(device),
        **at(device),
    }
    *found, p = function(ALONG, backend)(x, **tables, hadamard=64, symmetric=False)
    wanted = along_reference.coordinates(x, **tables).double()
    # products of TF32 at the least, and the result's own rounding
    factors = along_reference.dual(tables["directions"], tables["smooth"]).double()
    bound = 2**-10 * (x.double().abs() + 4) @ factors.abs().T + 2**-7 * wanted.abs()
    if not ((p.double() - wanted).abs() <= bound).all():
        return f"M, K {M, K}, {dtype}: coordinates are off by {float((p.double() - wanted).abs().max()):.3g}"
    expected = quantizer_reference.quantize_activation(x, **tables, coordinates=p, hadamard=64, symmetric=False)
    off = (found[0].int() - expected[0].int()).abs()
    if off.max() > 1 or (off > 0).float().mean() > FEW:
        return f"M, K {M, K}, {dtype}: codes are off by up to {int(off.max())}"
    if not torch.allclose(found[1], expected[1], rtol=64 * 2**-23, atol=0):
        return f"M, K {M, K}, {dtype}: wrong scales"
    return None


CHECKS = {
    QUANTIZER: check_quantizer,
    INT8: check_product(INT8, int8_reference.int8_linear, int8_weight),
    INT4: check_product(INT4, int4_reference.int4_linear, int4_weight),
    ALONG: check_along,
}
