/* merge_kernels.h: the kernels under cpu_merge.c, one table per instruction level (isa.h).
 *
 *     W[rows,columns] += factor * left[rows,R] right[R,columns]
 *
 *     left, packed:  row tiles     [ceil(rows / tile_rows)][depth(R)][tile_rows]             zeros beyond the edges
 *     right, packed: column panels [ceil(columns / tile_columns)][depth(R)][tile_columns]
 *
 * Inside a panel the columns are in the order in which the kernel's registers hold those of W. */
#ifndef PLORA_CPU_MERGE_KERNELS_H
#define PLORA_CPU_MERGE_KERNELS_H

#include "backend.h"

/* Some rows of one weight against all of its columns. */
struct cpu_merge_block {
    void *weight; /* the first of the rows */
    int64_t stride, rows, columns, rank;
    int32_t dtype;
    int32_t rounding;
    uint16_t *residual; /* of the first of the rows; with PLORA_ROUND_RESIDUAL */
    int64_t residual_stride;
    struct plora__merge_draw draw; /* from the first of the rows on; with PLORA_ROUND_STOCHASTIC */
    float factor;
    const float *left;              /* packed, from this row on */
    const float *right;             /* packed */
    struct plora__merge_sums *sums; /* NULL = not wanted; effective_rank is left alone */
    int64_t *overflows;             /* as in plora__merge_args */
};

struct cpu_merge_kernels {
    int tile_rows, tile_columns, block_rows; /* block_rows, a multiple of tile_rows, is a good size for block() */
    int64_t (*depth)(int64_t rank);          /* floats that the packed forms take for each row or column, >= rank */
    /* packed[r * width + c] = source[c * stride + r * rank_stride], 0 for c in [count, width). */
    void (*pack)(const float *source, int64_t stride, int64_t rank_stride, int64_t rank, int64_t count, int64_t width,
                 float *packed);
    /* One row tile, and one column panel that is to meet a weight of this dtype, in the order that block() wants. */
    void (*pack_tile)(const float *source, int64_t stride, int64_t rank_stride, int64_t rank, int64_t count,
                      float *packed);
    void (*pack_panel)(const float *source, int64_t stride, int64_t rank_stride, int64_t rank, int64_t count,
                       int32_t dtype, float *packed);
    void (*block)(const struct cpu_merge_block *block);
    /* gram[i * rank + j] = sum_c x[i,c] x[j,c] over pack()ed panels, for rows i in [begin, begin + gram_rows) and
     * j >= begin, and their mirror images. */
    int gram_rows;
    void (*gram)(const float *panels, int64_t panel_count, int64_t rank, int64_t begin, double *gram);
    /* The largest bit pattern without its sign. */
    uint32_t (*magnitude)(const float *values, int64_t count);
};

extern const struct cpu_merge_kernels cpu_merge_kernels_portable;
extern const struct cpu_merge_kernels cpu_merge_kernels_avx2;
extern const struct cpu_merge_kernels cpu_merge_kernels_avx512;
extern const struct cpu_merge_kernels cpu_merge_kernels_amx;

/* The table of a level. */
const struct cpu_merge_kernels *cpu_merge_kernels(int isa);

/* The launchers below cpu_merge_workspace() and cpu_merge(), for a given table. */
size_t cpu_merge_workspace_with(const struct cpu_merge_kernels *kernels, const struct plora__merge_args *args);
void cpu_merge_with(const struct cpu_merge_kernels *kernels, int threads, const struct plora__merge_args *args);
void cpu_magnitudes_with(const struct cpu_merge_kernels *kernels, int threads,
                         const struct plora__magnitude_args *args);

#endif
