/* product.h: C[m,n] (+)= A[m,k] B[k,n] (+ bias[n]) by oneDNN. The only users of dnnl.h are this file and product.c.
 *
 * Making a primitive compiles code (about 0.25 ms), so they are cached by shape, strides and types. Primitives are made for one
 * thread (`sequential`: to be run inside a parallel region) or for all threads of the device. oneDNN's scratch memory is ours:
 * it is grown when a primitive is made, one slot per thread, so that running allocates nothing and any thread may run.
 * The caller holds cpu_device.lock from prepare to the last run. */
#ifndef PLORA_CPU_PRODUCT_H
#define PLORA_CPU_PRODUCT_H

#include "cpu_backend.h"

struct cpu_matrix {
    void *data;
    int64_t row_stride, column_stride; /* in elements; one of them is 1 */
    int32_t dtype;                     /* F32 or BF16 */
};

struct cpu_product {
    int64_t m, n, k;
    struct cpu_matrix a, b, c; /* c.column_stride is 1 */
    const float *bias;         /* [n] or NULL */
    int accumulate;            /* C += instead of C = */
};

struct cpu_primitive;

plora_status cpu_products_create(struct cpu_device *cpu);
void cpu_products_destroy(struct cpu_device *cpu);

/* Whether products of bf16 operands run natively, and on matrix tiles (AMX). */
int cpu_products_bf16(const struct cpu_device *cpu);
int cpu_products_tiles(const struct cpu_device *cpu);

/* Finds or makes the primitive for these shapes, strides and types; data pointers are not looked at. */
plora_status cpu_product_prepare(struct cpu_device *cpu, const struct cpu_product *product, int sequential,
                                 struct cpu_primitive **primitive);

/* Runs it on the product's pointers, with the scratch slot of `thread`. Returns oneDNN's status, 0 = success: inside a
 * parallel region a message would stay on the wrong thread, so the caller reports it with cpu_product_failed(). */
int cpu_product_run(const struct cpu_device *cpu, const struct cpu_primitive *entry, const struct cpu_product *product,
                    int thread);
plora_status cpu_product_failed(const struct cpu_product *product, int onednn_status);

/* Both in one, by as many threads as it is worth. */
plora_status cpu_product(struct cpu_device *cpu, const struct cpu_product *product);

#endif
