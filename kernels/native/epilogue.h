// From accumulators to outputs.

#ifndef DIT_QUANT_EPILOGUE_H
#define DIT_QUANT_EPILOGUE_H

#include "product.h"

#include <string.h>

// that registers hold, or fewer
#define MOST_ROWS 12

// of tokens m and following; 0 of those past the last
static void pack_terms(const Product *p, int64_t m, float *terms) {
    for (int64_t i = 0; i < TILE_M; i++) {
        int known = m + i < p->M;
        terms[i] = known ? p->row_scale[m + i] : 0.0f;
        terms[TILE_M + i] = known && p->row_zero ? p->row_zero[m + i] : 0.0f;
        for (int64_t r = 0; r < p->rank; r++) {
            uint32_t bits = known ? (uint32_t)p->coordinates[(m + i) * p->rank + r] << 16 : 0;
            memcpy(terms + (2 + r) * TILE_M + i, &bits, 4);
        }
    }
}

// what is added to the outputs of columns n and following
INLINE __m512 addend(const Product *p, int64_t n, __mmask16 mask) {
    __m512 bias = p->bias ? _mm512_maskz_loadu_ps(mask, p->bias + n) : _mm512_setzero_ps();
    if (!p->correction) return bias;
    __m512 correction = _mm512_maskz_loadu_ps(mask, p->correction + n);
    return p->bias ? _mm512_add_ps(bias, correction) : correction;
}

// row scale * column scale * (sum - zero * column sum) + p B + (b + c), in the order of the reference, of up to
// MOST_ROWS rows of a tile times a strip: rows m and following, columns n and following
INLINE void finish(const Product *p, const float *terms, int64_t m, int64_t n, int64_t rows, const int count,
                   const __m512i sum[][2]) {
    const __mmask16 masks[2] = {first_lanes(p->N - n), first_lanes(MAX(p->N - n - LANES, 0))};
    const int added = p->bias || p->correction, zeros = p->row_zero != NULL;
    __m512 y[MOST_ROWS][2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const int64_t at = n + half * LANES;
        __m512 scale = _mm512_maskz_loadu_ps(masks[half], p->column_scale + at), column = _mm512_setzero_ps();
        if (zeros) column = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(masks[half], p->column_sum + at));
#pragma GCC unroll 12
        for (int i = 0; i < count; i++) {
            __m512 v = _mm512_cvtepi32_ps(sum[i][half]);
            if (zeros) v = _mm512_sub_ps(v, _mm512_mul_ps(_mm512_set1_ps(terms[TILE_M + i]), column));
            y[i][half] = _mm512_mul_ps(_mm512_mul_ps(v, _mm512_set1_ps(terms[i])), scale);
        }
    }
    for (int64_t r = 0; r < p->rank; r++) {
        const float *response = p->responses + r * p->N + n;
        __m512 low = _mm512_maskz_loadu_ps(masks[0], response);
        __m512 high = _mm512_maskz_loadu_ps(masks[1], response + LANES);
        // fused: p B is exact, see kernels/directions.py
#pragma GCC unroll 12
        for (int i = 0; i < count; i++) {
            __m512 coordinate = _mm512_set1_ps(terms[(2 + r) * TILE_M + i]);
            y[i][0] = _mm512_fmadd_ps(coordinate, low, y[i][0]);
            y[i][1] = _mm512_fmadd_ps(coordinate, high, y[i][1]);
        }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        __m512 more = addend(p, n + half * LANES, masks[half]);
        if (!masks[half]) break;
#pragma GCC unroll 12
        for (int i = 0; i < count; i++) {
            if (i >= rows) break;
            if (added) y[i][half] = _mm512_add_ps(y[i][half], more);
            store_lanes(p->y, p->dtype, (m + i) * p->N + n + half * LANES, masks[half], y[i][half]);
        }
    }
}

#endif
