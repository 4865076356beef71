/* product.c: matrix products by oneDNN's C API, 2.x (descriptor structs) and 3.x (handles). See product.h. */
#include "product.h"

#include <dnnl.h>
#include <string.h>

#include "dtype.h"
#include "status.h"
#include "threads.h"

enum { CACHE_ENTRIES = 512, SCRATCH_ALIGNMENT = 64 };

#if DNNL_VERSION_MAJOR >= 3
typedef dnnl_memory_desc_t descriptor;
#else
typedef dnnl_memory_desc_t descriptor; /* a struct */
#endif

/* What a primitive depends on. Compared as bytes: always zeroed first. */
struct key {
    int64_t m, n, k;
    int64_t a_row, a_column, b_row, b_column, c_row;
    int32_t a_dtype, b_dtype, c_dtype;
    int32_t bias, accumulate, sequential;
};

struct cpu_primitive {
    struct key key;
    dnnl_primitive_t primitive;
    descriptor a, b, c, bias, scratch;
    uint64_t last_use;
};

struct cpu_products {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    int bf16, tiles;
    int slots;            /* scratch slots, one per thread */
    size_t scratch_bytes; /* of one slot */
    char *scratch;
    uint64_t clock;
    int32_t count;
    struct cpu_primitive entries[CACHE_ENTRIES];
};

/* ----------------------------------------------------------------------------------- oneDNN 2.x and 3.x under one name */

static dnnl_data_type_t onednn_type(int32_t dtype)
{
    return dtype == PLORA_F32 ? dnnl_f32 : dnnl_bf16;
}

static dnnl_status_t describe(descriptor *out, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                              int32_t dtype)
{
    const dnnl_dims_t dims = {rows, columns};
    dnnl_dims_t strides = {row_stride, column_stride};
#if DNNL_VERSION_MAJOR >= 3
    /* The stride along a dimension of 1 means nothing, yet oneDNN 3.7 takes a matrix of one column with strides (n, 1) for one of
     * n adjacent elements; with the same stride twice it does not. */
    if (rows == 1 && strides[0] < strides[1]) strides[0] = strides[1];
    if (columns == 1 && strides[1] < strides[0]) strides[1] = strides[0];
    return dnnl_memory_desc_create_with_strides(out, 2, dims, onednn_type(dtype), strides);
#else
    return dnnl_memory_desc_init_by_strides(out, 2, dims, onednn_type(dtype), strides);
#endif
}

static void forget(struct cpu_primitive *entry)
{
    if (entry->primitive != NULL) dnnl_primitive_destroy(entry->primitive);
#if DNNL_VERSION_MAJOR >= 3
    dnnl_memory_desc_destroy(entry->a);
    dnnl_memory_desc_destroy(entry->b);
    dnnl_memory_desc_destroy(entry->c);
    dnnl_memory_desc_destroy(entry->bias);
    dnnl_memory_desc_destroy(entry->scratch);
#endif
    memset(entry, 0, sizeof *entry);
}

/* `descriptor *` in 2.x, the handle itself in 3.x: what memory and primitive creation take. */
#if DNNL_VERSION_MAJOR >= 3
#define HANDLE(d) (d)
#else
#define HANDLE(d) (&(d))
#endif

static dnnl_status_t create_descriptor(const struct cpu_primitive *entry, dnnl_engine_t engine,
                                       dnnl_primitive_attr_t attr, dnnl_primitive_desc_t *out)
{
    const int with_bias = entry->key.bias;
#if DNNL_VERSION_MAJOR >= 3
    return dnnl_matmul_primitive_desc_create(out, engine, entry->a, entry->b, with_bias ? entry->bias : NULL, entry->c,
                                             attr);
#else
    dnnl_matmul_desc_t operation;
    const dnnl_status_t status =
        dnnl_matmul_desc_init(&operation, &entry->a, &entry->b, with_bias ? &entry->bias : NULL, &entry->c);
    return status != dnnl_success ? status : dnnl_primitive_desc_create(out, &operation, attr, engine, NULL);
#endif
}

static dnnl_status_t create_attributes(int accumulate, dnnl_primitive_attr_t *attr)
{
    dnnl_status_t status = dnnl_primitive_attr_create(attr);
    if (status == dnnl_success) status = dnnl_primitive_attr_set_scratchpad_mode(*attr, dnnl_scratchpad_mode_user);
    if (status != dnnl_success || !accumulate) return status;
    dnnl_post_ops_t operations;
    status = dnnl_post_ops_create(&operations);
    if (status != dnnl_success) return status;
#if DNNL_VERSION_MAJOR >= 3
    status = dnnl_post_ops_append_sum(operations, 1.0f, 0, dnnl_data_type_undef);
#else
    status = dnnl_post_ops_append_sum(operations, 1.0f);
#endif
    if (status == dnnl_success) status = dnnl_primitive_attr_set_post_ops(*attr, operations);
    dnnl_post_ops_destroy(operations);
    return status;
}

