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

#include "plora.h"

struct plora__dropout {
    double probability; /* 0 = none */
    uint64_t seed;
    uint64_t step;
    uint64_t first_token; /* the element index of x[t,k] is (first_token + t) * K + k */
    int32_t layer;
};

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

/* Fresh A of one adapter: out[i] for element i of [R,K]. */
struct plora__init_args {
    float *out;
    int64_t count; /* R * K */
    int32_t init;  /* PLORA_INIT_... */
    int32_t layer;
    float scale; /* 1 / sqrt(K): the bound of the uniform, the standard deviation of the Gaussian */
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
    struct plora__merge_sums *sums; /* NULL = no report */
    /* Not NULL: a trial. W stays as it is, and this becomes the number of finite elements of W that the merge would make
     * infinite or NaN. */
    int64_t *overflows;
    void *workspace; /* 64-byte aligned, merge_workspace() bytes */
};

/* Sums over the elements of one weight, with d = the wanted update and g = W' - W. */
struct plora__merge_sums {
    double dd, gd, ww;     /* sum d^2, g d, W^2 */
    double changed;        /* number of elements whose bits changed */
    double lost_max;       /* max |d - g| */
    double effective_rank; /* of left right: (sum sigma^2)^2 / sum sigma^4, 0 when it is 0 */
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
    size_t (*merge_workspace)(void *device, const struct plora__merge_args *args);
    plora_status (*merge)(void *device, const struct plora__merge_args *args, void *stream);
};

/* The table of PLORA_BACKEND_..., or NULL for an unknown number. */
const struct plora_backend *plora__backend(int32_t backend);

extern const struct plora_backend plora__cpu_backend;

#endif
