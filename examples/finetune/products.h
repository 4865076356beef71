/* products.h: small single-threaded matrix products by oneDNN, for attention: c = a b, or c += a b. Each operand has a row
 * stride and may be seen transposed, so that no operand is ever copied. Made once per shape; may be run by several threads at
 * once, each under its own number. */
#ifndef FINETUNE_PRODUCTS_H
#define FINETUNE_PRODUCTS_H

#include <stdint.h>

struct product_shape {
    int64_t m, n, k;
    int64_t a_stride, b_stride, c_stride; /* of the rows in memory, in elements */
    int32_t a_transposed, b_transposed;   /* the memory holds a as [k,m], b as [n,k] */
    int32_t dtype;                        /* of a and b: PLORA_F32 or PLORA_BF16; c is fp32 */
    int32_t accumulate;
};

struct product;

int product_create(const struct product_shape *shape, int threads, struct product **product);
void product_destroy(struct product *product);
/* 0, or -1 when oneDNN failed. */
int product_run(struct product *product, int thread, const void *a, const void *b, float *c);

#endif
