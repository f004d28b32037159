// int8_linear and int4_linear for CPUs with AVX-512 VNNI. Bit-equal to kernels/int8_linear/reference.py.
//
// vpdpbusd multiplies unsigned by signed bytes: codes of a travel as a + 128, and the accumulators of column n start
// at -128 times the sum of its weights, which leaves the exact sum of a w.

#include "lanes.h"
#include "quantizer.h"
#include "team.h"

#include <string.h>
#include <sys/mman.h>

// accumulators of a tile: 12 tokens x 32 out-features in 24 registers
#define TILE_M 12
#define PANEL 32
// packed tokens that are multiplied by every panel before the next ones are packed: they stay in the last cache
#define CHUNK_BYTES 8388608
#define FEWEST_TILES 16
// the chunk is cut into parts of at least so many tiles, one for each thread or few: a part's tokens are written and
// read by the same threads, as caches far from each other take long to hand over what one of them wrote
#define PART_TILES 32
// the last panels, so many a thread, are taken in pieces, so many a thread: none must be waited for long
#define LAST_PANELS 2
#define LAST_PIECES 8
// an output of fewer bytes comes from memory that is mapped already
#define LARGE 4194304
#define HUGE_PAGE 2097152

typedef struct {
    // codes [M, K], or what makes them of x on their way into the tiles, and room for those of a tile for each thread
    const int8_t *a;
    const Quantizer *quantizer;
    int8_t *own;
    const uint8_t *w;
    const uint8_t *levels;
    const int8_t *table;
    int64_t M, N, K, G;
    const float *row_scale, *row_zero, *column_scale, *bias, *correction;
    const int32_t *column_sum;
    int64_t rank;
    const uint16_t *coordinates;
    // [rank, N]
    float *responses;
    void *y;
    int dtype;
    // the chunk: its tiles, the panels that are multiplied by a whole part of them, the pieces in which the others are
    int64_t tile, count, whole, pieces;
    uint8_t *tokens, *panels;
    Team team;
} Product;

INLINE int64_t words(int64_t K) { return (K + 3) / 4; }
INLINE int64_t panels(int64_t N) { return (N + PANEL - 1) / PANEL; }
INLINE int64_t tiles(int64_t M) { return (M + TILE_M - 1) / TILE_M; }

// bytes of a tile's codes, with room behind them, see pack_tile; and with the tokens' terms [2 + rank, 12]: row scales,
// row zeros and coordinates
INLINE int64_t codes_size(int64_t K) { return (words(K) * 4 * TILE_M + 16 + 63) / 64 * 64; }
INLINE int64_t tile_size(int64_t K, int64_t rank) { return codes_size(K) + ((2 + rank) * TILE_M * 4 + 63) / 64 * 64; }
// with room for the accumulators' first values
INLINE int64_t panel_size(int64_t K) { return (words(K) * 4 + 4) * PANEL; }

INLINE int64_t chunk_tiles(int64_t M, int64_t K, int64_t rank) {
    int64_t fit = CHUNK_BYTES / tile_size(K, rank);
    return MIN(tiles(M), fit < FEWEST_TILES ? FEWEST_TILES : fit);
}

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

INLINE __mmask64 first_bytes(int64_t count) {
    return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1;
}

// a [rows <= 12, K] -> [K / 4, 12] words of four unsigned codes; missing rows and columns are code 0. Whole registers
// are stored, of which the next one overwrites a quarter: 16 bytes behind the tile are written to.
static void pack_tile(const int8_t *a, int64_t rows, int64_t K, uint8_t *out) {
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    for (int64_t k = 0; k < K; k += 64) {
        __mmask64 mask = first_bytes(K - k);
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = i < rows ? _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, a + i * K + k), flip) : flip;
        transpose(r);
        for (int64_t j = 0; j < MIN(16, words(K) - k / 4); j++)
            _mm512_storeu_si512(out + (k / 4 + j) * TILE_M * 4, r[j]);
    }
}

// of tokens m and following; 0 of those past the last
static void pack_terms(const Product *p, int64_t m, float *terms) {
    for (int64_t i = 0; i < TILE_M; i++) {
        int known = m + i < p->M;
        terms[i] = known ? p->row_scale[m + i] : 0.0f;
        terms[TILE_M + i] = known && p->row_zero ? p->row_zero[m + i] : 0.0f;
        for (int64_t r = 0; r < p->rank; r++) {
            uint32_t bits = known ? (uint32_t)p->coordinates[(m + i) * p->rank + r] << 16 : 0;
            memcpy(terms + (2 + r) * TILE_M + i, &bits, 4);
        }
    }
}

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

