/* batch_kernels.c: the low-rank products of one slot's tokens, compiled once per instruction level (isa.h), in fp32.
 *
 *     shrink    low = s x A^T     dot products along K, TOKENS x RANKS at once, DEPTH columns after the other so that x stays in the
 *                                 nearest cache and A in the next; the lanes of a sum are added up at the end of each
 *     expand    y  += low B^T     columns in lanes, TOKENS x VECTORS registers; panels of B are turned round once for all tokens, which
 *                                 then go along the panels, so that y is read and written by whole stretches; each y is rounded once
 *
 * Few tokens leave these products to the speed of memory. So what comes next is asked for ahead: rows of A, rows of y. */
#include "batch_kernels.h"

#include "dtype.h"
#include "vector.h"

#if CPU_ISA >= CPU_ISA_AVX512
enum { SHRINK_TOKENS = 6, RANKS = 4, EXPAND_TOKENS = 6, VECTORS = 4 };
#elif CPU_ISA == CPU_ISA_AVX2
enum { SHRINK_TOKENS = 6, RANKS = 2, EXPAND_TOKENS = 6, VECTORS = 2 };
#else
enum { SHRINK_TOKENS = 4, RANKS = 2, EXPAND_TOKENS = 4, VECTORS = 2 };
#endif
enum { DEPTH = 512, PANEL = VECTORS * CPU_LANES, CACHE_LINE = 64 };

typedef uint16_t halves __attribute__((vector_size(2 * CPU_LANES)));
typedef float four __attribute__((vector_size(16)));

/* Within each quarter of a register: single numbers, or pairs, of the lower or upper half of both in turns. */
#if CPU_ISA >= CPU_ISA_AVX512
#define INTERLEAVE_LOW(a, b) _mm512_unpacklo_ps(a, b)
#define INTERLEAVE_HIGH(a, b) _mm512_unpackhi_ps(a, b)
#define PAIR_LOW(a, b) (cpu_vf) _mm512_unpacklo_pd((__m512d)(a), (__m512d)(b))
#define PAIR_HIGH(a, b) (cpu_vf) _mm512_unpackhi_pd((__m512d)(a), (__m512d)(b))
#elif CPU_ISA == CPU_ISA_AVX2
#define INTERLEAVE_LOW(a, b) _mm256_unpacklo_ps(a, b)
#define INTERLEAVE_HIGH(a, b) _mm256_unpackhi_ps(a, b)
#define PAIR_LOW(a, b) (cpu_vf) _mm256_unpacklo_pd((__m256d)(a), (__m256d)(b))
#define PAIR_HIGH(a, b) (cpu_vf) _mm256_unpackhi_pd((__m256d)(a), (__m256d)(b))
#else
#define INTERLEAVE_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define INTERLEAVE_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define PAIR_LOW(a, b) __builtin_shufflevector(a, b, 0, 1, 4, 5)
#define PAIR_HIGH(a, b) __builtin_shufflevector(a, b, 2, 3, 6, 7)
#endif

/* ---------------------------------------------------------------------------------------------------------- numbers */

CPU_INLINE cpu_vf load_lanes(const char *from, int32_t dtype)
{
    if (dtype == PLORA_F32) return cpu_load(from);
    halves value;
    memcpy(&value, from, sizeof value);
    return (cpu_vf)(__builtin_convertvector(value, cpu_vu) << 16);
}

/* The first `count` lanes, zero in the others. */
CPU_INLINE cpu_vf load_some(const char *from, int32_t dtype, int64_t count)
{
    char lanes[sizeof(cpu_vf)] = {0};
    memcpy(lanes, from, (size_t)count * plora__dtype_size(dtype));
    return load_lanes(lanes, dtype);
}

CPU_INLINE void store_lanes(char *to, int32_t dtype, cpu_vf value)
{
    if (dtype == PLORA_F32) {
        cpu_store(to, value);
        return;
    }
    const cpu_vu bits = (cpu_vu)value; /* plora__float_to_bf16() by lanes */
    const cpu_vu is_nan = (cpu_vu)((cpu_vi)(bits & 0x7fffffffu) > 0x7f800000);
    const cpu_vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = bits >> 16 | 0x40u;
    const halves narrow = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), halves);
    memcpy(to, &narrow, sizeof narrow);
}

/* Halves are added until there are four lanes. */
CPU_INLINE four fold(cpu_vf value)
{
#if CPU_LANES == 4
    return value;
#else
    cpu_vh half[2];
    memcpy(half, &value, sizeof half);
    const cpu_vh sum = half[0] + half[1];
#if CPU_LANES == 8
    return sum;
#else
    four quarter[2];
    memcpy(quarter, &sum, sizeof quarter);
    return quarter[0] + quarter[1];
#endif
#endif
}

