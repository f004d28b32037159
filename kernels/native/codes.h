// From the range of a row to its scale and zero, and from its values to codes.

#ifndef DIT_QUANT_CODES_H
#define DIT_QUANT_CODES_H

#include <float.h>
#include <math.h>

#include "lanes.h"
#include "rotation.h"

#define QMAX 127.0f

typedef struct {
    __m512 low, high;
    __mmask16 nan;
} Range;

INLINE Range no_range(void) { return (Range){_mm512_set1_ps(INFINITY), _mm512_set1_ps(-INFINITY), 0}; }

INLINE void widen(Range *range, __m512 v, __mmask16 mask) {
    range->low = _mm512_mask_min_ps(range->low, mask, range->low, v);
    range->high = _mm512_mask_max_ps(range->high, mask, range->high, v);
}

// a NaN in v or in w, masked lanes of which are 0
INLINE void note_nan(Range *range, __m512 v, __m512 w) {
    range->nan = _kor_mask16(range->nan, _mm512_cmp_ps_mask(v, w, _CMP_UNORD_Q));
}

INLINE float safe_scale(float extent, float qmax) {
    float step = extent / qmax;
    return step <= FLT_MIN ? 1.0f : step;  // a NaN stays
}

// numerics of `safe_scale` and `asymmetric_range`; a NaN in the row is a NaN in its range. Whether the row is finite.
INLINE int row_range(const Range *range, int symmetric, float *scale, float *zero) {
    float low = _mm512_reduce_min_ps(range->low), high = _mm512_reduce_max_ps(range->high);
    if (range->nan) low = high = NAN;
    int finite = isfinite(low) && isfinite(high);
    float extent = isnan(low) ? NAN : fmaxf(-low, high);
    *zero = 0.0f;
    if (symmetric) {
        *scale = safe_scale(extent, QMAX);
        return finite;
    }
    float spread = high - low, span = spread > 0.0f ? spread : extent;
    int far = extent > span * 128.0f;
    *scale = safe_scale(far ? 2.0f * extent : span + extent * 0x1p-20f, 2.0f * QMAX);
    if (!far) *zero = -QMAX - ceilf(low * (1.0f / *scale) - 0.5f);
    return finite;
}

// adding it to a small number leaves an integer in the low bits: the number, rounded, ties to even
#define MAGIC 0x1.8p23f

// round(v / scale + zero) of a row whose range was measured, so that it is within -127 and 127; offset: zero + MAGIC
INLINE __m512i within_range(const float *v, __mmask16 mask, __m512 inverse, __m512 offset) {
    __m512 y = _mm512_add_ps(_mm512_mul_ps(load_floats(v, mask), inverse), offset);
    return _mm512_sub_epi32(_mm512_castps_si512(y), _mm512_castps_si512(_mm512_set1_ps(MAGIC)));
}

INLINE __m512i in_any_case(const float *v, __mmask16 mask, __m512 inverse, __m512 offset) {
    __m512 y = _mm512_mul_ps(load_floats(v, mask), inverse);
    y = _mm512_sub_ps(_mm512_add_ps(y, offset), _mm512_set1_ps(MAGIC));
    // in this order of arguments a NaN passes; it becomes code 0, as in torch
    y = _mm512_min_ps(_mm512_set1_ps(QMAX), _mm512_max_ps(_mm512_set1_ps(-QMAX), y));
    return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(y, y, _CMP_ORD_Q), y);
}

INLINE __m128i order_of_bytes(const int arrangement) {
    return arrangement == FOUR_REVERSED  ? _mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12)
           : arrangement == ALL_REVERSED ? _mm_setr_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
                                         : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

// sixteen values, not SWAPPED ones
INLINE void store_codes(int8_t *codes, __mmask16 mask, __m512i values, const int arrangement) {
    __m128i bytes = _mm512_cvtsepi32_epi8(values);
    if (arrangement != FORWARD) bytes = _mm_shuffle_epi8(bytes, order_of_bytes(arrangement));
    if (mask == ALL)
        _mm_storeu_si128((__m128i *)codes, bytes);
    else
        _mm_mask_storeu_epi8(codes, mask, bytes);
}

// 64 values
INLINE void store_block(int8_t *codes, const __m512i v[4], const int arrangement) {
    // quarter q holds the codes of quarter q of v[0], v[1], v[2] and v[3]: registers and quarters change places
    __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
    __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    if (arrangement == ALL_REVERSED) quarters = _mm512_xor_si512(quarters, _mm512_set1_epi32(12));
    bytes = _mm512_permutexvar_epi32(quarters, bytes);
    // then the lanes within each
    const int rest = arrangement == ALL_REVERSED ? FOUR_REVERSED : arrangement;
    if (rest != FORWARD) bytes = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(order_of_bytes(rest)));
    _mm512_storeu_si512(codes, bytes);
}

INLINE __m512i code_lanes(const float *v, __mmask16 mask, __m512 inverse, __m512 offset, int within) {
    return within ? within_range(v, mask, inverse, offset) : in_any_case(v, mask, inverse, offset);
}

// v [K], arranged as rotation.h says -> codes [K]. within: the row's range was measured
INLINE void encode(const float *v, int64_t K, float scale, float zero, const int within, const int arrangement,
                   int8_t *codes) {
    __m512 inverse = _mm512_set1_ps(1.0f / scale), offset = _mm512_set1_ps(zero + MAGIC);
    __m512i four[4];
    int64_t at = 0;
    for (; at + 4 * LANES <= K; at += 4 * LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) four[i] = code_lanes(v + at + i * LANES, ALL, inverse, offset, within);
        store_block(codes + at, four, arrangement);
    }
    for (; at < K; at += LANES) {
        __mmask16 mask = first_lanes(K - at);
        store_codes(codes + at, mask, code_lanes(v + at, mask, inverse, offset, within), arrangement);
    }
}

#endif
