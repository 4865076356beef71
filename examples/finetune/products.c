/* products.c: see products.h. Written for the C API of oneDNN 2.x and 3.x. Scratch memory is the lane's own, because any thread
 * may run a product. Where oneDNN cannot multiply bf16 (before AVX-512), the operands are widened to fp32 first. */
#include "products.h"

#include <dnnl.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "plora.h"
#include "util.h"

struct lane { /* of one thread */
    dnnl_stream_t stream;
    dnnl_memory_t a, b, c, scratch;
    void *scratch_data;
    float *wide_a, *wide_b; /* [m,k], [k,n] as they lie in memory; NULL when oneDNN takes the operands as they are */
};

struct product {
    struct product_shape shape;
    dnnl_engine_t engine;
    dnnl_primitive_t primitive;
    dnnl_memory_desc_t scratch;
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
    if (status == dnnl_success) status = dnnl_primitive_attr_set_scratchpad_mode(attributes, dnnl_scratchpad_mode_user);
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
    if (status == dnnl_success) {
#if DNNL_VERSION_MAJOR >= 3
        status =
            dnnl_memory_desc_clone(&p->scratch, dnnl_primitive_desc_query_md(selected, dnnl_query_scratchpad_md, 0));
#else
        p->scratch = *dnnl_primitive_desc_query_md(selected, dnnl_query_scratchpad_md, 0);
#endif
    }
    if (status == dnnl_success) status = dnnl_primitive_create(&p->primitive, selected);
    if (selected) dnnl_primitive_desc_destroy(selected);
    if (operations) dnnl_post_ops_destroy(operations);
    if (attributes) dnnl_primitive_attr_destroy(attributes);
    return status;
}

static dnnl_status_t make_scratch(const struct product *p, struct lane *lane)
{
#if DNNL_VERSION_MAJOR >= 3
    const size_t bytes = dnnl_memory_desc_get_size(p->scratch);
    const dnnl_memory_desc_t description = p->scratch;
#else
    const size_t bytes = dnnl_memory_desc_get_size(&p->scratch);
    const dnnl_memory_desc_t *description = &p->scratch;
#endif
    if (bytes > 0 && posix_memalign(&lane->scratch_data, 64, bytes) != 0) return dnnl_out_of_memory;
    return dnnl_memory_create(&lane->scratch, description, p->engine, lane->scratch_data);
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
        if (status == dnnl_success) status = make_scratch(p, lane);
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

static void unmake(struct product *p)
{
    for (int i = 0; i < p->threads; i++) {
        struct lane *lane = &p->lanes[i];
        if (lane->a) dnnl_memory_destroy(lane->a);
        if (lane->b) dnnl_memory_destroy(lane->b);
        if (lane->c) dnnl_memory_destroy(lane->c);
        if (lane->scratch) dnnl_memory_destroy(lane->scratch);
        if (lane->stream) dnnl_stream_destroy(lane->stream);
        free(lane->scratch_data);
        free(lane->wide_a);
        free(lane->wide_b);
        *lane = (struct lane){0};
    }
    if (p->primitive) dnnl_primitive_destroy(p->primitive);
    if (p->engine) dnnl_engine_destroy(p->engine);
#if DNNL_VERSION_MAJOR >= 3
    if (p->scratch) dnnl_memory_desc_destroy(p->scratch);
#endif
    p->primitive = NULL;
    p->engine = NULL;
    memset(&p->scratch, 0, sizeof p->scratch);
}

/* The same product of operands that lie densely in fp32. */
static dnnl_status_t make_widened(struct product *p)
{
    struct product_shape wide = p->shape;
    wide.dtype = PLORA_F32;
    wide.a_stride = wide.a_transposed ? wide.m : wide.k;
    wide.b_stride = wide.b_transposed ? wide.k : wide.n;
    for (int i = 0; i < p->threads; i++) {
        struct lane *lane = &p->lanes[i];
        lane->wide_a = calloc((size_t)(wide.m * wide.k), sizeof *lane->wide_a);
        lane->wide_b = calloc((size_t)(wide.k * wide.n), sizeof *lane->wide_b);
        if (!lane->wide_a || !lane->wide_b) return dnnl_out_of_memory;
    }
    return make(p, &wide);
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
    p->shape = *shape;
    /* oneDNN plans for the number of threads that OpenMP would use now. */
    const int usual = omp_get_max_threads();
    omp_set_num_threads(1);
    dnnl_status_t status = make(p, shape);
    if (status == dnnl_unimplemented && shape->dtype == PLORA_BF16) {
        unmake(p);
        status = make_widened(p);
    }
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
    unmake(p);
    free(p->lanes);
    free(p);
}

/* bf16 rows `stride` apart, one after the other in fp32. */
static const void *widened(const uint16_t *from, int64_t stride, int64_t rows, int64_t columns, float *to)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) {
            const uint32_t bits = (uint32_t)from[i * stride + j] << 16;
            memcpy(&to[i * columns + j], &bits, sizeof bits);
        }
    return to;
}

int product_run(struct product *p, int thread, const void *a, const void *b, float *c)
{
    struct lane *lane = &p->lanes[thread];
    const struct product_shape *s = &p->shape;
    if (lane->wide_a) {
        a = widened(a, s->a_stride, s->a_transposed ? s->k : s->m, s->a_transposed ? s->m : s->k, lane->wide_a);
        b = widened(b, s->b_stride, s->b_transposed ? s->n : s->k, s->b_transposed ? s->k : s->n, lane->wide_b);
    }
    /* oneDNN's handles are not const, yet it only reads the sources. */
    dnnl_status_t status = dnnl_memory_set_data_handle(lane->a, (void *)(uintptr_t)a);
    if (status == dnnl_success) status = dnnl_memory_set_data_handle(lane->b, (void *)(uintptr_t)b);
    if (status == dnnl_success) status = dnnl_memory_set_data_handle(lane->c, c);
    const dnnl_exec_arg_t arguments[] = {{DNNL_ARG_SRC, lane->a},
                                         {DNNL_ARG_WEIGHTS, lane->b},
                                         {DNNL_ARG_DST, lane->c},
                                         {DNNL_ARG_SCRATCHPAD, lane->scratch}};
    if (status == dnnl_success) status = dnnl_primitive_execute(p->primitive, lane->stream, 4, arguments);
    return status == dnnl_success ? 0 : -1;
}
