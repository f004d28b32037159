// int8_linear and int4_linear for CPUs with AVX-512. Bit-equal to kernels/int8_linear/reference.py.

#ifdef DIT_QUANT_AMX
#include "amx.h"
#else
#include "vnni.h"
#endif
#include "weights.h"

#include <sys/mman.h>

// packed tokens that are multiplied by every panel before the next ones are packed: they stay in the last cache
#define CHUNK_BYTES 8388608
#define FEWEST_TILES 16
// the chunk is cut into parts of at least so many tokens, one for each thread or few: a part's tokens are written and
// read by the same threads, as caches far from each other take long to hand over what one of them wrote
#define PART_TOKENS 384
// an output of fewer bytes comes from memory that is mapped already
#define LARGE 4194304
#define HUGE_PAGE 2097152
// an output of more bytes goes past the caches, which would not hold it until it is read
#define STREAMED 16777216

#define VALUES_SIZE (256 * 16)

INLINE int64_t panel_size(int64_t K) { return panel_strips(K) * strip_size(K); }
INLINE int64_t panels(const Product *p) { return (strips(p->N) + p->panel - 1) / p->panel; }

INLINE int64_t chunk_tiles(int64_t M, int64_t K, int64_t rank) {
    int64_t fit = CHUNK_BYTES / tile_size(K, rank);
    return MIN(tiles(M), fit < FEWEST_TILES ? FEWEST_TILES : fit);
}

// the tiles of a part: from this one to that of the next part
INLINE int64_t part_start(const Product *p, int64_t part) { return p->count * part / p->team.shares; }

// of tokens m and following
INLINE const int8_t *codes_of(const Product *p, int64_t m) {
    if (!p->quantizer) return p->a + m * p->K;
    int thread = p->team.number();
    int8_t *codes = p->own + thread * TILE_M * p->K;
    quantize_portion(p->quantizer, m, MIN(m + TILE_M, p->M), thread, codes);
    return codes;
}

static void pack_tiles(void *data) {
    Product *p = data;
    int64_t own = own_share(&p->team), t;
    for (int64_t part = own; part < own + p->team.shares; part++) {
        int64_t at = part % p->team.shares, start = part_start(p, at), count = part_start(p, at + 1) - start;
        while ((t = take(&p->team, at, 1)) < count) {
            int64_t m = (p->tile + start + t) * TILE_M;
            uint8_t *tile = p->tokens + (start + t) * tile_size(p->K, p->rank);
            pack_tile(codes_of(p, m), MIN(TILE_M, p->M - m), p->K, tile);
            pack_terms(p, m, (float *)(tile + codes_size(p->K)));
        }
    }
}

// a panel times the tiles `start` to `end` of the chunk
INLINE void multiply_panel(const Product *p, int64_t panel, int64_t start, int64_t end, uint8_t *w, Multiplier *u) {
    const int64_t row_size = p->levels ? p->K / 2 : p->K, columns = p->panel * STRIP, n = panel * columns;
    const int64_t count = MIN(p->panel, strips(p->N - n));
    // the panel that this thread is likely to take next comes from memory meanwhile
    const int64_t next = n + sharers(&p->team) * columns, ahead = MIN(columns, p->N - next) * row_size;
    const char *from = (const char *)p->w + next * row_size;
    for (int64_t strip = 0; strip < count; strip++)
        (p->levels ? pack_strip4 : pack_strip8)(p, n + strip * STRIP, w + strip * strip_size(p->K));
    for (int64_t t = start; t < end; t++) {
        int64_t m = (p->tile + t) * TILE_M;
        for (int64_t at = ahead * (t - start) / (end - start); at < ahead * (t - start + 1) / (end - start); at += 64)
            _mm_prefetch(from + at, _MM_HINT_T1);
        for (int64_t strip = 0; strip < count; strip++)
            multiply_tile(p, p->tokens + t * tile_size(p->K, p->rank), w + strip * strip_size(p->K), m,
                          n + strip * STRIP, p->M - m, u);
    }
}

// panel after panel, each times the thread's part of the tiles or, near the end, a piece of it; then others' parts
static void multiply_panels(void *data) {
    Product *p = data;
    Multiplier multiplier;
    uint8_t *w = p->panels + p->team.number() * panel_size(p->K);
    int64_t own = own_share(&p->team), items = p->whole + (panels(p) - p->whole) * p->pieces, item;
    start_multiplying(&multiplier);
    for (int64_t part = own; part < own + p->team.shares; part++) {
        int64_t at = part % p->team.shares, start = part_start(p, at), count = part_start(p, at + 1) - start;
        while ((item = take(&p->team, at, 1)) < items) {
            int64_t late = item - p->whole, panel = late < 0 ? item : p->whole + late / p->pieces;
            int64_t piece = late < 0 ? 0 : late % p->pieces, pieces = late < 0 ? 1 : p->pieces;
            multiply_panel(p, panel, start + count * piece / pieces, start + count * (piece + 1) / pieces, w,
                           &multiplier);
        }
    }
    stop_multiplying(p, &multiplier);
    // before others read what was streamed
    if (p->streamed) _mm_sfence();
}

