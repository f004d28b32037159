// quantize_activation for CPUs with AVX-512. Bit-equal to kernels/quantize_activation/reference.py.

#include "quantizer.h"
#include "codes.h"
#include "rotation.h"
#include "team.h"

// rows that are transformed in turns: the tables come from the first cache, and so do the rows, which more would push
// out
#define PAIR 3
// registers of a row that are transformed together, where the order allows it
#define MOST_REGISTERS 12

// all codes at once
typedef struct {
    Quantizer quantizer;
    int8_t *codes;
    Team team;
} Codes;

// a row of x; how many bytes the one that is transformed next lies behind it; the row's coordinates p [rank] along
// directions; the tables
typedef struct {
    const void *x;
    int64_t K, next, rank;
    const float *p, *tables;
} Row;

// of tables, from a register of a row to the next
INLINE int64_t table_step(int64_t rank) { return (2 + rank) * LANES; }

// x -> ((x - z - p V) / s) H of `count` registers of a row: whole blocks, or one register, masked
INLINE void transform(const Row *row, int dtype, const int order, const int along, int64_t start, const int count,
                      __mmask16 mask, const int measured, Range *range, float *out) {
    // constant in most cases
    const int64_t rank = along <= SUMS ? along : row->rank, step = table_step(rank);
    const float *z = row->tables + start / LANES * step, *V = z + LANES, *factor = V + rank * LANES;
    __m512 v[16];
#pragma GCC unroll 16
    for (int i = 0; i < count; i++)
        if (order < 64)
            v[i] = load_lanes(row->x, dtype, start + i * LANES, mask);
        else if (i % 4 == 0)
            load_swapped(row->x, dtype, start + i * LANES, v + i);
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) {
        // the next rows come from memory meanwhile, a cache line at a time
        const char *next = (const char *)row->x + row->next + (start + i * LANES) * width(dtype);
        if (along && i % (4 / width(dtype)) == 0)
            _mm_prefetch(next, _MM_HINT_T1);
        else if (!along)
            _mm_prefetch(next, _MM_HINT_T0);
        v[i] = _mm512_sub_ps(v[i], _mm512_load_ps(z + i * step));
    }
    for (int64_t r = 0; r < rank; r += SUMS) less(v, count, row->p + r, V + r * LANES, step);
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) v[i] = _mm512_mul_ps(v[i], _mm512_load_ps(factor + i * step));
    if (order >= 64)
        rotate_swapped(v, count, order);
    else
#pragma GCC unroll 16
        for (int i = 0; i < count; i++) v[i] = rotate_lanes(v[i], order);
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) {
        if (measured) widen(range, v[i], mask);
        if (measured && i % 2 == 0) note_nan(range, v[i], v[i + 1 < count ? i + 1 : i]);
        store_lanes(out, FP32, start + i * LANES, mask, v[i]);
    }
}

// up to PAIR rows, transformed -> out [rows, K], their lanes in the order of rotation.h; and their ranges, if measured.
// A few registers of each in turn, so that the tables come from the first cache.
typedef void (*transform_t)(const Row *rows, int64_t count, int measured, Range *ranges, float *out);

INLINE void transform_rows(const Row *rows, int64_t count, int dtype, const int order, const int along,
                           const int measured, Range *ranges, float *out) {
    const int most = order == 256 ? 16 : MOST_REGISTERS, fewest = order <= LANES ? 1 : order / LANES;
    const int64_t K = rows->K;
    for (int64_t start = 0, size; start < K; start += size) {
        int64_t left = K - start;
        size = left >= most * LANES ? most * LANES : fewest * LANES;
        for (int64_t i = 0; i < count; i++) {
            // copies, which what is stored to `out` cannot change; of a range field by field: to load a register from
            // where less was just stored takes long
            const Row row = rows[i];
            Range range = {ranges[i].low, ranges[i].high, ranges[i].nan};
            if (left >= most * LANES)
                transform(&row, dtype, order, along, start, most, ALL, measured, &range, out + i * K);
            else if (order >= LANES || left >= LANES)
                transform(&row, dtype, order, along, start, fewest, ALL, measured, &range, out + i * K);
            else
                transform(&row, dtype, order, along, start, 1, first_lanes(left), measured, &range, out + i * K);
            ranges[i].low = range.low;
            ranges[i].high = range.high;
            ranges[i].nan = range.nan;
        }
    }
}

#define TRANSFORM(DTYPE, ORDER, ALONG)                                                                             \
    static void transform_##DTYPE##_##ORDER##_##ALONG(const Row *rows, int64_t count, int measured, Range *ranges, \
                                                      float *out) {                                                \
        if (measured || ALONG)                                                                                     \
            transform_rows(rows, count, DTYPE, ORDER, ALONG, 1, ranges, out);                                      \
        else                                                                                                       \
            transform_rows(rows, count, DTYPE, ORDER, ALONG, 0, ranges, out);                                      \
    }
