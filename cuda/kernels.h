/* kernels.h: what the launchers (cuda_<noun>.c, C) and the kernels (<noun>.cu, CUDA C++) share: the list of the kernels, and for
 * each family the one struct that its kernels take by value:
 *
 *     extern "C" __global__ void merge_bf16_kernel(const __grid_constant__ struct merge_params p)
 *     cuda_launch(device, CUDA_KERNEL_MERGE_BF16, grid, block, shared_bytes, &params, stream)
 *
 * Pointers in the structs are device memory. Nothing of the runtime is included here. */
#ifndef PLORA_CUDA_KERNELS_H
#define PLORA_CUDA_KERNELS_H

#include <stdint.h>

/* X(ID, file, function): the kernel CUDA_KERNEL_<ID> is `function` of <file>.cu. */
#define CUDA_KERNEL_LIST(X)                                                                                            \
    CUDA_INIT_KERNELS(X)                                                                                               \
    CUDA_OPTIMIZER_KERNELS(X)                                                                                          \
    CUDA_MERGE_KERNELS(X)                                                                                              \
    CUDA_LINEAR_KERNELS(X)                                                                                             \
    CUDA_BATCH_KERNELS(X)                                                                                              \
    CUDA_DEQUANTISE_KERNELS(X)

/* ----------------------------------------------------------------------------------------------------- init (init.cu) */

#define CUDA_INIT_KERNELS(X)                                                                                           \
    X(INIT_UNIFORM, init, init_uniform_kernel)                                                                         \
    X(INIT_GAUSSIAN, init, init_gaussian_kernel)

struct init_params {
    float *out; /* [., columns]; a row for each blockIdx.y */
    int64_t columns;
    int64_t first_element, row_elements; /* as in plora__init_args */
    uint64_t seed, stage;
    float scale;
    int32_t layer;
};

enum { INIT_THREADS = 256 }; /* a block draws 4 * INIT_THREADS elements */

/* ------------------------------------------------------------------------------------------- optimizer (optimizer.cu) */

#define CUDA_OPTIMIZER_KERNELS(X)                                                                                      \
    X(GRADIENT_NORM, optimizer, gradient_norm_kernel)                                                                  \
    X(ADAMW, optimizer, adamw_kernel)                                                                                  \
    X(SGD, optimizer, sgd_kernel)                                                                                      \
    X(SCALE, optimizer, scale_kernel)

struct plora__segment;
struct plora__step_state;

/* The step's workspace: what the norm's launch tells the update's. Zero before the first step. */
struct optimizer_scratch {
    uint32_t blocks_done; /* 0 between launches */
    int32_t refused;      /* 1: the update changes nothing */
    float factor;         /* on each gradient: scale, clipped */
    uint32_t reserved[13];
    double sums[]; /* one of each block of the norm */
};

struct gradient_norm_params {
    const float *gradients; /* [count], 16-byte aligned */
    int64_t count;
    struct optimizer_scratch *scratch;
    struct plora__step_state *state;
    double gradient_scale, max_norm;
};

/* The factors of one segment's update, of A or of B. */
struct optimizer_rates {
    float decay; /* 1 - lr * weight decay */
    float rate;  /* lr; AdamW: / (1 - beta1^t) */
};

struct optimizer_params {
    float *parameters; /* this and the next three: [count], 16-byte aligned */
    const float *gradients;
    float *first_moment;
    float *second_moment; /* NULL for SGD */
    int64_t count;
    const struct plora__segment *segments; /* each begins at a multiple of 4 */
    const struct optimizer_scratch *scratch;
    struct optimizer_rates rates[2];            /* of A, of B */
    float beta1, beta1_rest, beta2, beta2_rest; /* rest = 1 - beta */
    float root;                                 /* 1 / sqrt(1 - beta2^t) */
    float epsilon;
    int32_t segment_count;
};

struct scale_params {
    float *values; /* [count], 16-byte aligned */
    int64_t count;
    float factor;
};

enum {
    OPTIMIZER_THREADS = 256,
    OPTIMIZER_TILE = 4096, /* elements of one block of an update */
    NORM_BLOCKS_MAX = 1024
};

/* ----------------------------------------------------------------------------------------- merge (merge.cu, report.cu) */

