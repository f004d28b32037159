// Coordinates of tokens along directions that are kept in 16 bits, and what is left of a token without them.

#ifndef DIT_QUANT_ALONG_H
#define DIT_QUANT_ALONG_H

#include "lanes.h"
#include "rotation.h"

#define MOST_DIRECTIONS 16
// directions that are worked on at a time, in registers
#define SUMS 4
// rows whose coordinates are found at a time, so that the duals are loaded once for them: as many as registers hold
#define TOGETHER 6

// rank directions V [padded, K], filled up with zeros, as the rotation has x; duals V / s² [padded, K]; origin
// z · duals [rank]
typedef struct {
    int64_t K, rank, padded;
    float *V, *duals, origin[MOST_DIRECTIONS];
} Directions;

INLINE int64_t padded_rank(int64_t rank) { return (rank + SUMS - 1) / SUMS * SUMS; }

// V fp16 [rank, K], 1 / s, z -> fp32 in `buffer` [2 padded, K]
INLINE Directions directions_of(const uint16_t *given, int64_t rank, int64_t K, const float *factor,
                                const float *shift, int swapped, float *buffer) {
    Directions d = {.K = K, .rank = rank, .padded = padded_rank(rank), .V = buffer};
    d.duals = buffer + d.padded * K;
    for (int64_t r = 0; r < d.padded; r++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < K; k += LANES) {
            __mmask16 mask = first_lanes(K - k);
            __m512 v = r < rank ? load_lanes(given + r * K, FP16, k, mask) : _mm512_setzero_ps();
            store_lanes(d.V + r * K, FP32, k, mask, v);
            __m512 inverse = load_floats(factor + k, mask);
            v = _mm512_mul_ps(_mm512_mul_ps(v, inverse), inverse);
            store_lanes(d.duals + r * K, FP32, k, mask, v);
            sum = _mm512_fmadd_ps(v, load_floats(shift + k, mask), sum);
        }
        if (r < rank) d.origin[r] = _mm512_reduce_add_ps(sum);
        if (swapped) swap_table(d.V + r * K, K);
    }
    return d;
}

// lanes `at` and following of rows that share what they are multiplied by: SUMS duals
INLINE void add_coordinates(const char *const *rows, int dtype, const float *dual, int64_t K, int64_t at,
                            __mmask16 mask, __m512 sum[][SUMS]) {
    __m512 v[TOGETHER];
#pragma GCC unroll 6
    for (int i = 0; i < TOGETHER; i++) v[i] = load_lanes(rows[i], dtype, at, mask);
#pragma GCC unroll 4
    for (int r = 0; r < SUMS; r++) {
        __m512 factor = load_floats(dual + r * K + at, mask);
#pragma GCC unroll 6
        for (int i = 0; i < TOGETHER; i++) sum[i][r] = _mm512_fmadd_ps(v[i], factor, sum[i][r]);
    }
}

// of the lanes of each of four registers
INLINE __m128 sums_of(const __m512 *v) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// bf16 coordinates [count, rank] of up to TOGETHER rows
INLINE void find_coordinates(const Directions *d, const void *x, int dtype, int64_t stride, int64_t count,
                             uint16_t *coordinates) {
    float p[TOGETHER][MOST_DIRECTIONS];
    const int64_t step = stride * width(dtype), K = d->K;
    const char *rows[TOGETHER];
    for (int i = 0; i < TOGETHER; i++) rows[i] = (const char *)x + MIN(i, count - 1) * step;
    for (int64_t first = 0; first < d->rank; first += SUMS) {
        __m512 sum[TOGETHER][SUMS];
#pragma GCC unroll 6
        for (int i = 0; i < TOGETHER; i++)
#pragma GCC unroll 4
            for (int r = 0; r < SUMS; r++) sum[i][r] = _mm512_setzero_ps();
        const float *dual = d->duals + first * K;
        int64_t at = 0;
        for (; at + LANES <= K; at += LANES) add_coordinates(rows, dtype, dual, K, at, ALL, sum);
        if (at < K) add_coordinates(rows, dtype, dual, K, at, first_lanes(K - at), sum);
        __m128 origin = _mm_loadu_ps(d->origin + first);
#pragma GCC unroll 6
        for (int i = 0; i < TOGETHER; i++) _mm_storeu_ps(p[i] + first, _mm_sub_ps(sums_of(sum[i]), origin));
    }
    __mmask16 mask = first_lanes(d->rank);
    for (int64_t i = 0; i < count; i++)
        _mm256_mask_storeu_epi16(coordinates + i * d->rank, mask, bf16_lanes(_mm512_maskz_loadu_ps(mask, p[i])));
}

// `count` registers of a row less SUMS directions, the first of which continues at `V`. Fused: p V is exact, see
// kernels/directions.py.
INLINE void less(__m512 *v, const int count, const float *p, const float *V, int64_t K, __mmask16 mask) {
    __m512 lanes[SUMS];
#pragma GCC unroll 4
    for (int r = 0; r < SUMS; r++) lanes[r] = _mm512_set1_ps(p[r]);
#pragma GCC unroll 16
    for (int i = 0; i < count; i++)
#pragma GCC unroll 4
        for (int r = 0; r < SUMS; r++)
            v[i] = _mm512_fnmadd_ps(lanes[r], load_floats(V + r * K + i * LANES, mask), v[i]);
}

#endif
