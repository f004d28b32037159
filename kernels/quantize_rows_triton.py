"""The two quantizer kernels: rows that fit in registers are read once, longer ones twice."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005 (the compiler knows no starred tuples)
import triton
import triton.language as tl

from .directions_triton import columns_of, coordinates_along, less_directions
from .launcher import GROUP_POINTERS
from .quantizing_triton import (
    asymmetric_range,
    column_tables,
    encode,
    gelu,
    larger,
    load_rows,
    mirrored,
    normalise,
    rotate,
    round_even,
    safe_scale,
    sigmoid_product,
    smaller,
    table_row,
    table_row_again,
    table_value,
)


@triton.jit
def prologue(chunk, up, PROLOGUE: tl.constexpr):
    """What stands before the quantizer, column by column."""
    x = chunk.to(tl.float32)
    if PROLOGUE == "swiglu":
        x = sigmoid_product(x, x) * up.to(tl.float32)
    elif PROLOGUE == "gelu" or PROLOGUE == "gelu_tanh":
        x = gelu(x, PROLOGUE)
    return x


# sizes that change from call to call must not compile anew; those that steer vectors stay specialised
@triton.jit(do_not_specialize=["M", "T", "tokens", "eps"], do_not_specialize_on_alignment=GROUP_POINTERS)
def quantize_rows(
    x_ptr,
    up_ptr,
    weight_ptr,
    bias_ptr,
    gamma_ptr,
    beta_ptr,
    shift_ptr,
    smooth_ptr,
    directions_ptr,
    coordinates_ptr,
    static_scale_ptr,
    static_zero_ptr,
    index_ptr,
    fraction_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    M,
    K,
    T,
    x_stride,
    up_stride,
    tokens,
    gamma_stride,
    beta_stride,
    eps,
    PROLOGUE: tl.constexpr,
    RANGE: tl.constexpr,
    ORDER: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    PREFETCH: tl.constexpr,
    STAGES: tl.constexpr,
    HOLD_SHIFT: tl.constexpr,
    FIND: tl.constexpr,
):
    """Whole rows: CHUNKS * WIDTH >= K = COLUMNS. RANGE "symmetric", "asymmetric" or "static".

    FIND: the coordinates along the directions are an output, not an operand. HOLD_SHIFT: the shift stays in registers.
    PREFETCH: the next tile is loaded to registers meanwhile. STAGES > 1: the next STAGES - 1 to shared memory.
    """
    # what the compiler knows to be inside needs no mask, no zeros to start from and no address of its own
    K = COLUMNS
    PADDED: tl.constexpr = CHUNKS * WIDTH > COLUMNS
    index = tl.load(index_ptr)
    fraction = tl.load(fraction_ptr).to(tl.float32)
    shifts, inverses = column_tables(
        shift_ptr if HOLD_SHIFT else None, smooth_ptr, index, fraction, T, K, WIDTH, CHUNKS
    )
    zero = tl.zeros((ROWS,), tl.float32)
    if RANGE == "static":
        value = table_value(static_scale_ptr, index, fraction, T)
        inverse = tl.zeros((ROWS,), tl.float32) + tl.div_rn(1.0, value)
        origin = 0.0
        if static_zero_ptr is not None:
            origin = round_even(table_value(static_zero_ptr, index, fraction, T))
            zero += origin
        if tl.program_id(0) == 0:
            tl.store(scale_ptr, value)
            if static_zero_ptr is not None:
                tl.store(zero_ptr, origin)

    programs = tl.num_programs(0)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if PREFETCH:
        coming = load_rows(x_ptr, rows, M, K, x_stride, ROWS, WIDTH, CHUNKS)
        coming_up = coming
        if PROLOGUE == "swiglu":
            coming_up = load_rows(up_ptr, rows, M, K, up_stride, ROWS, WIDTH, CHUNKS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), programs, num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = rows < M
        if PREFETCH:
            chunks = coming
            ups = coming_up
            # the next tile is on its way while this one is worked on
            coming = load_rows(x_ptr, rows + programs * ROWS, M, K, x_stride, ROWS, WIDTH, CHUNKS)
            coming_up = coming
            if PROLOGUE == "swiglu":
                coming_up = load_rows(up_ptr, rows + programs * ROWS, M, K, up_stride, ROWS, WIDTH, CHUNKS)
        else:
            chunks = load_rows(x_ptr, rows, M, K, x_stride, ROWS, WIDTH, CHUNKS)
            ups = chunks
            if PROLOGUE == "swiglu":
                ups = load_rows(up_ptr, rows, M, K, up_stride, ROWS, WIDTH, CHUNKS)
        if PROLOGUE == "layer" or PROLOGUE == "rms":
            chunks = normalise(
                chunks, weight_ptr, bias_ptr, gamma_ptr, beta_ptr, tl.minimum(rows, M - 1) // tokens, K,
                gamma_stride, beta_stride, eps, ROWS, WIDTH, CHUNKS, PROLOGUE,
            )  # fmt: skip
        shifted = ()
        for chunk in tl.static_range(CHUNKS):
            y = prologue(chunks[chunk], ups[chunk], PROLOGUE)
            if shift_ptr is not None:
                if HOLD_SHIFT:
                    y = y - shifts[chunk]
                else:
                    columns = columns_of(y)
                    mask = columns < K - chunk * WIDTH
                    y = y - table_row_again(shift_ptr + chunk * WIDTH, index, fraction, T, K, columns, mask)
            shifted = shifted + (y,)
        coordinates = ()
        if FIND:
            along = coordinates_along(
                shifted, inverses, directions_ptr, coordinates_ptr, rows, inside, K,
                ROWS, WIDTH, CHUNKS, smooth_ptr is not None, RANK,
            )  # fmt: skip
        for r in tl.static_range(RANK):
            p = along[r] if FIND else tl.load(coordinates_ptr + rows * RANK + r, mask=inside, other=0.0)
            coordinates = coordinates + (p.to(tl.float32),)
        transformed = ()
        for chunk in tl.static_range(CHUNKS):
            y = less_directions(shifted[chunk], directions_ptr, coordinates, chunk * WIDTH, K, RANK)
            if smooth_ptr is not None:
                y = y * inverses[chunk]
            transformed = transformed + (rotate(y, ORDER, VECTOR),)

        if RANGE == "symmetric":
            extent = tl.abs(transformed[0])
            for chunk in tl.static_range(1, CHUNKS):
                extent = larger(extent, tl.abs(transformed[chunk]))
            scale = safe_scale(tl.reduce(extent, 1, larger), 127.0)
            inverse = tl.div_rn(1.0, scale)
        elif RANGE == "asymmetric":
            # only the last chunk can reach beyond K
            last = transformed[CHUNKS - 1]
            within = (tl.arange(0, WIDTH) < K - (CHUNKS - 1) * WIDTH)[None, :]
            low = tl.where(within, last, float("inf")) if PADDED else last
            high = tl.where(within, last, float("-inf")) if PADDED else last
            for chunk in tl.static_range(CHUNKS - 1):
                low = smaller(low, transformed[chunk])
                high = larger(high, transformed[chunk])
            # one reduction for both ends
            high, low = tl.split(tl.reduce(tl.join(high, -low), 1, larger))
            scale, inverse, zero = asymmetric_range(-low, high)
        if RANGE != "static":
            tl.store(scale_ptr + rows, scale, mask=inside)
            if RANGE == "asymmetric":
                tl.store(zero_ptr + rows, zero, mask=inside)

        start = codes_ptr + rows.to(tl.int64)[:, None] * K
        for chunk in tl.static_range(CHUNKS):
            columns = tl.arange(0, WIDTH)
            codes = encode(transformed[chunk], inverse[:, None], zero[:, None], RANGE)
            mask = inside[:, None] & (columns < K - chunk * WIDTH)[None, :]
            tl.store(start + chunk * WIDTH + mirrored(columns, ORDER, VECTOR)[None, :], codes, mask=mask)


@triton.jit
def long_columns(
    x_ptr, up_ptr, shift_ptr, smooth_ptr, directions_ptr, coordinates_ptr, row, index, fraction, T, K, columns,
    PROLOGUE: tl.constexpr, ORDER: tl.constexpr, RANK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One row's transformed `columns` [1, WIDTH]; x_ptr and up_ptr point to the row."""
    mask = columns < K
    x = tl.load(x_ptr + columns, mask=mask, other=0.0)
    up = x
    if PROLOGUE == "swiglu":
        up = tl.load(up_ptr + columns, mask=mask, other=0.0)
    y = prologue(x, up, PROLOGUE)
    if shift_ptr is not None:
        y = y - table_row(shift_ptr, index, fraction, T, K, columns, mask)
    for r in tl.static_range(RANK):
        p = tl.load(coordinates_ptr + row * RANK + r).to(tl.float32)
        v = tl.load(directions_ptr + r * K + columns, mask=mask, other=0.0, eviction_policy="evict_last")
        y = tl.fma(tl.broadcast_to(-p, y.shape), v.to(tl.float32), y)
    if smooth_ptr is not None:
        smooth = tl.load(smooth_ptr + columns, mask=mask, other=1.0, eviction_policy="evict_last")
        y = y * tl.div_rn(1.0, smooth.to(tl.float32))
    return rotate(y, ORDER, VECTOR)