// rows n to n + 31 of the weight -> [K / 4, 32] words of four codes, and the accumulators' first values [32]
INLINE void pack_panel(const Product *product, int64_t n, int bits, uint8_t *out, int32_t *first) {
    // a copy, which what is stored to `out` cannot change
    const Product local = *product, *p = &local;
    const __m512i ones = _mm512_set1_epi8(1);
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
                sum = _mm512_dpbusd_epi32(sum, ones, r[j]);
                _mm512_store_si512(out + ((k / 4 + j) * 2 + half) * 64, r[j]);
            }
        }
        _mm512_store_si512(first + half * LANES, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 7)));
    }
}
static void pack_panel8(const Product *p, int64_t n, uint8_t *out, int32_t *first) { pack_panel(p, n, 8, out, first); }
static void pack_panel4(const Product *p, int64_t n, uint8_t *out, int32_t *first) { pack_panel(p, n, 4, out, first); }

// row scale * column scale * (sum - zero * column sum) + p B + (b + c), in the order of the reference, of one half
// of a tile: rows m and following, columns n and following
INLINE void finish(const Product *p, const float *terms, int64_t m, int64_t n, int64_t rows, const int count,
                   __m512i sum[][2], int half) {
    if (n >= p->N) return;
    __mmask16 mask = first_lanes(p->N - n);
    __m512 none = _mm512_setzero_ps(), scale = _mm512_maskz_loadu_ps(mask, p->column_scale + n);
    __m512 column = p->row_zero ? _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(mask, p->column_sum + n)) : none;
    __m512 addend = p->bias ? _mm512_maskz_loadu_ps(mask, p->bias + n) : none;
    if (p->correction) {
        __m512 correction = _mm512_maskz_loadu_ps(mask, p->correction + n);
        addend = p->bias ? _mm512_add_ps(addend, correction) : correction;
    }
    __m512 y[TILE_M];
#pragma GCC unroll 12
    for (int i = 0; i < count; i++) {
        y[i] = _mm512_cvtepi32_ps(sum[i][half]);
        if (p->row_zero) y[i] = _mm512_sub_ps(y[i], _mm512_mul_ps(_mm512_set1_ps(terms[TILE_M + i]), column));
        y[i] = _mm512_mul_ps(_mm512_mul_ps(y[i], _mm512_set1_ps(terms[i])), scale);
    }
    for (int64_t r = 0; r < p->rank; r++) {
        __m512 response = _mm512_maskz_loadu_ps(mask, p->responses + r * p->N + n);
        // fused: p B is exact, see kernels/directions.py
#pragma GCC unroll 12
        for (int i = 0; i < count; i++)
            y[i] = _mm512_fmadd_ps(_mm512_set1_ps(terms[(2 + r) * TILE_M + i]), response, y[i]);
    }
#pragma GCC unroll 12
    for (int i = 0; i < count; i++) {
        if (i >= rows) break;
        if (p->bias || p->correction) y[i] = _mm512_add_ps(y[i], addend);
        store_lanes(p->y, p->dtype, (m + i) * p->N + n, mask, y[i]);
    }
}

