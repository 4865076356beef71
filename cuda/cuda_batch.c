/* cuda_batch.c: many adapters in one batch, in two launches: low = x A^T in parts, y += s (sum of the parts) B^T
 * (batch.cu).
 *
 * Precision: where x and y are bf16 (and the device has the tensor cores for it), A, B and low are rounded to bf16;
 * otherwise all of it is fp32.
 *
 * Workspace: low, in fp32, a part for every BATCH_SPLIT columns of x. How x is cut depends on K alone, so that a
 * token's sums do not depend on the rest of the batch. */
#include "cuda.h"

#include "dtype.h"

static int64_t pieces(int64_t extent, int64_t piece)
{
    return (extent + piece - 1) / piece;
}

static int64_t low_stride(const struct plora__batch_args *args)
{
    return pieces(args->max_rank, LINEAR_RANK_PAD) * LINEAR_RANK_PAD;
}

size_t cuda_batch_workspace(void *device, const struct plora__batch_args *args)
{
    (void)device;
    return (size_t)(pieces(args->in_features, BATCH_SPLIT) * args->tokens * low_stride(args)) * sizeof(float);
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

plora_status cuda_batch_forward(void *device, const struct plora__batch_args *args, void *stream)
{
    if (args->tiles == 0 || args->max_rank == 0) return PLORA_OK;
    const struct cuda_device *cuda = device;
    const int bf16 = cuda->capability >= 80 && args->x.dtype == PLORA_BF16 && args->y.dtype == PLORA_BF16;
    const int64_t splits = pieces(args->in_features, BATCH_SPLIT);
    const struct batch_params params = {.x = args->x.data,
                                        .y = args->y.data,
                                        .segments = args->segments,
                                        .slots = args->slots,
                                        .list = args->list,
                                        .low = args->workspace,
                                        .x_stride = args->x.stride,
                                        .y_stride = args->y.stride,
                                        .in_features = args->in_features,
                                        .out_features = args->out_features,
                                        .tokens = args->tokens,
                                        .segment_count = args->segment_count,
                                        .tiles = args->tiles,
                                        .low_stride = (int32_t)low_stride(args),
                                        .splits = (int32_t)splits,
                                        .x_dtype = args->x.dtype,
                                        .y_dtype = args->y.dtype,
                                        .x_aligned = is_aligned(&args->x, bf16 ? 8 : 4),
                                        .y_aligned = is_aligned(&args->y, bf16 ? 8 : 4)};
    const int threads = bf16 ? LINEAR_TILE_THREADS : LINEAR_FMA_THREADS;
    const int64_t rank_tiles = pieces(params.low_stride, bf16 ? LINEAR_TILE : LINEAR_FMA_RANKS);
    PLORA_TRY(launch(device, bf16 ? CUDA_KERNEL_BATCH_SHRINK_BF16 : CUDA_KERNEL_BATCH_SHRINK_F32, args->tiles,
                     rank_tiles * splits, threads, &params, stream));
    return launch(device, bf16 ? CUDA_KERNEL_BATCH_EXPAND_BF16 : CUDA_KERNEL_BATCH_EXPAND_F32, args->tiles,
                  pieces(args->out_features, LINEAR_TILE), threads, &params, stream);
}
