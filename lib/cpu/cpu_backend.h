/* cpu_backend.h: the CPU's device state, and the launchers that its table (cpu_backend.c) names. */
#ifndef PLORA_CPU_BACKEND_H
#define PLORA_CPU_BACKEND_H

#include <pthread.h>

#include "backend.h"

struct cpu_products; /* product.c: the cached oneDNN primitives */

struct cpu_device {
    int threads;       /* of every parallel region, > 0 */
    int deterministic; /* work is cut in pieces that do not depend on `threads` */
    struct plora__host_memory memory;
    pthread_mutex_t lock; /* held while `products` and its scratch are in use */
    struct cpu_products *products;
};

/* How many threads an operation of this many element operations is worth. Starting the others takes microseconds, and a
 * scheduler's slice where they must wait for a core, so small work stays on the caller. */
static inline int cpu_threads_for(const struct cpu_device *cpu, double operations)
{
    return operations < 4e6 ? 1 : cpu->threads;
}

plora_status cpu_init_adapter(void *device, const struct plora__init_args *args, void *stream);

size_t cpu_linear_workspace(void *device, const struct plora__linear_args *args);
plora_status cpu_linear_forward(void *device, const struct plora__linear_args *args, void *stream);
plora_status cpu_linear_backward(void *device, const struct plora__linear_args *args, void *stream);

size_t cpu_step_workspace(void *device, const struct plora__step_args *args);
plora_status cpu_optimizer_step(void *device, const struct plora__step_args *args, void *stream);
plora_status cpu_scale(void *device, float *values, int64_t count, float factor, void *stream);

plora_status cpu_magnitudes(void *device, const struct plora__magnitude_args *args, void *stream);
size_t cpu_merge_workspace(void *device, const struct plora__merge_args *args);
plora_status cpu_merge(void *device, const struct plora__merge_args *args, void *stream);
/* The same without sums or dry run, for the output of a product: each thread takes neighbouring rows, which it wrote. */
void cpu_merge_rows(int threads, const struct plora__merge_args *args);

size_t cpu_batch_workspace(void *device, const struct plora__batch_args *args);
plora_status cpu_batch_forward(void *device, const struct plora__batch_args *args, void *stream);
int64_t cpu_batch_panel_count(int64_t out_features, int64_t rank);
void cpu_batch_pack(const float *b, int64_t out_features, int64_t rank, float *panels);
plora_status cpu_write(void *device, void *destination, const void *source, size_t bytes, void *stream);

plora_status cpu_dequantise(void *device, const struct plora__dequantise_args *args, void *stream);
plora_status cpu_quantise(void *device, const struct plora__quantise_args *args);

#endif
