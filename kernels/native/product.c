// int8_linear and int4_linear for CPUs with AVX-512 VNNI. Bit-equal to kernels/int8_linear/reference.py.
//
// vpdpbusd multiplies unsigned by signed bytes: codes of a travel as a + 128, and the accumulators of column n start
// at -128 times the sum of its weights, which leaves the exact sum of a w.

#include "lanes.h"

#include <string.h>
#include <sys/mman.h>

// accumulators of a tile: 12 tokens x 32 out-features in 24 registers
#define TILE_M 12
#define PANEL 32
// tokens that share one unpacking of the weight: as many as fit, within limits
#define CHUNK_BYTES 4194304
#define FEWEST_TILES 16
#define MOST_TILES 64
// an output of fewer bytes comes from memory that is mapped already
#define LARGE 4194304
#define HUGE_PAGE 2097152

typedef struct {
    const int8_t *a;
    const uint8_t *w;
    const uint8_t *levels;
    const int8_t *table;
    int64_t M, N, K, G;
    const float *row_scale, *row_zero, *column_scale, *bias, *correction;
    const int32_t *column_sum;
    void *y;
    int dtype;
    int64_t chunks, portions, next_item, workers;
    uint8_t *buffers;
    int64_t buffer_size;
} Product;

INLINE int64_t words(int64_t K) { return (K + 3) / 4; }
INLINE int64_t panels(int64_t N) { return (N + PANEL - 1) / PANEL; }
INLINE int64_t tiles(int64_t M) { return (M + TILE_M - 1) / TILE_M; }

INLINE int64_t chunk_tiles(int64_t K) {
    int64_t fit = CHUNK_BYTES / (words(K) * 4 * TILE_M);
    return fit < FEWEST_TILES ? FEWEST_TILES : MIN(fit, MOST_TILES);
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

// a [rows <= 12, K] -> [K / 4, 12] words of four unsigned codes; missing rows and columns are code 0
static void pack_tile(const int8_t *a, int64_t rows, int64_t K, uint8_t *out) {
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    for (int64_t k = 0; k < K; k += 64) {
        __mmask64 mask = first_bytes(K - k);
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = i < rows ? _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, a + i * K + k), flip) : flip;
        transpose(r);
        for (int64_t j = 0; j < MIN(16, words(K) - k / 4); j++)
            _mm512_mask_storeu_epi32(out + (k / 4 + j) * TILE_M * 4, (1 << TILE_M) - 1, r[j]);
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

// row scale * column scale * (sum - zero * column sum) + b + c, in the reference's order of operations
INLINE void finish(const Product *p, int64_t m, int64_t n, __m512i sum) {
    if (n >= p->N) return;
    __mmask16 mask = first_lanes(p->N - n);
    __m512 y = _mm512_cvtepi32_ps(sum);
    if (p->row_zero) {
        __m512 column = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(mask, p->column_sum + n));
        y = _mm512_sub_ps(y, _mm512_mul_ps(_mm512_set1_ps(p->row_zero[m]), column));
    }
    y = _mm512_mul_ps(y, _mm512_set1_ps(p->row_scale[m]));
    y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, p->column_scale + n));
    if (p->bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, p->bias + n));
    if (p->correction) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, p->correction + n));
    store_lanes(p->y, p->dtype, m * p->N + n, mask, y);
}

// `count` tokens of a packed tile times a packed panel
INLINE void multiply(const Product *p, const uint8_t *a, const uint8_t *w, const int32_t *first, int64_t m, int64_t n,
                     int64_t rows, const int count) {
    __m512i sum[TILE_M][2];
    for (int i = 0; i < count; i++) {
        sum[i][0] = _mm512_load_si512(first);
        sum[i][1] = _mm512_load_si512(first + LANES);
    }
    for (int64_t k = words(p->K); k > 0; k--) {
        __m512i low = _mm512_load_si512(w), high = _mm512_load_si512(w + 64);
#pragma GCC unroll 12
        for (int i = 0; i < count; i++) {
            __m512i x = _mm512_set1_epi32(((const int32_t *)a)[i]);
            sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], x, low);
            sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], x, high);
        }
        a += TILE_M * 4;
        w += PANEL * 4;
    }
#pragma GCC unroll 12
    for (int i = 0; i < count; i++) {
        if (i >= rows) break;
        finish(p, m + i, n, sum[i][0]);
        finish(p, m + i, n + LANES, sum[i][1]);
    }
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