static dnnl_status_t create_primitive(struct cpu_primitive *entry, dnnl_engine_t engine, size_t *scratch_bytes)
{
    const struct key *key = &entry->key;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_primitive_desc_t primitive_descriptor = NULL;
    dnnl_status_t status = describe(&entry->a, key->m, key->k, key->a_row, key->a_column, key->a_dtype);
    if (status == dnnl_success) status = describe(&entry->b, key->k, key->n, key->b_row, key->b_column, key->b_dtype);
    if (status == dnnl_success) status = describe(&entry->c, key->m, key->n, key->c_row, 1, key->c_dtype);
    if (status == dnnl_success && key->bias) status = describe(&entry->bias, 1, key->n, key->n, 1, PLORA_F32);
    if (status == dnnl_success) status = create_attributes(key->accumulate, &attr);
    if (status == dnnl_success) status = create_descriptor(entry, engine, attr, &primitive_descriptor);
    if (status == dnnl_success) {
#if DNNL_VERSION_MAJOR >= 3
        const_dnnl_memory_desc_t scratch =
            dnnl_primitive_desc_query_md(primitive_descriptor, dnnl_query_scratchpad_md, 0);
        status = dnnl_memory_desc_clone(&entry->scratch, scratch);
#else
        entry->scratch = *dnnl_primitive_desc_query_md(primitive_descriptor, dnnl_query_scratchpad_md, 0);
#endif
        *scratch_bytes = dnnl_memory_desc_get_size(HANDLE(entry->scratch));
    }
    if (status == dnnl_success) status = dnnl_primitive_create(&entry->primitive, primitive_descriptor);
    if (primitive_descriptor != NULL) dnnl_primitive_desc_destroy(primitive_descriptor);
    if (attr != NULL) dnnl_primitive_attr_destroy(attr);
    return status;
}

/* --------------------------------------------------------------------------------------------------------------- cache */

static struct key key_of(const struct cpu_product *product, int sequential)
{
    struct key key;
    memset(&key, 0, sizeof key);
    key.m = product->m;
    key.n = product->n;
    key.k = product->k;
    key.a_row = product->a.row_stride;
    key.a_column = product->a.column_stride;
    key.b_row = product->b.row_stride;
    key.b_column = product->b.column_stride;
    key.c_row = product->c.row_stride;
    key.a_dtype = product->a.dtype;
    key.b_dtype = product->b.dtype;
    key.c_dtype = product->c.dtype;
    key.bias = product->bias != NULL;
    key.accumulate = product->accumulate != 0;
    key.sequential = sequential != 0;
    return key;
}

static plora_status grow_scratch(struct cpu_device *cpu, size_t bytes)
{
    struct cpu_products *products = cpu->products;
    if (bytes <= products->scratch_bytes) return PLORA_OK;
    bytes = (bytes + 4095) / 4096 * 4096;
    void *larger;
    PLORA_TRY(cpu->memory.allocate(cpu->memory.owner, bytes * (size_t)products->slots, &larger));
    if (products->scratch != NULL)
        cpu->memory.release(cpu->memory.owner, products->scratch, products->scratch_bytes * (size_t)products->slots);
    products->scratch = larger;
    products->scratch_bytes = bytes;
    return PLORA_OK;
}

plora_status cpu_product_prepare(struct cpu_device *cpu, const struct cpu_product *product, int sequential,
                                 struct cpu_primitive **primitive)
{
    struct cpu_products *products = cpu->products;
    const struct key key = key_of(product, sequential);
    struct cpu_primitive *entry = NULL;
    for (int32_t i = 0; i < products->count; ++i) {
        struct cpu_primitive *candidate = &products->entries[i];
        if (memcmp(&candidate->key, &key, sizeof key) == 0) {
            candidate->last_use = ++products->clock;
            *primitive = candidate;
            return PLORA_OK;
        }
        if (entry == NULL || candidate->last_use < entry->last_use) entry = candidate;
    }
    if (products->count < CACHE_ENTRIES)
        entry = &products->entries[products->count++];
    else
        forget(entry);

    memset(entry, 0, sizeof *entry);
    entry->key = key;
    size_t scratch_bytes = 0;
    const int threads = cpu_set_threads(sequential ? 1 : cpu->threads);
    const dnnl_status_t status = create_primitive(entry, products->engine, &scratch_bytes);
    cpu_set_threads(threads);
    plora_status result = PLORA_OK;
    if (status != dnnl_success)
        result =
            plora__fail(status == dnnl_out_of_memory ? PLORA_ERROR_OUT_OF_MEMORY : PLORA_ERROR_BACKEND,
                        "oneDNN cannot make the product [%lld,%lld] x [%lld,%lld] (status %d)", (long long)product->m,
                        (long long)product->k, (long long)product->k, (long long)product->n, (int)status);
    if (result == PLORA_OK) result = grow_scratch(cpu, scratch_bytes);
    if (result != PLORA_OK) {
        forget(entry); /* an empty entry matches no product and is the first to be used again */
        return result;
    }
    entry->last_use = ++products->clock;
    *primitive = entry;
    return PLORA_OK;
}

/* ----------------------------------------------------------------------------------------------------------------- run */

