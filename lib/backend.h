/* backend.h: the seam between the library and the machine.
 *
 *     public call -> check once, fill an argument struct -> plora_backend table -> launcher -> kernel
 *
 * One table per backend (cpu/cpu_backend.c; CUDA's in cuda/), listed in backends.c. Compute entries take raw pointers and
 * shapes that were already checked, enqueue on `stream`, and never allocate or wait: what they need beyond their operands is in
 * `workspace`, and what they find out is written to memory of the device, from where the caller copies it when it wants to wait.
 * Handles stop above this line. The naive version of each operation, which both backends are tested against, is in
 * tests/reference.c. All pointers are memory of the backend's device unless said otherwise. */
#ifndef PLORA_BACKEND_H
#define PLORA_BACKEND_H

#include "host_device.h"
#include "plora.h"

struct plora__dropout {
    double probability; /* 0 = none */
    uint64_t seed;
    uint64_t step;
    uint64_t first_token;
    int32_t layer;
    int64_t first_column,
        row_elements; /* of the whole layer, where x is columns of a longer row: 0 and K of one that is whole */
};

/* The number of x[token, column] among the elements that the mask is drawn for, modulo 2^64. */
static inline uint64_t plora__dropout_element(const struct plora__dropout *dropout, int64_t token, int64_t column)
{
    return (dropout->first_token + (uint64_t)token) * (uint64_t)dropout->row_elements +
           (uint64_t)(dropout->first_column + column);
}

/* One linear layer with at most one adapter. Without: rank = 0 and a, b, gradients NULL. */
struct plora__linear_args {
    int64_t tokens, in_features, out_features; /* T, K, N */
    int64_t rank;
    float scale;
    int32_t fan_in_fan_out; /* weight is [K,N] */
    int32_t delta_only;     /* no base product; add to y (dx) */
    int32_t accumulate;     /* backward: add to dx */
    int32_t bias_dtype;
    plora_matrix weight;
    /* Not NULL: W is this, dequantised panel by panel; weight has its shape, no data, and the dtype of x, to which panels are rounded where
     * the product is one of bf16. */
    const struct plora__quantised *quantised;
    const void *bias;  /* [N] or NULL */
    const float *a;    /* [R,K] */
    const float *b;    /* [N,R] */
    float *a_gradient; /* += */
    float *b_gradient; /* += */
    struct plora__dropout dropout;
    plora_matrix x;  /* [T,K] */
    plora_matrix y;  /* [T,N]; dy in the backward */
    plora_matrix dx; /* [T,K]; data NULL = not wanted */
    void *workspace; /* 64-byte aligned, linear_workspace() bytes for `tokens` */
};

/* Fresh A of one adapter: out[rows, columns], whose (r, k) is element first_element + r * row_elements + k of the whole [R,K]. */
struct plora__init_args {
    float *out;
    int64_t rows, columns;
    int64_t first_element, row_elements;
    int32_t init; /* PLORA_INIT_... */
    int32_t layer;
    float scale; /* 1 / sqrt(K) of the whole: the bound of the uniform, the standard deviation of the Gaussian */
    uint64_t seed;
    uint64_t stage;
};

/* A run of parameters with one learning rate; the arena is cut into such segments (LoRA+: A and B differ). */
struct plora__segment {
    int64_t begin, end;
    int32_t is_b;
    int32_t reserved;
};

/* What a step leaves behind. */
struct plora__step_state {
    double norm;     /* of the scaled gradients; inf or NaN when one of them is */
    int64_t refused; /* += 1 when it is: then nothing else was changed */
};

struct plora__step_args {
    int32_t algorithm;
    int32_t segment_count;
    int64_t count;
    float *parameters;
    const float *gradients;
    float *first_moment;
    float *second_moment;                  /* NULL for SGD */
    const struct plora__segment *segments; /* they cover [0, count) in order */
    struct plora__step_state *state;
    double learning_rate[2]; /* of A, of B */
    double weight_decay, beta1, beta2, epsilon;
    double bias_correction1, bias_correction2; /* 1 - beta^t */
    double gradient_scale;
    double max_norm; /* 0 = no clipping; else the gradients are scaled down to it */
    void *workspace; /* 64-byte aligned, step_workspace() bytes, zero before the first step */
};

