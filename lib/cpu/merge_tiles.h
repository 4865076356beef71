/* merge_tiles.h: the product of merge_kernels.c on matrix tiles of bf16 (AMX), to the precision of fp32.
 *
 *     x = h + m + l              three bf16 numbers of 8 bits each hold the 24 bits of a float
 *     a b = l h + h l + m m + m h + h m + h h         up to 2^-24 |a b|
 *
 * The six products are summed in that order, the small ones first, in fp32: they are rounded as a plain fp32 sum is. Tiles treat
 * numbers below 2^-126 as zero.
 *
 * A tile of `left` is 16 rows of 16 pairs (r, r + 1), one of `right` 16 pairs of 16 columns; a pair is 32 bits:
 *
 *     left, packed:  [rows / 16][R / 32][h, m, l][16 rows][16 pairs]
 *     right, packed: [columns / 64][R / 32][4][h, m, l][16 pairs][16 columns] */
#ifndef PLORA_CPU_MERGE_TILES_H
#define PLORA_CPU_MERGE_TILES_H

enum { HIGH, MIDDLE, LOW, PARTS, PAIRS = 16, TILE = PAIRS * CPU_LANES };

static int64_t chunks(int64_t rank)
{
    return (rank + 2 * PAIRS - 1) / (2 * PAIRS);
}

static int64_t depth(int64_t rank)
{
    return chunks(rank) * PARTS * PAIRS;
}

CPU_INLINE void split_parts(struct pair value, cpu_vu parts[PARTS])
{
    const __m512 largest = _mm512_set1_ps(0x1.fep127f); /* above it, h would be rounded to infinity */
    const struct pair finite = {_mm512_max_ps(_mm512_min_ps(value.first, largest), -largest),
                                _mm512_max_ps(_mm512_min_ps(value.second, largest), -largest)};
    for (int part = 0; part < PARTS; ++part) {
        parts[part] = join_bf16(part == 0 ? finite : value);
        const struct pair taken = split_bf16(parts[part]);
        value.first -= taken.first;
        value.second -= taken.second;
    }
}

/* The even and the odd ones of 32 numbers. */
CPU_INLINE struct pair deal(const float *from)
{
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 low = cpu_load(from), high = cpu_load(from + CPU_LANES);
    return (struct pair){_mm512_permutex2var_ps(low, even, high),
                         _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high)};
}

/* to[i] = from[i * stride], 0 for i in [count, width). */
CPU_INLINE void gather(float *to, const float *from, int64_t stride, int64_t count, int64_t width)
{
    if (count > width) count = width;
    if (stride == 1 && count == width) {
        memcpy(to, from, (size_t)width * sizeof *to);
        return;
    }
    for (int64_t i = 0; i < width; ++i)
        to[i] = i < count ? from[i * stride] : 0.0f;
}

static void pack_tile(const float *source, int64_t stride, int64_t rank_stride, int64_t rank, int64_t count,
                      float *packed)
{
    for (int64_t r = 0; r < rank; r += 2 * PAIRS, packed += PARTS * TILE)
        for (int64_t row = 0; row < TILE_ROWS; ++row) {
            const int inside = row < count;
            float values[2 * PAIRS];
            cpu_vu parts[PARTS];
            gather(values, source + row * stride * inside + r * rank_stride, rank_stride, inside ? rank - r : 0,
                   2 * PAIRS);
            split_parts(deal(values), parts);
            for (int part = 0; part < PARTS; ++part)
                cpu_store(packed + part * TILE + row * PAIRS, (cpu_vf)parts[part]);
        }
}

/* The columns of r and r + 1, dealt as the registers of a bf16 weight hold them, 0 from `rank` on. */
CPU_INLINE void load_columns(float columns[2][TILE_COLUMNS], const float *source, int64_t stride, int64_t rank_stride,
                             int64_t r, int64_t rank, int64_t count, int32_t dtype)
{
    for (int64_t i = 0; i < 2; ++i) {
        const int inside = r + i < rank;
        gather(columns[i], source + (r + i) * rank_stride * inside, stride, inside ? count : 0, TILE_COLUMNS);
        for (int j = 0; dtype == PLORA_BF16 && j < TILE_COLUMNS; j += 2 * CPU_LANES) {
            const struct pair dealt = deal(columns[i] + j);
            cpu_store(columns[i] + j, dealt.first);
            cpu_store(columns[i] + j + CPU_LANES, dealt.second);
        }
    }
}