#define BY_ORDER(DTYPE, ALONG)                                 \
    TRANSFORM(DTYPE, 1, ALONG)                                 \
    TRANSFORM(DTYPE, 4, ALONG)                                 \
    TRANSFORM(DTYPE, 16, ALONG)                                \
    TRANSFORM(DTYPE, 64, ALONG)                                \
    TRANSFORM(DTYPE, 256, ALONG)                               \
    INLINE transform_t by_order_##DTYPE##_##ALONG(int order) { \
        switch (order) {                                       \
            case 4: return transform_##DTYPE##_4_##ALONG;      \
            case 16: return transform_##DTYPE##_16_##ALONG;    \
            case 64: return transform_##DTYPE##_64_##ALONG;    \
            case 256: return transform_##DTYPE##_256_##ALONG;  \
            default: return transform_##DTYPE##_1_##ALONG;     \
        }                                                      \
    }
// without directions, with SUMS of them or fewer, with more
#define BY_RANK(DTYPE)                                                                    \
    BY_ORDER(DTYPE, 0)                                                                    \
    BY_ORDER(DTYPE, 4)                                                                    \
    BY_ORDER(DTYPE, 16)                                                                   \
    INLINE transform_t by_rank_##DTYPE(int order, int64_t rank) {                         \
        if (rank == 0) return by_order_##DTYPE##_0(order);                                \
        return rank <= SUMS ? by_order_##DTYPE##_4(order) : by_order_##DTYPE##_16(order); \
    }
BY_RANK(FP32)
BY_RANK(BF16)
BY_RANK(FP16)

static transform_t transform_for(int dtype, int order, int64_t rank) {
    switch (dtype) {
        case FP32: return by_rank_FP32(order, rank);
        case BF16: return by_rank_BF16(order, rank);
        default: return by_rank_FP16(order, rank);
    }
}

static void find_coordinates_of(const Quantizer *q, int64_t row, int64_t rows) {
    const void *x = (const char *)q->x + row * q->stride * width(q->dtype);
    uint16_t *out = q->coordinates + row * q->along.rank;
    switch (q->dtype) {
        case FP32: find_coordinates(&q->along, x, FP32, q->stride, rows, out); break;
        case BF16: find_coordinates(&q->along, x, BF16, q->stride, rows, out); break;
        default: find_coordinates(&q->along, x, FP16, q->stride, rows, out);
    }
}

static Row row_of(const Quantizer *q, int64_t at, float *p) {
    const Directions *d = &q->along;
    const int64_t step = q->stride * width(q->dtype), ahead = d->rank ? TOGETHER : 1;
    if (d->rank) _mm512_storeu_ps(p, load_lanes(q->coordinates, BF16, at * d->rank, first_lanes(d->rank)));
    return (Row){(const char *)q->x + at * step, q->K, ahead * step, padded_rank(d->rank), p, q->tables};
}

static void encode_row(const float *v, int64_t K, float scale, float zero, int within, int order, int8_t *codes) {
    switch (2 * arrangement(order) + within) {
        case 2 * FORWARD: encode(v, K, scale, zero, 0, FORWARD, codes); break;
        case 2 * FORWARD + 1: encode(v, K, scale, zero, 1, FORWARD, codes); break;
        case 2 * FOUR_REVERSED: encode(v, K, scale, zero, 0, FOUR_REVERSED, codes); break;
        case 2 * FOUR_REVERSED + 1: encode(v, K, scale, zero, 1, FOUR_REVERSED, codes); break;
        case 2 * ALL_REVERSED: encode(v, K, scale, zero, 0, ALL_REVERSED, codes); break;
        case 2 * ALL_REVERSED + 1: encode(v, K, scale, zero, 1, ALL_REVERSED, codes); break;
        case 2 * SWAPPED: encode(v, K, scale, zero, 0, SWAPPED, codes); break;
        default: encode(v, K, scale, zero, 1, SWAPPED, codes);
    }
}

// rows `at` and following, up to PAIR, their coordinates known
static void quantize_rows(const Quantizer *q, transform_t transform, int64_t at, int64_t count, float *buffer,
                          int8_t *codes) {
    float p[PAIR][MOST_DIRECTIONS];
    Row rows[PAIR];
    Range ranges[PAIR];
    for (int64_t i = 0; i < count; i++) {
        rows[i] = row_of(q, at + i, p[i]);
        ranges[i] = no_range();
    }
    transform(rows, count, !q->fixed, ranges, buffer);
    for (int64_t i = 0; i < count; i++) {
        float scale = q->fixed_scale, zero = q->fixed_zero;
        int within = 0;
        if (!q->fixed) {
            within = row_range(ranges + i, q->symmetric, &scale, &zero);
            q->scale[at + i] = scale;
            if (q->zero) q->zero[at + i] = zero;
        }
        encode_row(buffer + i * q->K, q->K, scale, zero, within, q->order, codes + i * q->K);
    }
}

