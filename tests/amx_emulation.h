// The instructions of AMX that amx.h uses, in plain C: for compilers and CPUs without them. Included before everything.

#ifndef DIT_QUANT_AMX_EMULATION_H
#define DIT_QUANT_AMX_EMULATION_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define DIT_QUANT_AMX 1

// of this thread: eight tiles of 16 rows of 64 bytes, and whether they are configured to be that
static __thread int8_t emulated_tiles[8][16][64];
static __thread int emulated_ready;

static inline void emulated_loadconfig(const void *given) {
    const uint8_t *config = given;
    int known = config[0] == 1 && config[1] == 0;
    for (int tile = 0; tile < 8; tile++)
        known &= config[16 + 2 * tile] == 64 && config[17 + 2 * tile] == 0 && config[48 + tile] == 16;
    if (!known) abort();
    emulated_ready = 1;
}

static inline void emulated_release(void) { emulated_ready = 0; }

static inline int8_t (*emulated_tile(int tile))[64] {
    if (!emulated_ready) abort();
    return emulated_tiles[tile];
}

static inline void emulated_zero(int tile) { memset(emulated_tile(tile), 0, 1024); }

static inline void emulated_load(int tile, const void *from, int64_t stride) {
    for (int row = 0; row < 16; row++) memcpy(emulated_tile(tile)[row], (const char *)from + row * stride, 64);
}

static inline void emulated_store(int tile, void *to, int64_t stride) {
    for (int row = 0; row < 16; row++) memcpy((char *)to + row * stride, emulated_tile(tile)[row], 64);
}

// c [16, 16] int32 += a [16, 64] b, whose row r holds rows 4 r to 4 r + 3 of a matrix [64, 16], column by column
static inline void emulated_product(int c, int a, int b) {
    for (int row = 0; row < 16; row++) {
        uint32_t sums[16];
        memcpy(sums, emulated_tile(c)[row], 64);
        for (int k = 0; k < 64; k++)
            for (int column = 0; column < 16; column++)
                sums[column] += (uint32_t)(emulated_tile(a)[row][k] * emulated_tile(b)[k / 4][4 * column + k % 4]);
        memcpy(emulated_tile(c)[row], sums, 64);
    }
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbssd
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_load
#define _tile_stream_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_dpbssd emulated_product

#endif
