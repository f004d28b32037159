// quantize_activation for CPUs with AVX-512. Bit-equal to kernels/quantize_activation/reference.py.

#include <float.h>
#include <math.h>

#include "lanes.h"
#include "team.h"

#define QMAX 127.0f
// rows that a thread takes at a time
#define PORTION 8
#define MOST_DIRECTIONS 16
// directions whose sums stay in registers
#define SUMS 4

typedef struct {
    const void *x;
    int dtype, order, symmetric;
    int64_t M, K, stride;
    const float *offset, *factor;
    // directions V and their duals V / s² [rank, K], z · duals; bf16 coordinates [M, rank], given or to be found
    int64_t rank;
    int find;
    uint16_t *coordinates;
    float *directions, *duals, origin[MOST_DIRECTIONS];
    const float *fixed_scale, *fixed_zero;
    int8_t *codes;
    float *scale, *zero, *buffers;
    Team team;
} Quantizer;

// sum of the four / 2 - one of them. Fused: halving is exact, so that the bits are those of two operations.
INLINE __m512 mirrored(__m512 sum, __m512 v) { return _mm512_fmsub_ps(sum, _mm512_set1_ps(0.5f), v); }

// a stage of the rotation over four registers: the mirror image of each is subtracted
INLINE void butterfly(__m512 *v, int stride) {
    __m512 a = v[0], b = v[stride], c = v[2 * stride], d = v[3 * stride];
    __m512 sum = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
    v[0] = mirrored(sum, d);
    v[stride] = mirrored(sum, c);
    v[2 * stride] = mirrored(sum, b);
    v[3 * stride] = mirrored(sum, a);
}

// the same between neighbours of four lanes (stride 1)
INLINE __m512 butterfly_lanes(__m512 v) {
    __m512 pairs = _mm512_add_ps(v, _mm512_permute_ps(v, 0xB1));
    return mirrored(_mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4E)), _mm512_permute_ps(v, 0x1B));
}

// and between the register's four quarters (stride 4)
INLINE __m512 butterfly_quarters(__m512 v) {
    __m512 pairs = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xB1));
    return mirrored(_mm512_add_ps(pairs, _mm512_shuffle_f32x4(pairs, pairs, 0x4E)), _mm512_shuffle_f32x4(v, v, 0x1B));
}

typedef struct {
    __m512 low, high;
    __mmask16 nan;
} Range;

INLINE void widen(Range *range, __m512 v, __mmask16 mask) {
    range->low = _mm512_mask_min_ps(range->low, mask, range->low, v);
    range->high = _mm512_mask_max_ps(range->high, mask, range->high, v);
    range->nan = _kor_mask16(range->nan, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q));
}

// a row of x, or one of fp32 of which shift and directions were taken off; how many bytes the next one lies behind it
typedef struct {
    const void *x;
    int64_t next;
    const float *offset;
} Row;

// lanes `at` and following of two rows, times those of `count` duals
INLINE void add_products(const Quantizer *q, const void *x, const void *other, int dtype, const float *dual, int64_t at,
                         __mmask16 mask, __m512 sum[][2], const int count) {
    __m512 v = load_lanes(x, dtype, at, mask), w = load_lanes(other, dtype, at, mask);
    // the next two rows come from memory meanwhile
    int64_t size = dtype == FP32 ? 4 : 2, next = (at + 2 * q->stride) * size;
    _mm_prefetch((const char *)x + next, _MM_HINT_T0);
    _mm_prefetch((const char *)other + next, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) {
        __m512 factor = _mm512_maskz_loadu_ps(mask, dual + r * q->K + at);
        sum[r][0] = _mm512_fmadd_ps(v, factor, sum[r][0]);
        sum[r][1] = _mm512_fmadd_ps(w, factor, sum[r][1]);
    }
}

INLINE void project(const Quantizer *q, const void *x, const void *other, int dtype, int64_t first, const int count,
                    float p[][MOST_DIRECTIONS]) {
    const float *dual = q->duals + first * q->K;
    __m512 sum[SUMS][2];
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    int64_t at = 0;
    for (; at + LANES <= q->K; at += LANES) add_products(q, x, other, dtype, dual, at, ALL, sum, count);
    if (at < q->K) add_products(q, x, other, dtype, dual, at, first_lanes(q->K - at), sum, count);
    for (int r = 0; r < count; r++)
        for (int i = 0; i < 2; i++) p[i][first + r] = _mm512_reduce_add_ps(sum[r][i]) - q->origin[first + r];
}

