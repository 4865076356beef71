/* cpu_backend.c: the CPU's operation table. "Device" memory is host memory, streams do not exist, every call is complete when
 * it returns. */
#include "cpu_backend.h"

#include <string.h>

#include "product.h"
#include "status.h"
#include "threads.h"

static void cpu_close(void *device)
{
    struct cpu_device *cpu = device;
    const struct plora__host_memory memory = cpu->memory;
    cpu_products_destroy(cpu);
    pthread_mutex_destroy(&cpu->lock);
    memory.release(memory.owner, cpu, sizeof *cpu);
}

static plora_status cpu_open(const plora_context_options *options, const struct plora__host_memory *memory,
                             void **device)
{
    PLORA_CHECK(options->device == 0, PLORA_ERROR_INVALID_ARGUMENT, "device is %d: the CPU backend has only device 0",
                options->device);
    void *allocated;
    PLORA_TRY(memory->allocate(memory->owner, sizeof(struct cpu_device), &allocated));
    struct cpu_device *cpu = allocated;
    *cpu = (struct cpu_device){
        .threads = options->threads > 0 ? options->threads : cpu_default_threads(),
        .deterministic = options->deterministic,
        .memory = *memory,
    };
    pthread_mutex_init(&cpu->lock, NULL);
    const plora_status status = cpu_products_create(cpu);
    if (status != PLORA_OK) {
        cpu_close(cpu);
        return status;
    }
    *device = cpu;
    return PLORA_OK;
}

static plora_status cpu_allocate(void *device, size_t bytes, void **memory)
{
    const struct cpu_device *cpu = device;
    return cpu->memory.allocate(cpu->memory.owner, bytes, memory);
}

static void cpu_release(void *device, void *memory, size_t bytes)
{
    const struct cpu_device *cpu = device;
    cpu->memory.release(cpu->memory.owner, memory, bytes);
}

static plora_status cpu_copy(void *device, void *destination, const void *source, size_t bytes, void *stream)
{
    (void)device;
    (void)stream;
    if (bytes > 0) memmove(destination, source, bytes);
    return PLORA_OK;
}

static plora_status cpu_clear(void *device, void *memory, size_t bytes, void *stream)
{
    enum { PIECE = 1 << 18 };
    (void)stream;
    const int threads = cpu_threads_for(device, 8.0 * (double)bytes);
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t begin = 0; begin < bytes; begin += PIECE)
        memset((char *)memory + begin, 0, bytes - begin < PIECE ? bytes - begin : PIECE);
    return PLORA_OK;
}

static plora_status cpu_synchronize(void *device, void *stream)
{
    (void)device;
    (void)stream;
    return PLORA_OK;
}

static plora_status cpu_check_stream(void *device, void *stream, int waits)
{
    (void)device;
    (void)waits;
    PLORA_CHECK(stream == NULL, PLORA_ERROR_INVALID_ARGUMENT, "stream is %p: must be NULL for the CPU backend", stream);
    return PLORA_OK;
}

const struct plora_backend plora__cpu_backend = {
    .name = "cpu",
    .open = cpu_open,
    .close = cpu_close,
    .allocate = cpu_allocate,
    .release = cpu_release,
    .copy = cpu_copy,
    .clear = cpu_clear,
    .synchronize = cpu_synchronize,
    .check_stream = cpu_check_stream,
    .init_adapter = cpu_init_adapter,
    .linear_workspace = cpu_linear_workspace,
    .linear_forward = cpu_linear_forward,
    .linear_backward = cpu_linear_backward,
    .step_workspace = cpu_step_workspace,
    .optimizer_step = cpu_optimizer_step,
    .scale = cpu_scale,
    .magnitudes = cpu_magnitudes,
    .merge_workspace = cpu_merge_workspace,
    .merge = cpu_merge,
    .write = cpu_write,
    .batch_workspace = cpu_batch_workspace,
    .batch_forward = cpu_batch_forward,
    .batch_panel_count = cpu_batch_panel_count,
    .batch_pack = cpu_batch_pack,
    .dequantise = cpu_dequantise,
    .quantise = cpu_quantise,
};
