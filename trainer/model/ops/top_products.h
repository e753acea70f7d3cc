/* The part of top_products.c that is compiled for each instruction set.
 *
 * Given: NAME(of), of a function or type; TARGET, the instruction set; LANES of a vector; ROWS and VECTORS
 * whose sums are held in registers at once; MASK(x), a bit for each lane of a vector of comparisons.
 */

typedef float NAME(floats) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t NAME(ints) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#define FLOATS(at) (*(const NAME(floats) *)(at))
#define INTS(at) (*(const NAME(ints) *)(at))

/* Scores of ROWS queries, [width, ROWS], and the columns of a panel. */
TARGET static inline __attribute__((always_inline)) void NAME(multiply)(
    const float *panel, const float *queries, int64_t width, float *score, int64_t stride)
{
    for (int part = 0; part < PANEL; part += LANES * VECTORS) {
        NAME(floats) sum[ROWS][VECTORS], keys[VECTORS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++)
                sum[r][v] = FLOATS(panel + part + v * LANES);
        for (int64_t d = 0; d < width; d++) {
            for (int v = 0; v < VECTORS; v++)
                keys[v] = FLOATS(panel + (1 + d) * PANEL + part + v * LANES);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++)
                    sum[r][v] += queries[d * ROWS + r] * keys[v];
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++)
                *(NAME(floats) *)(score + r * stride + part + v * LANES) = sum[r][v];
    }
}

/* The largest number that k of the scores reach, to so many of its bits; the least one where there are fewer.
 *
 * Scores are followed by LANES that may be written to; `room` is for as many. */
TARGET static float NAME(kth)(float *score, int64_t count, int64_t k, int32_t *room, int bits)
{
    NAME(ints) most = (NAME(ints)){0} + LEAST;
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    for (int64_t i = count; i < padded; i++)
        score[i] = -INFINITY;
    for (int64_t i = 0; i < padded; i += LANES) {
        NAME(ints) order = INTS(score + i);
        order ^= (order >> 31) & 0x7fffffff;
        *(NAME(ints) *)(room + i) = order;
        NAME(ints) more = order > most;
        most = (order & more) | (most & ~more);
    }
    int64_t low = LEAST, high = LEAST;
    for (int lane = 0; lane < LANES; lane++)
        high = most[lane] > high ? most[lane] : high;
    /* k scores reach `low`, unless that is the least; fewer reach more than `high`. */
    for (; low < high && bits; bits--) {
        int64_t middle = low + (high - low + 1) / 2, reach = 0;
        for (int64_t i = 0; i < padded; i += LANES)
            reach += __builtin_popcount(MASK(INTS(room + i) >= (int32_t)middle));
        if (reach >= k)
            low = middle;
        else
            high = middle - 1;
    }
    return of_order((int32_t)low);
}

/* A bound that k of the scores of some panels reach: so do k of the best of any groups of their columns. */
TARGET static float NAME(bound)(const float *score, int64_t panels, int64_t groups, int64_t k, float *best, int32_t *room)
{
    memcpy(best, score, groups * PANEL * sizeof(float));
    for (int64_t p = groups, group = 0; p < panels; p++, group = group + 1 < groups ? group + 1 : 0)
        for (int64_t x = 0; x < PANEL; x += LANES) {
            NAME(ints) here = INTS(score + p * PANEL + x), there = INTS(best + group * PANEL + x);
            NAME(ints) more = (NAME(floats))here > (NAME(floats))there;
            *(NAME(ints) *)(best + group * PANEL + x) = (here & more) | (there & ~more);
        }
    return NAME(kth)(best, groups * PANEL, k, room, NEAR);
}

/* Puts the scores of some panels that reach the bound behind those that are there; -> how many there are.
 *
 * Without a branch a vector: first which columns reach it, then each of these. `room`: 8 bytes a panel. */
TARGET static int64_t NAME(reaching)(
    const float *score, int64_t first, int64_t panels, float bound, float *value, int32_t *place, int64_t count,
    uint64_t *room)
{
    for (int64_t p = 0; p < panels; p++) {
        uint64_t reach = 0;
        for (int x = 0; x < PANEL; x += LANES)
            reach |= (uint64_t)MASK(FLOATS(score + p * PANEL + x) >= bound) << x;
        room[p] = reach;
    }
    for (int64_t p = 0; p < panels; p++)
        for (uint64_t left = room[p]; left; left &= left - 1) {
            int64_t column = p * PANEL + __builtin_ctzll(left);
            value[count] = score[column];
            place[count++] = (int32_t)(first + column);
        }
    return count;
}

