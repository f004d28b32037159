"""Host side that both linear kernels share: the tile, the options and the operands of a launch. Imports no triton."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import autotune
from .directions import check
from .tiles import Tile, bucket_of, candidates, tile_for
from .triton_device import capability_of, selected


def run(op: str, launch: Callable[[Tile], None], device: torch.device, M: int, N: int, K: int, flags: tuple) -> None:
    """launch(tile) on the tensors' device, with the tabled tile or, where asked for, the tuned one."""
    capability = capability_of(device)
    with selected(device):
        tile = tile_for(op, capability, M, N, K)
        if autotune.enabled(device):
            key = autotune.key_of(op, device, capability, M, N, K, flags)
            options = candidates(op, capability, bucket_of(M), N, K)
            tile = autotune.tuned_tile(key, options, tile, launch, device)
        launch(tile)


def launch_options(tile: Tile, K: int, rank: int, groups: int, capability: int) -> dict[str, object]:
    """The constexprs that both linears share, and Triton's own options. No fused multiply-add: it has other bits."""
    even = K % (tile.block_k * tile.dots) == 0
    return {
        "RANK": rank,
        "INTERPOLATE": groups > 1,
        "EVEN_K": even,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "DOTS": tile.dots,
        "PARTS": tile.parts_with(rank > 0, even),
        "EARLY": tile.early and even,
        "OPAQUE": capability > 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": False,
    }


def aligned(operand: Tensor) -> Tensor:
    """Contiguous and at an address that words and descriptors can be read from: a view into a file may not be."""
    operand = operand.contiguous()
    return operand if operand.data_ptr() % 16 == 0 else operand.clone()


def epilogue_operands(
    row_scale: Tensor,
    column_scale: Tensor,
    row_zero: Tensor | None,
    column_sum: Tensor | None,
    bias: Tensor | None,
    correction: Tensor | None,
    coordinates: Tensor | None,
    responses: Tensor | None,
    index: Tensor,
    fraction: Tensor,
) -> tuple[Tensor | None, ...]:
    """In the order of the kernels' arguments. column_sum only matters where a zero point multiplies it."""
    check(coordinates, responses, row_scale.shape[0], column_scale.numel())
    if row_zero is not None and column_sum is None:
        raise ValueError("an asymmetric activation needs the weight's column sums")
    return (
        row_scale,
        row_zero,
        column_scale.contiguous(),
        None if row_zero is None or column_sum is None else column_sum.contiguous(),
        None if bias is None else bias.contiguous(),
        None if correction is None else correction.contiguous(),
        None if coordinates is None else coordinates.contiguous(),
        None if responses is None else responses.contiguous(),
        None if correction is None else index,
        None if correction is None else fraction,
    )


def row_stride(rows: Tensor | None) -> int:
    """Elements between rows of [M, 1]; 0 where one value is expanded."""
    return 0 if rows is None else rows.stride(0)


def groups_of(correction: Tensor | None) -> int:
    return 1 if correction is None else correction.shape[0]


def rank_of(responses: Tensor | None) -> int:
    return 0 if responses is None else responses.shape[0]
