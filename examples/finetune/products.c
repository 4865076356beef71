/* products.c: see products.h. Written for the C API of oneDNN 2.x and 3.x. */
#include "products.h"

#include <dnnl.h>
#include <omp.h>
#include <stdlib.h>

#include "plora.h"
#include "util.h"

struct lane { /* of one thread */
    dnnl_stream_t stream;
    dnnl_memory_t a, b, c;
};

struct product {
    dnnl_engine_t engine;
    dnnl_primitive_t primitive;
    struct lane *lanes;
    int threads;
};

static dnnl_status_t make_primitive(struct product *p, dnnl_memory_desc_t *a, dnnl_memory_desc_t *b,
                                    dnnl_memory_desc_t *c, int accumulate)
{
    dnnl_primitive_attr_t attributes = NULL;
    dnnl_post_ops_t operations = NULL;
    dnnl_primitive_desc_t selected = NULL;
    dnnl_status_t status = dnnl_primitive_attr_create(&attributes);
    if (status == dnnl_success && accumulate) {
        status = dnnl_post_ops_create(&operations);
#if DNNL_VERSION_MAJOR >= 3
        if (status == dnnl_success) status = dnnl_post_ops_append_sum(operations, 1.0f, 0, dnnl_data_type_undef);
#else
        if (status == dnnl_success) status = dnnl_post_ops_append_sum(operations, 1.0f);
#endif
        if (status == dnnl_success) status = dnnl_primitive_attr_set_post_ops(attributes, operations);
    }
#if DNNL_VERSION_MAJOR >= 3
    if (status == dnnl_success)
        status = dnnl_matmul_primitive_desc_create(&selected, p->engine, *a, *b, NULL, *c, attributes);
#else
    dnnl_matmul_desc_t operation;
    if (status == dnnl_success) status = dnnl_matmul_desc_init(&operation, a, b, NULL, c);
    if (status == dnnl_success) status = dnnl_primitive_desc_create(&selected, &operation, attributes, p->engine, NULL);
#endif
    if (status == dnnl_success) status = dnnl_primitive_create(&p->primitive, selected);
    if (selected) dnnl_primitive_desc_destroy(selected);
    if (operations) dnnl_post_ops_destroy(operations);
    if (attributes) dnnl_primitive_attr_destroy(attributes);
    return status;
}

static dnnl_status_t make(struct product *p, const struct product_shape *shape)
{
#if DNNL_VERSION_MAJOR >= 3
    dnnl_memory_desc_t a = NULL, b = NULL, c = NULL;
    dnnl_memory_desc_t *pa = &a, *pb = &b, *pc = &c;
#define CREATE(d, rows, columns, stride, transposed, type)                                                             \
    dnnl_memory_desc_create_with_strides(                                                                              \
        &(d), 2, (const dnnl_dims_t){rows, columns}, type,                                                             \
        (const dnnl_dims_t){(transposed) ? 1 : (stride), (transposed) ? (stride) : 1})
#else
    dnnl_memory_desc_t a, b, c;
    dnnl_memory_desc_t *pa = &a, *pb = &b, *pc = &c;
#define CREATE(d, rows, columns, stride, transposed, type)                                                             \
    dnnl_memory_desc_init_by_strides(&(d), 2, (const dnnl_dims_t){rows, columns}, type,                                \
                                     (const dnnl_dims_t){(transposed) ? 1 : (stride), (transposed) ? (stride) : 1})
#endif
    const dnnl_data_type_t type = shape->dtype == PLORA_BF16 ? dnnl_bf16 : dnnl_f32;
    dnnl_status_t status = dnnl_engine_create(&p->engine, dnnl_cpu, 0);
    if (status == dnnl_success) status = CREATE(a, shape->m, shape->k, shape->a_stride, shape->a_transposed, type);
    if (status == dnnl_success) status = CREATE(b, shape->k, shape->n, shape->b_stride, shape->b_transposed, type);
    if (status == dnnl_success) status = CREATE(c, shape->m, shape->n, shape->c_stride, 0, dnnl_f32);
    if (status == dnnl_success) status = make_primitive(p, pa, pb, pc, shape->accumulate);
    for (int i = 0; i < p->threads && status == dnnl_success; i++) {
        struct lane *lane = &p->lanes[i];
        status = dnnl_stream_create(&lane->stream, p->engine, dnnl_stream_default_flags);
#if DNNL_VERSION_MAJOR >= 3
        if (status == dnnl_success) status = dnnl_memory_create(&lane->a, a, p->engine, DNNL_MEMORY_NONE);
        if (status == dnnl_success) status = dnnl_memory_create(&lane->b, b, p->engine, DNNL_MEMORY_NONE);
        if (status == dnnl_success) status = dnnl_memory_create(&lane->c, c, p->engine, DNNL_MEMORY_NONE);
#else
        if (status == dnnl_success) status = dnnl_memory_create(&lane->a, pa, p->engine, DNNL_MEMORY_NONE);
        if (status == dnnl_success) status = dnnl_memory_create(&lane->b, pb, p->engine, DNNL_MEMORY_NONE);
        if (status == dnnl_success) status = dnnl_memory_create(&lane->c, pc, p->engine, DNNL_MEMORY_NONE);
#endif
    }
#if DNNL_VERSION_MAJOR >= 3
    dnnl_memory_desc_destroy(a);
    dnnl_memory_desc_destroy(b);
    dnnl_memory_desc_destroy(c);
#endif
    return status;
}