#define CUDA_MERGE_KERNELS(X)                                                                                          \
    X(MERGE_F32, merge, merge_f32_kernel)                                                                              \
    X(MERGE_BF16, merge, merge_bf16_kernel)                                                                            \
    X(MERGE_F16, merge, merge_f16_kernel)                                                                              \
    X(MERGE_REPORT_F32, merge, merge_report_f32_kernel)                                                                \
    X(MERGE_REPORT_BF16, merge, merge_report_bf16_kernel)                                                              \
    X(MERGE_REPORT_F16, merge, merge_report_f16_kernel)                                                                \
    X(MERGE_ROUNDED_BF16, merge, merge_rounded_bf16_kernel)                                                            \
    X(MERGE_ROUNDED_F16, merge, merge_rounded_f16_kernel)                                                              \
    X(MERGE_ROUNDED_REPORT_BF16, merge, merge_rounded_report_bf16_kernel)                                              \
    X(MERGE_ROUNDED_REPORT_F16, merge, merge_rounded_report_f16_kernel)                                                \
    X(MERGE_TOTAL, report, merge_total_kernel)                                                                         \
    X(GRAM, report, gram_kernel)                                                                                       \
    X(GRAM_SUM, report, gram_sum_kernel)                                                                               \
    X(GRAM_TRACE, report, gram_trace_kernel)                                                                           \
    X(MAGNITUDES, report, magnitudes_kernel)

struct plora__merge_sums;

enum {
    MERGE_THREADS = 256,
    MERGE_TILE_COLUMNS = 128,
    MERGE_TILE_BYTES = 32768, /* of W in one block */
    GRAM_TILE = 16,           /* a block computes 16 x 16 elements of a Gram matrix, one in a thread */
    MERGE_RANK_MAX = 16384,
    GRAM_CHUNK = 64,    /* rows of left (columns of right) that it has in shared memory */
    GRAM_SLICE = 512,   /* and those that it goes through, where there are blocks enough */
    GRAM_BLOCKS = 1024, /* of one matrix, about */
    MAGNITUDE_THREADS = 1024
};

/* What a block of the merge tells the report, and the trial. */
struct merge_partial {
    double dd, gd, ww, ll, changed, lost_max; /* as in plora__merge_sums */
    double overflows;                         /* as in plora__merge_args */
};

struct merge_params {
    void *weight; /* [rows, columns], `stride` elements between rows */
    int64_t rows, columns, stride;
    const float *left, *right; /* as in plora__merge_args */
    int64_t left_row_stride, left_rank_stride, right_rank_stride, right_column_stride;
    struct merge_partial *partials; /* one a block; of the report's kernels */
    float factor;
    int32_t rank;
    uint32_t panels; /* tiles side by side */
    int32_t aligned; /* the rows of W, and of the residual, begin at multiples of 16 bytes */
    int32_t trial;   /* W is not written */
    /* As in plora__merge_args: of the kernels that round otherwise than to nearest. */
    int32_t rounding, layer;
    uint64_t seed, stage;
    int64_t first_element, row_elements;
    uint16_t *residual;
    int64_t residual_stride;
};

/* tr M and tr M^2 of one tile of M = (left^T left) (right right^T). */
struct gram_traces {
    double trace, trace_square;
};

struct merge_total_params {
    const struct merge_partial *partials;
    int64_t partial_count;
    const struct gram_traces *traces;
    int64_t trace_count;
    struct plora__merge_sums *sums; /* or NULL */
    int64_t *overflows;             /* or NULL */
};

/* Both Gram matrices: side 0 is left^T left, side 1 right right^T. vector[side](c, r) = vector[c * stride + r * rank_stride]. */
struct gram_params {
    const float *vectors[2];
    int64_t stride[2], rank_stride[2], count[2];
    int64_t slice[2];           /* of c, for each block */
    int32_t slices[2];          /* <= gridDim.y */
    double *grams[2];           /* [slices][rank][rank]; gram_sum_kernel leaves the sum in the first */
    struct gram_traces *traces; /* of gram_trace_kernel, one a block */
    int32_t rank;
};

struct magnitudes_params {
    const float *values;
    const struct plora__segment *segments;
    double *magnitudes;
};

/* ------------------------------------------------------------- linear (convert.cu, shrink.cu, expand.cu, gradient.cu) */