// sum + the four products in every lane. Not the intrinsic: GCC would copy accumulators from register to register.
INLINE void add_products(__m512i *sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// `count` tokens of a packed tile times a packed panel
INLINE void multiply(const Product *p, const uint8_t *a, const uint8_t *w, const int32_t *first, int64_t m, int64_t n,
                     int64_t rows, const int count) {
    const float *terms = (const float *)(a + codes_size(p->K));
    __m512i sum[TILE_M][2];
#pragma GCC unroll 12
    for (int i = 0; i < count; i++) {
        sum[i][0] = _mm512_load_si512(first);
        sum[i][1] = _mm512_load_si512(first + LANES);
    }
    for (int64_t k = words(p->K); k > 0; k--) {
        __m512i low = _mm512_load_si512(w), high = _mm512_load_si512(w + 64);
#pragma GCC unroll 12
        for (int i = 0; i < count; i++) {
            __m512i x = _mm512_set1_epi32(((const int32_t *)a)[i]);
            add_products(&sum[i][0], x, low);
            add_products(&sum[i][1], x, high);
        }
        a += TILE_M * 4;
        w += PANEL * 4;
    }
    finish(p, terms, m, n, rows, count, sum, 0);
    finish(p, terms, m, n + LANES, rows, count, sum, 1);
}

static void multiply_tile(const Product *p, const uint8_t *a, const uint8_t *w, const int32_t *first, int64_t m,
                          int64_t n, int64_t rows) {
    if (rows > 8)
        multiply(p, a, w, first, m, n, rows, 12);
    else if (rows > 4)
        multiply(p, a, w, first, m, n, rows, 8);
    else if (rows > 1)
        multiply(p, a, w, first, m, n, rows, 4);
    else
        multiply(p, a, w, first, m, n, rows, 1);
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
INLINE void multiply_panel(const Product *p, int64_t panel, int64_t start, int64_t end, uint8_t *w, int32_t *first) {
    int64_t row_size = p->levels ? p->K / 2 : p->K, n = panel * PANEL;
    // the panel that this thread is likely to take next comes from memory meanwhile
    int64_t next = n + sharers(&p->team) * PANEL, ahead = MIN(PANEL, p->N - next) * row_size;
    const char *from = (const char *)p->w + next * row_size;
    (p->levels ? pack_panel4 : pack_panel8)(p, n, w, first);
    for (int64_t t = start; t < end; t++) {
        int64_t m = (p->tile + t) * TILE_M;
        for (int64_t at = ahead * (t - start) / (end - start); at < ahead * (t - start + 1) / (end - start); at += 64)
            _mm_prefetch(from + at, _MM_HINT_T1);
        multiply_tile(p, p->tokens + t * tile_size(p->K, p->rank), w, first, m, n, p->M - m);
    }
}

// panel after panel, each times the thread's part of the tiles or, near the end, a piece of it; then others' parts
static void multiply_panels(void *data) {
    Product *p = data;
    uint8_t *w = p->panels + p->team.number() * panel_size(p->K);
    int32_t *first = (int32_t *)(w + words(p->K) * 4 * PANEL);
    int64_t own = own_share(&p->team), items = p->whole + (panels(p->N) - p->whole) * p->pieces, item;
    for (int64_t part = own; part < own + p->team.shares; part++) {
        int64_t at = part % p->team.shares, start = part_start(p, at), count = part_start(p, at + 1) - start;
        while ((item = take(&p->team, at, 1)) < items) {
            int64_t late = item - p->whole, panel = late < 0 ? item : p->whole + late / p->pieces;
            int64_t piece = late < 0 ? 0 : late % p->pieces, pieces = late < 0 ? 1 : p->pieces;
            multiply_panel(p, panel, start + count * piece / pieces, start + count * (piece + 1) / pieces, w, first);
        }
    }
}

// bytes of scratch memory
int64_t linear_buffer(int64_t M, int64_t N, int64_t K, int64_t rank, unsigned threads) {
    return chunk_tiles(M, K, rank) * tile_size(K, rank) + threads * panel_size(K) + rank * N * 4;
}

// responses [rank, N] fp16; buffer [linear_buffer(M, N, K, rank, threads)], aligned to 64 bytes
static void multiply_all(Product p, parallel_t parallel, number_t number, unsigned threads, const uint16_t *responses,
                         uint8_t *buffer) {
    int64_t most = chunk_tiles(p.M, p.K, p.rank), chunks = (tiles(p.M) + most - 1) / most;
    int64_t nbytes = p.M * p.N * width(p.dtype);
    p.tokens = buffer;
    p.panels = buffer + most * tile_size(p.K, p.rank);
    p.responses = (float *)(p.panels + threads * panel_size(p.K));
    for (int64_t at = 0; at < p.rank * p.N; at += LANES) {
        __mmask16 mask = first_lanes(p.rank * p.N - at);
        store_lanes(p.responses, FP32, at, mask, load_lanes(responses, FP16, at, mask));
    }
    if (nbytes >= LARGE) {
        // fresh memory: one page fault for 2 MiB in place of 512, which would cost a third of the product
        uintptr_t start = ((uintptr_t)p.y + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        uintptr_t stop = ((uintptr_t)p.y + nbytes) / HUGE_PAGE * HUGE_PAGE;
        if (stop > start) madvise((void *)start, stop - start, MADV_HUGEPAGE);
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        p.tile = tiles(p.M) * chunk / chunks;
        p.count = tiles(p.M) * (chunk + 1) / chunks - p.tile;
        p.team = team(parallel, number, threads, p.count / PART_TILES);
        int64_t sharing = sharers(&p.team), last = threads > 1 ? MIN(panels(p.N), LAST_PANELS * sharing) : 0;
        p.whole = panels(p.N) - last;
        p.pieces = 1;
        while (p.pieces * 2 * p.team.shares <= p.count && last * p.pieces < LAST_PIECES * sharing) p.pieces *= 2;
        run(&p.team, pack_tiles, &p);
        run(&p.team, multiply_panels, &p);
    }
}

// a [M, K]; w [N, K] int8, or with levels [N, G] packed [N, K / 2]; table [16] or null; row_scale, row_zero [M];
// column_scale, column_sum, bias, correction [N], of which all but column_scale may be null; coordinates [M, rank]
// bf16, responses [rank, N] fp16; y [M, N]; buffer [linear_buffer(M, N, K, rank, threads)], aligned to 64 bytes
void linear(parallel_t parallel, number_t number, unsigned threads, const int8_t *a, const uint8_t *w,
            const uint8_t *levels, const int8_t *table, int64_t M, int64_t N, int64_t K, int64_t G,
            const float *row_scale, const float *row_zero, const float *column_scale, const int32_t *column_sum,
            const float *bias, const float *correction, int64_t rank, const uint16_t *coordinates,
            const uint16_t *responses, void *y, int dtype, uint8_t *buffer) {
    Product p = {.a = a, .w = w, .levels = levels, .table = table, .M = M, .N = N, .K = K, .G = G,
                 .row_scale = row_scale, .row_zero = row_zero, .column_scale = column_scale, .bias = bias,
                 .correction = correction, .column_sum = column_sum, .rank = rank, .coordinates = coordinates, .y = y,
                 .dtype = dtype};
    multiply_all(p, parallel, number, threads, responses, buffer);
}

// bytes of scratch memory
int64_t layer_buffer(int64_t M, int64_t N, int64_t K, int64_t rank, unsigned threads) {
    return linear_buffer(M, N, K, rank, threads) + quantizer_buffer(K, rank, threads) + threads * TILE_M * K +
           M * (2 * 4 + rank * 2) + 64;
}

// quantize_activation, or with directions quantize_along, and `linear` of its codes, which are never in memory as a
// whole: the same bits. x [M, K], its rows `stride` apart; the tables as there; y [M, N] of the type of x;
// buffer [layer_buffer(M, N, K, rank, threads)], aligned to 64 bytes
void layer(parallel_t parallel, number_t number, unsigned threads, const void *x, int dtype, int64_t M, int64_t K,
           int64_t stride, const float *shift, const float *smooth, int64_t rank, const uint16_t *directions, int order,
           int symmetric, const float *fixed_scale, const float *fixed_zero, const uint8_t *w, const uint8_t *levels,
           const int8_t *table, int64_t N, int64_t G, const float *column_scale, const int32_t *column_sum,
           const float *bias, const float *correction, const uint16_t *responses, void *y, uint8_t *buffer) {
    uint8_t *room = buffer + (linear_buffer(M, N, K, rank, threads) + 63) / 64 * 64;
    float *tables = (float *)room, *scale = tables + quantizer_buffer(K, rank, threads) / 4, *zero = scale + M;
    uint16_t *coordinates = (uint16_t *)(zero + M);
    int zeros = fixed_scale ? fixed_zero != NULL : !symmetric;
    for (int64_t m = 0; fixed_scale && m < M; m++) {
        scale[m] = *fixed_scale;
        zero[m] = fixed_zero ? *fixed_zero : 0.0f;
    }
    Quantizer quantizer = quantizer_of(threads, x, dtype, M, K, stride, shift, smooth, rank, rank > 0, coordinates,
                                       directions, order, symmetric, fixed_scale, fixed_zero, scale,
                                       zeros ? zero : NULL, tables);
    Product p = {.quantizer = &quantizer, .own = (int8_t *)(coordinates + M * rank), .w = w, .levels = levels,
                 .table = table, .M = M, .N = N, .K = K, .G = G, .row_scale = scale, .row_zero = zeros ? zero : NULL,
                 .column_scale = column_scale, .bias = bias, .correction = correction, .column_sum = column_sum,
                 .rank = rank, .coordinates = coordinates, .y = y, .dtype = dtype};
    multiply_all(p, parallel, number, threads, responses, buffer);
}
