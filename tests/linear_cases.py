"""Operands and expectations shared by the tests of the two Triton linears. Not a test module."""

import os

import pytest
import torch
from dit_quant.kernels.tiles import TILES, Tile, family_of
from dit_quant.kernels.triton_device import capability_of

# directions of a full case
RANK = 3


def case(M: int, N: int, codes: torch.Tensor, *, full: bool, dtype: torch.dtype, device, T: int = 3) -> dict:
    """Epilogue keywords for weight codes [N, K]; full: zero points, bias, corrections and directions too."""
    random = torch.Generator().manual_seed(M * N)
    given = {
        "row_scale": torch.rand(M, 1, generator=random) / 64,
        "column_scale": torch.rand(N, 1, generator=random) / 64,
        "index": torch.tensor([T - 2 if T > 1 else 0]),
        "fraction": torch.tensor([0.3]),
    }
    if full:
        given |= {
            "row_zero": torch.randint(-127, 128, (M, 1), generator=random).float(),
            "column_sum": codes.sum(dim=1, dtype=torch.int32),
            "bias": torch.randn(N, generator=random).to(dtype),
            "correction": torch.randn(T, N, generator=random).half(),
            "coordinates": torch.randn(M, RANK, generator=random).bfloat16(),
            "responses": torch.randn(RANK, N, generator=random).half(),
        }
    return {**{name: value.to(device) for name, value in given.items()}, "dtype": dtype}


def activations(M: int, K: int, device) -> torch.Tensor:
    random = torch.Generator().manual_seed(M + K)
    return torch.randint(-127, 128, (M, K), dtype=torch.int8, generator=random).to(device)


def expected(reference, *operands, dtype: torch.dtype, **epilogue) -> torch.Tensor:
    """The reference's output. Triton's interpreter truncates fp32 to bf16 where every GPU rounds: so does this."""
    if dtype is torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        exact = reference(*operands, dtype=torch.float32, **epilogue)
        return (exact.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return reference(*operands, dtype=dtype, **epilogue)


def skip_on_other_cards(tile: Tile, op: str, device: torch.device) -> None:
    """A card's shared memory holds its own family's tiles; the interpreter holds all."""
    if (device.type == "cuda" or capability_of(device)) and tile not in TILES[op, family_of(capability_of(device))]:
        pytest.skip("a tile of another family")
