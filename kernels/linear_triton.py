"""Device side that both linear kernels share: the walk over the output's tiles, and the epilogue in its two forms."""

# Triton's decorators are beyond the type checker
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005 (the compiler knows no starred tuples)
import triton
import triton.language as tl


@triton.jit
def tile_position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile of this program: GROUP_M rows of tiles are walked column by column, so that L2 sees both operands again."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % rows, within // rows


@triton.jit
def table_row(table_ptr, index_ptr, fraction_ptr, T, N, offs_n, mask_n, INTERPOLATE: tl.constexpr):
    """Row index + fraction of a [T, N] table at offs_n, fp32; both stay on the device. As numerics.lerp_rows."""
    index = tl.load(index_ptr).to(tl.int64)
    low = tl.load(table_ptr + index * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if INTERPOLATE:
        following = tl.minimum(index + 1, T - 1)
        high = tl.load(table_ptr + following * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        low = low + tl.load(fraction_ptr) * (high - low)
    return low


@triton.jit
def kept(x, OPAQUE: tl.constexpr):
    """x, 32 bits each, or the bits of 16, which stay in the layout they were loaded in: one value per thread, not one
    per output column. Compilers move conversions of layouts over that of types, so that 16 bits are to be kept as such.

    OPAQUE: NVIDIA cards; elsewhere nothing is done.
    """
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.int16, bitcast=True)
        if OPAQUE:
            x = tl.inline_asm_elementwise("mov.b16 $0, $1;", "=h,h", [x], dtype=x.dtype, is_pure=False, pack=1)
    elif OPAQUE:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)
    return x


@triton.jit
def addend(operands, N, offs_n, mask_n, INTERPOLATE: tl.constexpr):
    """Bias + correction at offs_n, fp32; 0 where both are absent."""
    _, _, _, _, bias_ptr, correction_ptr, _, _, index_ptr, fraction_ptr, T, _, _ = operands
    total = tl.zeros(offs_n.shape, tl.float32)
    if bias_ptr is not None:
        total = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if correction_ptr is not None:
        c = table_row(correction_ptr, index_ptr, fraction_ptr, T, N, offs_n, mask_n, INTERPOLATE)
        total = c if bias_ptr is None else total + c
    return total


@triton.jit
def epilogue_vectors(
    operands, M, N, first_m, first_n,
    RANK: tl.constexpr, INTERPOLATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OPAQUE: tl.constexpr,
):  # fmt: skip
    """All that a tile's epilogue reads, to be called before the main loop: a register or two per vector and thread.

    operands: of the epilogue, in the order of the kernels' arguments, index and fraction, T and the two strides.
    -> row scale, row zero [BLOCK_M]; column scale, sum, addend [BLOCK_N] fp32; RANK vectors of coordinates, bits of
    bf16, and of responses, bits of fp16.
    """
    row_scale_ptr, row_zero_ptr, column_scale_ptr, column_sum_ptr, _, _, coordinates_ptr, responses_ptr = operands[:8]
    stride_row_scale, stride_row_zero = operands[11:]
    offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    row_scale = kept(tl.load(row_scale_ptr + offs_m * stride_row_scale, mask=mask_m, other=0.0), OPAQUE)
    column_scale = kept(tl.load(column_scale_ptr + offs_n, mask=mask_n, other=0.0), OPAQUE)
    row_zero, column_sum = row_scale, column_scale
    if row_zero_ptr is not None:
        row_zero = kept(tl.load(row_zero_ptr + offs_m * stride_row_zero, mask=mask_m, other=0.0), OPAQUE)
        column_sum = kept(tl.load(column_sum_ptr + offs_n, mask=mask_n, other=0).to(tl.float32), OPAQUE)
    added = addend(operands, N, offs_n, mask_n, INTERPOLATE)
    coordinates = ()
    responses = ()
    for r in tl.static_range(RANK):
        p = tl.load(coordinates_ptr + offs_m * RANK + r, mask=mask_m, other=0.0)
        response = tl.load(responses_ptr + r * N + offs_n, mask=mask_n, other=0.0)
        coordinates = coordinates + (kept(p, OPAQUE),)
        responses = responses + (kept(response, OPAQUE),)
    return row_scale, row_zero, column_scale, column_sum, kept(added, OPAQUE), coordinates, responses


@triton.jit
def plus_direction(y, p, response):
    """y + p response; their product is exact: fused or not, the bits are the same."""
    return tl.fma(tl.broadcast_to(p[:, None], y.shape), tl.broadcast_to(response[None, :], y.shape), y)


