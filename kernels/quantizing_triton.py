"""Device side of every activation quantizer: read rows once, transform, rotate, range, encode.

A program owns tiles of ROWS whole rows, each held as CHUNKS tensors [ROWS, WIDTH], and keeps the tables in registers
from tile to tile. The order of the fp32 operations is the reference's; launch with enable_fp_fusion=False.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005 (the compiler knows no starred tuples)
import triton
import triton.language as tl

# 1.5 * 2**23: adding it rounds |v| < 2**22 to an integer, ties to even, and leaves that integer in the low bits
MAGIC = tl.constexpr(12582912.0)
TINY = tl.constexpr(1.1754943508222875e-38)
# of a row's magnitude, which widens its range: see the reference
MARGIN = tl.constexpr(2.0**-20)


@triton.jit
def round_even(v):
    return (v + MAGIC) - MAGIC


@triton.jit
def table_row(table_ptr, index, fraction, T, K, columns, mask):
    """Row index + fraction of a table [T, K] at `columns`, fp32; the second row is read only where it counts."""
    low = tl.load(table_ptr + index * K + columns, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    following = tl.minimum(index + 1, T - 1)
    between = columns < tl.where(fraction != 0.0, K, 0)
    high = tl.load(table_ptr + following * K + columns, mask=between, other=0.0, eviction_policy="evict_last")
    return tl.where(between, low + fraction * (high.to(tl.float32) - low), low)


@triton.jit
def table_row_again(table_ptr, index, fraction, T, K, columns, mask):
    """The same for tables read anew for every row of x: where groups are not interpolated, nothing is computed. Where
    they are, the loads of one call wait for those of the last, which is short from the first cache only."""
    row = tl.load(table_ptr + index * K + columns, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if fraction != 0.0:
        following = tl.minimum(index + 1, T - 1)
        high = tl.load(table_ptr + following * K + columns, mask=mask, other=0.0, eviction_policy="evict_last")
        row = row + fraction * (high.to(tl.float32) - row)
    return row


@triton.jit
def table_value(table_ptr, index, fraction, T):
    """Entry index + fraction of a table [T], fp32."""
    low = tl.load(table_ptr + index).to(tl.float32)
    high = tl.load(table_ptr + tl.minimum(index + 1, T - 1)).to(tl.float32)
    return tl.where(fraction != 0.0, low + fraction * (high - low), low)


@triton.jit
def rotate(x, ORDER: tl.constexpr, VECTOR: tl.constexpr):
    """Block Hadamard over the last dimension of x [ROWS, WIDTH], except that the groups of VECTOR columns of a block
    come out in reverse order: see `mirrored`.

    out_i = (sum of the four) / 2 - x_(3-i) for every digit of the column. Reduced over pairs, so that the order of
    the sum is not the layout's to choose; 3-i is left to the store, so that no element changes its thread.
    """
    if ORDER >= 4:
        x = butterfly(x, 1)
    if ORDER >= 16:
        x = butterfly(x, 4)
    if ORDER >= 64:
        x = butterfly(x, 16)
    if ORDER >= 256:
        x = butterfly(x, 64)
    # what a thread holds side by side is turned round in its registers
    if ORDER >= 4:
        x = mirror(mirror(x, 1), 2)
    if ORDER >= 16:
        x = mirror(x, 4)
    if ORDER >= 16 and VECTOR >= 16:
        x = mirror(x, 8)
    return x


@triton.jit
def mirror(x, STRIDE: tl.constexpr):
    """Swaps the columns that differ in bit STRIDE: (a + b) - a in integers, which compiles to b."""
    y = tl.reshape(x.to(tl.int32, bitcast=True), (x.shape[0] * x.shape[1] // (2 * STRIDE), 2, STRIDE))
    y = tl.broadcast_to(tl.sum(y, axis=1, keep_dims=True), y.shape) - y
    return tl.reshape(y, (x.shape[0], x.shape[1])).to(tl.float32, bitcast=True)


@triton.jit
def butterfly(x, STRIDE: tl.constexpr):
    y = tl.reshape(x, (x.shape[0] * x.shape[1] // (4 * STRIDE), 2, 2, STRIDE))
    total = tl.sum(tl.sum(y, axis=2, keep_dims=True), axis=1, keep_dims=True)
    # half the sum is exact, so that fusing rounds as the reference does; in Triton 3.6 -y is 0 - y, an instruction
    return tl.reshape(tl.fma(tl.broadcast_to(total, y.shape), 0.5, y * -1.0), (x.shape[0], x.shape[1]))


@triton.jit
def mirrored(columns, ORDER: tl.constexpr, VECTOR: tl.constexpr):
    """Where the columns of `rotate` belong."""
    if ORDER > VECTOR:
        columns = tl.max_contiguous(tl.multiple_of(columns ^ (ORDER - VECTOR), VECTOR), VECTOR)
    return columns


@triton.jit
def safe_scale(extent, QMAX: tl.constexpr):
    step = tl.div_rn(extent, QMAX)
    return tl.where(step <= TINY, 1.0, step)


@triton.jit
def larger(a, b):
    """A NaN is larger than anything: tl.max would lose it, and with it that the row is broken."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def asymmetric_range(low, high):
    """-> scale, 1 / scale, zero; the fallbacks for constant and far-off rows are explained in the reference."""
    magnitude = tl.maximum(tl.abs(high), tl.abs(low))
    spread = high - low
    span = tl.where(spread > 0, spread, magnitude)
    far = magnitude > span * 128.0
    scale = safe_scale(tl.where(far, 2.0 * magnitude, span + magnitude * MARGIN), 254.0)
    inverse = tl.div_rn(1.0, scale)
    return scale, inverse, tl.where(far, 0.0, -127.0 - tl.ceil(low * inverse - 0.5))


