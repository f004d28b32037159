// Products by AMX: tiles of 16 rows of 64 bytes, signed by signed bytes.
//
// The tile unit works beside the vector units. So the epilogue of a block of outputs runs, slice by slice, between the
// products of the next one.

#ifndef DIT_QUANT_AMX_H
#define DIT_QUANT_AMX_H

#include "epilogue.h"

#define TILE_ROWS 16
#define TILE_BYTES (TILE_ROWS * BLOCK)
// rows of a slice of the epilogue
#define SLICE_ROWS 8
#define SLICES (TILE_M / SLICE_ROWS)
#define EIGHT(x) x, x, x, x, x, x, x, x

// of a tile of tokens times a strip: terms of the tokens, and sums before their epilogue
typedef struct {
    const float *terms;
    int64_t m, n, rows;
    __m512i sum[TILE_M][2];
} Sums;

// of a thread: the sums that are worked on, and those before, none where these have no rows
typedef struct {
    Sums sums[2];
    int turn;
} Multiplier;

// four tiles of accumulators, two of tokens, two of weights
INLINE void start_multiplying(Multiplier *u) {
    // constant: to GCC the instruction reads 8 bytes, and it leaves out what would write the others
    static const struct {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1, .bytes = {EIGHT(BLOCK)}, .rows = {EIGHT(TILE_ROWS)}};
    _tile_loadconfig(&shape);
    u->sums[0].rows = u->sums[1].rows = u->turn = 0;
}

// a [rows <= 32, K] -> [K / 64, 32] blocks of 64 codes: one tile of 16 tokens after the other; missing rows and columns
// are 0
static void pack_tile(const int8_t *a, int64_t rows, int64_t K, uint8_t *out) {
    for (int64_t k = 0; k < K; k += BLOCK, out += TILE_M * BLOCK) {
        __mmask64 mask = first_bytes(K - k);
        for (int64_t i = 0; i < TILE_M; i++)
            _mm512_store_si512(out + i * BLOCK, _mm512_maskz_loadu_epi8(i < rows ? mask : 0, a + i * K + k));
    }
}

static void finish_slice(const Product *p, const Sums *s, int64_t slice) {
    int64_t row = slice * SLICE_ROWS;
    if (row < s->rows) finish(p, s->terms + row, s->m + row, s->n, s->rows - row, SLICE_ROWS, s->sum + row);
}

// tokens, `wide`: two tiles of 16, times a strip -> sum; and the epilogue of `before`. Weights pass the first cache by,
// which holds the tokens until the next strip: from the second, both would not come fast enough.
INLINE void multiply(const Product *p, const uint8_t *a, const uint8_t *w, __m512i sum[][2], const Sums *before,
                     const int wide) {
    const int64_t steps = words(p->K) * 4 / BLOCK;
    int64_t slice = 0;
    // tokens and weights are in memory by now: GCC does not know that tiles are loaded from there
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step++, a += TILE_M * BLOCK, w += STRIP * BLOCK) {
        _tile_stream_loadd(6, w, BLOCK);
        _tile_stream_loadd(7, w + TILE_BYTES, BLOCK);
        _tile_loadd(4, a, BLOCK);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        if (wide) {
            _tile_loadd(5, a + TILE_BYTES, BLOCK);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
        for (; slice * steps < SLICES * (step + 1); slice++) finish_slice(p, before, slice);
    }
    _tile_stored(0, &sum[0][0], 2 * BLOCK);
    _tile_stored(1, &sum[0][1], 2 * BLOCK);
    if (wide) {
        _tile_stored(2, &sum[TILE_ROWS][0], 2 * BLOCK);
        _tile_stored(3, &sum[TILE_ROWS][1], 2 * BLOCK);
    }
}

// tokens m and following, `rows` of which there are, times the strip w of out-features n and following
static void multiply_tile(const Product *p, const uint8_t *a, const uint8_t *w, int64_t m, int64_t n, int64_t rows,
                          Multiplier *u) {
    Sums *now = &u->sums[u->turn], *before = &u->sums[!u->turn];
    u->turn = !u->turn;
    now->terms = (const float *)(a + codes_size(p->K));
    now->m = m;
    now->n = n;
    now->rows = MIN(rows, TILE_M);
    if (rows > TILE_ROWS)
        multiply(p, a, w, now->sum, before, 1);
    else
        multiply(p, a, w, now->sum, before, 0);
}

// after the last tile
INLINE void stop_multiplying(const Product *p, Multiplier *u) {
    for (int64_t slice = 0; slice < SLICES; slice++) finish_slice(p, &u->sums[!u->turn], slice);
    _tile_release();
}

#endif
