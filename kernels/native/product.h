// What a product is made of, for the driver (product.c) and the instructions that multiply (amx.h, vnni.h).

#ifndef DIT_QUANT_PRODUCT_H
#define DIT_QUANT_PRODUCT_H

#include "quantizer.h"
#include "tables.h"
#include "team.h"

// TILE_M tokens are a tile; STRIP out-features a strip, which is multiplied by a tile at a time; PANEL_STRIPS at most a
// panel, which a thread multiplies by a tile before it goes to the next: tokens then come from far away once a panel,
// which is to stay in a thread's own cache, PANEL_BYTES or one strip.
// BLOCK: bytes of a row that an instruction works on, zeros behind the last. CODE_OFFSET is added to codes of tokens.
// The last panels, LAST_PANELS a thread, are cut into pieces, LAST_PIECES a thread: none must be waited for long, but
// every piece packs its panel anew.
#ifdef DIT_QUANT_AMX
#define TILE_M 32
#define BLOCK 64
#define CODE_OFFSET 0
#define PANEL_STRIPS 8
#define PANEL_BYTES 786432
#define LAST_PANELS 1
#define LAST_PIECES 2
#else
#define TILE_M 12
#define BLOCK 4
#define CODE_OFFSET 128
#define PANEL_STRIPS 2
#define PANEL_BYTES 81920
#define LAST_PANELS 2
#define LAST_PIECES 8
#endif
#define STRIP 32

// what a product multiplies by, and its epilogue: w [N, K] int8, or with levels [N, G] packed [N, K / 2], and then a
// table [16] or null; column_scale, bias [N], correction [T, N], of which all but the first may be absent; column_sum
// [N] or null; responses [rank, N] fp16
typedef struct {
    const uint8_t *w, *levels;
    const int8_t *table;
    int64_t N, G, rank;
    Table column_scale, bias, correction;
    const int32_t *column_sum;
    const uint16_t *responses;
} Weight;

typedef struct {
    // codes [M, K], or what makes them of x on their way into the tiles, and room for those of a tile for each thread
    const int8_t *a;
    const Quantizer *quantizer;
    int8_t *own;
    const uint8_t *w;
    const uint8_t *levels;
    // [256, 16], of 4-bit weights
    int8_t (*values)[16];
    int64_t M, N, K, G;
    const float *row_scale, *row_zero;
    int64_t rank;
    const uint16_t *coordinates;
    // terms of the columns, see list_columns; whether anything is added behind the product
    float *columns;
    int added;
    // whether outputs are whole cache lines that do not stay in a cache
    int streamed;
    void *y;
    int dtype;
    // strips of a panel
    int64_t panel;
    // the chunk: its tiles, the panels that are multiplied by a whole part of them, the pieces in which the others are
    int64_t tile, count, whole, pieces;
    uint8_t *tokens, *panels;
    Team team;
} Product;

INLINE int64_t words(int64_t K) { return (K + BLOCK - 1) / BLOCK * (BLOCK / 4); }
INLINE int64_t strips(int64_t N) { return (N + STRIP - 1) / STRIP; }
INLINE int64_t tiles(int64_t M) { return (M + TILE_M - 1) / TILE_M; }

// bytes of a tile's codes, with room behind them, see pack_tile; and with the tokens' terms [2 + rank, TILE_M]: row
// scales, row zeros and coordinates
INLINE int64_t codes_size(int64_t K) { return (words(K) * 4 * TILE_M + 16 + 63) / 64 * 64; }
INLINE int64_t tile_size(int64_t K, int64_t rank) { return codes_size(K) + ((2 + rank) * TILE_M * 4 + 63) / 64 * 64; }
// with room for the accumulators' first values
INLINE int64_t strip_size(int64_t K) { return (words(K) * 4 + 4) * STRIP; }

INLINE int64_t panel_strips(int64_t K) {
    int64_t fit = PANEL_BYTES / strip_size(K);
    return fit < 1 ? 1 : MIN(fit, PANEL_STRIPS);
}

INLINE __mmask64 first_bytes(int64_t count) {
    return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1;
}

#endif
