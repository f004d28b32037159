"""int8 x int8 -> int32, exact whatever the device has."""

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from ..backends import first_line
from ..dispatch import cannot_launch, warn_once

# AMD's data-centre cards. On others hipBLASLt lacks the product, raises, or ends the process, so that none is tried
HIP_PRODUCTS = ("gfx90a", "gfx94", "gfx95")

# any sum of this many products of codes is an exact fp32 integer: 1024 * 127**2 < 2**24
EXACT_COLUMNS = 1024
# fewer are padded: oneDNN takes one column for a vector of any stride
LEAST_COLUMNS = 8


def int8_matmul(a: Tensor, w: Tensor) -> Tensor:
    """a [M, K] int8, w [N, K] int8 -> a wᵀ [M, N] int32, exact for K <= 2**17.

    Padded to the sizes that the CUDA routine accepts (M > 16, K and N multiples of 8); zeros add nothing. Where that
    routine cannot be launched, fp32 products take over, with a warning.
    """
    if not int_mm_is_exact(a.device):
        return float_product(a, w)
    try:
        return padded_product(a, w)
    except RuntimeError as error:
        if a.device.type == "cpu" or not cannot_launch(error):
            raise
        lacking = f"torch has no int8 product on {a.device}"
        warn_once(f"{lacking} ({first_line(error)}); fp32 products run instead, which is slow", about=lacking)
        return float_product(a, w)


def padded_product(a: Tensor, w: Tensor) -> Tensor:
    """`int8_matmul` by torch._int_mm."""
    M, N, K = a.shape[0], w.shape[0], a.shape[1]
    pad_m, pad_n, pad_k = max(0, 32 - M), -N % 8, -K % 8
    if pad_m or pad_k:
        a = torch.nn.functional.pad(a, (0, pad_k, 0, pad_m))
    if pad_n or pad_k:
        w = torch.nn.functional.pad(w, (0, pad_k, 0, pad_n))
    return torch._int_mm(a.contiguous(), w.contiguous().t())[:M, :N]  # pyright: ignore[reportPrivateImportUsage]


@lru_cache(maxsize=16)
def int_mm_is_exact(device: torch.device) -> bool:
    """Whether torch._int_mm can be had and adds without saturation.

    On x86 CPUs without VNNI, oneDNN adds pairs of products in 16 bits, which 127 * 127 overflows: tried once.
    CUDA: cards before compute capability 7.5 have no int8 matrix product. HIP: see HIP_PRODUCTS.
    """
    if device.type == "cuda" and torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(HIP_PRODUCTS)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 5)
    if device.type != "cpu":
        return False
    ones = torch.ones(64, 64, dtype=torch.int8)
    return bool((torch._int_mm(127 * ones, 127 * ones) == 64 * 127**2).all())  # pyright: ignore[reportPrivateImportUsage]


def float_product(a: Tensor, w: Tensor) -> Tensor:
    """a [M, K], w [N, K] int8 -> [M, N] int32, through exact fp32 products; codes fit TF32 and bf16 as well."""
    total = torch.zeros(len(a), len(w), dtype=torch.int32, device=a.device)
    kind = a.device.type
    # autocast would turn them to half precision
    with torch.autocast(kind, enabled=False) if kind != "meta" and torch.is_autocast_enabled(kind) else nullcontext():
        for part in range(0, a.shape[1], EXACT_COLUMNS):
            columns = slice(part, part + EXACT_COLUMNS)
            total += torch.mm(a[:, columns].float(), w[:, columns].float().t()).to(torch.int32)
    return total
