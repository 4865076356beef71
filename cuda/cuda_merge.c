/* cuda_merge.c: the launchers of the unload: the magnitudes checked before it, and W += factor * left right (merge.cu,
 * report.cu).
 *
 *     workspace   [partial sums of the tiles of W][traces of the tiles of M][slices of left^T left][of right right^T]
 *
 * A merge is one launch; a trial one more, which adds up its counts; a report four more. How work is cut depends on
 * shapes alone. */
#include "cuda.h"
#include "dtype.h"

struct layout {
    int64_t panels, tiles;          /* of W: in a row, in all */
    int64_t gram_tiles, slices[2];  /* in a row of M; of rows of left, of columns of right */
    int64_t slice[2];               /* their length */
    size_t traces, grams[2], bytes; /* offsets; the partial sums are at 0 */
};

static int64_t pieces(int64_t whole, int64_t piece)
{
    return (whole + piece - 1) / piece;
}

static size_t align(int64_t bytes)
{
    return (size_t)pieces(bytes, 64) * 64;
}

static struct layout layout(const struct plora__merge_args *args)
{
    const plora_matrix *weight = &args->weight;
    const int64_t tile_rows = MERGE_TILE_BYTES / MERGE_TILE_COLUMNS / (int64_t)plora__dtype_size(weight->dtype);
    const int64_t counts[2] = {weight->rows, weight->columns};
    struct layout layout;
    layout.panels = pieces(weight->columns, MERGE_TILE_COLUMNS);
    layout.tiles = layout.panels * pieces(weight->rows, tile_rows);
    layout.gram_tiles = pieces(args->rank, GRAM_TILE);
    layout.traces = align(layout.tiles * (int64_t)sizeof(struct merge_partial));
    layout.bytes = layout.traces + align(layout.gram_tiles * layout.gram_tiles * (int64_t)sizeof(struct gram_traces));
    for (int side = 0; side < 2; ++side) {
        const int64_t most = GRAM_BLOCKS / (layout.gram_tiles * layout.gram_tiles),
                      wanted = pieces(counts[side], GRAM_SLICE);
        const int64_t slices = wanted < most ? wanted : most;
        layout.slice[side] = pieces(pieces(counts[side], slices > 0 ? slices : 1), GRAM_CHUNK) * GRAM_CHUNK;
        layout.slices[side] = counts[side] > 0 ? pieces(counts[side], layout.slice[side]) : 1;
        layout.grams[side] = layout.bytes;
        layout.bytes += align(layout.slices[side] * args->rank * args->rank * (int64_t)sizeof(double));
    }
    return layout;
}

size_t cuda_merge_workspace(void *device, const struct plora__merge_args *args)
{
    (void)device;
    return layout(args).bytes;
}

static dim3 grid(int64_t x, int64_t y, int64_t z)
{
    return (dim3){(unsigned)x, (unsigned)y, (unsigned)z};
}

/* The kernels of one way to round, by dtype. */
static enum cuda_kernel merge_kernel(const struct plora__merge_args *args, int report)
{
    static const enum cuda_kernel nearest[2][3] = {
        {CUDA_KERNEL_MERGE_F32, CUDA_KERNEL_MERGE_BF16, CUDA_KERNEL_MERGE_F16},
        {CUDA_KERNEL_MERGE_REPORT_F32, CUDA_KERNEL_MERGE_REPORT_BF16, CUDA_KERNEL_MERGE_REPORT_F16},
    };
    static const enum cuda_kernel rounded[2][3] = {
        {CUDA_KERNEL_MERGE_F32, CUDA_KERNEL_MERGE_ROUNDED_BF16, CUDA_KERNEL_MERGE_ROUNDED_F16},
        {CUDA_KERNEL_MERGE_REPORT_F32, CUDA_KERNEL_MERGE_ROUNDED_REPORT_BF16, CUDA_KERNEL_MERGE_ROUNDED_REPORT_F16},
    };
    return (args->rounding == PLORA_ROUND_NEAREST ? nearest : rounded)[report][args->weight.dtype];
}

/* Whether the rows begin at multiples of 16 bytes. */
static int is_aligned(const void *data, int64_t stride, size_t size)
{
    return (uintptr_t)data % 16 == 0 && (size_t)stride * size % 16 == 0;
}

