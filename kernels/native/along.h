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

// duals V / s² of rank directions V, SUMS of them at a time: [K / LANES, SUMS, LANES] after one another, filled up with
// zeros; origin z · duals [rank]
typedef struct {
    int64_t K, rank;
    float *duals, origin[MOST_DIRECTIONS];
} Directions;

INLINE int64_t padded_rank(int64_t rank) { return (rank + SUMS - 1) / SUMS * SUMS; }

// lanes `at` and following of rows that share what they are multiplied by: SUMS duals
INLINE void add_coordinates(const char *const *rows, int dtype, const float *duals, int64_t at, __mmask16 mask,
                            __m512 sum[][SUMS]) {
    __m512 v[TOGETHER];
#pragma GCC unroll 6
    for (int i = 0; i < TOGETHER; i++) v[i] = load_lanes(rows[i], dtype, at, mask);
#pragma GCC unroll 4
    for (int r = 0; r < SUMS; r++) {
        __m512 dual = _mm512_load_ps(duals + at * SUMS + r * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < TOGETHER; i++) sum[i][r] = _mm512_fmadd_ps(v[i], dual, sum[i][r]);
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
        const float *duals = d->duals + first * registers(K) * LANES;
        int64_t at = 0;
        for (; at + LANES <= K; at += LANES) add_coordinates(rows, dtype, duals, at, ALL, sum);
        if (at < K) add_coordinates(rows, dtype, duals, at, first_lanes(K - at), sum);
        __m128 origin = _mm_loadu_ps(d->origin + first);
#pragma GCC unroll 6
        for (int i = 0; i < TOGETHER; i++) _mm_storeu_ps(p[i] + first, _mm_sub_ps(sums_of(sum[i]), origin));
    }
    __mmask16 mask = first_lanes(d->rank);
    for (int64_t i = 0; i < count; i++)
        _mm256_mask_storeu_epi16(coordinates + i * d->rank, mask, bf16_lanes(_mm512_maskz_loadu_ps(mask, p[i])));
}

// `count` registers of a row less SUMS directions V, those of the first register at V, of the next one `step` further on.
// Fused: p V is exact, see kernels/directions.py.
INLINE void less(__m512 *v, const int count, const float *p, const float *V, int64_t step) {
    __m512 lanes[SUMS];
#pragma GCC unroll 4
    for (int r = 0; r < SUMS; r++) lanes[r] = _mm512_set1_ps(p[r]);
#pragma GCC unroll 16
    for (int i = 0; i < count; i++)
#pragma GCC unroll 4
        for (int r = 0; r < SUMS; r++)
            v[i] = _mm512_fnmadd_ps(lanes[r], _mm512_load_ps(V + i * step + r * LANES), v[i]);
}

#endif
