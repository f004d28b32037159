"""A call of a quantizer, and the gate before any timing: every backend of it against its reference."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from dit_quant import kernels
from dit_quant.kernels.backends import AUTO, Shape
from dit_quant.kernels.dispatch import bucket
from dit_quant.kernels.quantizer_op import has_zero
from kernel_checks import FEW, Checks, backends, function, refusal
from torch import Tensor

# codes, scale, zero
Quantized = tuple[Tensor, Tensor, Tensor | None]
# a norm's sums in another order move a value by at most 2**-23 (36 + log2 K) of the row's largest, a rotation's by as
# much again; roundings of random sign come to a tenth of it, 2e-4 of a step, so that FEW codes lie that close to a tie
CLOSE = 2**-16


@dataclass(frozen=True)
class Call:
    """op(*operands, **keywords): operands [M, K] or [B, L, K]; the quantizer's settings are among the keywords."""

    op: str
    operands: tuple[Tensor, ...]
    keywords: dict[str, Any]

    def run(self, backend: str = AUTO) -> Quantized:
        """Through the dispatcher, as a layer calls it."""
        return getattr(kernels, self.op)(*self.operands, **self.keywords, backend=backend)

    @property
    def shape(self) -> Shape:
        """What the dispatcher chooses by."""
        x, given = self.operands[0], self.keywords
        return Shape(
            self.op,
            x.device,
            x.dtype,
            bucket(x.numel() // x.shape[-1]),
            x.shape[-1],
            hadamard=given["hadamard"],
            symmetric=not has_zero(given["symmetric"], given["static_scale"], given["static_zero"]),
            static=given["static_scale"] is not None,
        )

    def __str__(self) -> str:
        x = self.operands[0]
        dtype, order = str(x.dtype).removeprefix("torch."), self.keywords["hadamard"]
        ranges = "static" if self.shape.static else "symmetric" if self.shape.symmetric else "asymmetric"
        return f"{' x '.join(map(str, x.shape))} {dtype}, {ranges}, rotation of {order}"


def check_all(device: torch.device, calls: Iterable[Call]) -> Checks:
    """Every backend but the reference, of every op that is called."""
    by_op: dict[str, list[Call]] = {}
    for call in calls:
        by_op.setdefault(call.op, []).append(call)
    passed, refused, failed = set(), {}, {}
    for op, given in by_op.items():
        for backend in backends(device):
            label, taken = f"{op}, {backend}", [call for call in given if refusal(call.shape, backend) is None]
            reason = next(filter(None, (check(call, backend) for call in taken)), None)
            if not taken:
                refused[label] = refusal(given[-1].shape, backend)
            elif reason is not None:
                failed[label] = reason
            else:
                passed.add((op, backend))
    return Checks(frozenset(passed), refused, failed)


def check(call: Call, backend: str) -> str | None:
    """None, or what is wrong with the backend's results."""
    try:
        # the implementation itself: the dispatcher would let another one take over where it cannot be launched
        found, expected = (function(call.op, b)(*call.operands, **call.keywords) for b in (backend, "reference"))
        reason = difference(found, expected)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    return None if reason is None else f"{call}: {reason}"[:300]


def difference(found: Quantized, expected: Quantized) -> str | None:
    """None where the codes, counted from the zero point, are equal but next to a tie, and the scales are close."""
    (codes, scale, zero), (codes_, scale_, zero_) = found, expected
    if (zero is None) != (zero_ is None) or codes.shape != codes_.shape:
        return "results of another form"
    if not torch.allclose(scale, scale_, rtol=CLOSE, atol=0):
        return "wrong scales"
    off = (steps(codes, zero) - steps(codes_, zero_)).abs()
    share = float((off > 0).float().mean())
    return f"{share:.2%} of the codes are off, by up to {int(off.max())}" if off.max() > 1 or share > FEW else None


def steps(codes: Tensor, zero: Tensor | None) -> Tensor:
    """codes [M, K] int8 -> whole steps from zero, fp32."""
    return codes.float() if zero is None else codes.float() - zero


def distance(found: Quantized, expected: Quantized) -> float:
    """Relative L2 distance of what two results stand for, over about 64 rows out of all samples."""
    every = slice(None, None, max(1, len(found[0]) // 64))
    a, b = (
        scale[every] * steps(codes[every], None if zero is None else zero[every])
        for codes, scale, zero in (found, expected)
    )
    return float((a - b).norm() / b.norm())