void quantize_portion(const Quantizer *q, int64_t at, int64_t end, int thread, int8_t *codes) {
    float *buffer = q->buffers + thread * PAIR * q->K;
    transform_t transform = transform_for(q->dtype, q->order, q->along.rank);
    for (int64_t row = at; row < end; row += PAIR) {
        if (q->find && (row - at) % TOGETHER == 0) find_coordinates_of(q, row, MIN(TOGETHER, end - row));
        quantize_rows(q, transform, row, MIN(PAIR, end - row), buffer, codes + (row - at) * q->K);
    }
}

static void work(void *data) {
    Codes *all = data;
    const Quantizer *q = &all->quantizer;
    int thread = all->team.number();
    int64_t own = own_share(&all->team), shares = all->team.shares, taken;
    for (int64_t share = own; share < own + shares; share++) {
        int64_t first = q->M * (share % shares) / shares, end = q->M * (share % shares + 1) / shares;
        while ((taken = first + take(&all->team, share % shares, PORTION)) < end)
            quantize_portion(q, taken, MIN(taken + PORTION, end), thread, all->codes + taken * q->K);
    }
}

int64_t quantizer_buffer(int64_t K, int64_t rank, unsigned threads) {
    return (registers(K) * (table_step(padded_rank(rank)) + padded_rank(rank) * LANES) + threads * PAIR * K) * 4;
}

// tables [K / LANES, 2 + padded rank, LANES] as a Quantizer has them; and what finds coordinates
static Directions list_tables(const Tokens *x, Group group, float *tables, float *duals) {
    const int64_t K = x->K, padded = padded_rank(x->rank), step = table_step(padded);
    Directions along = {.K = K, .rank = x->rank, .duals = duals};
    __m512 origin[MOST_DIRECTIONS];
    for (int64_t r = 0; r < padded; r++) origin[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += LANES) {
        const __mmask16 mask = first_lanes(K - k);
        float *at = tables + k / LANES * step;
        __m512 z = row_lanes(&x->shift, group, K, k, mask), factor = _mm512_set1_ps(1.0f);
        if (x->smooth.data) factor = _mm512_maskz_div_ps(mask, factor, row_lanes(&x->smooth, group, K, k, mask));
        _mm512_store_ps(at, z);
        _mm512_store_ps(at + step - LANES, factor);
        for (int64_t r = 0; r < padded; r++) {
            __m512 v = _mm512_setzero_ps();
            if (r < x->rank) v = load_lanes(x->directions + r * K, FP16, k, mask);
            __m512 dual = _mm512_maskz_mul_ps(mask, _mm512_mul_ps(v, factor), factor);
            _mm512_store_ps(at + (1 + r) * LANES, v);
            _mm512_store_ps(duals + (r / SUMS * registers(K) * LANES + k) * SUMS + r % SUMS * LANES, dual);
            origin[r] = _mm512_fmadd_ps(dual, z, origin[r]);
        }
    }
    for (int64_t r = 0; r < x->rank; r++) along.origin[r] = _mm512_reduce_add_ps(origin[r]);
    for (int64_t i = 0; x->order >= 64 && i < 2 + padded; i++) swap_table(tables + i * LANES, K, step);
    return along;
}

Quantizer quantizer_of(const Tokens *x, Group group, uint16_t *coordinates, int find, float *scale,
                       float *zero, float *buffer) {
    const int64_t padded = padded_rank(x->rank);
    float *duals = buffer + registers(x->K) * table_step(padded);
    return (Quantizer){.x = x->x, .dtype = x->dtype, .order = x->order, .symmetric = x->symmetric, .M = x->M,
                       .K = x->K, .stride = x->stride, .tables = buffer,
                       .along = list_tables(x, group, buffer, duals), .coordinates = coordinates, .find = find,
                       .fixed = x->fixed_scale.data != NULL, .fixed_scale = row_value(&x->fixed_scale, group),
                       .fixed_zero = nearbyintf(row_value(&x->fixed_zero, group)), .scale = scale,
                       .zero = x->symmetric ? NULL : zero, .buffers = duals + registers(x->K) * padded * LANES};
}

// coordinates [M, rank] bf16, read or, to `find` them, written; codes [M, K]; scale, zero [M], written where the range is
// not static, zero where it is asymmetric; buffer [quantizer_buffer(K, rank, threads)]. Where a table has not the group
// that is asked for nothing happens. Whether it has.
int quantize_activation(parallel_t parallel, number_t number, unsigned threads, const Tokens *x, const Group *group,
                        uint16_t *coordinates, int find, int8_t *codes, float *scale, float *zero, float *buffer) {
    if (!has_group(x, *group)) return 0;
    Codes all = {.quantizer = quantizer_of(x, *group, coordinates, find, scale, zero, buffer),
                 .codes = codes, .team = team(parallel, number, threads, x->M / PORTION)};
    run(&all.team, work, &all);
    return 1;
}