// bytes of scratch memory
int64_t linear_buffer(int64_t M, int64_t N, int64_t K, int64_t rank, unsigned threads) {
    return chunk_tiles(M, K, rank) * tile_size(K, rank) + threads * panel_size(K) + VALUES_SIZE +
           columns_size(N, rank) * 4;
}

// p: its tokens, y and shape; buffer [linear_buffer(M, N, K, rank, threads)], aligned to 64 bytes
static void multiply_all(Product p, const Weight *w, Group group, parallel_t parallel, number_t number,
                         unsigned threads, uint8_t *buffer) {
    if (!p.M) return;
    int64_t most = chunk_tiles(p.M, p.K, w->rank), chunks = (tiles(p.M) + most - 1) / most;
    int64_t nbytes = p.M * w->N * width(p.dtype);
    p.w = w->w;
    p.levels = w->levels;
    p.N = w->N;
    p.G = w->G;
    p.rank = w->rank;
    p.panel = panel_strips(p.K);
    p.tokens = buffer;
    p.panels = buffer + most * tile_size(p.K, p.rank);
    p.values = (int8_t(*)[16])(p.panels + threads * panel_size(p.K));
    p.columns = (float *)(p.values + 256);
    p.added = w->bias.data || w->correction.data;
    p.streamed = nbytes >= STREAMED && !((uintptr_t)p.y % 64) && !(p.N * width(p.dtype) % 64);
    if (p.levels) list_values(w->table, p.values);
    list_columns(&p, w, group);
    if (nbytes >= LARGE) {
        // fresh memory: one page fault for 2 MiB in place of 512, which would cost a third of the product
        uintptr_t start = ((uintptr_t)p.y + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        uintptr_t stop = ((uintptr_t)p.y + nbytes) / HUGE_PAGE * HUGE_PAGE;
        if (stop > start) madvise((void *)start, stop - start, MADV_HUGEPAGE);
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        p.tile = tiles(p.M) * chunk / chunks;
        p.count = tiles(p.M) * (chunk + 1) / chunks - p.tile;
        p.team = team(parallel, number, threads, p.count * TILE_M / PART_TOKENS);
        int64_t sharing = sharers(&p.team), last = threads > 1 ? MIN(panels(&p), LAST_PANELS * sharing) : 0;
        p.whole = panels(&p) - last;
        p.pieces = 1;
        while (p.pieces * 2 * p.team.shares <= p.count && last * p.pieces < LAST_PIECES * sharing) p.pieces *= 2;
        run(&p.team, pack_tiles, &p);
        run(&p.team, multiply_panels, &p);
    }
}

// a [M, K] int8; row_scale, row_zero [M], of which the second may be null; coordinates [M, rank] bf16; y [M, N];
// buffer [linear_buffer(M, N, K, rank, threads)], aligned to 64 bytes. Where a table has not the group that is asked
// for nothing happens. Whether it has.
int linear(parallel_t parallel, number_t number, unsigned threads, const int8_t *a, int64_t M, int64_t K,
           const float *row_scale, const float *row_zero, const uint16_t *coordinates, const Weight *w,
           const Group *group, void *y, int dtype, uint8_t *buffer) {
    if (outside(&w->correction, *group)) return 0;
    Product p = {.a = a, .M = M, .K = K, .row_scale = row_scale, .row_zero = row_zero, .coordinates = coordinates,
                 .y = y, .dtype = dtype};
    multiply_all(p, w, *group, parallel, number, threads, buffer);
    return 1;
}

// bytes of scratch memory
int64_t layer_buffer(int64_t M, int64_t N, int64_t K, int64_t rank, unsigned threads) {
    return linear_buffer(M, N, K, rank, threads) + quantizer_buffer(K, rank, threads) + threads * TILE_M * K +
           M * (2 * 4 + rank * 2) + 64;
}

// quantize_activation, or with directions quantize_along, and `linear` of its codes, which are never in memory as a
// whole: the same bits. y [M, N] of the type of x; buffer [layer_buffer(M, N, K, rank, threads)], aligned to 64 bytes.
// Where a table has not the group that is asked for nothing happens. Whether it has.
int layer(parallel_t parallel, number_t number, unsigned threads, const Tokens *x, const Weight *w, const Group *group,
          void *y, uint8_t *buffer) {
    if (!has_group(x, *group) || outside(&w->correction, *group)) return 0;
    const int64_t M = x->M, K = x->K;
    uint8_t *room = buffer + (linear_buffer(M, w->N, K, w->rank, threads) + 63) / 64 * 64;
    float *tables = (float *)room, *scale = tables + quantizer_buffer(K, w->rank, threads) / 4, *zero = scale + M;
    uint16_t *coordinates = (uint16_t *)(zero + M);
    Quantizer quantizer = quantizer_of(x, *group, coordinates, w->rank > 0, scale, zero, tables);
    for (int64_t m = 0; quantizer.fixed && m < M; m++) {
        scale[m] = quantizer.fixed_scale;
        zero[m] = quantizer.fixed_zero;
    }
    Product p = {.quantizer = &quantizer, .own = (int8_t *)(coordinates + M * w->rank), .M = M, .K = K,
                 .row_scale = scale, .row_zero = has_zero(x) ? zero : NULL, .coordinates = coordinates, .y = y,
                 .dtype = x->dtype};
    multiply_all(p, w, *group, parallel, number, threads, buffer);
    return 1;
}
