// quantize_activation for CPUs with AVX-512. Bit-equal to kernels/quantize_activation/reference.py.

#include <float.h>
#include <math.h>

#include "lanes.h"

#define QMAX 127.0f
// rows that a thread takes at a time
#define PORTION 8

typedef struct {
    const void *x;
    int dtype, order, symmetric;
    int64_t M, K, stride;
    const float *offset, *factor, *fixed_scale, *fixed_zero;
    int8_t *codes;
    float *scale, *zero, *buffers;
    int64_t next_row, workers;
} Quantizer;

// a stage of the rotation over four registers: sum of the four / 2 - the mirror image
INLINE void butterfly(__m512 *v, int stride) {
    __m512 a = v[0], b = v[stride], c = v[2 * stride], d = v[3 * stride];
    __m512 half = _mm512_mul_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)), _mm512_set1_ps(0.5f));
    v[0] = _mm512_sub_ps(half, d);
    v[stride] = _mm512_sub_ps(half, c);
    v[2 * stride] = _mm512_sub_ps(half, b);
    v[3 * stride] = _mm512_sub_ps(half, a);
}

// the same between neighbours of four lanes (stride 1)
INLINE __m512 butterfly_lanes(__m512 v) {
    __m512 pairs = _mm512_add_ps(v, _mm512_permute_ps(v, 0xB1));
    __m512 half = _mm512_mul_ps(_mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4E)), _mm512_set1_ps(0.5f));
    return _mm512_sub_ps(half, _mm512_permute_ps(v, 0x1B));
}

// and between the register's four quarters (stride 4)
INLINE __m512 butterfly_quarters(__m512 v) {
    __m512 pairs = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xB1));
    __m512 half = _mm512_mul_ps(_mm512_add_ps(pairs, _mm512_shuffle_f32x4(pairs, pairs, 0x4E)), _mm512_set1_ps(0.5f));
    return _mm512_sub_ps(half, _mm512_shuffle_f32x4(v, v, 0x1B));
}

typedef struct {
    __m512 low, high;
    __mmask16 nan;
} Range;

INLINE void widen(Range *range, __m512 v, __mmask16 mask) {
    range->low = _mm512_mask_min_ps(range->low, mask, range->low, v);
    range->high = _mm512_mask_max_ps(range->high, mask, range->high, v);
    range->nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
}

INLINE __m512 shifted(const Quantizer *q, const char *x, int dtype, int64_t at, __mmask16 mask) {
    __m512 v = load_lanes(x, dtype, at, mask);
    if (q->offset) v = _mm512_sub_ps(v, _mm512_maskz_loadu_ps(mask, q->offset + at));
    if (q->factor) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, q->factor + at));
    return v;
}

// x -> ((x - z) / s) H of one row, and its range
INLINE Range transform(const Quantizer *q, const char *x, int dtype, int order, float *out) {
    Range range = {_mm512_set1_ps(INFINITY), _mm512_set1_ps(-INFINITY), 0};
    int count = order <= LANES ? 1 : order / LANES;
    for (int64_t start = 0; start < q->K; start += count * LANES) {
        __m512 v[16];
        __mmask16 mask = first_lanes(q->K - start);
        for (int i = 0; i < count; i++) {
            v[i] = shifted(q, x, dtype, start + i * LANES, mask);
            if (order >= 4) v[i] = butterfly_lanes(v[i]);
            if (order >= 16) v[i] = butterfly_quarters(v[i]);
        }
        if (order >= 64)
            for (int i = 0; i < count; i += 4) butterfly(v + i, 1);
        if (order >= 256)
            for (int i = 0; i < 4; i++) butterfly(v + i, 4);
        for (int i = 0; i < count; i++) {
            widen(&range, v[i], mask);
            _mm512_mask_storeu_ps(out + start + i * LANES, mask, v[i]);
        }
    }
    return range;
}

INLINE float safe_scale(float extent, float qmax) {
    float step = extent / qmax;
    return step > FLT_MIN ? step : 1.0f;
}

// numerics of `safe_scale` and `asymmetric_range`; a NaN in the row is a NaN in its range
INLINE void row_range(const Range *range, int symmetric, float *scale, float *zero) {
    float low = _mm512_reduce_min_ps(range->low), high = _mm512_reduce_max_ps(range->high);
    if (range->nan) low = high = NAN;
    float extent = isnan(low) ? NAN : fmaxf(-low, high), spread = high - low;
    *zero = 0.0f;
    *scale = safe_scale(extent, QMAX);
    if (symmetric) return;
    float fine = safe_scale(spread > 0.0f ? spread : extent, 2.0f * QMAX);
    if (extent > fine * 32768.0f) return;
    *scale = fine;
    *zero = -QMAX - nearbyintf(low * (1.0f / fine));
}

INLINE void encode(const float *v, int64_t K, float scale, float zero, int8_t *codes) {
    __m512 inverse = _mm512_set1_ps(1.0f / scale), offset = _mm512_set1_ps(zero);
    __m512 low = _mm512_set1_ps(-QMAX), high = _mm512_set1_ps(QMAX);
    for (int64_t at = 0; at < K; at += LANES) {
        __mmask16 mask = first_lanes(K - at);
        __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, v + at), inverse);
        y = _mm512_add_ps(_mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), offset);
        // in this order of arguments a NaN passes, and becomes code 0 as in torch
        y = _mm512_min_ps(high, _mm512_max_ps(low, y));
        _mm_mask_storeu_epi8(codes + at, mask, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(y)));
    }
}

INLINE void quantize_row(Quantizer *q, int64_t row, int dtype, int order, float *buffer) {
    const char *x = (const char *)q->x + row * q->stride * (dtype == FP32 ? 4 : 2);
    Range range = transform(q, x, dtype, order, buffer);
    float scale, zero;
    if (q->fixed_scale) {
        scale = *q->fixed_scale;
        zero = q->fixed_zero ? *q->fixed_zero : 0.0f;
    } else {
        row_range(&range, q->symmetric, &scale, &zero);
        q->scale[row] = scale;
        if (q->zero) q->zero[row] = zero;
    }
    encode(buffer, q->K, scale, zero, q->codes + row * q->K);
}

INLINE void quantize_rows(Quantizer *q, int dtype, int order, float *buffer) {
    int64_t start;
    while ((start = __atomic_fetch_add(&q->next_row, PORTION, __ATOMIC_RELAXED)) < q->M)
        for (int64_t row = start; row < MIN(start + PORTION, q->M); row++) quantize_row(q, row, dtype, order, buffer);
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
    float *buffer = q->buffers + __atomic_fetch_add(&q->workers, 1, __ATOMIC_RELAXED) * q->K;
    switch (q->dtype) {
        case FP32: rows_FP32(q, buffer); break;
        case BF16: rows_BF16(q, buffer); break;
        default: rows_FP16(q, buffer);
    }
}

// x [M, K], its rows `stride` apart; offset, factor [K] or null; fixed_scale, fixed_zero [1]: a static range;
// codes [M, K]; scale, zero [M], zero null where symmetric or static; buffers [threads, K]
void quantize_activation(parallel_t parallel, unsigned threads, const void *x, int dtype, int64_t M, int64_t K,
                         int64_t stride, const float *offset, const float *factor, int order, int symmetric,
                         const float *fixed_scale, const float *fixed_zero, int8_t *codes, float *scale, float *zero,
                         float *buffers) {
    Quantizer q = {x, dtype, order, symmetric, M, K, stride, offset, factor, fixed_scale, fixed_zero,
                   codes, scale, zero, buffers, 0, 0};
    parallel(work, &q, threads, 0);
}