int product_create(const struct product_shape *shape, int threads, struct product **product)
{
    *product = NULL;
    struct product *p = calloc(1, sizeof *p);
    if (p) p->lanes = calloc((size_t)threads, sizeof *p->lanes);
    if (!p || !p->lanes) {
        free(p);
        return fault("out of memory: a product of %d lanes", threads);
    }
    p->threads = threads;
    /* oneDNN plans for the number of threads that OpenMP would use now. */
    const int usual = omp_get_max_threads();
    omp_set_num_threads(1);
    const dnnl_status_t status = make(p, shape);
    omp_set_num_threads(usual);
    if (status != dnnl_success) {
        product_destroy(p);
        return fault("oneDNN status %d for a product of %lld x %lld x %lld", (int)status, (long long)shape->m,
                     (long long)shape->n, (long long)shape->k);
    }
    *product = p;
    return 0;
}

void product_destroy(struct product *p)
{
    if (!p) return;
    for (int i = 0; i < p->threads; i++) {
        struct lane *lane = &p->lanes[i];
        if (lane->a) dnnl_memory_destroy(lane->a);
        if (lane->b) dnnl_memory_destroy(lane->b);
        if (lane->c) dnnl_memory_destroy(lane->c);
        if (lane->stream) dnnl_stream_destroy(lane->stream);
    }
    if (p->primitive) dnnl_primitive_destroy(p->primitive);
    if (p->engine) dnnl_engine_destroy(p->engine);
    free(p->lanes);
    free(p);
}

int product_run(struct product *p, int thread, const void *a, const void *b, float *c)
{
    struct lane *lane = &p->lanes[thread];
    /* oneDNN's handles are not const, yet it only reads the sources. */
    dnnl_status_t status = dnnl_memory_set_data_handle(lane->a, (void *)(uintptr_t)a);
    if (status == dnnl_success) status = dnnl_memory_set_data_handle(lane->b, (void *)(uintptr_t)b);
    if (status == dnnl_success) status = dnnl_memory_set_data_handle(lane->c, c);
    const dnnl_exec_arg_t arguments[] = {{DNNL_ARG_SRC, lane->a}, {DNNL_ARG_WEIGHTS, lane->b}, {DNNL_ARG_DST, lane->c}};
    if (status == dnnl_success) status = dnnl_primitive_execute(p->primitive, lane->stream, 3, arguments);
    return status == dnnl_success ? 0 : -1;
}
