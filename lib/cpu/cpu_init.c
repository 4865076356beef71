/* cpu_init.c: the fresh A of an adapter (philox.h, normal.h): element i is a function of (seed, stage, layer, i) alone. */
#include "convert_kernels.h"
#include "cpu_backend.h"
#include "isa.h"
#include "normal.h"

enum { DRAWN = 4 * CPU_DRAWS };

plora_status cpu_init_adapter(void *device, const struct plora__init_args *args, void *stream)
{
    const struct cpu_device *cpu = device;
    (void)stream;
    const struct cpu_convert_kernels *kernels = cpu_convert_kernels(cpu_isa());
    const int threads = cpu_threads_for(cpu, 64.0 * (double)args->count);
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t begin = 0; begin < args->count; begin += DRAWN) {
        uint32_t words[DRAWN];
        kernels->draw(words, args->seed, PLORA__PURPOSE_INIT, args->stage, args->layer, (uint64_t)begin / 4);
        const int64_t count = args->count - begin < DRAWN ? args->count - begin : DRAWN;
        if (args->init != PLORA_INIT_GAUSSIAN) kernels->symmetric(args->out + begin, words, args->scale, count);
        for (int64_t i = 0; args->init == PLORA_INIT_GAUSSIAN && i < count; ++i)
            args->out[begin + i] = plora__normal(words[i]) * args->scale;
    }
    return PLORA_OK;
}
