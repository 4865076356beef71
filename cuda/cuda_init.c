/* cuda_init.c: the launcher of the fresh A of an adapter (init.cu). */
#include "cuda.h"

plora_status cuda_init_adapter(void *device, const struct plora__init_args *args, void *stream)
{
    const int whole = args->columns == args->row_elements; /* then it is a single row */
    const int64_t rows = whole ? 1 : args->rows, columns = whole ? args->rows * args->columns : args->columns;
    const struct init_params params = {
        .out = args->out,
        .columns = columns,
        .first_element = args->first_element,
        .row_elements = args->row_elements,
        .seed = args->seed,
        .stage = args->stage,
        .scale = args->scale,
        .layer = args->layer,
    };
    const int64_t lead = whole ? 0 : 3; /* at most, of a row that begins inside of a draw */
    const int64_t drawn = 4 * INIT_THREADS, blocks = (columns + lead + drawn - 1) / drawn;
    PLORA_CHECK(blocks <= INT32_MAX && rows <= UINT16_MAX, PLORA_ERROR_UNSUPPORTED,
                "an adapter of [%lld,%lld] is too large", (long long)args->rows, (long long)args->columns);
    return cuda_launch(device, args->init == PLORA_INIT_GAUSSIAN ? CUDA_KERNEL_INIT_GAUSSIAN : CUDA_KERNEL_INIT_UNIFORM,
                       (dim3){(unsigned)blocks, (unsigned)rows, 1}, (dim3){INIT_THREADS, 1, 1}, 0, &params, stream);
}
