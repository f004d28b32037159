"""4-bit weights in torch ops: a block of output columns is decoded in machine words, then multiplied as int8."""

import torch
from torch import Tensor

from ..int8_linear.torch_impl import Epilogue, multiply
from ..numerics import decode_int4

# weights of a block. CPU: the decoded block stays in the last cache; else: bounds the int8 copy
CPU_BLOCK = 2**22
DEVICE_BLOCK = 2**26
# by bytes
WORDS = {8: torch.int64, 4: torch.int32}


def refusal(device: torch.device) -> str | None:
    """Runs wherever torch does."""
    return None


@torch.no_grad()
def int4_linear(
    a: Tensor,
    packed: Tensor,
    *,
    levels: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    index: Tensor,
    fraction: Tensor,
    table: Tensor | None = None,
    row_zero: Tensor | None = None,
    column_sum: Tensor | None = None,
    bias: Tensor | None = None,
    correction: Tensor | None = None,
    coordinates: Tensor | None = None,
    responses: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """As the reference, and as int8_linear of the decoded weight bit for bit."""
    N, K = len(packed), a.shape[1]
    y = torch.empty(len(a), N, dtype=dtype, device=a.device)
    epilogue = Epilogue.of(
        row_scale, column_scale, index, fraction, row_zero, column_sum, bias, correction, coordinates, responses
    )
    # whole cache lines of y, and columns that need no padding
    block = max(64, (CPU_BLOCK if a.device.type == "cpu" else DEVICE_BLOCK) // max(K, 1) // 64 * 64)
    for start in range(0, N, block):
        part = slice(start, start + block)
        w = decode(packed[part], levels[part], table)
        multiply(a, w, epilogue.columns(part), y[:, part])
    return y


def decode(packed: Tensor, levels: Tensor, table: Tensor | None = None) -> Tensor:
    """`decode_int4`, eight or four weights to a machine word, for weights whose codes stay within int8.

    With a group's multiplier m and zero z, every byte of word * m + (128 - z m) 0x01..01 is code8 + 128, in 1..255:
    nothing is carried from byte to byte, and flipping the top bits leaves code8.
    """
    size = 2 * packed.shape[1] // levels.shape[1]
    width = next((width for width in WORDS if size % width == 0), None)
    if table is not None or width is None:
        return decode_int4(packed, levels, table)
    word, ones = WORDS[width], int.from_bytes(b"\x01" * width, "little")
    # bytes hi lo -> the two nibbles as the bytes of an int16, low nibble first
    pairs = packed.to(torch.int16)
    pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F)
    words = pairs.view(word).unflatten(1, (levels.shape[1], -1))
    multiplier = levels >> 4
    offset = ((levels & 0xF) * multiplier).to(word).mul_(-ones).add_(128 * ones - (1 << 8 * width))
    torch.addcmul(offset[..., None], words, multiplier.to(word)[..., None], out=words)
    pairs.view(word).bitwise_xor_(128 * ones - (1 << 8 * width))
    return pairs.view(torch.int8)
