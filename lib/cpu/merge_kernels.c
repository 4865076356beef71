/* merge_kernels.c: W += factor * left right, a tile of W at a time, compiled once per instruction level (isa.h).
 *
 *     sum[i,j] = sum_r left[i,r] right[r,j]      fp32 accumulators in registers, TILE_ROWS x TILE_VECTORS of them
 *                                                (AMX: in matrix tiles, merge_tiles.h)
 *     W[i,j]   = round(W[i,j] + factor sum[i,j]) one fma (portable level: product and sum) and one rounding, to nearest even or by
 *                                                merge_rounding.h
 *
 * W is read and written once, strip by strip, and the lines of a tile to come are prefetched while this one is computed. A tile
 * over the edge works on a copy padded with zeros, so that every element goes through the same operations.
 *
 * bf16 columns are paired: one 32-bit lane holds columns 2j (low half) and 2j+1 (high half), so widening is a shift and a mask,
 * and no lane ever moves. pack_panel() deals the columns of `right` accordingly: evens first, then odds. */
#include "merge_kernels.h"

#include <stdatomic.h>

#include "dtype.h"
#include "vector.h"

/* A block of W, BLOCK_TILES tiles high, is walked in strips of STRIP_TILES tiles, row by row: a strip of `right` stays in the nearest
 * cache, and few rows of W are in it at a time: rows of 4096 numbers begin in the same set of it. What is fetched is the tile below, or
 * the one beside that in the next strip. */
#if CPU_ISA == CPU_ISA_AMX
enum { TILE_ROWS = 16, TILE_VECTORS = 4, BLOCK_TILES = 4, STRIP_TILES = 1, GRAM_ROWS = 4 };
enum { FETCH_BELOW = 0, FETCH_AT_ONCE = 0, FETCH_TO_WRITE = 0, FETCH_LEVEL = 2 };
#elif CPU_ISA == CPU_ISA_AVX512
enum { TILE_ROWS = 6, TILE_VECTORS = 4, BLOCK_TILES = 4, STRIP_TILES = 1, GRAM_ROWS = 4 };
enum { FETCH_BELOW = 0, FETCH_AT_ONCE = 0, FETCH_TO_WRITE = 1, FETCH_LEVEL = 3 };
#else
enum { TILE_ROWS = 3, TILE_VECTORS = 4, BLOCK_TILES = 8, STRIP_TILES = 8, GRAM_ROWS = 2 };
enum { FETCH_BELOW = 1, FETCH_AT_ONCE = 1, FETCH_TO_WRITE = 1, FETCH_LEVEL = 3 };
#endif
enum { TILE_COLUMNS = TILE_VECTORS * CPU_LANES, STRIP_COLUMNS = STRIP_TILES * TILE_COLUMNS };
enum { PAIR = 2 * CPU_LANES, GRAM_COLUMNS = 4, UNROLL = 4, CACHE_LINE = 64 };

#define PAIR_BYTES(dtype) (((dtype) == PLORA_F32 ? 2 : 1) * (int64_t)sizeof(cpu_vf))

typedef int32_t __attribute__((may_alias)) aliased_int32;

/* The report of plora__merge_sums, by lanes. */
struct lane_sums {
    cpu_vd dd, gd, ww, ll, lost_max;
    cpu_vi changed;
};

/* Two registers of W. */
struct pair {
    cpu_vf first, second;
};

#if CPU_ISA == CPU_ISA_PORTABLE
static cpu_vf load_f16(const uint16_t *from)
{
    cpu_vf value;
    for (int i = 0; i < CPU_LANES; ++i)
        value[i] = plora__f16_to_float(from[i]);
    return value;
}

static void store_f16(uint16_t *to, cpu_vf value)
{
    for (int i = 0; i < CPU_LANES; ++i)
        to[i] = plora__float_to_f16(value[i]);
}
#elif CPU_ISA == CPU_ISA_AVX2
CPU_INLINE cpu_vf load_f16(const uint16_t *from)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}