@triton.jit
def encode(x, inverse, zero, RANGE: tl.constexpr):
    """x [ROWS, WIDTH] fp32, inverse and zero [ROWS, 1] -> int8 codes. |zero| < 2**21.

    Only a static range can be passed. Clamped before rounding: the bounds are integers, so that it comes to the same.
    """
    v = x * inverse
    if RANGE == "static":
        v = tl.minimum(tl.maximum(v, -127.0 - zero), 127.0 - zero)
    v = v + (zero + MAGIC)
    return v.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def sigmoid_product(x, u):
    """x sigmoid(u)."""
    return x / (1.0 + tl.exp(-u))


@triton.jit
def gelu(x, PROLOGUE: tl.constexpr):
    if PROLOGUE == "gelu_tanh":
        # x (1 + tanh u) / 2 = x sigmoid(2 u)
        y = sigmoid_product(x, 1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return y


@triton.jit
def load_rows(x_ptr, rows, M, K, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    """CHUNKS tensors [ROWS, WIDTH] in the dtype of x, zero beyond M and K."""
    chunks = ()
    start = x_ptr + rows.to(tl.int64)[:, None] * stride
    for chunk in tl.static_range(CHUNKS):
        columns = tl.arange(0, WIDTH)
        mask = (rows < M)[:, None] & (columns < K - chunk * WIDTH)[None, :]
        place = start + chunk * WIDTH + columns[None, :]
        chunks = chunks + (tl.load(place, mask=mask, other=0.0, eviction_policy="evict_first"),)
    return chunks


@triton.jit
def column_tables(shift_ptr, smooth_ptr, index, fraction, T, K, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    """Shift and 1 / smooth as CHUNKS tensors [1, WIDTH] each, or None."""
    shifts = ()
    inverses = ()
    for chunk in tl.static_range(CHUNKS):
        columns = (chunk * WIDTH + tl.arange(0, WIDTH))[None, :]
        mask = columns < K
        if shift_ptr is not None:
            shifts = shifts + (table_row(shift_ptr, index, fraction, T, K, columns, mask),)
        if smooth_ptr is not None:
            smooth = tl.load(smooth_ptr + columns, mask=mask, other=1.0, eviction_policy="evict_last")
            inverses = inverses + (tl.div_rn(1.0, smooth.to(tl.float32)),)
    return shifts, inverses


@triton.jit
def normalise(
    chunks,
    weight_ptr,
    bias_ptr,
    gamma_ptr,
    beta_ptr,
    sample,
    K,
    gamma_stride,
    beta_stride,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    PROLOGUE: tl.constexpr,
):
    """LayerNorm or RMSNorm, weight, bias, then y (1 + gamma) + beta, all fp32; sample [ROWS] chooses the modulation."""
    mean = tl.zeros((ROWS, 1), tl.float32)
    if PROLOGUE == "layer":
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            total += chunks[chunk].to(tl.float32)
        mean = tl.div_rn(tl.sum(total, axis=1), K * 1.0)[:, None]
    square = tl.zeros((ROWS, WIDTH), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        inside = (chunk * WIDTH + tl.arange(0, WIDTH) < K)[None, :]
        centred = tl.where(inside, chunks[chunk].to(tl.float32) - mean, 0.0)
        square += centred * centred
    variance = tl.div_rn(tl.sum(square, axis=1), K * 1.0)[:, None]
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    out = ()
    for chunk in tl.static_range(CHUNKS):
        columns = (chunk * WIDTH + tl.arange(0, WIDTH))[None, :]
        mask = columns < K
        y = tl.where(mask, (chunks[chunk].to(tl.float32) - mean) * inverse, 0.0)
        if weight_ptr is not None:
            y = y * tl.load(weight_ptr + columns, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if bias_ptr is not None:
            y = y + tl.load(bias_ptr + columns, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if gamma_ptr is not None:
            gamma = tl.load(gamma_ptr + sample.to(tl.int64)[:, None] * gamma_stride + columns, mask=mask, other=0.0)
            y = y * (1.0 + gamma.to(tl.float32))
        if beta_ptr is not None:
            beta = tl.load(beta_ptr + sample.to(tl.int64)[:, None] * beta_stride + columns, mask=mask, other=0.0)
            y = y + beta.to(tl.float32)
        out = out + (y,)
    return out
