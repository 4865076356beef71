/* batch_kernels.h: the kernels under cpu_batch.c, one table per instruction level (isa.h). The order of a token's sums
 * depends on K and R alone: not on the other tokens, nor on how many there are. */
#ifndef PLORA_CPU_BATCH_KERNELS_H
#define PLORA_CPU_BATCH_KERNELS_H

#include "backend.h"

/* Tokens of one slot, and the rows of a matrix that are theirs. */
struct cpu_batch_rows {
    const int32_t *list; /* NULL = first, first + 1 ... */
    int64_t first, count;
};

/* What x is multiplied with, and where the result goes. */
struct cpu_batch_part {
    const struct plora__batch_slot *slot;
    float *low;
    int64_t low_stride;
};

struct cpu_batch_kernels {
    int panel_columns; /* of B at a time */
    /* panels[column * rank + r * panel_columns + i] = b[(column + i) * rank + r], column a multiple of panel_columns; zeros behind N. */
    void (*pack)(const float *b, int64_t rank, int64_t out_features, float *panels);
    /* For each part: low[i * low_stride + r] = scale * sum_k x[row i, k] a[r * K + k] */
    void (*shrink)(const plora_matrix *x, const struct cpu_batch_rows *rows, const struct cpu_batch_part *parts,
                   int32_t part_count);
    /* y[row i, n] += sum_r low[i * low_stride + r] b[n * R + r] for begin <= n < end; begin is a multiple of
     * panel_columns; panel: room for as many panels as cover them, for a slot without panels of its own. */
    void (*expand)(const plora_matrix *y, const struct cpu_batch_rows *rows, const struct plora__batch_slot *slot,
                   const float *low, int64_t low_stride, int64_t begin, int64_t end, float *panel);
};

extern const struct cpu_batch_kernels cpu_batch_kernels_portable;
extern const struct cpu_batch_kernels cpu_batch_kernels_avx2;
extern const struct cpu_batch_kernels cpu_batch_kernels_avx512;
extern const struct cpu_batch_kernels cpu_batch_kernels_amx;

/* The table of a level, and the launchers below cpu_batch_workspace() and cpu_batch_forward() for it. */
const struct cpu_batch_kernels *cpu_batch_kernels(int isa);
size_t cpu_batch_workspace_with(const struct cpu_batch_kernels *kernels, int threads,
                                const struct plora__batch_args *args);
void cpu_batch_forward_with(const struct cpu_batch_kernels *kernels, int threads, const struct plora__batch_args *args);

#endif
