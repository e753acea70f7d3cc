/* The part of top_products.c that is compiled for each instruction set.
 *
 * Given: NAME(of), of a function or type; TARGET, the instruction set; LANES of a vector; ROWS and VECTORS
 * whose sums are held in registers at once; MASK(x), a bit for each lane of a vector of comparisons.
 */

typedef float NAME(floats) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t NAME(ints) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#define FLOATS(at) (*(const NAME(floats) *)(at))
#define INTS(at) (*(const NAME(ints) *)(at))

/* Scores of ROWS queries, [width, ROWS], and the columns of a panel, and where there are bounds, one of each
 * row, a bit for each column that reaches it. */
TARGET static inline __attribute__((always_inline)) void NAME(multiply)(
    const float *panel, const float *queries, int64_t width, float *score, int64_t stride, const float *bounds,
    uint64_t *reach, int64_t reach_stride)
{
    if (bounds)
        for (int r = 0; r < ROWS; r++)
            reach[r * reach_stride] = 0;
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
        if (bounds)
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++)
                    reach[r * reach_stride] |= (uint64_t)MASK(sum[r][v] >= bounds[r]) << (part + v * LANES);
    }
}

/* A number that at least k of the scores reach, and at most k + `more`, unless equal ones stand in the way; the
 * least number where fewer are above it.
 *
 * Scores are followed by LANES that may be written to; `room` is for as many. */
