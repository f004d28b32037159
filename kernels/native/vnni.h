// Products by AVX-512 VNNI.
//
// vpdpbusd multiplies unsigned by signed bytes: codes of a travel as a + 128, and the accumulators of column n start
// at -128 times the sum of its weights, which leaves the exact sum of a w.

#ifndef DIT_QUANT_VNNI_H
#define DIT_QUANT_VNNI_H

#include "epilogue.h"
#include "transpose.h"

// nothing stays from tile to tile
typedef struct {
} Multiplier;

INLINE void start_multiplying(Multiplier *u) { (void)u; }
INLINE void stop_multiplying(const Product *p, Multiplier *u) { (void)p, (void)u; }

// a [rows <= 12, K] -> [K / 4, 12] words of four unsigned codes; missing rows and columns are code 0. Whole registers
// are stored, of which the next one overwrites a quarter: 16 bytes behind the tile are written to.
static void pack_tile(const int8_t *a, int64_t rows, int64_t K, uint8_t *out) {
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    for (int64_t k = 0; k < K; k += 64) {
        __mmask64 mask = first_bytes(K - k);
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = i < rows ? _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, a + i * K + k), flip) : flip;
        transpose(r);
        for (int64_t j = 0; j < MIN(16, words(K) - k / 4); j++)
            _mm512_storeu_si512(out + (k / 4 + j) * TILE_M * 4, r[j]);
    }
}

// sum + the four products in every lane. Not the intrinsic: GCC would copy accumulators from register to register.
INLINE void add_products(__m512i *sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// `count` tokens of a packed tile times a strip
INLINE void multiply(const Product *p, const uint8_t *a, const uint8_t *w, int64_t m, int64_t n, int64_t rows,
                     const int count) {
    const float *terms = (const float *)(a + codes_size(p->K));
    const int32_t *first = (const int32_t *)(w + words(p->K) * 4 * STRIP);
    __m512i sum[TILE_M][2];
#pragma GCC unroll 12
    for (int i = 0; i < count; i++) {
        sum[i][0] = _mm512_load_si512(first);
        sum[i][1] = _mm512_load_si512(first + LANES);
    }
    for (int64_t k = words(p->K); k > 0; k--) {
        __m512i low = _mm512_load_si512(w), high = _mm512_load_si512(w + 64);
#pragma GCC unroll 12
        for (int i = 0; i < count; i++) {
            __m512i x = _mm512_set1_epi32(((const int32_t *)a)[i]);
            add_products(&sum[i][0], x, low);
            add_products(&sum[i][1], x, high);
        }
        a += TILE_M * 4;
        w += STRIP * 4;
    }
    finish(p, terms, m, n, rows, count, sum);
}

// tokens m and following, `rows` of which there are, times the strip w of out-features n and following
static void multiply_tile(const Product *p, const uint8_t *a, const uint8_t *w, int64_t m, int64_t n, int64_t rows,
                          Multiplier *u) {
    (void)u;
    if (rows > 8)
        multiply(p, a, w, m, n, rows, 12);
    else if (rows > 4)
        multiply(p, a, w, m, n, rows, 8);
    else if (rows > 1)
        multiply(p, a, w, m, n, rows, 4);
    else
        multiply(p, a, w, m, n, rows, 1);
}

#endif