/* The K best of the scores that may be, if they are so for sure; -> their number, or less than 0. */
TARGET static int64_t NAME(choose)(
    const struct question *asked, float *value, const int32_t *place, int64_t count, float slack, int64_t *column,
    int32_t *room)
{
    float kth = NAME(kth)(value, count, asked->k, room, EXACT), after = -INFINITY;
    int64_t reach = 0, chosen = 0;
    for (int64_t i = 0; i < count; i++) {
        float lower = value[i] < kth ? value[i] : -INFINITY;
        after = lower > after ? lower : after;
        reach += value[i] >= kth;
    }
    after = reach > asked->k ? kth : after;
    if (count > asked->k && after >= kth - slack)
        return -count;
    if (asked->last) {
        for (int64_t i = count - 1; i >= 0; i--)
            if (value[i] >= kth)
                column[chosen++] = asked->columns - 1 - place[i];
    } else {
        for (int64_t i = 0; i < count; i++)
            if (value[i] >= kth)
                column[chosen++] = place[i];
    }
    return chosen;
}

TARGET static void NAME(top)(const struct question *asked, const struct answer *found)
{
    int64_t k = asked->k, width = asked->width, panels = panels_of(asked->columns), padded = panels * PANEL;
    int64_t groups = panels_of_groups(asked->columns, k), of_chunk = panels_of_chunk(asked->columns, width, k);
    int64_t stride = of_chunk * PANEL;
    float *queries = found->room, *score = queries + ROWS * width, *best = score + ROWS * stride;
    float *bounds = best + groups * PANEL;
    int32_t *room = (int32_t *)(bounds + asked->rows);
    /* Whole numbers of 64 bits lie there, too. */
    room += (uintptr_t)room % sizeof(uint64_t) / sizeof(int32_t);
    for (int64_t first = 0; first < panels; first += of_chunk) {
        int64_t some = least(of_chunk, panels - first);
        for (int64_t begin = 0; begin < asked->rows; begin += ROWS) {
            int64_t rows = least(ROWS, asked->rows - begin);
            for (int64_t d = 0; d < width; d++)
                for (int64_t r = 0; r < ROWS; r++)
                    queries[d * ROWS + r] = r < rows ? asked->query[(begin + r) * asked->query_stride + d] : 0.0f;
            for (int64_t p = 0; p < some; p++)
                NAME(multiply)(asked->keys + (first + p) * (1 + width) * PANEL, queries, width, score + p * PANEL, stride);
            for (int64_t r = 0; r < rows; r++) {
                int64_t row = begin + r, count = first ? found->count[row] : 0;
                float *own = score + r * stride, *value = found->value + row * padded;
                int32_t *place = found->place + row * padded;
                if (asked->beside) {
                    const float *added = asked->beside + row * asked->beside_stride + first * PANEL;
                    int64_t columns = least(some * PANEL, asked->columns - first * PANEL);
                    for (int64_t x = 0; x < columns; x++)
                        own[x] += added[x];
                }
                if (!first)
                    bounds[row] = NAME(bound)(own, some, groups, k, best, room) - asked->slack[row];
                bounds[row] = fmaxf(bounds[row], of_order(LEAST));
                count = NAME(reaching)(own, first * PANEL, some, bounds[row], value, place, count, (uint64_t *)room);
                if (first + some < panels && count > 2 * k) {
                    bounds[row] = fmaxf(NAME(kth)(value, count, k, room, NEAR) - asked->slack[row], bounds[row]);
                    int64_t left = 0;
                    for (int64_t i = 0; i < count; i++) {
                        value[left] = value[i];
                        place[left] = place[i];
                        left += value[i] >= bounds[row];
                    }
                    count = left;
                }
                found->count[row] = count;
            }
        }
    }
    for (int64_t row = 0; row < asked->rows; row++)
        found->count[row] = NAME(choose)(
            asked, found->value + row * padded, found->place + row * padded, found->count[row], asked->slack[row],
            found->column + row * k, room);
}

#undef FLOATS
#undef INTS
#undef NAME
#undef TARGET
#undef LANES
#undef VECTORS
#undef ROWS
#undef MASK