CPU_INLINE void store_f16(uint16_t *to, cpu_vf value)
{
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
CPU_INLINE cpu_vf load_f16(const uint16_t *from)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

CPU_INLINE void store_f16(uint16_t *to, cpu_vf value)
{
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif

CPU_INLINE struct pair split_bf16(cpu_vu halves)
{
    return (struct pair){(cpu_vf)(halves << 16), (cpu_vf)(halves & 0xffff0000u)};
}

/* Of each lane the upper 16 bits of `upper` and the lower ones of `lower`. */
CPU_INLINE cpu_vu join_halves(cpu_vu upper, cpu_vu lower)
{
#if CPU_ISA >= CPU_ISA_AVX512
    enum { CHOOSE = 0xca }; /* a ? b : c */
    return (cpu_vu)_mm512_ternarylogic_epi32(_mm512_set1_epi32((int)0xffff0000u), (__m512i)upper, (__m512i)lower,
                                             CHOOSE);
#elif CPU_ISA == CPU_ISA_AVX2
    return (cpu_vu)_mm256_blend_epi16((__m256i)lower, (__m256i)upper, 0xaa);
#else
    return (upper & 0xffff0000u) | (lower & 0xffffu);
#endif
}

/* Upper and lower halves of a pair of registers, in the order of the columns. */
struct halves {
    cpu_vu upper, lower;
};

CPU_INLINE struct halves halves_of(struct pair value)
{
    const cpu_vu first = (cpu_vu)value.first, second = (cpu_vu)value.second;
    return (struct halves){join_halves(second, first >> 16), join_halves(second << 16, first)};
}

CPU_INLINE struct pair pair_of(struct halves halves)
{
    return (struct pair){(cpu_vf)join_halves(halves.upper << 16, halves.lower),
                         (cpu_vf)join_halves(halves.upper, halves.lower >> 16)};
}

/* Both registers rounded to bf16 and joined again. With h the upper and l the lower half of a float, h goes up when l is past
 * the middle, or on it with h odd: when (l | (h & 1)) > 0x8000. The NaNs that an addition makes have l = 0 and stay NaN. */
CPU_INLINE cpu_vu join_bf16(struct pair value)
{
    const struct halves halves = halves_of(value);
#if CPU_ISA >= CPU_ISA_AVX512
    enum { OR_AND = 0xf8 }; /* a | (b & c) */
    const __m512i high = (__m512i)halves.upper;
    const __m512i tie = _mm512_ternarylogic_epi32((__m512i)halves.lower, high, _mm512_set1_epi16(1), OR_AND);
    const __mmask32 up = _mm512_cmpgt_epu16_mask(tie, _mm512_set1_epi16(INT16_MIN));
    return (cpu_vu)_mm512_mask_add_epi16(high, up, high, _mm512_set1_epi16(1));
#else
    const cpu_vu16 high = (cpu_vu16)halves.upper, tie = (cpu_vu16)halves.lower | (high & 1);
    return (cpu_vu)(high - (cpu_vu16)((cpu_vi16)(tie ^ 0x8000u) > 0)); /* a signed comparison is one instruction */
#endif
}

CPU_INLINE struct pair load_pair(const char *from, int32_t dtype)
{
    if (dtype == PLORA_BF16) return split_bf16((cpu_vu)cpu_load(from));
    if (dtype == PLORA_F16)
        return (struct pair){load_f16((const uint16_t *)from), load_f16((const uint16_t *)from + CPU_LANES)};
    return (struct pair){cpu_load(from), cpu_load(from + sizeof(cpu_vf))};
}

CPU_INLINE void store_pair(char *to, struct pair value, int32_t dtype)
{
    if (dtype == PLORA_BF16) {
        cpu_store(to, (cpu_vf)join_bf16(value));
    } else if (dtype == PLORA_F16) {
        store_f16((uint16_t *)to, value.first);
        store_f16((uint16_t *)to + CPU_LANES, value.second);
    } else {
        cpu_store(to, value.first);
        cpu_store(to + sizeof(cpu_vf), value.second);
    }
}

CPU_INLINE void add_sums(struct lane_sums *sums, cpu_vf before, cpu_vf after, cpu_vf sum, cpu_vd factor)
{
    for (int half = 0; half < 2; ++half) {
        const cpu_vd w = cpu_widen(before, half), d = factor * cpu_widen(sum, half); /* exact: 24 + 24 bits */
        const cpu_vd g = cpu_widen(after, half) - w;
        sums->dd = cpu_fma_double(d, d, sums->dd);
        sums->gd = cpu_fma_double(g, d, sums->gd);
        sums->ww = cpu_fma_double(w, w, sums->ww);
        sums->ll = cpu_fma_double(d - g, d - g, sums->ll);
        sums->lost_max = cpu_max_magnitude_double(sums->lost_max, d - g);
    }
    sums->changed -= (cpu_vi)before != (cpu_vi)after;
}

#include "merge_rounding.h"

/* Rows of a tile in memory, strides in bytes. */
struct place {
    char *weight, *low; /* low halves, with PLORA_ROUND_RESIDUAL; else NULL */
    int64_t stride, low_stride;
    int64_t element; /* the number of the first, with PLORA_ROUND_STOCHASTIC */
};

/* What is done to all elements of a block. dtype and rounding are constants at every call, as is whether there are sums. */
struct work {
    int32_t dtype, rounding;
    float factor;
    const struct drawing *drawing; /* with PLORA_ROUND_STOCHASTIC */
    struct lane_sums *sums;        /* NULL = no report */
};

/* Pair number i of a row. */
CPU_INLINE struct pair load_value(const char *weight, const uint16_t *low, int i, struct work work)
{
    weight += i * PAIR_BYTES(work.dtype);
    return work.rounding == PLORA_ROUND_RESIDUAL ? load_joined(weight, low + i * PAIR, work.dtype)
                                                 : load_pair(weight, work.dtype);
}

CPU_INLINE void store_value(char *weight, uint16_t *low, const uint16_t *random, int i, struct pair value,
                            struct work work)
{
    weight += i * PAIR_BYTES(work.dtype);
    if (work.rounding == PLORA_ROUND_RESIDUAL)
        store_split(weight, low + i * PAIR, value, work.dtype);
    else if (work.rounding == PLORA_ROUND_STOCHASTIC)
        store_random(weight, value, random + i * PAIR, work.dtype);
    else
        store_pair(weight, value, work.dtype);
}

/* One row of a tile, with its random numbers. */
CPU_INLINE void add_row(const struct place *place, int64_t row, const uint16_t *random, const cpu_vf sum[TILE_VECTORS],
                        struct work work)
{
    enum { ROW_PAIRS = TILE_VECTORS / 2 };
    const cpu_vf factors = cpu_broadcast(work.factor);
    char *weight = place->weight + row * place->stride;
    uint16_t *low = work.rounding == PLORA_ROUND_RESIDUAL ? (uint16_t *)(place->low + row * place->low_stride) : NULL;
    struct pair before[ROW_PAIRS], after[ROW_PAIRS];
    cpu_vu largest = {0};
#pragma GCC unroll 8
    for (int i = 0; i < ROW_PAIRS; ++i) {
        before[i] = load_value(weight, low, i, work);
        after[i].first = cpu_fma(factors, sum[2 * i], before[i].first);
        after[i].second = cpu_fma(factors, sum[2 * i + 1], before[i].second);
        if (work.rounding != PLORA_ROUND_NEAREST) largest = larger(largest, after[i]);
    }
    if (work.rounding != PLORA_ROUND_NEAREST && __builtin_expect(is_near_largest(largest, work.dtype), 0)) {
        float values[TILE_COLUMNS];
        for (int i = 0; i < ROW_PAIRS; ++i)
            lay_out(values + i * PAIR, after[i], work.dtype);
        store_slowly((uint16_t *)weight, low, random, values, work.rounding, work.dtype);
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < ROW_PAIRS; ++i)
            store_value(weight, low, random, i, after[i], work);
    }
    if (work.sums == NULL) return;
#pragma GCC unroll 8
    for (int i = 0; i < ROW_PAIRS; ++i) {
        const struct pair stored = load_value(weight, low, i, work);
        const cpu_vd wide_factor = cpu_widen(factors, 0);
        add_sums(work.sums, before[i].first, stored.first, sum[2 * i], wide_factor);
        add_sums(work.sums, before[i].second, stored.second, sum[2 * i + 1], wide_factor);
    }
}

/* A tile whose lines are fetched row by row while this one is computed: where rows are many and long, all at once would use up the
 * fill buffers. */
struct ahead {
    uintptr_t row, low_row; /* may lie past the weight, where a prefetch does no harm; low_row 0 = none */
    int64_t stride, row_bytes, low_stride, done;
};

CPU_INLINE void fetch_row(struct ahead *next)
{
    for (int64_t line = 0; line < next->row_bytes; line += CACHE_LINE) {
        __builtin_prefetch((const char *)(next->row + (uintptr_t)line), FETCH_TO_WRITE, FETCH_LEVEL);
        if (next->low_row != 0) /* the weight has 16 bits too: as many bytes */
            __builtin_prefetch((const char *)(next->low_row + (uintptr_t)line), FETCH_TO_WRITE, FETCH_LEVEL);
    }
    next->row += (uintptr_t)next->stride;
    if (next->low_row != 0) next->low_row += (uintptr_t)next->low_stride;
    ++next->done;
}

#if CPU_ISA == CPU_ISA_AMX
#include "merge_tiles.h"
#else
static int64_t depth(int64_t rank)
{
    return rank;
}

struct lag {
    char unused; /* the sum of a tile is added at once */
};

CPU_INLINE void merge_tile(struct lag *lag, const struct place *place, const float *left, const float *right,
                           int64_t rank, struct work work, struct ahead next)
{
    struct random random;
    if (work.rounding == PLORA_ROUND_STOCHASTIC) draw_rows(work.drawing, place->element, &random);
    cpu_vf sum[TILE_ROWS][TILE_VECTORS];
    /* The sum over r goes on in phases, between which rows are fetched. */
    const int64_t phase = FETCH_AT_ONCE ? rank : (rank + TILE_ROWS * UNROLL - 1) / (TILE_ROWS * UNROLL) * UNROLL;
    (void)lag;
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < TILE_VECTORS; ++j)
            sum[i][j] = (cpu_vf){0};
    for (int64_t end = 0, r = 0; r < rank;) {
        end = end + phase < rank ? end + phase : rank;
        while (next.done * rank < end * TILE_ROWS)
            fetch_row(&next);
#pragma GCC unroll 4
        for (; r < end; ++r, left += TILE_ROWS, right += TILE_COLUMNS) {
            cpu_vf row[TILE_VECTORS];
#pragma GCC unroll 8
            for (int j = 0; j < TILE_VECTORS; ++j)
                row[j] = cpu_load(right + j * CPU_LANES);
#pragma GCC unroll 8
            for (int i = 0; i < TILE_ROWS; ++i) {
                const cpu_vf value = cpu_broadcast(left[i]);
#pragma GCC unroll 8
                for (int j = 0; j < TILE_VECTORS; ++j)
                    sum[i][j] = cpu_fma(value, row[j], sum[i][j]);
            }
        }
    }
    atomic_signal_fence(memory_order_acq_rel); /* keeps the loads of W from being moved up, where they would spill */
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; ++i) {
        const uint16_t *numbers = work.rounding == PLORA_ROUND_STOCHASTIC
                                      ? random_row(&random, i, place->element + i * work.drawing->row_elements)
                                      : NULL;
        add_row(place, i, numbers, sum[i], work);
    }
}

