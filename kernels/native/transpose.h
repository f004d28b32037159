// Sixteen registers of sixteen words, turned over.

#ifndef DIT_QUANT_TRANSPOSE_H
#define DIT_QUANT_TRANSPOSE_H

#include "lanes.h"

// row i, word j <-> row j, word i
INLINE void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i ab = _mm512_unpacklo_epi32(r[i], r[i + 1]), AB = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        __m512i cd = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), CD = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(ab, cd);
        t[i + 1] = _mm512_unpackhi_epi64(ab, cd);
        t[i + 2] = _mm512_unpacklo_epi64(AB, CD);
        t[i + 3] = _mm512_unpackhi_epi64(AB, CD);
    }
    // quarter q of t[4 i + j] holds word 4 q + j of rows 4 i to 4 i + 3
    for (int j = 0; j < 4; j++) {
        __m512i low = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x44), high = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xEE);
        __m512i LOW = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x44);
        __m512i HIGH = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xEE);
        r[j] = _mm512_shuffle_i32x4(low, LOW, 0x88);
        r[4 + j] = _mm512_shuffle_i32x4(low, LOW, 0xDD);
        r[8 + j] = _mm512_shuffle_i32x4(high, HIGH, 0x88);
        r[12 + j] = _mm512_shuffle_i32x4(high, HIGH, 0xDD);
    }
}

#endif