#define CUDA_LINEAR_KERNELS(X)                                                                                         \
    X(WIDEN, convert, widen_kernel)                                                                                    \
    X(PACK_F32, convert, pack_f32_kernel)                                                                              \
    X(PACK_BF16, convert, pack_bf16_kernel)                                                                            \
    X(REDUCE_F32, convert, reduce_f32_kernel)                                                                          \
    X(REDUCE_BF16, convert, reduce_bf16_kernel)                                                                        \
    X(SHRINK_F32, shrink, shrink_f32_kernel)                                                                           \
    X(SHRINK_BF16, shrink, shrink_bf16_kernel)                                                                         \
    X(EXPAND_F32, expand, expand_f32_kernel)                                                                           \
    X(EXPAND_BF16, expand, expand_bf16_kernel)                                                                         \
    X(GRADIENT_F32, gradient, gradient_f32_kernel)                                                                     \
    X(GRADIENT_BF16, gradient, gradient_bf16_kernel)

enum {
    LINEAR_TILE = 64,          /* tokens, columns or ranks of one tile */
    LINEAR_BLOCK = 128,        /* tokens (of a gradient: columns) of a block of a bf16 kernel: two tiles */
    LINEAR_TILE_THREADS = 128, /* of a block of a bf16 kernel */
    LINEAR_FMA_THREADS = 256,  /* of a block of an fp32 kernel */
    LINEAR_FMA_RANKS = 32,     /* ranks of a block of the batch's fp32 shrink kernel */
    LINEAR_FMA_STEP = 32,      /* terms of the sums that it takes at once */
    LINEAR_RANK_PAD = 16,      /* padded_rank is a multiple of it */
    CONVERT_THREADS = 128,
    PACK_TILE = 32
};

struct linear_dropout {
    uint64_t seed, step;
    uint64_t first_element, row_elements; /* x[t,k] is element first_element + t * row_elements + k */
    uint32_t threshold;                   /* plora__dropout_threshold() */
    float scale;                          /* 1 / (1 - probability) */
    int32_t layer;
    int32_t active;
};

/* out[rows, columns] = in, widened to fp32. A block converts 4 * CONVERT_THREADS numbers of one row. */
struct widen_params {
    const void *in;
    float *out; /* 16-byte aligned rows of a multiple of 4 numbers */
    int64_t in_stride, out_stride, rows, columns;
    int32_t dtype;
    int32_t aligned; /* four numbers of `in` may be read at once */
};

/* A and B as [padded_rank, columns], columns a multiple of LINEAR_TILE, zeros behind the end; in fp32 or bf16. A block writes
 * PACK_TILE x PACK_TILE numbers; the first a_blocks are A's. */
struct pack_params {
    const float *a; /* [R,K] */
    const float *b; /* [N,R] */
    void *packed_a, *packed_b;
    int64_t rank, in_features, out_features, a_columns, b_columns;
    int32_t padded_rank;
    uint32_t a_blocks;
};

/* out[i] = scale * sum over s of partials[s * count + i], + out[i] where accumulated. */
struct reduce_job {
    const float *partials;
    void *out;
    int64_t count;
    int32_t splits;
    uint32_t blocks;
};
struct reduce_params {
    struct reduce_job jobs[2]; /* the blocks of the first, then those of the second */
    float scale;
    int32_t accumulate;
};

/* partials[split, T, padded_rank] of in[T,D] factor^T[D, padded_rank]. */
struct shrink_job {
    const void *in;
    const void *factor; /* packed */
    float *partials;
    int64_t stride, factor_stride, columns; /* of in; columns = D */
    int32_t dtype, aligned, drop;
    int32_t split_columns; /* of one block, a multiple of LINEAR_TILE */
};
struct shrink_params {
    struct shrink_job jobs[2];
    uint32_t first_blocks; /* of job 0 */
    int32_t padded_rank;
    int64_t tokens;
    struct linear_dropout dropout;
};