CPU_INLINE void finish_tile(struct lag *lag, struct work work)
{
    (void)lag, (void)work;
}

static void open_tiles(void)
{
}

static void close_tiles(void)
{
}
#endif

/* Copies the part [rows, columns] of a tile between W and the padded copy. */
static void copy_tile(char *to, int64_t to_stride, const char *from, int64_t from_stride, int64_t rows,
                      size_t row_bytes)
{
    for (int64_t i = 0; i < rows; ++i)
        memcpy(to + i * to_stride, from + i * from_stride, row_bytes);
}

static int64_t count_overflows(const char *before, const char *after, int64_t elements, int32_t dtype)
{
    int64_t count = 0;
    for (int64_t i = 0; i < elements; ++i)
        count += isfinite(plora__load(before, i, dtype)) && !isfinite(plora__load(after, i, dtype));
    return count;
}

/* A tile over the edge, or of a trial, is worked on as a copy, padded with zeros. */
struct copy {
    int64_t rows, columns; /* of W in it */
    _Alignas(CACHE_LINE) char weight[TILE_ROWS * TILE_COLUMNS * sizeof(float)];
    char before[TILE_ROWS * TILE_COLUMNS * sizeof(float)];
    _Alignas(CACHE_LINE) char low[TILE_ROWS * TILE_COLUMNS * sizeof(uint16_t)];
};

