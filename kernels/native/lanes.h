// Sixteen floats at a time: loads and stores of the three float types.

#ifndef DIT_QUANT_LANES_H
#define DIT_QUANT_LANES_H

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define ALL ((__mmask16)0xFFFF)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

enum { FP32, BF16, FP16 };

INLINE __mmask16 first_lanes(int64_t count) {
    return count >= LANES ? ALL : (__mmask16)((1u << count) - 1);
}

// that hold K entries, the last one perhaps in part
INLINE int64_t registers(int64_t K) { return (K + LANES - 1) / LANES; }

// bytes of an entry
INLINE int64_t width(int dtype) { return dtype == FP32 ? 4 : 2; }

// v[0] and the next lanes; those outside the mask are 0
INLINE __m512 load_floats(const float *v, __mmask16 mask) {
    return mask == ALL ? _mm512_loadu_ps(v) : _mm512_maskz_loadu_ps(mask, v);
}

// x[at] and the next lanes, widened to fp32; lanes outside the mask are 0
INLINE __m512 load_lanes(const void *x, int dtype, int64_t at, __mmask16 mask) {
    if (dtype == FP32) return load_floats((const float *)x + at, mask);
    const uint16_t *narrow = (const uint16_t *)x + at;
    __m256i half = mask == ALL ? _mm256_loadu_si256((const __m256i *)narrow) : _mm256_maskz_loadu_epi16(mask, narrow);
    if (dtype == FP16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// fp32 -> bf16, ties to even; a NaN stays one
INLINE __m256i bf16_lanes(__m512 v) {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

INLINE __m256i half_lanes(int dtype, __m512 v) {
    return dtype == BF16 ? bf16_lanes(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}

// v -> y[at] and the next; a whole register by a plain store, which on Zen 4 is many times faster than a masked one
INLINE void store_lanes(void *y, int dtype, int64_t at, __mmask16 mask, __m512 v) {
    float *wide = (float *)y + at;
    uint16_t *narrow = (uint16_t *)y + at;
    if (dtype == FP32 && mask == ALL)
        _mm512_storeu_ps(wide, v);
    else if (dtype == FP32)
        _mm512_mask_storeu_ps(wide, mask, v);
    else if (mask == ALL)
        _mm256_storeu_si256((__m256i *)narrow, half_lanes(dtype, v));
    else
        _mm256_mask_storeu_epi16(narrow, mask, half_lanes(dtype, v));
}

INLINE void store_line(void *y, __m512i v, int streamed) {
    if (streamed)
        _mm512_stream_si512(y, v);
    else
        _mm512_storeu_si512(y, v);
}

// 32 lanes -> y[at] and the next. streamed: past the caches, whole lines
INLINE void store_strip(void *y, int dtype, int64_t at, __m512 low, __m512 high, int streamed) {
    char *line = (char *)y + at * width(dtype);
    if (dtype == FP32) {
        store_line(line, _mm512_castps_si512(low), streamed);
        store_line(line + 64, _mm512_castps_si512(high), streamed);
    } else {
        __m512i both = _mm512_castsi256_si512(half_lanes(dtype, low));
        store_line(line, _mm512_inserti64x4(both, half_lanes(dtype, high), 1), streamed);
    }
}

#endif
