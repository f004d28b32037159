"""What tokens do along a few directions: taken off before they are rounded, added again behind the product."""

import torch
from torch import Tensor

# in registers or in a cache beside everything else
MOST = 16


def along(y: Tensor, coordinates: Tensor, table: Tensor, sign: float = 1.0) -> Tensor:
    """y [M, D] fp32 -> y + sign p table, one direction after the other.

    8 bits of p [M, R] bf16 times 11 bits of the table [R, D] fp16 are exact in fp32: a fused multiply-add changes
    nothing, and only the order of the directions matters.
    """
    for p, row in zip(coordinates.float().unbind(1), table.float(), strict=True):
        y = y + (sign * p)[:, None] * row
    return y


def check(coordinates: Tensor | None, table: Tensor | None, M: int, D: int) -> None:
    """Raises ValueError where one of the two is missing, of the wrong size, or of a type whose products round."""
    if coordinates is None and table is None:
        return
    if coordinates is None or table is None:
        raise ValueError("directions and the tokens' coordinates along them come together")
    if (coordinates.dtype, table.dtype) != (torch.bfloat16, torch.float16):
        raise ValueError(f"coordinates are bf16 and their tables fp16, got {coordinates.dtype} and {table.dtype}")
    R = table.shape[0]
    if coordinates.shape != (M, R) or table.shape[1] != D:
        raise ValueError(
            f"coordinates {tuple(coordinates.shape)} and their table {tuple(table.shape)} are not [{M}, R], [R, {D}]"
        )
    if R > MOST:
        raise ValueError(f"{R} directions are more than {MOST}")


def check_tables(directions: Tensor | None, responses: Tensor | None, K: int, N: int) -> None:
    """What `check` asks of both tables of a layer, whose coordinates are found on the way."""
    if directions is None and responses is None:
        return
    if directions is None or responses is None:
        raise ValueError("directions and the weight's responses to them come together")
    if directions.dtype is not torch.float16 or responses.dtype is not torch.float16:
        raise ValueError(f"directions and responses are fp16, got {directions.dtype} and {responses.dtype}")
    R = directions.shape[0]
    if directions.shape[1] != K or responses.shape != (R, N):
        raise ValueError(
            f"directions {tuple(directions.shape)} and responses {tuple(responses.shape)} are not [R, {K}], [R, {N}]"
        )
    if R > MOST:
        raise ValueError(f"{R} directions are more than {MOST}")