/* Fills it, and says where its rows are. */
static struct place open_copy(struct copy *copy, const struct place *place, int64_t size, int trial)
{
    const int64_t low_size = (int64_t)sizeof(uint16_t);
    const struct place result = {copy->weight, copy->low, TILE_COLUMNS * size, TILE_COLUMNS * low_size, place->element};
    memset(copy->weight, 0, sizeof copy->weight);
    copy_tile(copy->weight, result.stride, place->weight, place->stride, copy->rows, (size_t)(copy->columns * size));
    if (place->low != NULL) {
        memset(copy->low, 0, sizeof copy->low);
        copy_tile(copy->low, result.low_stride, place->low, place->low_stride, copy->rows,
                  (size_t)(copy->columns * low_size));
    }
    if (trial) memcpy(copy->before, copy->weight, sizeof copy->before);
    return result;
}

/* Brings what became of it to W, or in a trial counts. */
static void close_copy(const struct copy *copy, const struct place *place, const struct cpu_merge_block *block)
{
    const int64_t size = (int64_t)plora__dtype_size(block->dtype), low_size = (int64_t)sizeof(uint16_t);
    if (block->overflows != NULL) {
        *block->overflows += count_overflows(copy->before, copy->weight, TILE_ROWS * TILE_COLUMNS, block->dtype);
        return;
    }
    copy_tile(place->weight, place->stride, copy->weight, TILE_COLUMNS * size, copy->rows,
              (size_t)(copy->columns * size));
    if (place->low != NULL)
        copy_tile(place->low, place->low_stride, copy->low, TILE_COLUMNS * low_size, copy->rows,
                  (size_t)(copy->columns * low_size));
}

