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

// fp32 terms of the columns, strip by strip: [3 + rank, STRIP] column scale, column sum, bias + c, responses; 0 past
// the last column
INLINE int64_t columns_size(int64_t N, int64_t rank) { return strips(N) * STRIP * (3 + rank); }

INLINE float *column_terms(const Product *p, int64_t n) { return p->columns + n * (3 + p->rank); }

static void list_columns(const Product *p, const Weight *w, Group group) {
    for (int64_t n = 0; n < strips(p->N) * STRIP; n += LANES) {
        const __mmask16 mask = first_lanes(MAX(p->N - n, 0));
        float *at = column_terms(p, n / STRIP * STRIP) + n % STRIP;
        __m512 added = row_lanes(&w->bias, group, p->N, n, mask);
        if (w->correction.data) {
            __m512 correction = row_lanes(&w->correction, group, p->N, n, mask);
            added = w->bias.data ? _mm512_add_ps(added, correction) : correction;
        }
        _mm512_store_ps(at, row_lanes(&w->column_scale, group, p->N, n, mask));
        if (w->column_sum) {
            __m512i sum = _mm512_maskz_loadu_epi32(mask, w->column_sum + n);
            _mm512_store_ps(at + STRIP, _mm512_cvtepi32_ps(sum));
        }
        _mm512_store_ps(at + 2 * STRIP, added);
        for (int64_t r = 0; r < p->rank; r++)
            _mm512_store_ps(at + (3 + r) * STRIP, load_lanes(w->responses + r * p->N, FP16, n, mask));
    }
}

// row scale * column scale * (sum - zero * column sum) + p B + (b + c), in the order of the reference, of `count` rows of
// a tile times a strip. whole: none of these rows and columns is past the last.
INLINE void finish_block(const Product *p, const float *terms, int64_t m, int64_t n, int64_t rows, const int count,
                         const __m512i sum[][2], const int dtype, const int whole) {
    const __mmask16 masks[2] = {whole ? ALL : first_lanes(p->N - n),
                                whole ? ALL : first_lanes(MAX(p->N - n - LANES, 0))};
    const float *columns = column_terms(p, n);
    __m512 y[MOST_ROWS][2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const __m512 scale = _mm512_load_ps(columns + half * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < count; i++) y[i][half] = _mm512_cvtepi32_ps(sum[i][half]);
        if (p->row_zero) {
            const __m512 column = _mm512_load_ps(columns + STRIP + half * LANES);
#pragma GCC unroll 12
            for (int i = 0; i < count; i++)
                y[i][half] = _mm512_sub_ps(y[i][half], _mm512_mul_ps(_mm512_set1_ps(terms[TILE_M + i]), column));
        }
#pragma GCC unroll 12
        for (int i = 0; i < count; i++)
            y[i][half] = _mm512_mul_ps(_mm512_mul_ps(y[i][half], _mm512_set1_ps(terms[i])), scale);
    }
    for (int64_t r = 0; r < p->rank; r++) {
        const float *response = columns + (3 + r) * STRIP;
        const __m512 low = _mm512_load_ps(response), high = _mm512_load_ps(response + LANES);
        // fused: p B is exact, see kernels/directions.py
#pragma GCC unroll 12
        for (int i = 0; i < count; i++) {
            __m512 coordinate = _mm512_set1_ps(terms[(2 + r) * TILE_M + i]);
            y[i][0] = _mm512_fmadd_ps(coordinate, low, y[i][0]);
            y[i][1] = _mm512_fmadd_ps(coordinate, high, y[i][1]);
        }
    }
    if (p->added) {
        const __m512 low = _mm512_load_ps(columns + 2 * STRIP), high = _mm512_load_ps(columns + 2 * STRIP + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < count; i++) {
            y[i][0] = _mm512_add_ps(y[i][0], low);
            y[i][1] = _mm512_add_ps(y[i][1], high);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < count; i++) {
        const int64_t at = (m + i) * p->N + n;
        if (whole)
            store_strip(p->y, dtype, at, y[i][0], y[i][1], p->streamed);
        else if (i < rows) {
            store_lanes(p->y, dtype, at, masks[0], y[i][0]);
            store_lanes(p->y, dtype, at + LANES, masks[1], y[i][1]);
        }
    }
}

// up to MOST_ROWS rows: rows m and following, columns n and following
INLINE void finish(const Product *p, const float *terms, int64_t m, int64_t n, int64_t rows, const int count,
                   const __m512i sum[][2]) {
    const int whole = n + STRIP <= p->N && rows >= count;
    if (!whole)
        finish_block(p, terms, m, n, rows, count, sum, p->dtype, 0);
    else if (p->dtype == FP32)
        finish_block(p, terms, m, n, rows, count, sum, FP32, 1);
    else if (p->dtype == BF16)
        finish_block(p, terms, m, n, rows, count, sum, BF16, 1);
    else
        finish_block(p, terms, m, n, rows, count, sum, FP16, 1);
}

#endif
