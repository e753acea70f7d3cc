/* The K best columns of each row of a matrix product, without the matrix: see top_products.py.
 *
 * Keys lie in panels of PANEL columns, one number of all of them after the other, as vectors of the processor
 * take them. Rows of queries are multiplied with some panels, as many as the cache holds, before the next
 * ones are touched, and of the scores only those go on that may be among the K best: see top_products.h,
 * which is compiled once for each instruction set.
 *
 * Numbers are finite, and so are their products: the caller sees to that. A score of -inf is never kept.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Columns of a panel: a multiple of what three vectors of any instruction set hold, and below 64. */
#define PANEL 48
/* Bytes of keys that are multiplied with all rows before the next ones. */
#define CHUNK (256 << 10)
/* Groups of columns whose best scores are the first bound, for each of the K. */
#define GROUPS 4
/* The least float but -inf, as `order_of` would say. */
#define LEAST ((int32_t)0x80800000)
/* A bound may be reached by so small a part of K more than K. */
#define SLOP 8

/* What is asked.
 *
 * keys: as `tandemrec_pack` left them; query: [rows, width]; beside: added to scores, [rows, columns], or
 * NULL; slack: of each row, how much may be wrong with the difference of two of its scores; last: columns are
 * counted from the end.
 */
struct question {
    const float *keys, *query, *beside, *slack;
    int64_t columns, width, rows, query_stride, beside_stride, k, last;
};

/* What is found.
 *
 * column: [rows, k], ascending; count: [rows], how many of them count; or, where it is less than 0, how many
 * scores of the row, those of `value` and `place`, are to be told apart by whoever knows them exactly.
 * value, place: [rows, padded columns], place with two more; `room` for what is done on the way: see
 * `tandemrec_room`.
 */
struct answer {
    int64_t *column, *count;
    float *value;
    int32_t *place;
    float *room;
};

/* Whole numbers that are in the order of the floats, and back. */
static inline int32_t order_of(int32_t bits)
{
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static inline float of_order(int32_t order)
{
    int32_t bits = order_of(order);
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static inline int64_t panels_of(int64_t columns)
{
    return (columns + PANEL - 1) / PANEL;
}

static inline int64_t least(int64_t one, int64_t other)
{
    return one < other ? one : other;
}

/* Panels whose columns are the first groups, and panels of a chunk. */
static inline int64_t panels_of_groups(int64_t columns, int64_t k)
{
    return least(panels_of(GROUPS * k), panels_of(columns));
}

static inline int64_t panels_of_chunk(int64_t columns, int64_t width, int64_t k)
{
    int64_t cached = CHUNK / ((width + 1) * PANEL * (int64_t)sizeof(float));
    int64_t groups = panels_of_groups(columns, k);
    return least(cached < groups ? groups : cached, panels_of(columns));
}

#if defined(__x86_64__)
#include <immintrin.h>

#define NAME(of) of##_512
#define TARGET __attribute__((target("avx512f,avx512dq,fma,bmi,popcnt,prefer-vector-width=512")))
#define LANES 16
#define VECTORS 3
#define ROWS 8
#define MASK(x) ((uint32_t)_mm512_movepi32_mask((__m512i)(x)))
#include "top_products.h"

#define NAME(of) of##_256
#define TARGET __attribute__((target("avx2,fma,bmi,popcnt")))
#define LANES 8
#define VECTORS 3
#define ROWS 4
#define MASK(x) ((uint32_t)_mm256_movemask_ps((__m256)(x)))
#include "top_products.h"
#endif

#define NAME(of) of##_any
#define TARGET
#define LANES 4
#define VECTORS 2
#define ROWS 4
#define MASK(x) ((uint32_t)((x)[0] & 1) | ((x)[1] & 2) | ((x)[2] & 4) | ((x)[3] & 8))
#include "top_products.h"

/* To be counted up with every change of what top_products.py calls. */
int64_t tandemrec_interface(void)
{
    return 1;
}

/* The best instruction set of those above that this processor has: lanes of a vector. */
int64_t tandemrec_lanes(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
        return 16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 8;
#endif
    return 4;
}

/* Columns up to whole panels. */
int64_t tandemrec_padded(int64_t columns)
{
    return panels_of(columns) * PANEL;
}

/* Floats of `room`, for so many rows at most. */
int64_t tandemrec_room(int64_t columns, int64_t width, int64_t rows, int64_t k)
{
    int64_t chunk = panels_of_chunk(columns, width, k), most = 8;
    int64_t of_rows = most * (2 * chunk + width + chunk * PANEL);
    return of_rows + panels_of_groups(columns, k) * PANEL + rows + most + tandemrec_padded(columns) + PANEL;
}

/* Rows of keys, `stride` floats apart, as panels: [panels, 1 + width, PANEL], first what is added to all scores
 * of a column: `bias`, or 0; -inf for columns that are none. */
void tandemrec_pack(
    const float *key, int64_t stride, int64_t columns, int64_t width, const float *bias, float *packed)
{
    for (int64_t begin = 0; begin < columns; begin += PANEL, packed += (1 + width) * PANEL) {
        int64_t own = least(PANEL, columns - begin);
        for (int64_t x = 0; x < PANEL; x++)
            packed[x] = x >= own ? -INFINITY : bias ? bias[begin + x] : 0.0f;
        for (int64_t x = 0; x < own; x++) {
            const float *row = key + (begin + x) * stride;
            for (int64_t d = 0; d < width; d++)
                packed[(1 + d) * PANEL + x] = row[d];
        }
        for (int64_t x = own; x < PANEL; x++)
            for (int64_t d = 0; d < width; d++)
                packed[(1 + d) * PANEL + x] = 0.0f;
    }
}

/* Answers a question by vectors of so many lanes. */
void tandemrec_top(int64_t lanes, const struct question *asked, const struct answer *found)
{
#if defined(__x86_64__)
    if (lanes == 16) {
        top_512(asked, found);
        return;
    }
    if (lanes == 8) {
        top_256(asked, found);
        return;
    }
#endif
    top_any(asked, found);
}