/* partials[split] of low^T[R,T] in[T,D], each laid out as the gradient: element (r, d) at r * rank_stride + d * column_stride. */
struct gradient_job {
    const void *in;
    const void *low; /* [T, padded_rank] */
    float *partials;
    int64_t stride, columns, rank_stride, column_stride;
    int32_t dtype, aligned, drop;
    int32_t split_tokens; /* of one block, a multiple of LINEAR_TILE */
};
struct gradient_params {
    struct gradient_job jobs[2];
    uint32_t first_blocks; /* of job 0 */
    int32_t padded_rank;
    int64_t rank, tokens;
    struct linear_dropout dropout;
};

/* out[T,O] = (keep_out ? out : 0) + sum + bias + drop(low factor), rounded once. */
struct expand_params {
    void *out;
    const float *sum;   /* NULL = 0 */
    const void *bias;   /* [O], NULL = 0 */
    const void *low;    /* [T, padded_rank] */
    const void *factor; /* packed, from the first column on */
    int64_t stride, sum_stride, factor_stride, tokens, columns;
    int64_t first_column; /* of the elements whose dropout is drawn */
    int32_t dtype, aligned, keep_out, bias_dtype;
    int32_t padded_rank; /* 0 = no low-rank part */
    int32_t drop;
    struct linear_dropout dropout;
};

/* -------------------------------------------------------------------------------------------------- batch (batch.cu) */

#define CUDA_BATCH_KERNELS(X)                                                                                          \
    X(BATCH_SHRINK_F32, batch, batch_shrink_f32_kernel)                                                                \
    X(BATCH_SHRINK_BF16, batch, batch_shrink_bf16_kernel)                                                              \
    X(BATCH_EXPAND_F32, batch, batch_expand_f32_kernel)                                                                \
    X(BATCH_EXPAND_BF16, batch, batch_expand_bf16_kernel)                                                              \
    X(BATCH_WRITE, batch, batch_write_kernel)

struct plora__batch_segment;
struct plora__batch_slot;

enum { BATCH_SPLIT = 512 }; /* columns of x that one block sums over */

/* low[split][token of the list][low_stride] of x A^T, and y += scale (sum over the splits) B^T. */
struct batch_params {
    const void *x;
    void *y;
    const struct plora__batch_segment *segments;
    const struct plora__batch_slot *const *adapters;
    const int32_t *list; /* or NULL */
    float *low;
    int64_t x_stride, y_stride, in_features, out_features, tokens;
    int32_t segment_count, tiles;
    int32_t low_stride; /* a multiple of LINEAR_RANK_PAD, at least the rank of every slot */
    int32_t splits;     /* ceil(in_features / BATCH_SPLIT) */
    int32_t x_dtype, y_dtype, x_aligned, y_aligned;
    int32_t weight; /* adapters[slot][weight] */
};

/* to[i] = words[i]. A kernel's arguments may take 4 KB in all. */
enum { BATCH_WRITE_WORDS = 1000, BATCH_WRITE_THREADS = 256 };

struct batch_write_params {
    uint32_t *to;
    int32_t count;
    uint32_t words[BATCH_WRITE_WORDS];
};

/* ------------------------------------------------------------------------------------------- dequantise (dequantise.cu) */

#define CUDA_DEQUANTISE_KERNELS(X)                                                                                     \
    X(DEQUANTISE_INT8, dequantise, dequantise_int8_kernel)                                                             \
    X(DEQUANTISE_NF4, dequantise, dequantise_nf4_kernel)

enum { DEQUANTISE_THREADS = 128, DEQUANTISE_RUN = 8 }; /* a thread makes DEQUANTISE_RUN neighbours of a row */

/* As in plora__dequantise_args. */
struct dequantise_params {
    const void *codes;
    const float *scales;
    const uint8_t *nested_codes;
    const float *map;
    void *out;
    int64_t all_columns; /* of W */
    int64_t first_row, first_column, rows, columns, stride;
    int64_t group, groups; /* INT8: columns of a scale, scales of a row */
    float offset;
    int32_t dtype, aligned; /* aligned: a run of `out` may be written at once */
    float values[16];       /* of NF4 */
};

/* -------------------------------------------------------------------------------------------------- end of the sections */

enum cuda_kernel {
#define CUDA_KERNEL_ENUM(id, file, function) CUDA_KERNEL_##id,
    CUDA_KERNEL_LIST(CUDA_KERNEL_ENUM)
#undef CUDA_KERNEL_ENUM
        CUDA_KERNEL_COUNT
};

#endif
