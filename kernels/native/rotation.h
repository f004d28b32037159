// Block Hadamard rotation of registers. Every stage takes four values: their sum / 2, less the mirror image of each;
// the first stage neighbours, the next ones those 4, 16 and 64 apart.

#ifndef DIT_QUANT_ROTATION_H
#define DIT_QUANT_ROTATION_H

#include "lanes.h"

// sum of the four / 2 - one of them. Fused: halving is exact, so that the bits are those of two operations.
INLINE __m512 mirrored(__m512 sum, __m512 v) { return _mm512_fmsub_ps(sum, _mm512_set1_ps(0.5f), v); }

// between four registers
INLINE void butterfly(__m512 *v, int stride) {
    __m512 a = v[0], b = v[stride], c = v[2 * stride], d = v[3 * stride];
    __m512 sum = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
    v[0] = mirrored(sum, d);
    v[stride] = mirrored(sum, c);
    v[2 * stride] = mirrored(sum, b);
    v[3 * stride] = mirrored(sum, a);
}

// between neighbours of four lanes. The sum is the same in all of them, so that leaving out the mirror image only
// leaves the four in reverse order.
INLINE __m512 butterfly_lanes(__m512 v) {
    __m512 pairs = _mm512_add_ps(v, _mm512_permute_ps(v, 0xB1));
    return mirrored(_mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4E)), v);
}

// between the register's four quarters, in reverse order afterwards as well: all sixteen lanes are
INLINE __m512 butterfly_quarters(__m512 v) {
    __m512 pairs = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xB1));
    return mirrored(_mm512_add_ps(pairs, _mm512_shuffle_f32x4(pairs, pairs, 0x4E)), v);
}

// A block of 64 lies in four registers and is rotated between them, turned over from stage to stage. Entry
// 16 i + 4 q + j starts out in register i, quarter q, lane j.

// register i, lane j <-> register j, lane i, in every quarter
INLINE void swap_lanes(__m512 *v) {
    __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
    __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3])), d = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
    v[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    v[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    v[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    v[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}

// register j, quarter q <-> register q, quarter j
INLINE void swap_quarters(__m512 *v) {
    __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x44), b = _mm512_shuffle_f32x4(v[0], v[1], 0xEE);
    __m512 c = _mm512_shuffle_f32x4(v[2], v[3], 0x44), d = _mm512_shuffle_f32x4(v[2], v[3], 0xEE);
    v[0] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[1] = _mm512_shuffle_f32x4(a, c, 0xDD);
    v[2] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[3] = _mm512_shuffle_f32x4(b, d, 0xDD);
}

// 64 entries from `at` on, with lanes swapped: entry 16 i + 4 q + j in register j, quarter q, lane i
INLINE void load_swapped(const void *x, int dtype, int64_t at, __m512 *v) {
    if (dtype == FP32) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) v[i] = _mm512_loadu_ps((const float *)x + at + i * LANES);
        swap_lanes(v);
        return;
    }
    const uint16_t *narrow = (const uint16_t *)x + at;
    __m512i low = _mm512_loadu_si512(narrow), high = _mm512_loadu_si512(narrow + 32);
    // the entries of register 0, each in the upper half of its lane; those of register j are j further on
    const __m512i first = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 16, 32, 48, 4, 20, 36, 52, 8, 24, 40, 56, 12, 28, 44, 60), 16);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i entry = _mm512_add_epi16(first, _mm512_set1_epi16((short)j));
        __m512i bits = _mm512_maskz_permutex2var_epi16(0xAAAAAAAA, low, entry, high);
        v[j] = dtype == BF16 ? _mm512_castsi512_ps(bits)
                             : _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    }
}

// the registers of a table [K], of which the next lies `step` further on, in the order in which `load_swapped` has them
INLINE void swap_table(float *table, int64_t K, int64_t step) {
    for (int64_t at = 0; at < K; at += 64, table += 4 * step) {
        __m512 v[4];
        for (int j = 0; j < 4; j++) v[j] = _mm512_load_ps(table + j * step);
        swap_lanes(v);
        for (int j = 0; j < 4; j++) _mm512_store_ps(table + j * step, v[j]);
    }
}

// `count` registers, loaded in that way. Afterwards entry 16 i + 4 q + j of every 64 is in register i, quarter j,
// lane q.
// Stage by stage: a stage waits long for the one before, and a CPU looks ahead only so far for others' work.
INLINE void rotate_swapped(__m512 *v, const int count, const int order) {
#pragma GCC unroll 4
    for (int i = 0; i < count; i += 4) butterfly(v + i, 1);
#pragma GCC unroll 4
    for (int i = 0; i < count; i += 4) swap_quarters(v + i);
#pragma GCC unroll 4
    for (int i = 0; i < count; i += 4) butterfly(v + i, 1);
#pragma GCC unroll 4
    for (int i = 0; i < count; i += 4) swap_lanes(v + i);
#pragma GCC unroll 4
    for (int i = 0; i < count; i += 4) butterfly(v + i, 1);
    if (order == 256)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) butterfly(v + i, 4);
}

// up to 16 entries, within a register
INLINE __m512 rotate_lanes(__m512 v, const int order) {
    if (order >= 4) v = butterfly_lanes(v);
    if (order >= 16) v = butterfly_quarters(v);
    return v;
}

// in which order a rotation leaves a row: its own; every four lanes reversed; every sixteen; as `rotate_swapped` does
enum { FORWARD, FOUR_REVERSED, ALL_REVERSED, SWAPPED };

INLINE int arrangement(int order) {
    return order >= 64 ? SWAPPED : order == 16 ? ALL_REVERSED : order == 4 ? FOUR_REVERSED : FORWARD;
}

#endif