/* The sum of the lanes of each, as (0 + 2) + (1 + 3) of what fold() leaves. */
CPU_INLINE four sum_lanes(const cpu_vf value[4])
{
    four folded[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        folded[i] = fold(value[i]);
    const four first = __builtin_shufflevector(folded[0], folded[1], 0, 4, 1, 5) +
                       __builtin_shufflevector(folded[0], folded[1], 2, 6, 3, 7);
    const four second = __builtin_shufflevector(folded[2], folded[3], 0, 4, 1, 5) +
                        __builtin_shufflevector(folded[2], folded[3], 2, 6, 3, 7);
    return __builtin_shufflevector(first, second, 0, 1, 4, 5) + __builtin_shufflevector(first, second, 2, 3, 6, 7);
}

static char *row_of(const plora_matrix *matrix, const struct cpu_batch_rows *rows, int64_t i)
{
    const int64_t row = rows->list != NULL ? rows->list[rows->first + i] : rows->first + i;
    return (char *)matrix->data + row * matrix->stride * (int64_t)plora__dtype_size(matrix->dtype);
}

/* ----------------------------------------------------------------------------------------------------------- shrink */

/* x[k / CPU_LANES][token][k % CPU_LANES] of `depth` columns of some rows, in fp32 and with zeros at the end: one stream, which also spares
 * the cache rows that lie a power of two apart. */
CPU_INLINE void pack_rows(int tokens, int32_t dtype, char *const rows[], int64_t depth, float *x)
{
    const int64_t size = dtype == PLORA_F32 ? 4 : 2;
    for (int64_t k = 0; k < depth; k += CPU_LANES, x += tokens * CPU_LANES)
#pragma GCC unroll 6
        for (int i = 0; i < tokens; ++i)
            cpu_store(x + i * CPU_LANES, depth - k >= CPU_LANES ? load_lanes(rows[i] + k * size, dtype)
                                                                : load_some(rows[i] + k * size, dtype, depth - k));
}

/* sum[i, r] += x[i] a[r] by lanes. tokens and ranks are constants at every call. */
CPU_INLINE void multiply(int tokens, int ranks, const float *x, const cpu_vf *a, cpu_vf *sum)
{
#pragma GCC unroll 6
    for (int i = 0; i < tokens; ++i) {
        const cpu_vf left = cpu_load(x + i * CPU_LANES);
#pragma GCC unroll 4
        for (int r = 0; r < ranks; ++r)
            sum[i * ranks + r] = cpu_fma(left, a[r], sum[i * ranks + r]);
    }
}

/* low[i, r] (+)= sum over `depth` columns of x[i] a[r]; `ahead` is where the next rows of A are. */
CPU_INLINE void dots(int tokens, int ranks, const float *x, const float *a, const float *ahead, int64_t a_stride,
                     int64_t depth, int is_first, float *low, int64_t low_stride)
{
    cpu_vf sum[SHRINK_TOKENS * RANKS + 3] = {{0}}, right[RANKS];
    int64_t k = 0;
    for (; k + CPU_LANES <= depth; k += CPU_LANES, x += tokens * CPU_LANES) {
#pragma GCC unroll 4
        for (int r = 0; r < ranks; ++r) {
            __builtin_prefetch(ahead + r * a_stride + k, 0, 2);
            right[r] = cpu_load(a + r * a_stride + k);
        }
        multiply(tokens, ranks, x, right, sum);
    }
    if (k < depth) {
#pragma GCC unroll 4
        for (int r = 0; r < ranks; ++r)
            right[r] = load_some((const char *)(a + r * a_stride + k), PLORA_F32, depth - k);
        multiply(tokens, ranks, x, right, sum);
    }
    float total[SHRINK_TOKENS * RANKS + 3];
#pragma GCC unroll 6
    for (int i = 0; i < tokens * ranks; i += 4) {
        const four sums = sum_lanes(sum + i);
        memcpy(total + i, &sums, sizeof sums);
    }
#pragma GCC unroll 6
    for (int i = 0; i < tokens; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < ranks; ++r) {
            float *out = &low[i * low_stride + r];
            *out = is_first ? total[i * ranks + r] : *out + total[i * ranks + r];
        }
}

/* What some rows of x are multiplied with at a time: `depth` columns of A from `begin` on. */
struct block {
    int64_t columns, begin, depth, first; /* K; first: row of low */
    const struct cpu_batch_part *parts;
    int32_t part_count;
};

CPU_INLINE void shrink_part(int tokens, const float *x, const struct block *block, const struct cpu_batch_part *part)
{
    const int64_t stride = block->columns, depth = block->depth, rank = part->slot->rank;
    const int is_first = block->begin == 0;
    const float *a = part->slot->a + block->begin;
    float *low = part->low + block->first * part->low_stride;
    int64_t r = 0;
    for (; r + RANKS <= rank; r += RANKS) {
        const float *rows = a + r * stride, *ahead = rows;
        if (r + 2 * RANKS <= rank)
            ahead += RANKS * stride;
        else if (block->begin + 2 * depth <= stride)
            ahead = a + depth;
        dots(tokens, RANKS, x, rows, ahead, stride, depth, is_first, low + r, part->low_stride);
    }
    for (; r < rank; ++r)
        dots(tokens, 1, x, a + r * stride, a + r * stride, stride, depth, is_first, low + r, part->low_stride);
}

CPU_INLINE void shrink_rows(int tokens, int32_t dtype, char *const rows[], const struct block *block)
{
    float x[SHRINK_TOKENS * DEPTH];
    if (dtype == PLORA_F32)
        pack_rows(tokens, PLORA_F32, rows, block->depth, x);
    else
        pack_rows(tokens, PLORA_BF16, rows, block->depth, x);
    for (int32_t p = 0; p < block->part_count; ++p)
        shrink_part(tokens, x, block, &block->parts[p]);
}

static void shrink(const plora_matrix *x, const struct cpu_batch_rows *rows, const struct cpu_batch_part *parts,
                   int32_t part_count)
{
    const int64_t columns = x->columns, size = (int64_t)plora__dtype_size(x->dtype);
    struct block block = {.columns = columns, .parts = parts, .part_count = part_count};
    for (; block.begin < columns; block.begin += DEPTH) {
        block.depth = columns - block.begin < DEPTH ? columns - block.begin : DEPTH;
        for (block.first = 0; block.first < rows->count; block.first += SHRINK_TOKENS) {
            char *x_rows[SHRINK_TOKENS];
            const int64_t left = rows->count - block.first, count = left < SHRINK_TOKENS ? left : SHRINK_TOKENS;
            for (int64_t j = 0; j < count; ++j)
                x_rows[j] = row_of(x, rows, block.first + j) + block.begin * size;
#define SHRINK_CASE(n)                                                                                                 \
    case n: shrink_rows(n, x->dtype, x_rows, &block); break
            switch (count) {
                SHRINK_CASE(1);
                SHRINK_CASE(2);
                SHRINK_CASE(3);
                SHRINK_CASE(4);
#if CPU_ISA > CPU_ISA_PORTABLE
                SHRINK_CASE(5);
                SHRINK_CASE(6);
#endif
            }
        }
    }
    for (int32_t p = 0; p < part_count; ++p)
        for (int64_t i = 0; i < rows->count; ++i)
            for (int64_t r = 0; r < parts[p].slot->rank; ++r)
                parts[p].low[i * parts[p].low_stride + r] *= parts[p].slot->scale;
}

/* ----------------------------------------------------------------------------------------------------------- expand */

/* CPU_LANES rows of four numbers become four columns: each quarter of a register turns four of them round. */
CPU_INLINE void turn(const float *from, int64_t stride, float *to)
{
    cpu_vf row[4];
    for (int i = 0; i < 4; ++i)
        for (int quarter = 0; quarter < CPU_LANES / 4; ++quarter)
            memcpy((char *)&row[i] + quarter * sizeof(four), from + (4 * quarter + i) * stride, sizeof(four));
    const cpu_vf low01 = INTERLEAVE_LOW(row[0], row[1]), high01 = INTERLEAVE_HIGH(row[0], row[1]);
    const cpu_vf low23 = INTERLEAVE_LOW(row[2], row[3]), high23 = INTERLEAVE_HIGH(row[2], row[3]);
    cpu_store(to, PAIR_LOW(low01, low23));
    cpu_store(to + PANEL, PAIR_HIGH(low01, low23));
    cpu_store(to + 2 * PANEL, PAIR_LOW(high01, high23));
    cpu_store(to + 3 * PANEL, PAIR_HIGH(high01, high23));
}

/* panel[r * PANEL + n] = b[n * rank + r], zeros for n >= count. */
static void pack_panel(const float *b, int64_t rank, int64_t count, float *panel)
{
    int64_t n = 0;
    for (; n + CPU_LANES <= count; n += CPU_LANES) {
        int64_t r = 0;
        for (; r + 4 <= rank; r += 4)
            turn(b + n * rank + r, rank, panel + r * PANEL + n);
        for (; r < rank; ++r)
            for (int64_t i = n; i < n + CPU_LANES; ++i)
                panel[r * PANEL + i] = b[i * rank + r];
    }
    for (; n < PANEL; ++n)
        for (int64_t r = 0; r < rank; ++r)
            panel[r * PANEL + n] = n < count ? b[n * rank + r] : 0.0f;
}

/* y += the sums, of the columns that exist. */
CPU_INLINE void add_row(char *y, int32_t dtype, const cpu_vf sum[VECTORS], int64_t width)
{
    const int64_t bytes = dtype == PLORA_F32 ? sizeof(cpu_vf) : sizeof(halves);
    char edge[sizeof(cpu_vf) * VECTORS];
    char *at = y;
    if (width < PANEL) {
        memset(edge, 0, sizeof edge);
        memcpy(edge, y, (size_t)width * plora__dtype_size(dtype));
        at = edge;
    }
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j)
        store_lanes(at + j * bytes, dtype, load_lanes(at + j * bytes, dtype) + sum[j]);
    if (width < PANEL) memcpy(y, edge, (size_t)width * plora__dtype_size(dtype));
}