/* The tile at [row, column]. */
CPU_INLINE void merge_at(const struct cpu_merge_block *block, int64_t row, int64_t column, struct work work,
                         struct lag *lag, struct copy *copy)
{
    const int64_t size = (int64_t)plora__dtype_size(work.dtype), low_size = (int64_t)sizeof(uint16_t);
    const int64_t stride = block->stride * size, low_stride = block->residual_stride * low_size;
    const int64_t deep = depth(block->rank);
    const int has_low = work.rounding == PLORA_ROUND_RESIDUAL;
    const struct place place = {
        .weight = (char *)block->weight + row * stride + column * size,
        .low = has_low ? (char *)block->residual + row * low_stride + column * low_size : NULL,
        .stride = stride,
        .low_stride = low_stride,
        .element = block->draw.first_element + row * block->draw.row_elements + column,
    };
    const int below = FETCH_BELOW && row + TILE_ROWS < block->rows;
    const int64_t down = below ? TILE_ROWS : FETCH_BELOW ? -row : 0, aside = below ? 0 : STRIP_COLUMNS;
    const struct ahead next = {
        .row = (uintptr_t)place.weight + (uintptr_t)(down * stride + aside * size),
        .low_row = has_low ? (uintptr_t)place.low + (uintptr_t)(down * low_stride + aside * low_size) : 0,
        .stride = stride,
        .row_bytes = TILE_COLUMNS * size,
        .low_stride = low_stride,
    };
    const int64_t rows = block->rows - row, columns = block->columns - column;
    const int whole = rows >= TILE_ROWS && columns >= TILE_COLUMNS && block->overflows == NULL;
    struct place here = place;
    if (!whole) {
        copy->rows = rows < TILE_ROWS ? rows : TILE_ROWS;
        copy->columns = columns < TILE_COLUMNS ? columns : TILE_COLUMNS;
        here = open_copy(copy, &place, size, block->overflows != NULL);
    }
    merge_tile(lag, &here, block->left + row * deep, block->right + column * deep, block->rank, work, next);
    if (!whole) {
        finish_tile(lag, work);
        close_copy(copy, &place, block);
    }
}