// the coordinates of rows `row` and the next, if that is below `end`; two at a time share what they are multiplied by
INLINE void find_coordinates(const Quantizer *q, int64_t row, int64_t end, int dtype) {
    float p[2][MOST_DIRECTIONS];
    int64_t size = dtype == FP32 ? 4 : 2, rows = MIN(2, end - row), first = 0;
    const char *x = (const char *)q->x + row * q->stride * size, *other = x + (rows - 1) * q->stride * size;
    for (; first + SUMS <= q->rank; first += SUMS) project(q, x, other, dtype, first, SUMS, p);
    for (; first < q->rank; first++) project(q, x, other, dtype, first, 1, p);
    __mmask16 mask = first_lanes(q->rank);
    for (int64_t i = 0; i < rows; i++)
        _mm256_mask_storeu_epi16(q->coordinates + (row + i) * q->rank, mask,
                                 bf16_lanes(_mm512_maskz_loadu_ps(mask, p[i])));
}

// x, or what is left of it, less `count` directions. Fused: p V is exact, see kernels/directions.py.
INLINE void take_off(const void *x, int dtype, const float *offset, const float *directions, int64_t K,
                     const float *coordinates, const int count, float *out) {
    __m512 p[SUMS];
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) p[r] = _mm512_set1_ps(coordinates[r]);
    for (int64_t at = 0; at < K; at += LANES) {
        __mmask16 mask = first_lanes(K - at);
        __m512 v = load_lanes(x, dtype, at, mask);
        if (offset) v = _mm512_sub_ps(v, _mm512_maskz_loadu_ps(mask, offset + at));
#pragma GCC unroll 4
        for (int r = 0; r < count; r++)
            v = _mm512_fnmadd_ps(p[r], _mm512_maskz_loadu_ps(mask, directions + r * K + at), v);
        store_lanes(out, FP32, at, mask, v);
    }
}

// x - z - p V of row `at` -> out
INLINE void less_directions(const Quantizer *q, const void *x, int dtype, int64_t at, float *out) {
    float p[MOST_DIRECTIONS];
    __mmask16 mask = first_lanes(q->rank);
    _mm512_mask_storeu_ps(p, mask, load_lanes(q->coordinates, BF16, at * q->rank, mask));
    const float *V = q->directions;
    int64_t r = 0;
    for (; r + SUMS <= q->rank; r += SUMS)
        if (r == 0)
            take_off(x, dtype, q->offset, V, q->K, p, SUMS, out);
        else
            take_off(out, FP32, NULL, V + r * q->K, q->K, p + r, SUMS, out);
    for (; r < q->rank; r++)
        if (r == 0)
            take_off(x, dtype, q->offset, V, q->K, p, 1, out);
        else
            take_off(out, FP32, NULL, V + r * q->K, q->K, p + r, 1, out);
}

INLINE __m512 shifted(const Quantizer *q, const Row *row, int dtype, int64_t at, __mmask16 mask) {
    __m512 v = load_lanes(row->x, dtype, at, mask);
    if (row->offset) v = _mm512_sub_ps(v, _mm512_maskz_loadu_ps(mask, row->offset + at));
    if (q->factor) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, q->factor + at));
    return v;
}

// x -> ((x - z - p V) / s) H of `count` registers of a row, the last of them masked
INLINE void transform(const Quantizer *q, const Row *row, int dtype, int order, int64_t start, __mmask16 mask,
                      Range *range, float *out) {
    __m512 v[16];
    const int count = order <= LANES ? 1 : order / LANES;
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) {
        // the next row comes from memory meanwhile
        _mm_prefetch((const char *)row->x + row->next + (start + i * LANES) * (dtype == FP32 ? 4 : 2), _MM_HINT_T0);
        v[i] = shifted(q, row, dtype, start + i * LANES, mask);
        if (order >= 4) v[i] = butterfly_lanes(v[i]);
        if (order >= 16) v[i] = butterfly_quarters(v[i]);
    }
    if (order >= 64)
#pragma GCC unroll 4
        for (int i = 0; i < count; i += 4) butterfly(v + i, 1);
    if (order >= 256)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) butterfly(v + i, 4);
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) {
        if (range) widen(range, v[i], mask);
        store_lanes(out, FP32, start + i * LANES, mask, v[i]);
    }
}

