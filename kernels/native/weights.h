// The weight's rows, 4-bit ones decoded, in the order in which they are multiplied.

#ifndef DIT_QUANT_WEIGHTS_H
#define DIT_QUANT_WEIGHTS_H

#include "product.h"
#include "transpose.h"

// the 16 values that a group's codes stand for: (code - zero) multiplier, or table[code] multiplier
INLINE __m128i group_values(uint8_t level, const int8_t *table) {
    __m256i codes;
    if (table)
        codes = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)table));
    else
        codes = _mm256_sub_epi16(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                 _mm256_set1_epi16(level & 15));
    return _mm256_cvtepi16_epi8(_mm256_mullo_epi16(codes, _mm256_set1_epi16(level >> 4)));
}

INLINE __m512i decode_odd(const Product *p, const uint8_t *codes, const uint8_t *levels, int64_t k, int64_t size) {
    int8_t out[64] __attribute__((aligned(64))) = {0};
    for (int64_t i = k; i < MIN(k + 64, p->K); i++) {
        uint8_t code = (uint8_t)(codes[i / 2] >> (i % 2 * 4)) & 15, level = levels[i / size];
        out[i - k] = (int8_t)((p->table ? p->table[code] : code - (level & 15)) * (level >> 4));
    }
    return _mm512_load_si512(out);
}

// weights k to k + 63 of row n, 0 past the last
INLINE __m512i weights(const Product *p, int64_t n, int64_t k, int bits) {
    __mmask64 mask = first_bytes(p->K - k);
    if (bits == 8) return _mm512_maskz_loadu_epi8(mask, p->w + n * p->K + k);
    const uint8_t *codes = p->w + n * (p->K / 2), *levels = p->levels + n * p->G;
    int64_t size = p->K / p->G;
    if (size % 16) return decode_odd(p, codes, levels, k, size);
    __mmask32 half = (__mmask32)first_bytes((p->K - k) / 2);
    __m512i pairs = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(half, codes + k / 2));
    pairs = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi16(0x0F0F));
    __m512i values;
    if (size % 64 == 0) {
        values = _mm512_broadcast_i32x4(group_values(levels[k / size], p->table));
    } else {
        int64_t last = p->G - 1;
        values = _mm512_castsi128_si512(group_values(levels[k / size], p->table));
        values = _mm512_inserti32x4(values, group_values(levels[MIN((k + 16) / size, last)], p->table), 1);
        values = _mm512_inserti32x4(values, group_values(levels[MIN((k + 32) / size, last)], p->table), 2);
        values = _mm512_inserti32x4(values, group_values(levels[MIN((k + 48) / size, last)], p->table), 3);
    }
    return _mm512_maskz_shuffle_epi8(mask, values, pairs);
}

// rows n to n + 31 of the weight -> [K / 4, 32] words of four codes, and behind them the accumulators' first values
// [32]: -CODE_OFFSET times the sum of a row
INLINE void pack_strip(const Product *product, int64_t n, int bits, uint8_t *out) {
    // a copy, which what is stored to `out` cannot change
    const Product local = *product, *p = &local;
    const __m512i ones = _mm512_set1_epi8(1);
    int32_t *first = (int32_t *)(out + words(p->K) * 4 * STRIP);
    for (int half = 0; half < 2; half++) {
        int64_t row = n + half * LANES, rows = p->N - row;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t k = 0; k < p->K; k += 64) {
            __m512i r[16];
            if (rows >= 16)
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) r[i] = weights(p, row + i, k, bits);
            else
                for (int i = 0; i < 16; i++) r[i] = i < rows ? weights(p, row + i, k, bits) : _mm512_setzero_si512();
            transpose(r);
            for (int64_t j = 0; j < MIN(16, words(p->K) - k / 4); j++) {
                if (CODE_OFFSET) sum = _mm512_dpbusd_epi32(sum, ones, r[j]);
                _mm512_store_si512(out + ((k / 4 + j) * 2 + half) * 64, r[j]);
            }
        }
        sum = _mm512_mullo_epi32(sum, _mm512_set1_epi32(-CODE_OFFSET));
        if (CODE_OFFSET) _mm512_store_si512(first + half * LANES, sum);
    }
}
static void pack_strip8(const Product *p, int64_t n, uint8_t *out) { pack_strip(p, n, 8, out); }
static void pack_strip4(const Product *p, int64_t n, uint8_t *out) { pack_strip(p, n, 4, out); }

#endif
