// What quantizer.c offers to the product: the codes of a few tokens at a time.

#ifndef DIT_QUANT_QUANTIZER_H
#define DIT_QUANT_QUANTIZER_H

#include "along.h"

// rows that a thread takes at a time: a multiple of TOGETHER and of PAIR
#define PORTION 12

typedef struct {
    const void *x;
    int dtype, order, symmetric;
    int64_t M, K, stride;
    // z and 1 / s as the rotation has x
    const float *offset, *factor;
    Directions along;
    // bf16 [M, rank], given or to be found
    uint16_t *coordinates;
    int find;
    const float *fixed_scale, *fixed_zero;
    // [M], written where ranges are measured
    float *scale, *zero;
    // [PAIR, K] of each thread
    float *buffers;
} Quantizer;

// bytes of scratch memory
int64_t quantizer_buffer(int64_t K, int64_t rank, unsigned threads);

// x [M, K], its rows `stride` apart; shift, smooth [K] or null; coordinates [M, rank] bf16, read or found, directions
// [rank, K] fp16; fixed_scale, fixed_zero [1]: a static range; scale, zero [M], zero null where symmetric or static;
// buffer [quantizer_buffer(K, rank, threads)]
Quantizer quantizer_of(unsigned threads, const void *x, int dtype, int64_t M, int64_t K, int64_t stride,
                       const float *shift, const float *smooth, int64_t rank, int find, uint16_t *coordinates,
                       const uint16_t *directions, int order, int symmetric, const float *fixed_scale,
                       const float *fixed_zero, float *scale, float *zero, float *buffer);

// rows `at` to `end` -> codes [end - at, K]
void quantize_portion(const Quantizer *q, int64_t at, int64_t end, int thread, int8_t *codes);

#endif