INLINE void transform_row(const Quantizer *q, const Row *row, int dtype, int order, Range *range, float *out) {
    const int64_t step = order <= LANES ? LANES : order;
    int64_t start = 0;
    for (; start + step <= q->K; start += step) transform(q, row, dtype, order, start, ALL, range, out);
    if (start < q->K) transform(q, row, dtype, order, start, first_lanes(q->K - start), range, out);
}

INLINE float safe_scale(float extent, float qmax) {
    float step = extent / qmax;
    return step > FLT_MIN ? step : 1.0f;
}

// numerics of `safe_scale` and `asymmetric_range`; a NaN in the row is a NaN in its range. Whether the row is finite.
INLINE int row_range(const Range *range, int symmetric, float *scale, float *zero) {
    float low = _mm512_reduce_min_ps(range->low), high = _mm512_reduce_max_ps(range->high);
    if (range->nan) low = high = NAN;
    int finite = isfinite(low) && isfinite(high);
    float extent = isnan(low) ? NAN : fmaxf(-low, high), spread = high - low;
    *zero = 0.0f;
    *scale = safe_scale(extent, QMAX);
    if (symmetric) return finite;
    float fine = safe_scale(spread > 0.0f ? spread : extent, 2.0f * QMAX);
    if (extent > fine * 32768.0f) return finite;
    *scale = fine;
    *zero = -QMAX - nearbyintf(low * (1.0f / fine));
    return finite;
}

INLINE void store_codes(int8_t *codes, __mmask16 mask, __m128i values) {
    if (mask == ALL)
        _mm_storeu_si128((__m128i *)codes, values);
    else
        _mm_mask_storeu_epi8(codes, mask, values);
}

// of a row whose range was measured: nothing is below -127, and what rounds to more than 127 saturates
INLINE void encode_within(const float *v, __mmask16 mask, __m512 inverse, __m512i offset, int8_t *codes) {
    __m512i y = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, v), inverse));
    store_codes(codes, mask, _mm512_cvtsepi32_epi8(_mm512_add_epi32(y, offset)));
}

INLINE void encode_lanes(const float *v, __mmask16 mask, __m512 inverse, __m512 offset, int8_t *codes) {
    __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, v), inverse);
    y = _mm512_add_ps(_mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), offset);
    // in this order of arguments a NaN passes, and becomes code 0 as in torch
    y = _mm512_min_ps(_mm512_set1_ps(QMAX), _mm512_max_ps(_mm512_set1_ps(-QMAX), y));
    store_codes(codes, mask, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(y)));
}

INLINE void encode(const float *v, int64_t K, float scale, float zero, int within, int8_t *codes) {
    __m512 inverse = _mm512_set1_ps(1.0f / scale), offset = _mm512_set1_ps(zero);
    int64_t at = 0;
    if (within) {
        __m512i whole = _mm512_cvtps_epi32(offset);
        for (; at + LANES <= K; at += LANES) encode_within(v + at, ALL, inverse, whole, codes + at);
        if (at < K) encode_within(v + at, first_lanes(K - at), inverse, whole, codes + at);
        return;
    }
    for (; at + LANES <= K; at += LANES) encode_lanes(v + at, ALL, inverse, offset, codes + at);
    if (at < K) encode_lanes(v + at, first_lanes(K - at), inverse, offset, codes + at);
}

INLINE void transform_tokens(const Quantizer *q, int64_t at, int dtype, int order, Range *range, float *buffer) {
    int64_t next = q->stride * (dtype == FP32 ? 4 : 2);
    const char *x = (const char *)q->x + at * next;
    if (q->rank) {
        less_directions(q, x, dtype, at, buffer);
        Row left = {buffer, 0, NULL};
        transform_row(q, &left, FP32, order, range, buffer);
    } else {
        Row row = {x, next, q->offset};
        transform_row(q, &row, dtype, order, range, buffer);
    }
}

INLINE void quantize_row(Quantizer *q, int64_t row, int dtype, int order, float *buffer) {
    float scale, zero;
    int within = 0;
    if (q->fixed_scale) {
        transform_tokens(q, row, dtype, order, NULL, buffer);
        scale = *q->fixed_scale;
        zero = q->fixed_zero ? *q->fixed_zero : 0.0f;
    } else {
        Range range = {_mm512_set1_ps(INFINITY), _mm512_set1_ps(-INFINITY), 0};
        transform_tokens(q, row, dtype, order, &range, buffer);
        within = row_range(&range, q->symmetric, &scale, &zero);
        q->scale[row] = scale;
        if (q->zero) q->zero[row] = zero;
    }
    encode(buffer, q->K, scale, zero, within, q->codes + row * q->K);
}

