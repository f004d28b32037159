"""Device side of a 4-bit weight: packed codes and levels to int8, in registers."""

# Triton's decorators are beyond the type checker
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def consecutive_bytes(words, PERMUTE: tl.constexpr):
    """words of 8 nibbles -> (nibbles 0 to 3, nibbles 4 to 7), one per byte, lowest first.

    PERMUTE: the byte permutation of NVIDIA cards, which Triton does not find by itself; 5 instructions instead of 9.
    """
    if PERMUTE:
        even, odd = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
        first = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5140;", "=r,r,r", [even, odd], dtype=tl.int32, is_pure=True, pack=1
        )
        second = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7362;", "=r,r,r", [even, odd], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        first, second = words & 0xFFFF, (words >> 16) & 0xFFFF
        first, second = (first | (first << 8)) & 0x00FF00FF, (second | (second << 8)) & 0x00FF00FF
        first, second = (first | (first << 4)) & 0x0F0F0F0F, (second | (second << 4)) & 0x0F0F0F0F
    return first, second


@triton.jit
def looked_up(words, table_ptr, PERMUTE: tl.constexpr):
    """words of 8 nibbles -> (4, 4) bytes table[nibble] + 128, as `consecutive_bytes` without a table."""
    if PERMUTE:
        # entries 0 to 7 and 8 to 15 by the low three bits of each nibble, then one of both by the high bit
        low0, low1 = tl.load(table_ptr) ^ -0x7F7F7F80, tl.load(table_ptr + 1) ^ -0x7F7F7F80
        high0, high1 = tl.load(table_ptr + 2) ^ -0x7F7F7F80, tl.load(table_ptr + 3) ^ -0x7F7F7F80
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b32 three, which, low, high;
            and.b32 three, $2, 0x77777777;
            shr.u32 which, $2, 1;
            and.b32 which, which, 0x44444444;
            or.b32 which, which, 0x32103210;
            prmt.b32 low, $3, $4, three;
            prmt.b32 high, $5, $6, three;
            prmt.b32 $0, low, high, which;
            shr.u32 three, three, 16;
            shr.u32 which, which, 16;
            prmt.b32 low, $3, $4, three;
            prmt.b32 high, $5, $6, three;
            prmt.b32 $1, low, high, which;
            }""",
            "=&r,=&r,r,r,r,r,r",
            [words, low0, low1, high0, high1],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        first, second = consecutive_bytes(words, False)
        bytes_ptr = table_ptr.to(tl.pointer_type(tl.int8), bitcast=True)
        first, second = entries(first, bytes_ptr), entries(second, bytes_ptr)
    return first, second


@triton.jit
def entries(codes, table_ptr):
    """4 codes per word -> 4 bytes table[code] + 128 per word."""
    found = codes * 0
    for byte in tl.static_range(4):
        entry = tl.load(table_ptr + ((codes >> (8 * byte)) & 0xF)).to(tl.int32) + 128
        found = found | (entry << (8 * byte))
    return found


@triton.jit
def int8_of(first, second, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, THROUGH_SHARED: tl.constexpr):
    """Words of 4 int8 [BLOCK_N, BLOCK_K / 8] twice -> [BLOCK_N, BLOCK_K] int8. Compiles to nothing.

    THROUGH_SHARED: with a permutation over which Triton does not move the operand's layout conversion, so that each
    weight is decoded by one thread and passed on through shared memory, not decoded by every warp that needs it.
    """
    words = tl.join(first, second)
    if THROUGH_SHARED:
        low = tl.join(words.to(tl.int8), (words >> 8).to(tl.int8))
        high = tl.join((words >> 16).to(tl.int8), (words >> 24).to(tl.int8))
        codes = tl.join(low, high).permute(0, 1, 2, 4, 3)
    else:
        halves = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
        codes = tl.join(halves.to(tl.int8), (halves >> 8).to(tl.int8))
    return codes.reshape(BLOCK_N, BLOCK_K)


@triton.jit
def level_pointers(levels_ptr, first, rows, stride, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """[BLOCK_N, BLOCK_K / 32] pointers to the levels of every 4 words of `rows`, counted from `first`: to one level, at
    groups of 16 to two as an int16.

    4 words are the 16 bytes that a thread loads. Nothing is said of what divides `stride`: if Triton knew the levels to
    be aligned, a thread would load several and pass them on through shared memory, with two more barriers per step.
    """
    fours = tl.arange(0, BLOCK_K // 32)
    levels_ptr += first.to(tl.int64) * stride
    if GROUP == 16:
        levels_ptr = levels_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
        stride = stride // 2
    else:
        fours = fours * 32 // GROUP
    return levels_ptr + rows[:, None] * stride + fours[None, :]


@triton.jit
def levels_before(k, GROUP: tl.constexpr):
    """How many of what `level_pointers` point to belong to the first k columns of a row, a multiple of 32."""
    return k // (GROUP if GROUP > 16 else 32)


@triton.jit
def levels_of(loaded, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """What lies at `level_pointers` -> levels [BLOCK_N, BLOCK_K / 32], at groups of 16 twice as many."""
    levels = loaded.to(tl.int32)
    if GROUP == 16:
        levels = tl.join(levels & 0xFF, (levels >> 8) & 0xFF).reshape(BLOCK_N, BLOCK_K // 16)
    return levels


@triton.jit
def decode_tile(
    words,
    levels,
    table_ptr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PERMUTE: tl.constexpr,
    THROUGH_SHARED: tl.constexpr,
):
    """words [BLOCK_N, BLOCK_K / 8] int32, levels [BLOCK_N, L] uint8 -> int8 codes [BLOCK_N, BLOCK_K].

    (code - zero) multiplier + 128 lies in 0 to 255 for every code that an encoder writes, so four of them are one
    multiplication and one addition of 32-bit words, with no carry between bytes in the sum; then - 128 is a flip of
    each sign bit. With a table, table[code] + 128 takes the place of the code and 128 that of the zero.
    """
    LEVELS: tl.constexpr = levels.shape[1]
    REPEAT: tl.constexpr = BLOCK_K // 8 // LEVELS
    levels = levels.to(tl.int32)
    multiplier = levels >> 4
    if table_ptr is None:
        first, second = consecutive_bytes(words, PERMUTE)
        offset = (128 - (levels & 0xF) * multiplier) * 0x01010101
    else:
        first, second = looked_up(words, table_ptr, PERMUTE)
        offset = (128 - 128 * multiplier) * 0x01010101
    multiplier = tl.broadcast_to(multiplier[:, :, None], (BLOCK_N, LEVELS, REPEAT)).reshape(BLOCK_N, BLOCK_K // 8)
    offset = tl.broadcast_to(offset[:, :, None], (BLOCK_N, LEVELS, REPEAT)).reshape(BLOCK_N, BLOCK_K // 8)
    first, second = first * multiplier + offset, second * multiplier + offset
    return int8_of(first ^ -0x7F7F7F80, second ^ -0x7F7F7F80, BLOCK_N, BLOCK_K, THROUGH_SHARED)