/* tokens is a constant at every call. */
CPU_INLINE void expand_tokens(int tokens, int32_t dtype, char *const y[], const float *low, int64_t low_stride,
                              const float *panel, int64_t rank, int64_t width)
{
    cpu_vf sum[EXPAND_TOKENS][VECTORS] = {{{0}}};
    for (int64_t r = 0; r < rank; ++r) {
        cpu_vf right[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j)
            right[j] = cpu_load(panel + r * PANEL + j * CPU_LANES);
#pragma GCC unroll 6
        for (int i = 0; i < tokens; ++i) {
            const cpu_vf left = cpu_broadcast(low[i * low_stride + r]);
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j)
                sum[i][j] = cpu_fma(left, right[j], sum[i][j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < tokens; ++i)
        if (dtype == PLORA_F32)
            add_row(y[i], PLORA_F32, sum[i], width);
        else
            add_row(y[i], PLORA_BF16, sum[i], width);
}

/* The rows of up to EXPAND_TOKENS tokens from number i on, at a column; returns how many. */
static int64_t rows_at(const plora_matrix *y, const struct cpu_batch_rows *rows, int64_t i, int64_t column, char *at[])
{
    const int64_t left = rows->count - i, count = left < EXPAND_TOKENS ? left : EXPAND_TOKENS;
    for (int64_t j = 0; j < count; ++j)
        at[j] = row_of(y, rows, i + j) + column * (int64_t)plora__dtype_size(y->dtype);
    return count > 0 ? count : 0;
}

static void fetch(char *const rows[], int64_t count, int64_t offset, int64_t bytes)
{
    for (int64_t j = 0; j < count; ++j)
        for (int64_t line = 0; line < bytes; line += CACHE_LINE)
            __builtin_prefetch(rows[j] + offset + line, 1);
}

static void expand(const plora_matrix *y, const struct cpu_batch_rows *rows, const struct plora__batch_slot *slot,
                   const float *low, int64_t low_stride, int64_t begin, int64_t end, float *panel)
{
    const int64_t size = (int64_t)plora__dtype_size(y->dtype), rank = slot->rank, columns = end - begin;
    const float *panels = slot->panels != NULL ? slot->panels + begin * rank : panel;
    char *y_rows[EXPAND_TOKENS], *next[EXPAND_TOKENS];
    int64_t count = rows_at(y, rows, 0, begin, y_rows);
    for (int64_t n = 0; n < columns; n += PANEL) {
        fetch(y_rows, count, n * size, PANEL * size);
        if (slot->panels == NULL)
            pack_panel(slot->b + (begin + n) * rank, rank, columns - n < PANEL ? columns - n : PANEL, panel + n * rank);
    }
    for (int64_t i = 0, next_count = 0; i < rows->count; i += EXPAND_TOKENS, count = next_count) {
        next_count = rows_at(y, rows, i + EXPAND_TOKENS, begin, next);
        for (int64_t n = 0; n < columns; n += PANEL) {
            const int64_t width = columns - n < PANEL ? columns - n : PANEL;
            char *at[EXPAND_TOKENS];
            for (int64_t j = 0; j < count; ++j)
                at[j] = y_rows[j] + n * size;
            fetch(next, next_count, n * size, PANEL * size);
#define EXPAND_CASE(c)                                                                                                 \
    case c: expand_tokens(c, y->dtype, at, low + i * low_stride, low_stride, panels + n * rank, rank, width); break
            switch (count) {
                EXPAND_CASE(1);
                EXPAND_CASE(2);
                EXPAND_CASE(3);
                EXPAND_CASE(4);
#if CPU_ISA > CPU_ISA_PORTABLE
                EXPAND_CASE(5);
                EXPAND_CASE(6);
#endif
            }
        }
        memcpy(y_rows, next, sizeof next);
    }
}

static void pack(const float *b, int64_t rank, int64_t out_features, float *panels)
{
    for (int64_t column = 0; column < out_features; column += PANEL) {
        const int64_t left = out_features - column;
        pack_panel(b + column * rank, rank, left < PANEL ? left : PANEL, panels + column * rank);
    }
}

const struct cpu_batch_kernels CPU_ISA_NAME(cpu_batch_kernels) = {
    .panel_columns = PANEL, .pack = pack, .shrink = shrink, .expand = expand};