static void pack_panel(const float *source, int64_t stride, int64_t rank_stride, int64_t rank, int64_t count,
                       int32_t dtype, float *packed)
{
    for (int64_t r = 0; r < chunks(rank) * 2 * PAIRS; r += 2) {
        float columns[2][TILE_COLUMNS];
        load_columns(columns, source, stride, rank_stride, r, rank, count, dtype);
        float *line = packed + r / (2 * PAIRS) * (PARTS * TILE * TILE_VECTORS) + r / 2 % PAIRS * CPU_LANES;
        for (int j = 0; j < TILE_VECTORS; ++j, line += PARTS * TILE) {
            cpu_vu parts[PARTS];
            split_parts((struct pair){cpu_load(columns[0] + j * CPU_LANES), cpu_load(columns[1] + j * CPU_LANES)},
                        parts);
            for (int part = 0; part < PARTS; ++part)
                cpu_store(line + part * TILE, (cpu_vf)parts[part]);
        }
    }
}

/* Sums leave the tiles through memory, so that of one tile is added to W while the next is computed. */
struct lag {
    struct place place; /* weight NULL = nothing is left to add */
    int half;           /* of `sum`, for the next tile */
    _Alignas(CACHE_LINE) cpu_vf sum[2][TILE_ROWS][TILE_VECTORS];
};

CPU_INLINE void add_lagging_row(struct lag *lag, int64_t row, struct work work)
{
    const cpu_vf *sum = lag->sum[!lag->half][row];
    if (work.rounding == PLORA_ROUND_STOCHASTIC) {
        const int64_t element = lag->place.element + row * work.drawing->row_elements;
        struct random random;
        draw_rows(work.drawing, element, &random);
        add_row(&lag->place, row, random_row(&random, 0, element), sum, work);
    } else {
        add_row(&lag->place, row, NULL, sum, work);
    }
}

/* Does a share of the last tile's rows, and fetches as many of the next one's. */
CPU_INLINE void work_meanwhile(struct lag *lag, struct ahead *next, int64_t step, int64_t steps, struct work work)
{
    while (next->done * steps < step * TILE_ROWS) {
        if (lag->place.weight != NULL) add_lagging_row(lag, next->done, work);
        fetch_row(next);
    }
}

CPU_INLINE void finish_tile(struct lag *lag, struct work work)
{
    for (int row = 0; lag->place.weight != NULL && row < TILE_ROWS; ++row)
        add_lagging_row(lag, row, work);
    lag->place.weight = NULL;
}

/* All terms but h h, of tiles 4, 5, 6 (h, m, l of `left`) and the three at `right`. */
#define ADD_SMALL_TERMS(sum, right)                                                                                    \
    _tile_loadd(7, (right) + HIGH * TILE, 64);                                                                         \
    _tile_dpbf16ps(sum, 6, 7);                                                                                         \
    _tile_dpbf16ps(sum, 5, 7);                                                                                         \
    _tile_loadd(7, (right) + LOW * TILE, 64);                                                                          \
    _tile_dpbf16ps(sum, 4, 7);                                                                                         \
    _tile_loadd(7, (right) + MIDDLE * TILE, 64);                                                                       \
    _tile_dpbf16ps(sum, 5, 7);                                                                                         \
    _tile_dpbf16ps(sum, 4, 7)

CPU_INLINE void merge_tile(struct lag *lag, const struct place *place, const float *left, const float *right,
                           int64_t rank, struct work work, struct ahead next)
{
    const int64_t count = chunks(rank), steps = TILE_VECTORS * count, parts = PARTS * TILE;
    cpu_vf(*sum)[TILE_VECTORS] = lag->sum[lag->half];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < count; ++i) {
        const float *a = left + i * parts, *b = right + i * parts * TILE_VECTORS;
        _tile_loadd(4, a + HIGH * TILE, 64);
        _tile_loadd(5, a + MIDDLE * TILE, 64);
        _tile_loadd(6, a + LOW * TILE, 64);
        work_meanwhile(lag, &next, TILE_VECTORS * i + 1, steps, work);
        ADD_SMALL_TERMS(0, b);
        work_meanwhile(lag, &next, TILE_VECTORS * i + 2, steps, work);
        ADD_SMALL_TERMS(1, b + parts);
        work_meanwhile(lag, &next, TILE_VECTORS * i + 3, steps, work);
        ADD_SMALL_TERMS(2, b + 2 * parts);
        work_meanwhile(lag, &next, TILE_VECTORS * i + 4, steps, work);
        ADD_SMALL_TERMS(3, b + 3 * parts);
    }
    for (int64_t i = 0; i < count; ++i) {
        const float *b = right + i * parts * TILE_VECTORS;
        _tile_loadd(4, left + i * parts, 64);
        _tile_loadd(5, b, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, b + parts, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, b + 2 * parts, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, b + 3 * parts, 64);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, &sum[0][0], sizeof sum[0]);
    _tile_stored(1, &sum[0][1], sizeof sum[0]);
    _tile_stored(2, &sum[0][2], sizeof sum[0]);
    _tile_stored(3, &sum[0][3], sizeof sum[0]);
    lag->place = *place;
    lag->half = !lag->half;
}

static void open_tiles(void)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
}

static void close_tiles(void)
{
    _tile_release();
}

#endif
