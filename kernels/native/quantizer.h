// What quantizer.c offers to the product: the codes of a few tokens at a time.

#ifndef DIT_QUANT_QUANTIZER_H
#define DIT_QUANT_QUANTIZER_H

#include "along.h"
#include "tables.h"

// rows that a thread takes at a time: a multiple of TOGETHER and of PAIR
#define PORTION 12

// x [M, K], its rows `stride` apart, and how it is quantized: shift [T, K], smooth [K], directions [rank, K] fp16;
// fixed_scale, fixed_zero [T], a static range; all of which may be absent
typedef struct {
    const void *x;
    int32_t dtype, order, symmetric;
    int64_t M, K, stride, rank;
    Table shift, smooth, fixed_scale, fixed_zero;
    const uint16_t *directions;
} Tokens;

typedef struct {
    const void *x;
    int dtype, order, symmetric;
    int64_t M, K, stride;
    // z, directions V and 1 / s of every register of a row, as the rotation has x: [K / LANES, 2 + padded rank, LANES]
    float *tables;
    Directions along;
    // bf16 [M, rank], given or to be found
    uint16_t *coordinates;
    int find;
    // a static range, if it is one
    int fixed;
    float fixed_scale, fixed_zero;
    // [M], written where ranges are measured; zero only where the range is asymmetric
    float *scale, *zero;
    // [PAIR, K] of each thread
    float *buffers;
} Quantizer;

// whether all tables have the group
INLINE int has_group(const Tokens *x, Group group) {
    return !outside(&x->shift, group) && !outside(&x->fixed_scale, group) && !outside(&x->fixed_zero, group);
}

// whether codes stand for values from a zero point on
INLINE int has_zero(const Tokens *x) { return x->fixed_scale.data ? x->fixed_zero.data != NULL : !x->symmetric; }

// bytes of scratch memory
int64_t quantizer_buffer(int64_t K, int64_t rank, unsigned threads);

// coordinates [M, rank] bf16, given or to be found; scale, zero [M]; buffer [quantizer_buffer(K, rank, threads)],
// aligned to 64 bytes
Quantizer quantizer_of(const Tokens *x, Group group, uint16_t *coordinates, int find, float *scale,
                       float *zero, float *buffer);

// rows `at` to `end` -> codes [end - at, K]
void quantize_portion(const Quantizer *q, int64_t at, int64_t end, int thread, int8_t *codes);

#endif