@triton.jit
def write_tile(
    y, y_ptr, M, N, first_m, first_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STORE: tl.constexpr
):  # fmt: skip
    """y [BLOCK_M, BLOCK_N] fp32 -> its place in [M, N]. STORE: y_ptr is a descriptor, and the copy engine writes."""
    if STORE:
        y_ptr.store([first_m, first_n], y.to(y_ptr.dtype))
    else:
        offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        # M N may pass 2**31, a tile never does: one scalar in int64, offsets in int32
        y_ptr += first_m.to(tl.int64) * N
        tl.store(
            y_ptr + tl.arange(0, BLOCK_M)[:, None] * N + offs_n[None, :],
            y.to(y_ptr.dtype.element_ty),
            mask=(offs_m < M)[:, None] & (offs_n < N)[None, :],
        )


@triton.jit
def finish_early(
    acc, vectors, operands, y_ptr, M, N, first_m, first_n,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] int32 -> y, with the results of `epilogue_vectors`; the reference's operations in its
    order, none of them fused."""
    row_scale, row_zero, column_scale, column_sum, added, coordinates, responses = vectors
    _, row_zero_ptr, _, _, bias_ptr, correction_ptr = operands[:6]
    y = acc.to(tl.float32)
    if row_zero_ptr is not None:
        y = y - row_zero[:, None] * column_sum[None, :]
    y = y * row_scale[:, None] * column_scale[None, :]
    for r in tl.static_range(RANK):
        p, response = coordinates[r].to(tl.bfloat16, bitcast=True), responses[r].to(tl.float16, bitcast=True)
        y = plus_direction(y, p.to(tl.float32), response.to(tl.float32))
    if bias_ptr is not None or correction_ptr is not None:
        y = y + added[None, :]
    write_tile(y, y_ptr, M, N, first_m, first_n, BLOCK_M, BLOCK_N, STORE)


@triton.jit
def finish_late(
    acc, operands, y_ptr, M, N, first_m, first_n,
    RANK: tl.constexpr, INTERPOLATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """As `finish_early`, where registers do not hold the vectors during the main loop."""
    row_scale_ptr, row_zero_ptr, column_scale_ptr, column_sum_ptr, bias_ptr, correction_ptr = operands[:6]
    coordinates_ptr, responses_ptr = operands[6:8]
    stride_row_scale, stride_row_zero = operands[11:]
    offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    y = acc.to(tl.float32)
    if row_zero_ptr is not None:
        row_zero = tl.load(row_zero_ptr + offs_m * stride_row_zero, mask=mask_m, other=0.0)
        column_sum = tl.load(column_sum_ptr + offs_n, mask=mask_n, other=0).to(tl.float32)
        y = y - row_zero[:, None] * column_sum[None, :]
    row_scale = tl.load(row_scale_ptr + offs_m * stride_row_scale, mask=mask_m, other=0.0)
    column_scale = tl.load(column_scale_ptr + offs_n, mask=mask_n, other=0.0)
    y = y * row_scale[:, None] * column_scale[None, :]
    if RANK > 0:
        # one after the other: unrolled, the loads of all would want registers at once
        for r in tl.range(RANK, num_stages=1, loop_unroll_factor=1):
            p = tl.load(coordinates_ptr + offs_m * RANK + r, mask=mask_m, other=0.0).to(tl.float32)
            response = tl.load(responses_ptr + r * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            y = plus_direction(y, p, response)
    if bias_ptr is not None or correction_ptr is not None:
        y = y + addend(operands, N, offs_n, mask_n, INTERPOLATE)[None, :]
    write_tile(y, y_ptr, M, N, first_m, first_n, BLOCK_M, BLOCK_N, STORE)


@triton.jit
def halves(acc):
    """Left and right columns."""
    HALF: tl.constexpr = acc.shape[1] // 2
    return acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1).split()


@triton.jit
def finish_tile(
    acc, vectors, operands, y_ptr, M, N, first_m, first_n,
    RANK: tl.constexpr, INTERPOLATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] int32 -> y. vectors: of `epilogue_vectors`, or None.

    PARTS 2, 4: columns one part after the other, for tiles whose column vectors would not fit in registers.
    """
    if vectors is not None:
        finish_early(acc, vectors, operands, y_ptr, M, N, first_m, first_n, RANK, BLOCK_M, BLOCK_N, STORE)
    else:
        # no function calls itself: Triton before 3.5 looks for the end of that forever
        parts = (acc,)
        if PARTS == 2:
            parts = halves(acc)
        elif PARTS == 4:
            left, right = halves(acc)
            parts = halves(left) + halves(right)
        WIDTH: tl.constexpr = BLOCK_N // PARTS
        for part in tl.static_range(PARTS):
            finish_late(
                parts[part], operands, y_ptr, M, N, first_m, first_n + part * WIDTH,
                RANK, INTERPOLATE, BLOCK_M, WIDTH, STORE,
            )  # fmt: skip
