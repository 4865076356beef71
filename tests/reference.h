/* reference.h: the naive version of the linear operations, the specification that every backend is tested against.
 *
 *     y = x W^T + bias + s drop(x) A^T B^T,      x[T,K] W[N,K] A[R,K] B[N,R] y[T,N]
 *
 * Dense row-major doubles, one loop per sum, nothing rounded on the way. Every result is a sum of products, and comes with the
 * sum of their absolute values: that is what an error bound of the same sum in another precision is proportional to. */
#ifndef PLORA_TESTS_REFERENCE_H
#define PLORA_TESTS_REFERENCE_H

#include "plora.h"

struct reference_sum {
    double value, magnitude;
};

struct reference_linear {
    int64_t tokens, in_features, out_features; /* T, K, N */
    int64_t rank;                              /* 0 = no adapter */
    double scale;                              /* s */
    const double *x;                           /* [T,K] */
    const double *w;                           /* [N,K] */
    const double *bias;                        /* [N] or NULL */
    const double *a;                           /* [R,K] */
    const double *b;                           /* [N,R] */
    const double *mask;                        /* [T,K], 0 or 1 / (1 - p); NULL = no dropout */
};

/* base[T,N] = x W^T + bias, low[T,N] = s drop(x) A^T B^T. */
void reference_linear_forward(const struct reference_linear *linear, struct reference_sum *base,
                              struct reference_sum *low);

/* From dy[T,N]: base[T,K] = dy W, low[T,K] = drop'(s dy B A), da[R,K] and db[N,R]. */
void reference_linear_backward(const struct reference_linear *linear, const double *dy, struct reference_sum *base,
                               struct reference_sum *low, struct reference_sum *da, struct reference_sum *db);

/* mask[T,K] of a dropout position. */
void reference_dropout(double probability, uint64_t seed, uint64_t step, int32_t layer, uint64_t first_token,
                       int64_t tokens, int64_t in_features, double *mask);

/* The words of elements 0 .. count - 1 of a fresh A. */
void reference_init_words(uint64_t seed, uint64_t stage, int32_t layer, int64_t count, uint32_t *words);

/* A fresh A[R,K], Kaiming uniform with a = sqrt(5): U(-1/sqrt(K), 1/sqrt(K)). */
void reference_init_kaiming(uint64_t seed, uint64_t stage, int32_t layer, int64_t rank, int64_t in_features, double *a);

/* low[N] = s x A^T B^T of one token x[K] with the adapter of its own, x, a[R,K] and b[N,R] in fp32 or wider. */
void reference_batch_token(const double *x, const float *a, const float *b, double scale, int64_t rank,
                           int64_t in_features, int64_t out_features, struct reference_sum *low);

/* Element (i, j) of a quantised W[., columns] in fp32, each operation rounded once. int8: scales[., ceil(columns / group)]. */
float reference_int8(const int8_t *codes, const float *scales, int64_t columns, int64_t group, int64_t i, int64_t j);
/* NF4 as bitsandbytes lays it out: blocks of 64 elements in row order; nested_codes NULL: absmax is fp32, else 8 bits each, in blocks of
 * 256. */
float reference_nf4(const uint8_t *codes, const float *absmax, const uint8_t *nested_codes, const float *map,
                    float offset, int64_t columns, int64_t i, int64_t j);

/* A matrix (transposed if asked for) as dense doubles. */
void reference_load(const plora_matrix *matrix, int transposed, double *dense);

#endif
