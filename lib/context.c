/* context.c: the context handle: backend, memory with its accounting, log. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "handles.h"

#define STRINGIFY_(x) #x
#define STRINGIFY(x) STRINGIFY_(x)

const char *plora_version(void)
{
    return STRINGIFY(PLORA_VERSION_MAJOR) "." STRINGIFY(PLORA_VERSION_MINOR) "." STRINGIFY(PLORA_VERSION_PATCH);
}

int32_t plora_abi_version(void)
{
    return PLORA_ABI_VERSION;
}

static void *default_allocate(size_t size, size_t alignment, void *user)
{
    (void)user;
    void *memory = NULL;
    return posix_memalign(&memory, alignment, size) == 0 ? memory : NULL;
}

static void default_free(void *memory, size_t size, void *user)
{
    (void)size;
    (void)user;
    free(memory);
}

static plora_status allocate_for_backend(void *owner, size_t bytes, void **memory)
{
    return plora__allocate(owner, bytes, memory);
}

static void release_for_backend(void *owner, void *memory, size_t bytes)
{
    plora__free(owner, memory, bytes);
}

static void count_allocation(struct plora__memory_count *count, size_t bytes)
{
    const size_t now = atomic_fetch_add(&count->current_bytes, bytes) + bytes;
    size_t peak = atomic_load(&count->peak_bytes);
    while (now > peak && !atomic_compare_exchange_weak(&count->peak_bytes, &peak, now)) {
    }
    atomic_fetch_add(&count->allocations, 1);
}

plora_status plora_context_create(const plora_context_options *given, plora_context **context)
{
    PLORA_CHECK(context != NULL, PLORA_ERROR_INVALID_ARGUMENT, "context is NULL");
    plora_context_options options = PLORA_CONTEXT_OPTIONS_INIT;
    PLORA_TRY(plora__read_options(&options, sizeof options, given, "plora_context_options"));
    PLORA_CHECK((options.host_allocate == NULL) == (options.host_free == NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "host_allocate and host_free must be given together");
    PLORA_CHECK((options.device_allocate == NULL) == (options.device_free == NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "device_allocate and device_free must be given together");
    PLORA_CHECK(options.threads >= 0, PLORA_ERROR_INVALID_ARGUMENT, "threads is %d: must be >= 0", options.threads);
    PLORA_CHECK(options.deterministic == 0 || options.deterministic == 1, PLORA_ERROR_INVALID_ARGUMENT,
                "deterministic is %d: must be 0 or 1", options.deterministic);
    PLORA_CHECK(options.reserved == 0, PLORA_ERROR_INVALID_ARGUMENT, "plora_context_options.reserved is not 0");
    const struct plora_backend *backend = plora__backend(options.backend);
    PLORA_CHECK(backend != NULL, PLORA_ERROR_INVALID_ARGUMENT, "backend %d is unknown", options.backend);
    if (options.host_allocate == NULL) {
        options.host_allocate = default_allocate;
        options.host_free = default_free;
    }

    plora_context *created = options.host_allocate(sizeof *created, PLORA__ALIGNMENT, options.host_user);
    PLORA_CHECK(created != NULL, PLORA_ERROR_OUT_OF_MEMORY, "out of memory: %zu bytes for the context",
                sizeof *created);
    memset(created, 0, sizeof *created);
    created->options = options;
    created->backend = backend;
    atomic_init(&created->references, 1);
    count_allocation(&created->host_memory, sizeof *created);
    const struct plora__host_memory memory = {allocate_for_backend, release_for_backend, created};
    const plora_status status = backend->open(&created->options, &memory, &created->device);
    if (status != PLORA_OK) {
        options.host_free(created, sizeof *created, options.host_user);
        return status;
    }
    *context = created;
    return PLORA_OK;
}

plora_status plora__host_device_open(plora_context *context, void **device)
{
    if (context->backend == &plora__cpu_backend) {
        *device = context->device;
        return PLORA_OK;
    }
    plora_context_options options = PLORA_CONTEXT_OPTIONS_INIT;
    options.threads = context->options.threads;
    options.deterministic = context->options.deterministic;
    const struct plora__host_memory memory = {allocate_for_backend, release_for_backend, context};
    return plora__cpu_backend.open(&options, &memory, device);
}

void plora__host_device_close(const plora_context *context, void *device)
{
    if (device != NULL && context->backend != &plora__cpu_backend) plora__cpu_backend.close(device);
}

void plora__context_retain(plora_context *context)
{
    atomic_fetch_add_explicit(&context->references, 1, memory_order_relaxed);
}

void plora__context_release(plora_context *context)
{
    if (atomic_fetch_sub_explicit(&context->references, 1, memory_order_acq_rel) != 1) return;
    context->backend->close(context->device);
    context->options.host_free(context, sizeof *context, context->options.host_user);
}

void plora_context_destroy(plora_context *context)
{
    if (context != NULL) plora__context_release(context);
}

plora_status plora_synchronize(plora_context *context, void *stream)
{
    PLORA_CHECK(context != NULL, PLORA_ERROR_INVALID_ARGUMENT, "context is NULL");
    PLORA_TRY(plora__check_stream(context, stream, 1));
    return context->backend->synchronize(context->device, stream);
}

plora_status plora_memory_stats(const plora_context *context, plora_memory_statistics *statistics)
{
    PLORA_CHECK(context != NULL, PLORA_ERROR_INVALID_ARGUMENT, "context is NULL");
    plora_memory_statistics result = PLORA_MEMORY_STATISTICS_INIT;
    result.current_bytes = atomic_load(&context->host_memory.current_bytes);
    result.peak_bytes = atomic_load(&context->host_memory.peak_bytes);
    result.allocations = atomic_load(&context->host_memory.allocations);
    result.device_current_bytes = atomic_load(&context->device_memory.current_bytes);
    result.device_peak_bytes = atomic_load(&context->device_memory.peak_bytes);
    result.device_allocations = atomic_load(&context->device_memory.allocations);
    result.mapped_bytes = atomic_load(&context->mapped_bytes);
    return plora__write_result(statistics, &result, sizeof result, "plora_memory_statistics");
}

plora_status plora__check_stream(const plora_context *context, void *stream, int waits)
{
    return context->backend->check_stream(context->device, stream, waits);
}

plora_status plora__read_device(const plora_context *context, void *host, const void *device, size_t bytes,
                                void *stream)
{
    PLORA_TRY(context->backend->copy(context->device, host, device, bytes, stream));
    return context->backend->synchronize(context->device, stream);
}

plora_status plora__allocate(plora_context *context, size_t bytes, void **memory)
{
    *memory = NULL;
    if (bytes == 0) return PLORA_OK;
    void *allocated = context->options.host_allocate(bytes, PLORA__ALIGNMENT, context->options.host_user);
    PLORA_CHECK(allocated != NULL, PLORA_ERROR_OUT_OF_MEMORY, "out of memory: %zu bytes", bytes);
    count_allocation(&context->host_memory, bytes);
    *memory = allocated;
    return PLORA_OK;
}

plora_status plora__allocate_zeroed(plora_context *context, size_t bytes, void **memory)
{
    PLORA_TRY(plora__allocate(context, bytes, memory));
    if (bytes > 0) memset(*memory, 0, bytes);
    return PLORA_OK;
}

void plora__free(plora_context *context, void *memory, size_t bytes)
{
    if (memory == NULL) return;
    context->options.host_free(memory, bytes, context->options.host_user);
    atomic_fetch_sub(&context->host_memory.current_bytes, bytes);
}

/* The CPU has its device memory from plora__allocate(), which counts it. */
static int has_own_memory(const plora_context *context)
{
    return context->options.backend != PLORA_BACKEND_CPU;
}