/* The largest |value| of each segment of an arena, +inf when one is inf or NaN. */
struct plora__magnitude_args {
    const float *values;
    const struct plora__segment *segments;
    double *magnitudes; /* [segment_count] */
    int32_t segment_count;
};

/* The random numbers of a stochastic rounding (rounding.h): W(i, j) takes that of element first_element + i * row_elements + j. */
struct plora__merge_draw {
    uint64_t seed, stage;
    int64_t first_element, row_elements;
    int32_t layer;
};

/* What is done of a merge: all; some rows of a weight, whose sums have no effective rank; or nothing but sums->effective_rank. */
enum { PLORA__MERGE_WHOLE, PLORA__MERGE_ROWS, PLORA__MERGE_RANK };

/* W += m s B A on one weight, seen as W[rows, columns] += factor * left[rows, R] right[R, columns]:
 * left = B, right = A, or with fan_in_fan_out left = A^T, right = B^T. The sum is formed in fp32 and rounded once. */
struct plora__merge_args {
    plora_matrix weight;
    int64_t rank;
    float factor; /* m s */
    int32_t rounding;
    const float *left;
    int64_t left_row_stride, left_rank_stride; /* left(i, r) = left[i * left_row_stride + r * left_rank_stride] */
    const float *right;
    int64_t right_rank_stride, right_column_stride;
    /* PLORA_ROUND_STOCHASTIC and PLORA_ROUND_RESIDUAL, for W in 16 bits. */
    struct plora__merge_draw draw;
    uint16_t *residual; /* the low halves of W, [rows, columns] */
    int64_t residual_stride;
    struct plora__merge_sums *sums; /* NULL = no report */
    int32_t part;                   /* PLORA__MERGE_...; on CUDA WHOLE */
    /* Not NULL: a trial. W stays as it is, and this becomes the number of finite elements of W that the merge would make
     * infinite or NaN. */
    int64_t *overflows;
    void *workspace; /* 64-byte aligned, merge_workspace() bytes */
};

/* Sums over the elements of one weight, with d = the wanted update and g = W' - W, residuals included. */
struct plora__merge_sums {
    double dd, gd, ww;     /* sum d^2, g d, W^2 */
    double ll;             /* sum (d - g)^2 */
    double changed;        /* number of elements whose bits changed */
    double lost_max;       /* max |d - g| */
    double effective_rank; /* of left right: (sum sigma^2)^2 / sum sigma^4, 0 when it is 0 */
};

/* One adapter of a batch, at one weight. */
struct plora__batch_slot {
    const float *a; /* [R,K] */
    const float *b; /* [N,R] */
    int32_t rank;   /* 0 = nothing to add */
    float scale;
    const float *panels; /* B as batch_pack() lays it out, or NULL */
};

/* Neighbours in the list of a batch's tokens that belong to one adapter. */
struct plora__batch_segment {
    int32_t slot; /* number of the adapter; -1 = nothing to add */
    int32_t first, count;
    int32_t tile; /* by plora__batch_cut() */
};

/* One of the layers that see the same x. */
struct plora__batch_target {
    int32_t weight;       /* adapters[slot][weight] is what belongs to it */
    int32_t max_rank;     /* of the adapters that the segments name, at this weight, at least */
    int64_t out_features; /* N */
    plora_matrix y;       /* [.,N], F32 or BF16 */
};

/* y[t] += s (x[t] A^T) B^T for every target, with the adapter of each token t in a list of them; other rows of y stay as they are. What
 * comes out for a token has the same bits whatever else is in the batch. */
struct plora__batch_args {
    int64_t tokens;      /* in the list */
    int64_t in_features; /* K */
    int32_t segment_count;
    int32_t tiles;                             /* what plora__batch_cut() returned */
    int32_t target_count;                      /* 1 .. PLORA__BATCH_TARGETS */
    const struct plora__batch_target *targets; /* host memory */
    /* What kernels read: device memory. */
    const struct plora__batch_segment *segments; /* they cover [0, tokens) of the list, cut */
    const struct plora__batch_slot *const *adapters;
    const int32_t *list; /* [tokens] rows of x and y, each at most once; NULL = 0, 1, 2 ... */
    plora_matrix x;      /* [.,K], F32 or BF16 */
    void *workspace;     /* 64-byte aligned, batch_workspace() bytes */
};

