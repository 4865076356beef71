/* cuda_init.c: the launcher of the fresh A of an adapter (init.cu). */
#include "cuda.h"

plora_status cuda_init_adapter(void *device, const struct plora__init_args *args, void *stream)
{
    const struct init_params params = {
        .out = args->out,
        .count = args->count,
        .seed = args->seed,
        .stage = args->stage,
        .scale = args->scale,
        .layer = args->layer,
    };
    const int64_t drawn = 4 * INIT_THREADS, blocks = (args->count + drawn - 1) / drawn;
    PLORA_CHECK(blocks <= INT32_MAX, PLORA_ERROR_UNSUPPORTED, "an adapter of %lld elements is too large",
                (long long)args->count);
    return cuda_launch(device, args->init == PLORA_INIT_GAUSSIAN ? CUDA_KERNEL_INIT_GAUSSIAN : CUDA_KERNEL_INIT_UNIFORM,
                       (dim3){(unsigned)blocks, 1, 1}, (dim3){INIT_THREADS, 1, 1}, 0, &params, stream);
}