TARGET static float NAME(kth)(float *score, int64_t count, int64_t k, int64_t more, int32_t *room)
{
    NAME(ints) most = (NAME(ints)){0} + LEAST, fewest = (NAME(ints)){0} + INT32_MAX;
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    for (int64_t i = count; i < padded; i++)
        score[i] = -INFINITY;
    for (int64_t i = 0; i < padded; i += LANES) {
        NAME(ints) order = INTS(score + i);
        order ^= (order >> 31) & 0x7fffffff;
        *(NAME(ints) *)(room + i) = order;
        NAME(ints) above = order > most, below = order < fewest;
        most = (order & above) | (most & ~above);
        fewest = (order & below) | (fewest & ~below);
    }
    int64_t low = count < k ? LEAST : INT32_MAX, high = LEAST;
    for (int lane = 0; lane < LANES; lane++) {
        high = most[lane] > high ? most[lane] : high;
        low = fewest[lane] < low ? fewest[lane] : low;
    }
    low = low < LEAST ? LEAST : low;
    /* At least k scores reach `low`, unless it is the least; fewer reach more than `high`. */
    while (low < high) {
        int64_t middle = low + (high - low + 1) / 2, reach = 0;
        for (int64_t i = 0; i < padded; i += LANES)
            reach += __builtin_popcount(MASK(INTS(room + i) >= (int32_t)middle));
        if (reach < k) {
            high = middle - 1;
            continue;
        }
        low = middle;
        if (reach <= k + more)
            break;
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
    return NAME(kth)(best, groups * PANEL, k, k / SLOP, room);
}

/* A bit for each column of some panels that reaches the bound. */
TARGET static void NAME(compare)(const float *score, int64_t panels, float bound, uint64_t *reach)
{
    for (int64_t p = 0; p < panels; p++) {
        uint64_t bits = 0;
        for (int x = 0; x < PANEL; x += LANES)
            bits |= (uint64_t)MASK(FLOATS(score + p * PANEL + x) >= bound) << x;
        reach[p] = bits;
    }
}

/* Puts the scores of some panels whose bits are set behind those that are there; -> how many there are.
 *
 * `first`: column of the first panel. */
TARGET static int64_t NAME(collect)(
    const float *score, int64_t first, int64_t panels, const uint64_t *reach, float *value, int32_t *place,
    int64_t count)
{
    int64_t before = count;
    for (int64_t p = 0; p < panels; p++) {
        /* Two are written whether they are there or not: what comes next is written over what is not. */
        uint64_t left = reach[p] | (uint64_t)1 << 63;
        int64_t more = __builtin_popcountll(left) - 1;
        place[count] = (int32_t)(p * PANEL + __builtin_ctzll(left));
        left &= left - 1;
        place[count + 1] = (int32_t)(p * PANEL + __builtin_ctzll(left | (uint64_t)1 << 63));
        if (__builtin_expect(more > 2, 0)) {
            left &= left - 1;
            for (int64_t i = 2; i < more; i++, left &= left - 1)
                place[count + i] = (int32_t)(p * PANEL + __builtin_ctzll(left));
        }
        count += more;
    }
    for (int64_t i = before; i < count; i++) {
        value[i] = score[place[i]];
        place[i] += (int32_t)first;
    }
    return count;
}

/* The K best of the scores that may be, if they are so for sure; -> their number, or less than 0. */
TARGET static int64_t NAME(choose)(
    const struct question *asked, float *value, const int32_t *place, int64_t count, float slack, int64_t *column,
    int32_t *room)
{
    float reached = NAME(kth)(value, count, asked->k, 0, room), kth = INFINITY, after = -INFINITY;
    NAME(floats) upper = (NAME(floats)){0} + INFINITY, lower = (NAME(floats)){0} - INFINITY;
    int64_t reach = 0, chosen = 0;
    /* What follows the scores is -INFINITY now. */
    for (int64_t i = 0; i < count; i += LANES) {
        NAME(floats) here = FLOATS(value + i);
        NAME(ints) above = here >= reached, up = above & (here < upper), down = ~above & (here > lower);
        upper = (NAME(floats))(((NAME(ints))here & up) | ((NAME(ints))upper & ~up));
        lower = (NAME(floats))(((NAME(ints))here & down) | ((NAME(ints))lower & ~down));
        reach += __builtin_popcount(MASK(above));
    }
    for (int lane = 0; lane < LANES; lane++) {
        kth = upper[lane] < kth ? upper[lane] : kth;
        after = lower[lane] > after ? lower[lane] : after;
    }
    after = reach > asked->k ? kth : after;
    if (count > asked->k && after >= kth - slack)
        return -count;
    /* Without a branch a score, of which nobody could foresee where it goes. */
    int64_t end = asked->last ? asked->columns - 1 : 0, sign = asked->last ? -1 : 1;
    for (int64_t n = 0; n < count; n++) {
        int64_t i = asked->last ? count - 1 - n : n;
        room[chosen] = (int32_t)(end + sign * place[i]);
        chosen += value[i] >= reached;
    }
    for (int64_t i = 0; i < chosen; i++)
        column[i] = room[i];
    return chosen;
}

/* Multiplies ROWS queries with the keys of some panels; `bounds`, `reach`: see `multiply`. */
TARGET static void NAME(multiply_panels)(
    const struct question *asked, const float *queries, int64_t first, int64_t panels, float *score, int64_t stride,
    const float *bounds, uint64_t *reach)
{
    const float *keys = asked->keys + first * (1 + asked->width) * PANEL;
    for (int64_t p = 0; p < panels; p++, keys += (1 + asked->width) * PANEL, score += PANEL)
        if (bounds)
            NAME(multiply)(keys, queries, asked->width, score, stride, bounds, reach + p, panels);
        else
            NAME(multiply)(keys, queries, asked->width, score, stride, NULL, NULL, 0);
}

TARGET static void NAME(top)(const struct question *asked, const struct answer *found)
{
    int64_t k = asked->k, width = asked->width, panels = panels_of(asked->columns), padded = panels * PANEL;
    int64_t groups = panels_of_groups(asked->columns, k), of_chunk = panels_of_chunk(asked->columns, width, k);
    int64_t stride = of_chunk * PANEL;
    uint64_t *reach = (uint64_t *)found->room;
    float *queries = (float *)(reach + ROWS * of_chunk), *score = queries + ROWS * width;
    float *best = score + ROWS * stride, *bounds = best + groups * PANEL;
    int32_t *room = (int32_t *)(bounds + asked->rows + ROWS);
    for (int64_t r = 0; r < asked->rows + ROWS; r++)
        bounds[r] = INFINITY;
    for (int64_t first = 0; first < panels; first += of_chunk) {
        int64_t some = least(of_chunk, panels - first);
        for (int64_t begin = 0; begin < asked->rows; begin += ROWS) {
            int64_t rows = least(ROWS, asked->rows - begin);
            for (int64_t d = 0; d < width; d++)
                for (int64_t r = 0; r < ROWS; r++)
                    queries[d * ROWS + r] = r < rows ? asked->query[(begin + r) * asked->query_stride + d] : 0.0f;
            /* The first chunk gives the first bounds, and what is added besides is not there yet. */
            int compared = first && !asked->beside;
            NAME(multiply_panels)(asked, queries, first, some, score, stride, compared ? bounds + begin : NULL, reach);
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
                    bounds[row] = fmaxf(
                        NAME(bound)(own, some, groups, k, best, room) - asked->slack[row], of_order(LEAST));
                if (!compared)
                    NAME(compare)(own, some, bounds[row], reach + r * some);
                count = NAME(collect)(own, first * PANEL, some, reach + r * some, value, place, count);
                if (first + some < panels && count > 2 * k) {
                    bounds[row] = fmaxf(NAME(kth)(value, count, k, k / SLOP, room) - asked->slack[row], bounds[row]);
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