plora_status plora__device_allocate(plora_context *context, size_t bytes, void **memory)
{
    *memory = NULL;
    if (bytes == 0) return PLORA_OK;
    PLORA_TRY(context->backend->allocate(context->device, bytes, memory));
    if (has_own_memory(context)) count_allocation(&context->device_memory, bytes);
    return PLORA_OK;
}

void plora__device_free(plora_context *context, void *memory, size_t bytes)
{
    if (memory == NULL) return;
    context->backend->release(context->device, memory, bytes);
    if (has_own_memory(context)) atomic_fetch_sub(&context->device_memory.current_bytes, bytes);
}

plora_status plora__multiply(size_t a, size_t b, size_t *product)
{
    PLORA_CHECK(!__builtin_mul_overflow(a, b, product), PLORA_ERROR_OUT_OF_MEMORY, "size overflow: %zu * %zu bytes", a,
                b);
    return PLORA_OK;
}

plora_status plora__duplicate(plora_context *context, const char *text, char **copy)
{
    const size_t bytes = strlen(text) + 1;
    void *memory;
    PLORA_TRY(plora__allocate(context, bytes, &memory));
    memcpy(memory, text, bytes);
    *copy = memory;
    return PLORA_OK;
}

void plora__free_string(plora_context *context, char *text)
{
    if (text != NULL) plora__free(context, text, strlen(text) + 1);
}

void plora__log(const plora_context *context, int32_t level, const char *format, ...)
{
    if (context->options.log == NULL || level > context->options.log_level) return;
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    context->options.log(level, text, context->options.log_user);
}