CPU_INLINE void merge_block(const struct cpu_merge_block *block, int32_t dtype, int32_t rounding,
                            struct lane_sums *sums)
{
    struct drawing drawing;
    if (rounding == PLORA_ROUND_STOCHASTIC) open_drawing(&drawing, &block->draw);
    const struct work work = {dtype, rounding, block->factor, &drawing, sums};
    struct lag lag = {0};
    struct copy copy;
    for (int64_t strip = 0; strip < block->columns; strip += STRIP_COLUMNS)
        for (int64_t row = 0; row < block->rows; row += TILE_ROWS)
            for (int64_t column = strip; column < strip + STRIP_COLUMNS && column < block->columns;
                 column += TILE_COLUMNS)
                merge_at(block, row, column, work, &lag, &copy);
    finish_tile(&lag, work);
}

#define DEFINE_BLOCK(name, dtype, rounding)                                                                            \
    static void merge_##name(const struct cpu_merge_block *block)                                                      \
    {                                                                                                                  \
        merge_block(block, dtype, rounding, NULL);                                                                     \
    }                                                                                                                  \
    static void merge_sums_##name(const struct cpu_merge_block *block, struct lane_sums *sums)                         \
    {                                                                                                                  \
        merge_block(block, dtype, rounding, sums);                                                                     \
    }

DEFINE_BLOCK(f32, PLORA_F32, PLORA_ROUND_NEAREST)
DEFINE_BLOCK(bf16, PLORA_BF16, PLORA_ROUND_NEAREST)
DEFINE_BLOCK(f16, PLORA_F16, PLORA_ROUND_NEAREST)
DEFINE_BLOCK(bf16_random, PLORA_BF16, PLORA_ROUND_STOCHASTIC)
DEFINE_BLOCK(f16_random, PLORA_F16, PLORA_ROUND_STOCHASTIC)
DEFINE_BLOCK(bf16_residual, PLORA_BF16, PLORA_ROUND_RESIDUAL)
DEFINE_BLOCK(f16_residual, PLORA_F16, PLORA_ROUND_RESIDUAL)

static void merge_plain(const struct cpu_merge_block *block)
{
    static void (*const merges[3][3])(const struct cpu_merge_block *) = {
        {merge_f32, merge_bf16, merge_f16},
        {merge_f32, merge_bf16_random, merge_f16_random},
        {merge_f32, merge_bf16_residual, merge_f16_residual},
    };
    merges[block->rounding][block->dtype](block);
}

static void merge_with_sums(const struct cpu_merge_block *block)
{
    static void (*const merges[3][3])(const struct cpu_merge_block *, struct lane_sums *) = {
        {merge_sums_f32, merge_sums_bf16, merge_sums_f16},
        {merge_sums_f32, merge_sums_bf16_random, merge_sums_f16_random},
        {merge_sums_f32, merge_sums_bf16_residual, merge_sums_f16_residual},
    };
    struct lane_sums lanes;
    memset(&lanes, 0, sizeof lanes);
    merges[block->rounding][block->dtype](block, &lanes);
    struct plora__merge_sums *sums = block->sums;
    sums->dd = cpu_sum_double(lanes.dd);
    sums->gd = cpu_sum_double(lanes.gd);
    sums->ww = cpu_sum_double(lanes.ww);
    sums->ll = cpu_sum_double(lanes.ll);
    sums->changed = 0;
    for (int i = 0; i < CPU_LANES; ++i)
        sums->changed += lanes.changed[i];
    sums->lost_max = 0;
    for (int i = 0; i < CPU_LANES / 2; ++i)
        if (lanes.lost_max[i] > sums->lost_max) sums->lost_max = lanes.lost_max[i];
}

static void merge(const struct cpu_merge_block *block)
{
    if (block->overflows != NULL) *block->overflows = 0;
    open_tiles();
    if (block->sums == NULL || block->overflows != NULL)
        merge_plain(block);
    else
        merge_with_sums(block);
    close_tiles();
}