enum { PLORA__BATCH_TARGETS = 8 };

/* Segments are worked on in tiles of PLORA__BATCH_TILE tokens: notes in each how many tiles there are before it, and returns how many
 * there are. To be called on the host, before the segments are copied to the device. */
enum { PLORA__BATCH_TILE = 64 };

static inline int32_t plora__batch_cut(struct plora__batch_segment *segments, int32_t count)
{
    int32_t tiles = 0;
    for (int32_t i = 0; i < count; ++i) {
        segments[i].tile = tiles;
        if (segments[i].slot >= 0) tiles += (segments[i].count + PLORA__BATCH_TILE - 1) / PLORA__BATCH_TILE;
    }
    return tiles;
}

/* The segment that has a tile. */
PLORA__HOST_DEVICE static inline int32_t plora__batch_find(const struct plora__batch_segment *segments, int32_t count,
                                                           int32_t tile)
{
    int32_t low = 0, high = count - 1; /* the last one that has no more tiles before it */
    while (low < high) {
        const int32_t middle = low + (high - low + 1) / 2;
        if (segments[middle].tile <= tile)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* A quantised W[rows, columns], every value a code times a scale.
 *
 *     INT8   W(i,j) = codes[i * columns + j] * scales[i * ceil(columns / group) + j / group]
 *     NF4    W(i,j) = nf4(e) * absmax(e / 64), e = i * columns + j; the four bits of element e are in byte e / 2, the upper half when e
 *            is even; nf4.h has the 16 values. The layout is that of bitsandbytes.
 *            absmax(b) = scales[b], or doubly quantised, map[nested_codes[b]] * scales[b / 256] + offset
 *
 * Each product and each sum is rounded to fp32: the same bits on every backend. */
enum { PLORA__QUANTISED_INT8, PLORA__QUANTISED_NF4 };
enum { PLORA__NF4_BLOCK = 64, PLORA__NF4_NESTED_BLOCK = 256 };

struct plora__quantised {
    int32_t format;
    float offset; /* of the absmax, when doubly quantised */
    int64_t rows, columns;
    int64_t group;               /* INT8: columns that share a scale; `columns` = one scale a row */
    const void *codes;           /* int8_t or nibbles */
    const float *scales;         /* see above */
    const uint8_t *nested_codes; /* of the absmax, NULL when it is not quantised itself */
    const float *map;            /* [256] */
};

/* A panel of it, from (first_row, first_column) on. */
struct plora__dequantise_args {
    struct plora__quantised weight;
    int64_t first_row, first_column;
    plora_matrix out; /* the panel, F32 or BF16 (rounded once more) */
};

/* How far quantised values are from what they stand for. */
struct plora__quantise_sums {
    double square, max; /* sum and largest of |value - W| */
};

/* Makes the codes of a run of elements, in host memory, whatever the context's device: full-precision masters lie there.
 *
 *     INT8   scale = max|W| / 127 of the group, code = W / scale rounded to nearest, ties to even
 *     NF4    absmax = max|W| of 64, code = the value nearest to W * (1 / absmax) (nf4.h); 0 where absmax is 0.
 *            Doubly quantised: with d = absmax - offset, scale = max|d| of 256, nested code = the nearest of `map` to
 *            d * (1 / scale), halfway the lower; 0 where scale is 0. Both are bitsandbytes' rules.
 *
 * Each operation is rounded to fp32. W must be finite. */
enum { PLORA__QUANTISE_UNIT = PLORA__NF4_BLOCK * PLORA__NF4_NESTED_BLOCK, PLORA__QUANTISE_UNITS = 64 };

struct plora__quantise_args {
    plora_matrix values; /* W, F32, BF16 or F16 */
    int32_t format;
    float offset;
    int64_t group;
    const float *map; /* [256] rising; NULL = not doubly quantised */
    /* In elements, row after row. INT8: whole rows, at most UNITS times those that fit into a UNIT. NF4: at most UNITS * UNIT, of which
     * the first begins a block (and one of 256 blocks). */
    int64_t first, count;
    void *codes; /* of the run, as are the others; of an odd number of nibbles the last half byte is 0 */
    float *scales;
    uint8_t *nested_codes;
    struct plora__quantise_sums *sums; /* of the run, or NULL */
};

/* The host memory of a context, for what a backend keeps on the host: 64-byte aligned, counted in plora_memory_stats(). */
struct plora__host_memory {
    plora_status (*allocate)(void *owner, size_t bytes, void **memory);
    void (*release)(void *owner, void *memory, size_t bytes);
    void *owner;
};

struct plora_backend {
    const char *name;
    int32_t asynchronous; /* 0: every call is complete when it returns */

    /* device is the backend's own state. On failure the message names the cause. */
    plora_status (*open)(const plora_context_options *options, const struct plora__host_memory *memory, void **device);
    void (*close)(void *device);

    plora_status (*allocate)(void *device, size_t bytes, void **memory); /* 64-byte aligned, not cleared */
    void (*release)(void *device, void *memory, size_t bytes);
    /* In any direction. */
    plora_status (*copy)(void *device, void *destination, const void *source, size_t bytes, void *stream);
    plora_status (*clear)(void *device, void *memory, size_t bytes, void *stream);
    /* Waits for the stream, NULL = for all work of the device. */
    plora_status (*synchronize)(void *device, void *stream);
    /* Whether calls may be put on the stream; with `waits`, calls that wait for it, or that a CUDA graph could not repeat. */
    plora_status (*check_stream)(void *device, void *stream, int waits);

    plora_status (*init_adapter)(void *device, const struct plora__init_args *args, void *stream);

    /* Only shapes and dtypes are read. */
    size_t (*linear_workspace)(void *device, const struct plora__linear_args *args);
    plora_status (*linear_forward)(void *device, const struct plora__linear_args *args, void *stream);
    plora_status (*linear_backward)(void *device, const struct plora__linear_args *args, void *stream);

    /* Only `count` is read. */
    size_t (*step_workspace)(void *device, const struct plora__step_args *args);
    plora_status (*optimizer_step)(void *device, const struct plora__step_args *args, void *stream);
    /* values *= factor */
    plora_status (*scale)(void *device, float *values, int64_t count, float factor, void *stream);

    plora_status (*magnitudes)(void *device, const struct plora__magnitude_args *args, void *stream);
    /* Only shapes, strides and dtype are read: it is enough for every rounding. */
    size_t (*merge_workspace)(void *device, const struct plora__merge_args *args);
    plora_status (*merge)(void *device, const struct plora__merge_args *args, void *stream);

    /* As copy, of a few whole 4-byte words of host memory that may be used again at once, and without waiting for the device. */
    plora_status (*write)(void *device, void *destination, const void *source, size_t bytes, void *stream);
    /* Only tokens, K and the targets' max_rank are read; it grows with each of them. */
    size_t (*batch_workspace)(void *device, const struct plora__batch_args *args);
    plora_status (*batch_forward)(void *device, const struct plora__batch_args *args, void *stream);
    /* B[N,R] once more, in the order that batch_forward() reads it, so that it need not be turned round in each batch: the same bits come
     * out. The number of floats, and the copy, 64-byte aligned. NULL where B is read as it is. */
    int64_t (*batch_panel_count)(int64_t out_features, int64_t rank);
    void (*batch_pack)(const float *b, int64_t out_features, int64_t rank, float *panels);
    plora_status (*dequantise)(void *device, const struct plora__dequantise_args *args, void *stream);
    plora_status (*quantise)(void *device, const struct plora__quantise_args *args); /* CPU only */
};

/* The table of PLORA_BACKEND_..., or NULL for an unknown number. */
const struct plora_backend *plora__backend(int32_t backend);

extern const struct plora_backend plora__cpu_backend;
extern const struct plora_backend plora__cuda_backend; /* not in a build without CUDA */

#endif
