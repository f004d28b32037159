"""Where comfy-kitchen's CUDA kernels can be used. Imports no comfy_kitchen: only asking about a CUDA device does."""

from functools import lru_cache

import torch

# int8 tensor cores begin here; comfy-kitchen has Turing kernels
MIN_CAPABILITY = (7, 5)
# its product of int8 codes that are given, not made from x: private, the same from 0.2.24 to 0.2.40
CODES_PRODUCT = "_int4_linear_via_int8_values"


def codes_product():
    """(int8 a, int8 w, row scale, column scale, bias, dtype) -> [M, N]: scaled in fp32, rows first."""
    from comfy_kitchen.backends import cuda  # pyright: ignore[reportMissingImports]

    return getattr(cuda, CODES_PRODUCT)


def device_refusal(device: torch.device) -> str | None:
    """None where its CUDA kernels run, else the reason in one line."""
    if device.type != "cuda":
        return f"no kernels of its own for {device.type} tensors"
    if torch.version.hip:
        return "its HIP kernels take no ready-made int8 codes"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < MIN_CAPABILITY:
        return f"compute capability {major}.{minor} < {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return _extension_refusal()


@lru_cache(maxsize=1)
def _extension_refusal() -> str | None:
    try:
        from comfy_kitchen.backends import cuda  # pyright: ignore[reportMissingImports]
        from comfy_kitchen.registry import registry  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return f"not installed ({error})"
    if not registry.is_available("cuda"):
        # the host switches it off where torch was built for a CUDA older than 13
        return f"its CUDA kernels are switched off (torch is built for CUDA {torch.version.cuda})"
    if not hasattr(cuda, CODES_PRODUCT):
        return "this version has no product of ready-made int8 codes"
    return None