int cpu_product_run(const struct cpu_device *cpu, const struct cpu_primitive *entry, const struct cpu_product *product,
                    int thread)
{
    const struct cpu_products *products = cpu->products;
    void *scratch = products->scratch == NULL ? NULL : products->scratch + products->scratch_bytes * (size_t)thread;
    const struct {
        int argument;
        const descriptor *description;
        void *data;
    } operands[] = {
        {DNNL_ARG_SRC, &entry->a, product->a.data},
        {DNNL_ARG_WEIGHTS, &entry->b, product->b.data},
        {DNNL_ARG_DST, &entry->c, product->c.data},
        {DNNL_ARG_SCRATCHPAD, &entry->scratch, scratch},
        {DNNL_ARG_BIAS, &entry->bias, (void *)(uintptr_t)product->bias},
    };
    const int count = entry->key.bias ? 5 : 4;
    dnnl_exec_arg_t arguments[5];
    int made = 0;
    dnnl_status_t status = dnnl_success;
    for (; made < count && status == dnnl_success; ++made) {
        arguments[made].arg = operands[made].argument;
        status = dnnl_memory_create(&arguments[made].memory, HANDLE(*operands[made].description), products->engine,
                                    operands[made].data);
        if (status != dnnl_success) break;
    }
    if (status == dnnl_success) status = dnnl_primitive_execute(entry->primitive, products->stream, count, arguments);
    for (int i = 0; i < made; ++i)
        dnnl_memory_destroy(arguments[i].memory);
    return (int)status;
}

plora_status cpu_product_failed(const struct cpu_product *product, int onednn_status)
{
    return plora__fail(onednn_status == dnnl_out_of_memory ? PLORA_ERROR_OUT_OF_MEMORY : PLORA_ERROR_BACKEND,
                       "oneDNN failed in the product [%lld,%lld] x [%lld,%lld] (status %d)", (long long)product->m,
                       (long long)product->k, (long long)product->k, (long long)product->n, onednn_status);
}

plora_status cpu_product(struct cpu_device *cpu, const struct cpu_product *product)
{
    struct cpu_primitive *primitive;
    const int own_threads = cpu_threads_for(cpu, 2.0 * (double)product->m * (double)product->n * (double)product->k);
    PLORA_TRY(cpu_product_prepare(cpu, product, own_threads == 1, &primitive));
    const int threads = cpu_set_threads(own_threads);
    const int status = cpu_product_run(cpu, primitive, product, 0);
    cpu_set_threads(threads);
    return status == 0 ? PLORA_OK : cpu_product_failed(product, status);
}

/* --------------------------------------------------------------------------------------------------- creation and end */

static int bf16_supported(const struct cpu_products *products)
{
    struct cpu_primitive probe;
    memset(&probe, 0, sizeof probe);
    probe.key = (struct key){.m = 16,
                             .n = 16,
                             .k = 16,
                             .a_row = 16,
                             .a_column = 1,
                             .b_row = 16,
                             .b_column = 1,
                             .c_row = 16,
                             .a_dtype = PLORA_BF16,
                             .b_dtype = PLORA_BF16,
                             .c_dtype = PLORA_BF16};
    size_t scratch_bytes;
    const dnnl_status_t status = create_primitive(&probe, products->engine, &scratch_bytes);
    forget(&probe);
    return status == dnnl_success;
}

plora_status cpu_products_create(struct cpu_device *cpu)
{
    void *memory;
    PLORA_TRY(cpu->memory.allocate(cpu->memory.owner, sizeof(struct cpu_products), &memory));
    struct cpu_products *products = memory;
    memset(products, 0, sizeof *products);
    products->slots = cpu->threads;
    cpu->products = products;
    dnnl_status_t status = dnnl_engine_create(&products->engine, dnnl_cpu, 0);
    if (status == dnnl_success)
        status = dnnl_stream_create(&products->stream, products->engine, dnnl_stream_default_flags);
    PLORA_CHECK(status == dnnl_success, PLORA_ERROR_BACKEND, "oneDNN: no CPU engine (status %d)", (int)status);
    products->bf16 = bf16_supported(products);
    products->tiles =
        products->bf16 && (dnnl_get_effective_cpu_isa() & dnnl_cpu_isa_avx512_core_amx) == dnnl_cpu_isa_avx512_core_amx;
    return PLORA_OK;
}

void cpu_products_destroy(struct cpu_device *cpu)
{
    struct cpu_products *products = cpu->products;
    if (products == NULL) return;
    for (int32_t i = 0; i < products->count; ++i)
        forget(&products->entries[i]);
    if (products->stream != NULL) dnnl_stream_destroy(products->stream);
    if (products->engine != NULL) dnnl_engine_destroy(products->engine);
    if (products->scratch != NULL)
        cpu->memory.release(cpu->memory.owner, products->scratch, products->scratch_bytes * (size_t)products->slots);
    cpu->memory.release(cpu->memory.owner, products, sizeof *products);
    cpu->products = NULL;
}

int cpu_products_bf16(const struct cpu_device *cpu)
{
    return cpu->products->bf16;
}

int cpu_products_tiles(const struct cpu_device *cpu)
{
    return cpu->products->tiles;
}
