/* cuda_batch.c: many adapters in one batch, in two launches: low = x A^T in parts, y += s (sum of the parts) B^T
 * (batch.cu).
 *
 * Precision: where x and y are bf16 (and the device has the tensor cores for it), A, B and low are rounded to bf16;
 * otherwise all of it is fp32.
 *
 * Workspace: low, in fp32, a part for every BATCH_SPLIT columns of x. How x is cut depends on K alone, so that a
 * token's sums do not depend on the rest of the batch. */
#include "cuda.h"

#include <string.h>

#include "dtype.h"

static int64_t pieces(int64_t extent, int64_t piece)
{
    return (extent + piece - 1) / piece;
}

static int64_t low_stride(int64_t rank)
{
    return pieces(rank, LINEAR_RANK_PAD) * LINEAR_RANK_PAD;
}

/* Targets follow one another on the stream, so one workspace is enough for all. */
size_t cuda_batch_workspace(void *device, const struct plora__batch_args *args)
{
    int64_t rank = 0;
    (void)device;
    for (int32_t i = 0; i < args->target_count; ++i)
        if (args->targets[i].max_rank > rank) rank = args->targets[i].max_rank;
    return (size_t)(pieces(args->in_features, BATCH_SPLIT) * args->tokens * low_stride(rank)) * sizeof(float);
}

/* Rows of a matrix may be read `count` numbers at a time. */
static int32_t is_aligned(const plora_matrix *matrix, int64_t count)
{
    return (uintptr_t)matrix->data % ((size_t)count * plora__dtype_size(matrix->dtype)) == 0 &&
           matrix->stride % count == 0;
}

static plora_status launch(struct cuda_device *device, enum cuda_kernel kernel, int64_t tiles, int64_t parts,
                           int threads, const struct batch_params *params, void *stream)
{
    PLORA_CHECK(parts <= INT32_MAX / tiles, PLORA_ERROR_UNSUPPORTED, "%s: a grid of %lld x %lld blocks is too large",
                cuda_kernel_sources[kernel].name, (long long)tiles, (long long)parts);
    return cuda_launch(device, kernel, (dim3){(unsigned)(tiles * parts), 1, 1}, (dim3){(unsigned)threads, 1, 1}, 0,
                       params, stream);
}

static plora_status run_target(struct cuda_device *device, const struct plora__batch_args *args,
                               const struct plora__batch_target *target, void *stream)
{
    if (target->max_rank == 0) return PLORA_OK;
    const plora_matrix *x = &args->x, *y = &target->y;
    const int bf16 = device->capability >= 80 && x->dtype == PLORA_BF16 && y->dtype == PLORA_BF16;
    const int64_t splits = pieces(args->in_features, BATCH_SPLIT);
    const struct batch_params params = {.x = x->data,
                                        .y = y->data,
                                        .segments = args->segments,
                                        .adapters = args->adapters,
                                        .list = args->list,
                                        .low = args->workspace,
                                        .x_stride = x->stride,
                                        .y_stride = y->stride,
                                        .in_features = args->in_features,
                                        .out_features = target->out_features,
                                        .tokens = args->tokens,
                                        .segment_count = args->segment_count,
                                        .tiles = args->tiles,
                                        .low_stride = (int32_t)low_stride(target->max_rank),
                                        .splits = (int32_t)splits,
                                        .x_dtype = x->dtype,
                                        .y_dtype = y->dtype,
                                        .x_aligned = is_aligned(x, bf16 ? 8 : 4),
                                        .y_aligned = is_aligned(y, bf16 ? 8 : 4),
                                        .weight = target->weight};
    const int threads = bf16 ? LINEAR_TILE_THREADS : LINEAR_FMA_THREADS;
    const int64_t rank_tiles = pieces(params.low_stride, bf16 ? LINEAR_TILE : LINEAR_FMA_RANKS);
    PLORA_TRY(launch(device, bf16 ? CUDA_KERNEL_BATCH_SHRINK_BF16 : CUDA_KERNEL_BATCH_SHRINK_F32, args->tiles,
                     rank_tiles * splits, threads, &params, stream));
    return launch(device, bf16 ? CUDA_KERNEL_BATCH_EXPAND_BF16 : CUDA_KERNEL_BATCH_EXPAND_F32, args->tiles,
                  pieces(target->out_features, LINEAR_TILE), threads, &params, stream);
}

plora_status cuda_batch_forward(void *device, const struct plora__batch_args *args, void *stream)
{
    if (args->tiles == 0) return PLORA_OK;
    for (int32_t i = 0; i < args->target_count; ++i)
        PLORA_TRY(run_target(device, args, &args->targets[i], stream));
    return PLORA_OK;
}

/* bytes is a multiple of 4. */
plora_status cuda_write(void *device, void *destination, const void *source, size_t bytes, void *stream)
{
    struct batch_write_params params = {0};
    for (size_t done = 0; done < bytes; done += sizeof params.words) {
        const size_t length = bytes - done < sizeof params.words ? bytes - done : sizeof params.words;
        params.to = (uint32_t *)((char *)destination + done);
        params.count = (int32_t)(length / sizeof *params.words);
        memcpy(params.words, (const char *)source + done, length);
        PLORA_TRY(cuda_launch(device, CUDA_KERNEL_BATCH_WRITE, (dim3){1, 1, 1}, (dim3){BATCH_WRITE_THREADS, 1, 1}, 0,
                              &params, stream));
    }
    return PLORA_OK;
}
