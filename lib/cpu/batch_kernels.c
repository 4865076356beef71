/* batch_kernels.c: the low-rank products of one slot's tokens, compiled once per instruction level (isa.h), in fp32.
 *
 *     shrink    low = s x A^T     dot products along K, TOKENS x RANKS at once, DEPTH columns after the other so that x
 *                                 and A stay in the nearest cache; the lanes of a sum are added up at the end of each
 *     expand    y  += low B^T     columns in lanes, TOKENS x VECTORS registers; a panel of B is turned round once for
 *                                 all tokens, and each y is rounded once */
#include "batch_kernels.h"

#include "dtype.h"
#include "vector.h"

#if CPU_ISA >= CPU_ISA_AVX512
enum { SHRINK_TOKENS = 6, EXPAND_TOKENS = 6, VECTORS = 4 };
#elif CPU_ISA == CPU_ISA_AVX2
enum { SHRINK_TOKENS = 3, EXPAND_TOKENS = 6, VECTORS = 2 };
#else
enum { SHRINK_TOKENS = 2, EXPAND_TOKENS = 4, VECTORS = 2 };
#endif
enum { RANKS = 4, DEPTH = 256, PANEL = VECTORS * CPU_LANES, CACHE_LINE = 64 };

typedef uint16_t halves __attribute__((vector_size(2 * CPU_LANES)));
typedef float four __attribute__((vector_size(16)));

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

CPU_INLINE float sum_lanes(cpu_vf value)
{
    const four last = fold(value);
    return (last[0] + last[2]) + (last[1] + last[3]);
}

/* sum_lanes() of four at once. */
CPU_INLINE four sum_four(const cpu_vf values[4])
{
    const four a = fold(values[0]), b = fold(values[1]), c = fold(values[2]), d = fold(values[3]);
    const four ab = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    const four cd = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
    return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
}

static char *row_of(const plora_matrix *matrix, const struct cpu_batch_rows *rows, int64_t i)
{
    const int64_t row = rows->list != NULL ? rows->list[rows->first + i] : rows->first + i;
    return (char *)matrix->data + row * matrix->stride * (int64_t)plora__dtype_size(matrix->dtype);
}

/* ----------------------------------------------------------------------------------------------------------- shrink */

