"""int8 product by comfy-kitchen's CUDA kernels: CUTLASS on sm_80 and newer, its own tiles or cuBLAS on Turing."""

import torch
from torch import Tensor

from ..directions import along, check
from ..kitchen import codes_product, device_refusal
from ..numerics import addend

# CUTLASS loads 16 codes at a time, and stores 16 bytes
K_MULTIPLE = 16
N_MULTIPLE = 8


def refusal(
    device: torch.device,
    *,
    K: int,
    N: int | None = None,
    dtype: torch.dtype = torch.float32,
    symmetric: bool = True,
) -> str | None:
    reason = device_refusal(device)
    if reason is not None:
        return reason
    if not symmetric:
        return "its epilogue has no zero point"
    if K % K_MULTIPLE:
        return f"K={K} is not a multiple of {K_MULTIPLE}"
    if N is not None and N % N_MULTIPLE:
        return f"N={N} is not a multiple of {N_MULTIPLE}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no {dtype} output"
    return None


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
    """As the reference. Its own bias is in the output's type and may be fused into the last product, so p B, bias
    and c(sigma) are added here, in fp32 and in the reference's order."""
    if row_zero is not None:
        raise ValueError("comfy-kitchen's epilogue has no zero point")
    check(coordinates, responses, len(a), len(w))
    plain = bias is None and correction is None and coordinates is None
    y = codes_product()(a, w, row_scale, column_scale, None, dtype if plain else torch.float32)
    if coordinates is not None and responses is not None:
        y = along(y, coordinates, responses)
    added = addend(bias, correction, index, fraction)
    return (y if added is None else y + added).to(dtype)