/* The traces of M, of which the effective rank is made. */
static plora_status launch_grams(struct cuda_device *device, const struct plora__merge_args *args,
                                 const struct layout *places, void *stream)
{
    char *base = args->workspace;
    const struct gram_params params = {
        .vectors = {args->left, args->right},
        .stride = {args->left_row_stride, args->right_column_stride},
        .rank_stride = {args->left_rank_stride, args->right_rank_stride},
        .count = {args->weight.rows, args->weight.columns},
        .slice = {places->slice[0], places->slice[1]},
        .slices = {(int32_t)places->slices[0], (int32_t)places->slices[1]},
        .grams = {(double *)(base + places->grams[0]), (double *)(base + places->grams[1])},
        .traces = (struct gram_traces *)(base + places->traces),
        .rank = (int32_t)args->rank,
    };
    const int64_t tiles = places->gram_tiles * places->gram_tiles,
                  slices = places->slices[0] > places->slices[1] ? places->slices[0] : places->slices[1];
    const dim3 block = {GRAM_TILE * GRAM_TILE, 1, 1};
    PLORA_TRY(cuda_launch(device, CUDA_KERNEL_GRAM, grid(tiles, slices, 2), block, 0, &params, stream));
    PLORA_TRY(cuda_launch(device, CUDA_KERNEL_GRAM_SUM, grid(pieces(args->rank * args->rank, block.x), 2, 1), block, 0,
                          &params, stream));
    return cuda_launch(device, CUDA_KERNEL_GRAM_TRACE, grid(tiles, 1, 1), block, 0, &params, stream);
}

plora_status cuda_merge(void *device, const struct plora__merge_args *args, void *stream)
{
    const struct layout places = layout(args);
    const size_t size = plora__dtype_size(args->weight.dtype);
    const int trial = args->overflows != NULL, report = args->sums != NULL && !trial;
    const dim3 block = {MERGE_THREADS, 1, 1};
    char *base = args->workspace;
    PLORA_CHECK(places.tiles <= INT32_MAX && args->rank <= MERGE_RANK_MAX, PLORA_ERROR_UNSUPPORTED,
                "W[%lld, %lld] with rank %lld is too large", (long long)args->weight.rows,
                (long long)args->weight.columns, (long long)args->rank);
    const struct merge_params params = {
        .weight = args->weight.data,
        .rows = args->weight.rows,
        .columns = args->weight.columns,
        .stride = args->weight.stride,
        .left = args->left,
        .right = args->right,
        .left_row_stride = args->left_row_stride,
        .left_rank_stride = args->left_rank_stride,
        .right_rank_stride = args->right_rank_stride,
        .right_column_stride = args->right_column_stride,
        .partials = (struct merge_partial *)base,
        .factor = args->factor,
        .rank = (int32_t)args->rank,
        .panels = (uint32_t)places.panels,
        .aligned = is_aligned(args->weight.data, args->weight.stride, size) &&
                   is_aligned(args->residual, args->residual_stride, size),
        .trial = trial,
        .rounding = args->rounding,
        .layer = args->draw.layer,
        .seed = args->draw.seed,
        .stage = args->draw.stage,
        .first_element = args->draw.first_element,
        .row_elements = args->draw.row_elements,
        .residual = args->residual,
        .residual_stride = args->residual_stride,
    };
    PLORA_TRY(
        cuda_launch(device, merge_kernel(args, report || trial), grid(places.tiles, 1, 1), block, 0, &params, stream));
    if (!report && !trial) return PLORA_OK;
    if (report) PLORA_TRY(launch_grams(device, args, &places, stream));
    const struct merge_total_params total = {
        .partials = params.partials,
        .partial_count = places.tiles,
        .traces = (const struct gram_traces *)(base + places.traces),
        .trace_count = report ? places.gram_tiles * places.gram_tiles : 0,
        .sums = report ? args->sums : NULL,
        .overflows = args->overflows,
    };
    return cuda_launch(device, CUDA_KERNEL_MERGE_TOTAL, grid(1, 1, 1), block, 0, &total, stream);
}

plora_status cuda_magnitudes(void *device, const struct plora__magnitude_args *args, void *stream)
{
    const struct magnitudes_params params = {
        .values = args->values, .segments = args->segments, .magnitudes = args->magnitudes};
    return cuda_launch(device, CUDA_KERNEL_MAGNITUDES, grid(args->segment_count, 1, 1), (dim3){MAGNITUDE_THREADS, 1, 1},
                       0, &params, stream);
}