/* low[i, r] (+)= sum over `depth` columns of x[i] a[r]. tokens, ranks (RANKS or 1) and dtype are constants at every call. */
CPU_INLINE void dots(int tokens, int ranks, int32_t dtype, char *const x[], const float *a, int64_t a_stride,
                     int64_t depth, int is_first, float *low, int64_t low_stride)
{
    const int64_t size = dtype == PLORA_F32 ? 4 : 2;
    cpu_vf sum[SHRINK_TOKENS][RANKS] = {{{0}}};
    for (int64_t k = 0; k < depth; k += CPU_LANES) {
        const int64_t rest = depth - k;
        cpu_vf right[RANKS];
#pragma GCC unroll 4
        for (int r = 0; r < ranks; ++r)
            right[r] = rest >= CPU_LANES ? cpu_load(a + r * a_stride + k)
                                         : load_some((const char *)(a + r * a_stride + k), PLORA_F32, rest);
#pragma GCC unroll 6
        for (int i = 0; i < tokens; ++i) {
            const cpu_vf left =
                rest >= CPU_LANES ? load_lanes(x[i] + k * size, dtype) : load_some(x[i] + k * size, dtype, rest);
#pragma GCC unroll 4
            for (int r = 0; r < ranks; ++r)
                sum[i][r] = cpu_fma(left, right[r], sum[i][r]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < tokens; ++i) {
        float *out = low + i * low_stride;
        if (ranks == RANKS) {
            four sums = sum_four(sum[i]), before;
            memcpy(&before, out, sizeof before);
            if (!is_first) sums += before;
            memcpy(out, &sums, sizeof sums);
        } else {
            out[0] = is_first ? sum_lanes(sum[i][0]) : out[0] + sum_lanes(sum[i][0]);
        }
    }
}

CPU_INLINE void dots_of(int tokens, int32_t dtype, char *const x[], const float *a, int64_t a_stride, int64_t depth,
                        int is_first, int64_t rank, float *low, int64_t low_stride)
{
    int64_t r = 0;
    for (; r + RANKS <= rank; r += RANKS)
        dots(tokens, RANKS, dtype, x, a + r * a_stride, a_stride, depth, is_first, low + r, low_stride);
    for (; r < rank; ++r)
        dots(tokens, 1, dtype, x, a + r * a_stride, a_stride, depth, is_first, low + r, low_stride);
}

/* Up to SHRINK_TOKENS rows of x by all parts. */
CPU_INLINE void shrink_rows(int32_t dtype, char *const x[], int64_t count, int64_t first, int64_t columns,
                            int64_t begin, int64_t depth, const struct cpu_batch_part *parts, int32_t part_count)
{
    for (int32_t p = 0; p < part_count; ++p) {
        const struct plora__batch_slot *slot = parts[p].slot;
        const int64_t low_stride = parts[p].low_stride;
        float *low = parts[p].low + first * low_stride;
        if (slot->rank == 0) continue;
#define SHRINK_CASE(n)                                                                                                 \
    case n: dots_of(n, dtype, x, slot->a + begin, columns, depth, begin == 0, slot->rank, low, low_stride); break
        switch (count) {
            SHRINK_CASE(1);
            SHRINK_CASE(2);
#if CPU_ISA >= CPU_ISA_AVX2
            SHRINK_CASE(3);
#endif
#if CPU_ISA >= CPU_ISA_AVX512
            SHRINK_CASE(4);
            SHRINK_CASE(5);
            SHRINK_CASE(6);
#endif
        }
    }
}

CPU_INLINE void shrink_as(int32_t dtype, const plora_matrix *x, const struct cpu_batch_rows *rows,
                          const struct cpu_batch_part *parts, int32_t part_count)
{
    const int64_t columns = x->columns, size = dtype == PLORA_F32 ? 4 : 2;
    for (int64_t begin = 0; begin < columns; begin += DEPTH) {
        const int64_t depth = columns - begin < DEPTH ? columns - begin : DEPTH;
        for (int64_t i = 0; i < rows->count; i += SHRINK_TOKENS) {
            char *x_rows[SHRINK_TOKENS];
            const int64_t count = rows->count - i < SHRINK_TOKENS ? rows->count - i : SHRINK_TOKENS;
            for (int64_t j = 0; j < count; ++j)
                x_rows[j] = row_of(x, rows, i + j) + begin * size;
            shrink_rows(dtype, x_rows, count, i, columns, begin, depth, parts, part_count);
        }
    }
    for (int32_t p = 0; p < part_count; ++p)
        for (int64_t i = 0; i < rows->count; ++i)
            for (int64_t r = 0; r < parts[p].slot->rank; ++r)
                parts[p].low[i * parts[p].low_stride + r] *= parts[p].slot->scale;
}

static void shrink(const plora_matrix *x, const struct cpu_batch_rows *rows, const struct cpu_batch_part *parts,
                   int32_t part_count)
{
    if (x->dtype == PLORA_F32)
        shrink_as(PLORA_F32, x, rows, parts, part_count);
    else
        shrink_as(PLORA_BF16, x, rows, parts, part_count);
}

/* ----------------------------------------------------------------------------------------------------------- expand */

/* Four rows of four numbers become four columns. */
CPU_INLINE void turn(const float *from, int64_t stride, float *to)
{
    four row[4];
    for (int i = 0; i < 4; ++i)
        memcpy(&row[i], from + i * stride, sizeof row[i]);
    const four low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
    const four high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
    const four low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
    const four high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
    const four columns[4] = {
        __builtin_shufflevector(low01, low23, 0, 1, 4, 5), __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
        __builtin_shufflevector(high01, high23, 0, 1, 4, 5), __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i)
        memcpy(to + i * PANEL, &columns[i], sizeof columns[i]);
}

/* panel[r * PANEL + n] = b[n * rank + r], zeros for n >= count. */
static void pack_panel(const float *b, int64_t rank, int64_t count, float *panel)
{
    int64_t n = 0;
    for (; n + 4 <= count; n += 4) {
        int64_t r = 0;
        for (; r + 4 <= rank; r += 4)
            turn(b + n * rank + r, rank, panel + r * PANEL + n);
        for (; r < rank; ++r)
            for (int64_t i = n; i < n + 4; ++i)
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

static void expand(const plora_matrix *y, const struct cpu_batch_rows *rows, const struct plora__batch_slot *slot,
                   const float *low, int64_t low_stride, int64_t begin, int64_t end, float *panel)
{
    const int64_t size = (int64_t)plora__dtype_size(y->dtype);
    for (int64_t column = begin; column < end; column += PANEL) {
        const int64_t width = end - column < PANEL ? end - column : PANEL;
        const float *packed = slot->panels != NULL ? slot->panels + column * slot->rank : panel;
        if (packed == panel) pack_panel(slot->b + column * slot->rank, slot->rank, width, panel);
        for (int64_t i = 0; i < rows->count; i += EXPAND_TOKENS) {
            char *y_rows[EXPAND_TOKENS];
            const int64_t count = rows->count - i < EXPAND_TOKENS ? rows->count - i : EXPAND_TOKENS;
            for (int64_t j = 0; j < count; ++j) {
                y_rows[j] = row_of(y, rows, i + j) + column * size;
                for (int64_t line = 0; line < width * size; line += CACHE_LINE)
                    __builtin_prefetch(y_rows[j] + line, 1);
            }
#define EXPAND_CASE(n)                                                                                                 \
    case n: expand_tokens(n, y->dtype, y_rows, low + i * low_stride, low_stride, packed, slot->rank, width); break
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
