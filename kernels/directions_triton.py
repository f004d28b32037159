"""Device side of the directions: what rows do along them is found, stored, and taken off."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: RUF005 (the compiler knows no starred tuples)
import triton
import triton.language as tl


@triton.jit
def columns_of(y):
    """0 to WIDTH - 1 for every row of y [ROWS, WIDTH]: each thread then loads what it needs of a table. What is loaded
    once for rows side by side passes through shared memory."""
    return tl.broadcast_to(tl.arange(0, y.shape[1])[None, :], y.shape)


@triton.jit
def direction(directions_ptr, r, first, columns, K):
    """Direction r of a table [R, K] at first + columns, fp32."""
    directions_ptr += r * K + first
    v = tl.load(directions_ptr + columns, mask=columns < K - first, other=0.0, eviction_policy="evict_last")
    return v.to(tl.float32)


@triton.jit
def less_directions(y, directions_ptr, coordinates, first, K, RANK: tl.constexpr):
    """y [ROWS, WIDTH] - p V at the columns from `first`. Fused: p V is exact, see kernels/directions.py."""
    for r in tl.static_range(RANK):
        v = direction(directions_ptr, r, first, columns_of(y), K)
        y = tl.fma(tl.broadcast_to(-coordinates[r][:, None], y.shape), v, y)
    return y


@triton.jit
def neighbours(x):
    """[ROWS, WIDTH] -> 2 tensors [ROWS, WIDTH / 2]: neighbouring columns, which each thread holds, go apart."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def plus_products(ys, v, total):
    """total + the sum of y v over a thread's neighbouring columns: fewer registers than one sum per column.

    ys: `neighbours` of y; v as wide, for all its rows or [1, WIDTH] for every one.
    """
    vs = neighbours(v)
    for column in tl.static_range(2):
        total = tl.fma(ys[column], tl.broadcast_to(vs[column], total.shape), total)
    return total


@triton.jit
def row_sums(parts):
    """Four tensors [ROWS, WIDTH] -> their sums over the columns, in one reduction: part i + 2 j at [:, i, j]."""
    return tl.sum(tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], parts[3])), axis=1)


@triton.jit
def apart(sums):
    """Of `row_sums` -> four tensors [ROWS]."""
    left, right = tl.split(sums)
    return tl.split(left) + tl.split(right)


@triton.jit
def store_coordinates(coordinates_ptr, sums, rows, inside, first, RANK: tl.constexpr):
    """The coordinates `first` to first + 3 of `rows`, as `row_sums` has them. Those of several rows in one store: they
    pass through shared memory on their way."""
    if rows.shape[0] > 1:
        which = first + tl.arange(0, 2)[None, :, None] + 2 * tl.arange(0, 2)[None, None, :]
        place = coordinates_ptr + (rows * RANK)[:, None, None] + which
        tl.store(place, sums, mask=inside[:, None, None] & (which < RANK))
    else:
        each = apart(sums)
        for r in tl.static_range(4):
            if first + r < RANK:
                tl.store(coordinates_ptr + rows * RANK + first + r, each[r], mask=inside)


@triton.jit
def coordinates_along(
    shifted, inverses, directions_ptr, coordinates_ptr, rows, inside, K,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, SCALED: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Rows y = x - z as CHUNKS tensors -> p = y · (V / s²), RANK tensors [ROWS] bf16 and more, stored too; four
    directions at a time."""
    found = ()
    for first in tl.static_range(0, RANK, 4):
        parts = (tl.zeros((ROWS, WIDTH // 2), tl.float32),) * 4
        for chunk in tl.static_range(CHUNKS):
            y = shifted[chunk]
            if SCALED:
                y = y * inverses[chunk] * inverses[chunk]
            ys = neighbours(y)
            added = ()
            for r in tl.static_range(4):
                part = parts[r]
                if first + r < RANK:
                    v = direction(directions_ptr, first + r, chunk * WIDTH, columns_of(y), K)
                    part = plus_products(ys, v, part)
                added = added + (part,)
            parts = added
        sums = row_sums(parts).to(tl.bfloat16)
        store_coordinates(coordinates_ptr, sums, rows, inside, first, RANK)
        each = apart(sums)
        for r in tl.static_range(4):
            found = found + (each[r],)
    return found