// part `index` of `count` of a range, in whole units
INLINE int64_t part(int64_t total, int64_t count, int64_t index) { return total * index / count; }

// all of a chunk's tiles times some of the panels, which are unpacked one after the other
static void run_item(const Product *p, int64_t item, uint8_t *buffer) {
    int64_t chunk = item / p->portions, portion = item % p->portions, tile_size = words(p->K) * 4 * TILE_M;
    int64_t tile = part(tiles(p->M), p->chunks, chunk), count = part(tiles(p->M), p->chunks, chunk + 1) - tile;
    int64_t panel = part(panels(p->N), p->portions, portion), end = part(panels(p->N), p->portions, portion + 1);
    int64_t row_size = p->levels ? p->K / 2 : p->K;
    int32_t *first = (int32_t *)buffer;
    uint8_t *w = buffer + PANEL * 4, *a = w + words(p->K) * 4 * PANEL;
    for (int64_t t = 0; t < count; t++) {
        int64_t m = (tile + t) * TILE_M;
        pack_tile(p->a + m * p->K, p->M - m, p->K, a + t * tile_size);
    }
    for (; panel < end; panel++) {
        int64_t n = panel * PANEL, following = panel + 1 < end ? MIN(PANEL, p->N - n - PANEL) * row_size : 0;
        const char *next = (const char *)p->w + (n + PANEL) * row_size;
        (p->levels ? pack_panel4 : pack_panel8)(p, n, w, first);
        for (int64_t t = 0; t < count; t++) {
            // the next panel comes from memory meanwhile
            for (int64_t at = part(following, count, t); at < part(following, count, t + 1); at += 64)
                _mm_prefetch(next + at, _MM_HINT_T1);
            multiply_tile(p, a + t * tile_size, w, first, (tile + t) * TILE_M, n, p->M - (tile + t) * TILE_M);
        }
    }
}

static void work(void *data) {
    Product *p = data;
    uint8_t *buffer = p->buffers + __atomic_fetch_add(&p->workers, 1, __ATOMIC_RELAXED) * p->buffer_size;
    int64_t item;
    while ((item = __atomic_fetch_add(&p->next_item, 1, __ATOMIC_RELAXED)) < p->chunks * p->portions)
        run_item(p, item, buffer);
}

static void split(Product *p, int64_t threads) {
    p->chunks = (tiles(p->M) + chunk_tiles(p->K) - 1) / chunk_tiles(p->K);
    // two items a thread or more, and as many for each: the last ones must not be waited for
    p->portions = 1;
    while (p->portions < panels(p->N) && (p->chunks * p->portions < 2 * threads || p->chunks * p->portions % threads))
        p->portions++;
}

// bytes of scratch memory that a thread needs
int64_t product_buffer(int64_t M, int64_t K) {
    int64_t rows = PANEL + MIN(tiles(M), chunk_tiles(K)) * TILE_M;
    return (PANEL * 4 + rows * words(K) * 4 + 127) / 64 * 64;
}

// a [M, K]; w [N, K] int8, or with levels [N, G] packed [N, K / 2]; table [16] or null; row_scale, row_zero [M];
// column_scale, column_sum, bias, correction [N], of which all but column_scale may be null; y [M, N];
// buffers [threads, product_buffer(M, K)], aligned to 64 bytes
void linear(parallel_t parallel, unsigned threads, const int8_t *a, const uint8_t *w, const uint8_t *levels,
            const int8_t *table, int64_t M, int64_t N, int64_t K, int64_t G, const float *row_scale,
            const float *row_zero, const float *column_scale, const int32_t *column_sum, const float *bias,
            const float *correction, void *y, int dtype, uint8_t *buffers) {
    Product p = {a, w, levels, table, M, N, K, G, row_scale, row_zero, column_scale, bias, correction, column_sum,
                 y, dtype, 0, 0, 0, 0, buffers, product_buffer(M, K)};
    int64_t nbytes = M * N * (dtype == FP32 ? 4 : 2);
    if (nbytes >= LARGE) {
        // fresh memory: one page fault for 2 MiB in place of 512, which would cost a third of the product
        uintptr_t start = ((uintptr_t)y + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        uintptr_t stop = ((uintptr_t)y + nbytes) / HUGE_PAGE * HUGE_PAGE;
        if (stop > start) madvise((void *)start, stop - start, MADV_HUGEPAGE);
    }
    split(&p, threads);
    parallel(work, &p, threads, 0);
}