@triton.jit(do_not_specialize=["M", "T"], do_not_specialize_on_alignment=GROUP_POINTERS)
def quantize_long_rows(
    x_ptr,
    up_ptr,
    shift_ptr,
    smooth_ptr,
    directions_ptr,
    coordinates_ptr,
    static_scale_ptr,
    static_zero_ptr,
    index_ptr,
    fraction_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    M,
    K,
    T,
    x_stride,
    up_stride,
    PROLOGUE: tl.constexpr,
    RANGE: tl.constexpr,
    ORDER: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program per row: its range first, then, from L2, its codes. A static range needs the second pass only."""
    index = tl.load(index_ptr)
    fraction = tl.load(fraction_ptr).to(tl.float32)
    row = tl.program_id(0).to(tl.int64)
    start = x_ptr + row * x_stride
    up_start = start
    if PROLOGUE == "swiglu":
        up_start = up_ptr + row * up_stride
    if RANGE == "static":
        scale = table_value(static_scale_ptr, index, fraction, T)
        zero = 0.0
        if static_zero_ptr is not None:
            zero = round_even(table_value(static_zero_ptr, index, fraction, T))
        inverse = tl.div_rn(1.0, scale)
        if row == 0:
            tl.store(scale_ptr, scale)
            if static_zero_ptr is not None:
                tl.store(zero_ptr, zero)
    else:
        low = tl.full((1, WIDTH), float("inf"), tl.float32)
        high = -low
        for first in range(0, K, WIDTH):
            columns = first + tl.arange(0, WIDTH)[None, :]
            y = long_columns(
                start, up_start, shift_ptr, smooth_ptr, directions_ptr, coordinates_ptr, row, index, fraction, T, K,
                columns, PROLOGUE, ORDER, RANK, VECTOR,
            )  # fmt: skip
            low = tl.where(columns < K, smaller(low, y), low)
            high = tl.where(columns < K, larger(high, y), high)
        if RANGE == "symmetric":
            scale = safe_scale(tl.reduce(larger(tl.abs(low), tl.abs(high)), None, larger), 127.0)
            inverse = tl.div_rn(1.0, scale)
            zero = 0.0
        else:
            scale, inverse, zero = asymmetric_range(tl.reduce(low, None, smaller), tl.reduce(high, None, larger))
            tl.store(zero_ptr + row, zero)
        tl.store(scale_ptr + row, scale)
    for first in range(0, K, WIDTH):
        columns = first + tl.arange(0, WIDTH)
        y = long_columns(
            start, up_start, shift_ptr, smooth_ptr, directions_ptr, coordinates_ptr, row, index, fraction, T, K,
            columns[None, :], PROLOGUE, ORDER, RANK, VECTOR,
        )  # fmt: skip
        place = codes_ptr + row * K + mirrored(columns, ORDER, VECTOR)[None, :]
        tl.store(place, encode(y, inverse, zero, RANGE), mask=columns[None, :] < K)
