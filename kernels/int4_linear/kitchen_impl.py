"""4-bit weights decoded by torch, multiplied by comfy-kitchen: for cards that Triton refuses.

Its own 4-bit formats cannot hold ours: a table of 16 levels for the whole tensor and a scale per group, where ours
has a zero point per group; or one scale per row.
"""

import torch
from torch import Tensor

from ..int8_linear import kitchen_impl as int8
from ..numerics import decode_int4


def refusal(
    device: torch.device,
    *,
    K: int,
    N: int | None = None,
    dtype: torch.dtype = torch.float32,
    symmetric: bool = True,
) -> str | None:
    return int8.refusal(device, K=K, N=N, dtype=dtype, symmetric=symmetric)


def int4_linear(a: Tensor, packed: Tensor, *, levels: Tensor, table: Tensor | None = None, **epilogue) -> Tensor:
    """As the reference. The int8 weight is written to memory at every call."""
    return int8.int8_linear(a, decode_int4(packed, levels, table), **epilogue)