INLINE void quantize_rows(Quantizer *q, int dtype, int order, float *buffer) {
    int64_t own = own_share(&q->team), shares = q->team.shares, taken;
    for (int64_t share = own; share < own + shares; share++) {
        int64_t first = q->M * (share % shares) / shares, end = q->M * (share % shares + 1) / shares;
        while ((taken = first + take(&q->team, share % shares, PORTION)) < end)
            for (int64_t row = taken, last = MIN(taken + PORTION, end); row < last; row++) {
                if (q->find && (row - taken) % 2 == 0) find_coordinates(q, row, last, dtype);
                quantize_row(q, row, dtype, order, buffer);
            }
    }
}

#define BY_ORDER(DTYPE)                                                   \
    static void rows_##DTYPE(Quantizer *q, float *buffer) {               \
        switch (q->order) {                                               \
            case 4: quantize_rows(q, DTYPE, 4, buffer); break;            \
            case 16: quantize_rows(q, DTYPE, 16, buffer); break;          \
            case 64: quantize_rows(q, DTYPE, 64, buffer); break;          \
            case 256: quantize_rows(q, DTYPE, 256, buffer); break;        \
            default: quantize_rows(q, DTYPE, 1, buffer);                  \
        }                                                                 \
    }
BY_ORDER(FP32)
BY_ORDER(BF16)
BY_ORDER(FP16)

static void work(void *data) {
    Quantizer *q = data;
    float *buffer = q->buffers + q->team.number() * q->K;
    switch (q->dtype) {
        case FP32: rows_FP32(q, buffer); break;
        case BF16: rows_BF16(q, buffer); break;
        default: rows_FP16(q, buffer);
    }
}

// V fp16 -> V, V / s² and z · V / s² in fp32
static void prepare(Quantizer *q, const uint16_t *directions) {
    for (int64_t r = 0; r < q->rank; r++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < q->K; k += LANES) {
            __mmask16 mask = first_lanes(q->K - k);
            __m512 v = load_lanes(directions + r * q->K, FP16, k, mask);
            store_lanes(q->directions + r * q->K, FP32, k, mask, v);
            if (q->factor) {
                __m512 inverse = _mm512_maskz_loadu_ps(mask, q->factor + k);
                v = _mm512_mul_ps(_mm512_mul_ps(v, inverse), inverse);
            }
            store_lanes(q->duals + r * q->K, FP32, k, mask, v);
            if (q->offset) sum = _mm512_fmadd_ps(v, _mm512_maskz_loadu_ps(mask, q->offset + k), sum);
        }
        q->origin[r] = _mm512_reduce_add_ps(sum);
    }
}

// x [M, K], its rows `stride` apart; offset, factor [K] or null; coordinates [M, rank] bf16, read or found, directions
// [rank, K] fp16; fixed_scale, fixed_zero [1]: a static range; codes [M, K]; scale, zero [M], zero null where symmetric
// or static; buffers [threads + 2 rank, K]
void quantize_activation(parallel_t parallel, number_t number, unsigned threads, const void *x, int dtype, int64_t M,
                         int64_t K, int64_t stride, const float *offset, const float *factor, int64_t rank, int find,
                         uint16_t *coordinates, const uint16_t *directions, int order, int symmetric,
                         const float *fixed_scale, const float *fixed_zero, int8_t *codes, float *scale, float *zero,
                         float *buffers) {
    float *V = buffers + threads * K;
    Quantizer q = {.x = x, .dtype = dtype, .order = order, .symmetric = symmetric, .M = M, .K = K, .stride = stride,
                   .offset = offset, .factor = factor, .rank = rank, .find = find, .coordinates = coordinates,
                   .directions = V, .duals = V + rank * K, .fixed_scale = fixed_scale, .fixed_zero = fixed_zero,
                   .codes = codes, .scale = scale, .zero = zero, .buffers = buffers,
                   .team = team(parallel, number, threads, M / PORTION)};
    prepare(&q, directions);
    run(&q.team, work, &q);
}
