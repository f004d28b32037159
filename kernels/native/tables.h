// Rows of tables as they are stored, found by the timestep's group and widened on the way.

#ifndef DIT_QUANT_TABLES_H
#define DIT_QUANT_TABLES_H

#include "lanes.h"

// [rows, size] of one of the float types, a row for each timestep group; rows 0: [size], the same at every timestep;
// data null: there is none
typedef struct {
    const void *data;
    int32_t dtype;
    int64_t rows;
} Table;

// where the timestep lies: between row index and the next one
typedef struct {
    const int64_t *index;
    const float *fraction;
} Group;

INLINE int outside(const Table *t, Group group) { return t->rows && (*group.index < 0 || *group.index >= t->rows); }

// lanes `at` and following of the row, numerics of `lerp_rows`; 0 where there is none
INLINE __m512 row_lanes(const Table *t, Group group, int64_t size, int64_t at, __mmask16 mask) {
    if (!t->data) return _mm512_setzero_ps();
    const int64_t index = t->rows ? *group.index : 0;
    __m512 low = load_lanes(t->data, t->dtype, index * size + at, mask);
    if (t->rows < 2 || *group.fraction == 0.0f) return low;
    __m512 high = load_lanes(t->data, t->dtype, MIN(index + 1, t->rows - 1) * size + at, mask);
    return _mm512_add_ps(low, _mm512_mul_ps(_mm512_set1_ps(*group.fraction), _mm512_sub_ps(high, low)));
}

// of a table of one column
INLINE float row_value(const Table *t, Group group) {
    return _mm512_cvtss_f32(row_lanes(t, group, 1, 0, first_lanes(1)));
}

#endif
