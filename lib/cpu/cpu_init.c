/* cpu_init.c: the fresh A of an adapter (philox.h, normal.h): element i is a function of (seed, stage, layer, i) alone. */
#include "cpu_backend.h"
#include "normal.h"
#include "philox.h"

plora_status cpu_init_adapter(void *device, const struct plora__init_args *args, void *stream)
{
    const struct cpu_device *cpu = device;
    (void)stream;
    const int threads = cpu_threads_for(cpu, 32.0 * (double)args->count);
    (void)threads; /* unused without OpenMP */
    const int64_t blocks = (args->count + 3) / 4;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        const struct plora__words words =
            plora__draw(args->seed, PLORA__PURPOSE_INIT, args->stage, args->layer, (uint64_t)block);
        for (int i = 0; i < 4 && 4 * block + i < args->count; ++i) {
            const float unit =
                args->init == PLORA_INIT_GAUSSIAN ? plora__normal(words.word[i]) : plora__symmetric(words.word[i]);
            args->out[4 * block + i] = unit * args->scale;
        }
    }
    return PLORA_OK;
}
