"""Activation quantizer in torch ops: in place, by blocks of rows that stay in a CPU's cache."""

import torch
from torch import Tensor

from ..directions import check
from ..numerics import INT8_MAX, lerp_rows, rotate, round_sum, safe_scale
from ..numerics import hadamard as hadamard_matrix
from .reference import asymmetric_range

# entries of a buffer. CPU: it stays in the last cache, and calls still cost little; else: bounds the fp32 copies
CPU_BLOCK = 2**20
DEVICE_BLOCK = 2**25
# sums of 16 neighbours are faster as a matrix product than as two butterflies of short strides
INNER = 16


def refusal(device: torch.device) -> str | None:
    """Runs wherever torch does."""
    return None


@torch.no_grad()
def quantize_activation(
    x: Tensor,
    *,
    index: Tensor,
    fraction: Tensor,
    shift: Tensor | None = None,
    smooth: Tensor | None = None,
    directions: Tensor | None = None,
    coordinates: Tensor | None = None,
    hadamard: int = 1,
    symmetric: bool = True,
    static_scale: Tensor | None = None,
    static_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the reference, and bit-equal to it, except that a rotation on CPU adds in another order."""
    M, K = x.shape
    check(coordinates, directions, M, K)
    if K % hadamard:
        raise ValueError(f"K={K} is not divisible by the Hadamard block {hadamard}")
    on_cpu = x.device.type == "cpu"
    by_product = on_cpu and hadamard > 1 and fp32_products_are_fp32()
    offset = None if shift is None else lerp_rows(shift, index, fraction)
    factor = None if smooth is None else smooth.float().reciprocal()
    static = None if static_scale is None else static_range(static_scale, static_zero, index, fraction)
    # blocks of the same size: a small last one would cost as many calls as the others
    blocks = max(1, round(M * K / (CPU_BLOCK if on_cpu else DEVICE_BLOCK)))
    block = max(1, -(-M // blocks))
    buffers = torch.empty(2 if by_product else 1, min(block, M), K, dtype=torch.float32, device=x.device)
    codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    ranges = []
    for start in range(0, M, block):
        part, out = x[start : start + block], codes[start : start + block]
        lines = None
        if coordinates is not None and directions is not None:
            lines = coordinates[start : start + block].float(), directions.float()
        y = (transform_by_product if by_product else transform)(
            part, offset, lines, factor, hadamard, buffers[:, : len(part)]
        )
        if static is not None:
            encode(y, *static, out, clamp=True)
            continue
        # two reductions: torch.aminmax along a row is 20 times slower on CPU
        low, high = torch.amin(y, dim=-1, keepdim=True), torch.amax(y, dim=-1, keepdim=True)
        if symmetric:
            scale, zero = safe_scale(torch.maximum(-low, high), INT8_MAX), None
        else:
            scale, zero = (usual_range if on_cpu else asymmetric_range)(low, high)
        encode(y, scale, zero, out)
        ranges.append((scale, zero))
    if static is not None:
        scale, zero = static
        return codes, scale.expand(M, 1), None if zero is None else zero.expand(M, 1)
    scales, zeros = zip(*ranges, strict=True)
    return codes, torch.cat(scales), None if symmetric else torch.cat(zeros)


def fp32_products_are_fp32() -> bool:
    """Whether the host left fp32 matrix products on CPU as they are: it may have allowed bf16 inside."""
    # torch 2.9 and newer; the older question raises where the newer setting was used
    setting = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)
    return setting in ("none", "ieee") if setting else torch.get_float32_matmul_precision() == "highest"


def static_range(scale: Tensor, zero: Tensor | None, index: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tables [T] -> scale, zero [1, 1] of the group."""
    at = lerp_rows(scale[:, None], index, fraction)[None]
    return at, None if zero is None else lerp_rows(zero[:, None], index, fraction)[None].round()


def usual_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """`asymmetric_range` on CPU, [m, 1], in a third of its calls where no row is constant, tiny or far off."""
    scale, magnitude = high - low, torch.maximum(high, -low)
    if not bool((magnitude + torch.finfo(torch.float32).tiny * 2**15 < scale * 2**7).all()):
        return asymmetric_range(low, high)
    scale.add_(magnitude, alpha=2**-20).div_(2 * INT8_MAX)
    return scale, (low * scale.reciprocal()).sub_(0.5).ceil_().neg_().sub_(INT8_MAX)


# p [m, R] and V [R, K], fp32
Lines = tuple[Tensor, Tensor]


def transform(
    x: Tensor, offset: Tensor | None, lines: Lines | None, factor: Tensor | None, order: int, buffers: Tensor
) -> Tensor:
    """x [m, K] -> ((x - z - p V) / s) H fp32, in buffers [1, m, K] unless rotated."""
    return rotate(subtract_and_scale(x, offset, lines, factor, buffers[0]), order)


def subtract_and_scale(
    x: Tensor, offset: Tensor | None, lines: Lines | None, factor: Tensor | None, out: Tensor
) -> Tensor:
    """x [m, K] -> (x - offset - p V) * factor, fp32."""
    if offset is not None and x.dtype is torch.float32:
        torch.sub(x, offset, out=out)
    else:
        # a mixed-type subtraction would widen x in memory of its own
        out.copy_(x)
        if offset is not None:
            out.sub_(offset)
    if lines is not None:
        for p, v in zip(lines[0].unbind(1), lines[1], strict=True):
            out.addcmul_(p[:, None], v, value=-1)
    return out if factor is None else out.mul_(factor)


def transform_by_product(
    x: Tensor, offset: Tensor | None, lines: Lines | None, factor: Tensor | None, order: int, buffers: Tensor
) -> Tensor:
    """`transform` on CPU, in buffers [2, m, K]: a matrix product of order 4 or 16, then radix-4 butterflies.

    The butterflies leave out their factor 1/2, which the product's matrix takes over; both are exact.
    """
    y, spare = buffers
    if offset is not None and factor is not None and lines is None:
        # one pass: x / s - z / s
        torch.addcmul(offset * -factor, x if x.dtype is torch.float32 else y.copy_(x), factor, out=y)
    else:
        subtract_and_scale(x, offset, lines, factor, y)
    matrix, strides = hadamard_matrix(min(order, INNER)), []
    stride = n = len(matrix)
    while stride < order:
        strides.append(stride)
        stride *= 4
    if stride != order:
        raise ValueError(f"Hadamard block {order} is not a power of 4; choose 16, 64 or 256")
    torch.mm(y.view(-1, n), matrix * 0.5 ** len(strides), out=spare.view(-1, n))
    for stride in strides:
        butterfly(spare, y, stride)
        y, spare = spare, y
    return spare


def butterfly(x: Tensor, out: Tensor, stride: int) -> None:
    """out = twice a stage of `numerics.rotate`: sum of the four minus twice the mirror image."""
    a, b, c, d = x.unflatten(-1, (-1, 4, stride)).unbind(-2)
    first, second, third, total = out.unflatten(-1, (-1, 4, stride)).unbind(-2)
    torch.add(a, b, out=first)
    torch.add(c, d, out=second)
    torch.add(first, second, out=total)
    torch.sub(total, d, alpha=2, out=first)
    torch.sub(total, c, alpha=2, out=second)
    torch.sub(total, b, alpha=2, out=third)
    total.sub_(a, alpha=2)


def encode(y: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor, *, clamp: bool = False) -> None:
    """y [m, K] fp32 is overwritten; codes go to out [m, K] int8. A range of y itself needs no clamp."""
    y.mul_(scale.reciprocal())
    y = y.round_() if zero is None else round_sum(y, zero)
    if clamp:
        y.clamp_(-INT8_MAX, INT8_MAX)
    out.copy_(y)