static void pack(const float *source, int64_t stride, int64_t rank_stride, int64_t rank, int64_t count, int64_t width,
                 float *packed)
{
    for (int64_t r = 0; r < rank; ++r, source += rank_stride, packed += width) {
        if (stride == 1)
            memcpy(packed, source, (size_t)count * sizeof *packed);
        else
            for (int64_t c = 0; c < count; ++c)
                packed[c] = source[c * stride];
        for (int64_t c = count; c < width; ++c)
            packed[c] = 0.0f;
    }
}

#if CPU_ISA != CPU_ISA_AMX
static void pack_tile(const float *source, int64_t stride, int64_t rank_stride, int64_t rank, int64_t count,
                      float *packed)
{
    pack(source, stride, rank_stride, rank, count, TILE_ROWS, packed);
}

static void pack_panel(const float *source, int64_t stride, int64_t rank_stride, int64_t rank, int64_t count,
                       int32_t dtype, float *packed)
{
    pack(source, stride, rank_stride, rank, count, TILE_COLUMNS, packed);
    if (dtype != PLORA_BF16) return;
    for (int64_t group = 0; group < rank * TILE_VECTORS / 2; ++group, packed += 2 * CPU_LANES) {
        float columns[2 * CPU_LANES];
        memcpy(columns, packed, sizeof columns);
        for (int i = 0; i < CPU_LANES; ++i) {
            packed[i] = columns[2 * i];
            packed[CPU_LANES + i] = columns[2 * i + 1];
        }
    }
}
#endif

static void gram(const float *panels, int64_t panel_count, int64_t rank, int64_t begin, double *gram)
{
    const float *left[GRAM_ROWS], *right[GRAM_COLUMNS];
    for (int i = 0; i < GRAM_ROWS; ++i) /* rows past the end: any, and not stored */
        left[i] = panels + TILE_COLUMNS * (begin + i < rank ? begin + i : rank - 1);
    for (int64_t first = begin; first < rank; first += GRAM_COLUMNS) {
        for (int j = 0; j < GRAM_COLUMNS; ++j)
            right[j] = panels + TILE_COLUMNS * (first + j < rank ? first + j : rank - 1);
        cpu_vd sum[GRAM_ROWS][GRAM_COLUMNS];
        memset(sum, 0, sizeof sum);
        for (int64_t panel = 0; panel < panel_count; ++panel)
            for (int64_t c = panel * rank * TILE_COLUMNS; c < panel * rank * TILE_COLUMNS + TILE_COLUMNS;
                 c += CPU_LANES / 2) {
                cpu_vd values[GRAM_COLUMNS];
#pragma GCC unroll 4
                for (int j = 0; j < GRAM_COLUMNS; ++j)
                    values[j] = cpu_load_double(right[j] + c);
#pragma GCC unroll 4
                for (int i = 0; i < GRAM_ROWS; ++i) {
                    const cpu_vd value = cpu_load_double(left[i] + c);
#pragma GCC unroll 4
                    for (int j = 0; j < GRAM_COLUMNS; ++j)
                        sum[i][j] = cpu_fma_double(value, values[j], sum[i][j]);
                }
            }
        for (int64_t i = begin; i < begin + GRAM_ROWS && i < rank; ++i)
            for (int64_t j = first > i ? first : i; j < first + GRAM_COLUMNS && j < rank; ++j)
                gram[i * rank + j] = gram[j * rank + i] = cpu_sum_double(sum[i - begin][j - first]);
    }
}

static uint32_t magnitude(const float *values, int64_t count)
{
    const aliased_int32 *bits = (const aliased_int32 *)values;
    int32_t maximum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t value = bits[i] & INT32_MAX;
        maximum = value > maximum ? value : maximum;
    }
    return (uint32_t)maximum;
}

const struct cpu_merge_kernels CPU_ISA_NAME(cpu_merge_kernels) = {
    .tile_rows = TILE_ROWS,
    .tile_columns = TILE_COLUMNS,
    .block_rows = BLOCK_TILES * TILE_ROWS,
    .depth = depth,
    .pack = pack,
    .pack_tile = pack_tile,
    .pack_panel = pack_panel,
    .block = merge,
    .gram_rows = GRAM_ROWS,
    .gram = gram,
    .magnitude = magnitude,
};
