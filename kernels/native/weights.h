// The weight's rows, 4-bit ones decoded, in the order in which they are multiplied.

#ifndef DIT_QUANT_WEIGHTS_H
#define DIT_QUANT_WEIGHTS_H

#include "product.h"
#include "transpose.h"

// what the 16 codes of a group stand for, at each of the 256 levels: (code - zero) multiplier, or table[code] multiplier
INLINE void list_values(const int8_t *table, int8_t values[][16]) {
    for (int level = 0; level < 256; level++)
        for (int code = 0; code < 16; code++)
            values[level][code] = (int8_t)((table ? table[code] : code - (level & 15)) * (level >> 4));
}

// 64 columns, k and following, and the groups of each 16 of them, as far as there are any
typedef struct {
    int64_t k, size, group[4];
} Columns;

INLINE Columns columns_of(const Product *p, int64_t k, int bits) {
    Columns c = {.k = k};
    if (bits == 8) return c;
    c.size = p->K / p->G;
    for (int i = 0; i < 4; i++) c.group[i] = MIN((k + 16 * i) / c.size, p->G - 1);
    return c;
}

// groups of a size that is not a multiple of 16
INLINE __m512i decode_odd(const Product *p, const uint8_t *codes, const uint8_t *levels, const Columns *c) {
    int8_t out[64] __attribute__((aligned(64))) = {0};
    for (int64_t i = c->k; i < MIN(c->k + 64, p->K); i++)
        out[i - c->k] = p->values[levels[i / c->size]][codes[i / 2] >> (i % 2 * 4) & 15];
    return _mm512_load_si512(out);
}

// of 16 columns
INLINE __m128i group_values(const Product *p, const uint8_t *levels, const Columns *c, int i) {
    return _mm_load_si128((const __m128i *)p->values[levels[c->group[i]]]);
}

// weights of row n, 0 past the last
INLINE __m512i weights(const Product *p, int64_t n, const Columns *c, int bits) {
    const __mmask64 mask = first_bytes(p->K - c->k);
    if (bits == 8) return _mm512_maskz_loadu_epi8(mask, p->w + n * p->K + c->k);
    const uint8_t *codes = p->w + n * (p->K / 2), *levels = p->levels + n * p->G;
    if (c->size % 16) return decode_odd(p, codes, levels, c);
    __mmask32 half = (__mmask32)first_bytes((p->K - c->k) / 2);
    __m512i pairs = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(half, codes + c->k / 2));
    pairs = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi16(0x0F0F));
    __m512i values;
    if (c->size % 64 == 0) {
        values = _mm512_broadcast_i32x4(group_values(p, levels, c, 0));
    } else {
        values = _mm512_castsi128_si512(group_values(p, levels, c, 0));
        values = _mm512_inserti32x4(values, group_values(p, levels, c, 1), 1);
        values = _mm512_inserti32x4(values, group_values(p, levels, c, 2), 2);
        values = _mm512_inserti32x4(values, group_values(p, levels, c, 3), 3);
    }
    return _mm512_maskz_shuffle_epi8(mask, values, pairs);
}

// rows n to n + 31 of the weight -> [K / BLOCK, 2, BLOCK / 4, 16] words of four codes, those of 16 rows side by side, and
// behind them the accumulators' first values [32]: -CODE_OFFSET times the sum of a row
INLINE void pack_strip(const Product *product, int64_t n, int bits, uint8_t *out) {
    // a copy, which what is stored to `out` cannot change
    const Product local = *product, *p = &local;
    const __m512i ones = _mm512_set1_epi8(1);
    int32_t *first = (int32_t *)(out + words(p->K) * 4 * STRIP);
    for (int half = 0; half < 2; half++) {
        int64_t row = n + half * LANES, rows = p->N - row;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t k = 0; k < p->K; k += 64) {
            const Columns columns = columns_of(p, k, bits);
            __m512i r[16];
            if (rows >= 16)
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) r[i] = weights(p, row + i, &columns, bits);
            else
                for (int i = 0; i < 16; i++) r[i] = i < rows ? weights(p, row + i, &columns, bits) : _mm512_setzero_si512();
            transpose(r);
            for (int64_t j = 0; j < MIN(16, words(p->K) - k / 4); j++) {
                const int64_t word = k / 4 + j, block = word / (BLOCK / 4), place = word % (BLOCK / 4);
                if (CODE_OFFSET) sum = _mm512_dpbusd_epi32(sum, ones, r[j]);
                _mm512_store_si512(out + ((block * 2 + half) * (BLOCK / 4) + place) * 64, r[j]);
            }
        }
        sum = _mm512_mullo_epi32(sum, _mm512_set1_epi32(-CODE_OFFSET));
        if (CODE_OFFSET) _mm512_store_si512(first + half * LANES, sum);
    }
}
static void pack_strip8(const Product *p, int64_t n, uint8_t *out) { pack_strip(p, n, 8, out); }
static void pack_strip4(const Product *p, int64_t n, uint8_t *out) { pack_strip(p, n, 4, out); }

#endif
