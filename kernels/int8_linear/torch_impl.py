"""int8 x int8 product in torch ops: torch._int_mm where it is exact, and an epilogue in place, by blocks of rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..directions import check
from ..numerics import addend
from .matmul import LEAST_COLUMNS, int8_matmul, int_mm_is_exact

# entries of an accumulator block. CPU: still in the last cache at the epilogue; else: bounds int32 and fp32 copies
CPU_BLOCK = 2**21
DEVICE_BLOCK = 2**26
# fewer rows at a time would not pay for reading the weight once more
LEAST_ROWS = 256


def refusal(device: torch.device) -> str | None:
    """Runs wherever torch does."""
    return None


@torch.no_grad()
def int8_linear(
    a: Tensor,
    w: Tensor,
    *,
    row_scale: Tensor,
    column_scale: Tensor,
    index: Tensor,
    fraction: Tensor,
    row_zero: Tensor | None = None,
    column_sum: Tensor | None = None,
    bias: Tensor | None = None,
    correction: Tensor | None = None,
    coordinates: Tensor | None = None,
    responses: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """As the reference; but bias and correction are added up first, and sums may be fused with their product."""
    y = torch.empty(len(a), len(w), dtype=dtype, device=a.device)
    epilogue = Epilogue.of(
        row_scale, column_scale, index, fraction, row_zero, column_sum, bias, correction, coordinates, responses
    )
    multiply(a, w, epilogue, y)
    return y


@dataclass(frozen=True)
class Epilogue:
    """row_scale, row_zero [M, 1]; column_scale, negative_sum (of the codes), addend (b + c) [N]; coordinates [M, R];
    responses [R, N]; all fp32."""

    row_scale: Tensor
    column_scale: Tensor
    row_zero: Tensor | None
    negative_sum: Tensor | None
    addend: Tensor | None
    coordinates: Tensor | None
    responses: Tensor | None

    @classmethod
    def of(
        cls,
        row_scale: Tensor,
        column_scale: Tensor,
        index: Tensor,
        fraction: Tensor,
        row_zero: Tensor | None,
        column_sum: Tensor | None,
        bias: Tensor | None,
        correction: Tensor | None,
        coordinates: Tensor | None,
        responses: Tensor | None,
    ) -> "Epilogue":
        """From the arguments of the ops."""
        check(coordinates, responses, len(row_scale), column_scale.numel())
        if row_zero is None:
            column_sum = None
        elif column_sum is None:
            raise ValueError("an asymmetric activation needs the weight's column sums")
        negative_sum = None if column_sum is None else column_sum.float().neg_()
        p, B = (None if v is None else v.float() for v in (coordinates, responses))
        added = addend(bias, correction, index, fraction)
        return cls(row_scale, column_scale.reshape(-1), row_zero, negative_sum, added, p, B)

    def columns(self, part: slice) -> "Epilogue":
        """The same for some of the output columns."""
        negative_sum, added = (None if v is None else v[part] for v in (self.negative_sum, self.addend))
        B = None if self.responses is None else self.responses[:, part]
        return Epilogue(
            self.row_scale, self.column_scale[part], self.row_zero, negative_sum, added, self.coordinates, B
        )

    def apply(self, accumulator: Tensor, rows: slice, out: Tensor) -> None:
        """accumulator [m, N] int32, contiguous, is overwritten; out [m, N], which may be the same memory."""
        y = accumulator.view(torch.float32)
        y.copy_(accumulator)
        if self.row_zero is not None and self.negative_sum is not None:
            y.addcmul_(self.row_zero[rows], self.negative_sum)
        y.mul_(self.row_scale[rows])
        last = out if out.dtype is torch.float32 else y
        if self.addend is None:
            torch.mul(y, self.column_scale, out=last)
        else:
            torch.addcmul(self.addend, y, self.column_scale, out=last)
        if self.coordinates is not None and self.responses is not None:
            last.addmm_(self.coordinates[rows], self.responses)
        if last is not out:
            out.copy_(last)


def multiply(a: Tensor, w: Tensor, epilogue: Epilogue, y: Tensor) -> None:
    """a [M, K], w [N, K] int8 -> y [M, N], by blocks of rows. On CPU an fp32 y holds the accumulators too."""
    (M, N), on_cpu = y.shape, y.device.type == "cpu"
    block = max(LEAST_ROWS, (CPU_BLOCK if on_cpu else DEVICE_BLOCK) // max(N, 1))
    in_place = y.dtype is torch.float32 and y.is_contiguous()
    # into memory that is here already; torch._int_mm misreads one column, and rows or columns that are all the same
    direct = on_cpu and int_mm_is_exact(y.device) and a.shape[1] >= LEAST_COLUMNS and 0 not in a.stride() + w.stride()
    buffer = None
    if direct and not in_place:
        buffer = torch.empty(min(block, M), N, dtype=torch.int32, device=y.device)
    for start in range(0, M, block):
        rows = slice(start, start + block)
        if not direct:
            accumulator = int8_matmul(a[rows], w)
        else:
            out = y[rows].view(torch.int32) if buffer is None else buffer[: len(y[rows])]
            accumulator = torch._int_mm(a[rows], w.t(), out=out)  # pyright: ignore[reportPrivateImportUsage]
        epilogue.apply(accumulator, rows, y[rows])
