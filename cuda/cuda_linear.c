/* cuda_linear.c: the linear layer with its adapter: cuBLAS for the products with W, own kernels for everything of low rank.
 *
 *     forward   pack A, B    shrink u = s drop(x) A^T                          y  = x W^T    expand y  += bias + u B^T
 *     backward  pack A, B    shrink u and v = s dy B    gradients dA, dB       dx = dy W     expand dx += drop'(v A)
 *
 * Both ways are out[T,O] = in[T,D] W + low[T,R] factor[R,O]: in = x, out = y or in = dy, out = dx.
 *
 * The base product. cuBLAS multiplies in and W as they are where both are bf16 or both fp32, straight into `out` where that is no
 * narrower than allowed: bf16 is rounded twice, by cuBLAS and with the low-rank part. Where a bias would come between the two, or the
 * dtypes are not what cuBLAS multiplies, the product is made in fp32 by panels in the workspace, widened from W (and `in`) as needed;
 * expand then rounds it once. So are the panels of a quantised W dequantised, to bf16 where x and `in` are of it:
 *
 *     W [O,D]   +---- DEPTH ----+------     one panel of W and of `in` after the other, all added to sum[T,WIDTH]
 *         WIDTH |               |
 *               +---------------+------
 *
 * Precision of the low-rank part: where x, y, dx and W are bf16 (and the device has the tensor cores for it), A, B, u and v are rounded
 * to bf16 and multiplied by tensor cores; otherwise all of it is fp32. Sums are split over blocks and added in a fixed order: the same
 * bits every time.
 *
 * Workspace (plan): cuBLAS's own, packed A and B, u, v, partial sums, panels. Its size grows with T and never shrinks, so that one for
 * many tokens does for few. */
#include "cuda.h"

#include "dtype.h"
#include "philox.h"

enum { WIDTH = 2048, DEPTH = 1024, SPLITS_MAX = 32, ALIGNMENT = 256 };

static int64_t at_most(int64_t value, int64_t limit)
{
    return value < limit ? value : limit;
}

static int64_t pieces(int64_t extent, int64_t piece)
{
    return (extent + piece - 1) / piece;
}

static int64_t padded(int64_t extent, int64_t piece)
{
    return pieces(extent, piece) * piece;
}

/* ---------------------------------------------------------------------------------------------------------------- plan */

/* One direction of a call. */
struct side {
    const struct plora__linear_args *args;
    const plora_matrix *in, *out;
    int32_t weight_by_output; /* W is stored [O,D] */
    int32_t keep_out;         /* add to what `out` holds */
    int32_t drop;             /* dropout on the low-rank part of the output */
    int32_t has_bias;
    size_t low, factor; /* in the workspace */
    int64_t factor_stride;
};

struct plan {
    int32_t bf16; /* the low-rank part, on tensor cores */
    int64_t padded_rank;
    int64_t a_columns, b_columns; /* of packed A and B */
    /* offsets: */
    size_t cublas, packed_a, packed_b, u, v, partials, weight_panel, in_panel, sum_panel;
    size_t cublas_bytes, bytes;
};

/* cuBLAS multiplies in and W as they are. */
static int is_direct(const struct side *side)
{
    const int32_t in = side->in->dtype;
    if (side->args->quantised != NULL) return 0;
    return in == side->args->weight.dtype && (in == PLORA_BF16 || side->out->dtype == PLORA_F32);
}

/* The product is made in fp32, in panels, before it is rounded into `out`. */
static int needs_sum(const struct side *side)
{
    return side->out->dtype != PLORA_F32 && (side->has_bias || !is_direct(side));
}

/* In what dtype `in` and a panel of W are multiplied when they are not as they are: a quantised W is made bf16 where `in` is. */
static int32_t panel_dtype(const struct side *side)
{
    const int bf16 = side->in->dtype == PLORA_BF16 && side->args->weight.dtype == PLORA_BF16;
    return side->args->quantised != NULL && bf16 ? PLORA_BF16 : PLORA_F32;
}

static struct side forward_side(const struct plora__linear_args *args, const struct plan *plan)
{
    return (struct side){.args = args,
                         .in = &args->x,
                         .out = &args->y,
                         .weight_by_output = !args->fan_in_fan_out,
                         .keep_out = args->delta_only,
                         .has_bias = args->bias != NULL && !args->delta_only,
                         .low = plan->u,
                         .factor = plan->packed_b,
                         .factor_stride = plan->b_columns};
}

static struct side backward_side(const struct plora__linear_args *args, const struct plan *plan)
{
    return (struct side){.args = args,
                         .in = &args->y,
                         .out = &args->dx,
                         .weight_by_output = args->fan_in_fan_out,
                         .keep_out = args->delta_only || args->accumulate,
                         .drop = args->dropout.probability > 0.0,
                         .low = plan->v,
                         .factor = plan->packed_a,
                         .factor_stride = plan->a_columns};
}

static size_t reserve(struct plan *plan, int64_t bytes)
{
    const size_t offset = plan->bytes;
    plan->bytes += (size_t)padded(bytes, ALIGNMENT);
    return offset;
}

/* Tokens (of a gradient: columns) of a block; all kernels have LINEAR_TILE of the other side. */
static int64_t block_extent(const struct plan *plan)
{
    return plan->bf16 ? LINEAR_BLOCK : LINEAR_TILE;
}

/* How many of `tiles` one block takes of each split, where there are `blocks` blocks for each: two blocks a multiprocessor. Not less
 * than two, or the partial sums would take more time than what is summed. */
static int64_t tiles_of_split(const struct cuda_device *device, int64_t blocks, int64_t tiles)
{
    const int64_t wanted = at_most(2 * (int64_t)device->multiprocessors / blocks, at_most(tiles / 2, SPLITS_MAX));
    return wanted <= 1 ? tiles : pieces(tiles, wanted);
}

/* At least what the partial sums of a shrink of [tokens, columns] take, for any number of tokens up to this one. */
static int64_t shrink_bytes(const struct cuda_device *device, const struct plan *plan, int64_t tokens, int64_t columns)
{
    const int64_t blocks = pieces(tokens, block_extent(plan));
    const int64_t splits = at_most(pieces(columns, LINEAR_TILE), SPLITS_MAX);
    const int64_t split_blocks = at_most(2 * (int64_t)device->multiprocessors, blocks * splits);
    return (split_blocks > blocks ? split_blocks : blocks) * block_extent(plan) * plan->padded_rank *
           (int64_t)sizeof(float);
}

/* Both gradients are one launch, so each is cut for half of the machine. */
static int64_t gradient_bytes(const struct cuda_device *device, const struct plan *plan, int64_t tokens,
                              int64_t columns, int64_t rank)
{
    const int64_t splits = at_most((int64_t)device->multiprocessors / pieces(columns, block_extent(plan)),
                                   at_most(pieces(tokens, LINEAR_TILE), SPLITS_MAX));
    return (splits > 1 ? splits : 1) * rank * columns * (int64_t)sizeof(float);
}

static struct plan make_plan(const struct cuda_device *device, const struct plora__linear_args *args, int is_forward)
{
    const int64_t tokens = args->tokens, k = args->in_features, n = args->out_features, size = sizeof(float);
    struct plan plan = {0};
    plan.bf16 = device->capability >= 80 && args->x.dtype == PLORA_BF16 && args->y.dtype == PLORA_BF16 &&
                args->weight.dtype == PLORA_BF16 &&
                (is_forward || args->dx.data == NULL || args->dx.dtype == PLORA_BF16);
    plan.padded_rank = padded(args->rank, LINEAR_RANK_PAD);
    plan.a_columns = padded(k, LINEAR_TILE);
    plan.b_columns = padded(n, LINEAR_TILE);
    plan.cublas_bytes = (size_t)(device->capability >= 90 ? 32 : 4) << 20; /* what its manual recommends */
    plan.cublas = reserve(&plan, (int64_t)plan.cublas_bytes);
    if (args->rank > 0) {
        const int64_t shrinks = shrink_bytes(device, &plan, tokens, k) + shrink_bytes(device, &plan, tokens, n);
        const int64_t gradients =
            gradient_bytes(device, &plan, tokens, k, args->rank) + gradient_bytes(device, &plan, tokens, n, args->rank);
        plan.packed_a = reserve(&plan, plan.padded_rank * plan.a_columns * size);
        plan.packed_b = reserve(&plan, plan.padded_rank * plan.b_columns * size);
        plan.u = reserve(&plan, tokens * plan.padded_rank * size);
        plan.v = reserve(&plan, tokens * plan.padded_rank * size);
        plan.partials = reserve(&plan, shrinks > gradients ? shrinks : gradients);
    }
    const struct side side = is_forward ? forward_side(args, &plan) : backward_side(args, &plan);
    if (!is_direct(&side)) {
        if (args->weight.dtype != PLORA_F32 || args->quantised != NULL)
            plan.weight_panel = reserve(&plan, (int64_t)WIDTH * DEPTH * size);
        if (side.in->dtype != panel_dtype(&side)) plan.in_panel = reserve(&plan, tokens * DEPTH * size);
    }
    if (needs_sum(&side)) plan.sum_panel = reserve(&plan, tokens * WIDTH * size);
    return plan;
}

size_t cuda_linear_workspace(void *device, const struct plora__linear_args *args)
{
    const size_t forward_bytes = make_plan(device, args, 1).bytes, backward_bytes = make_plan(device, args, 0).bytes;
    return (forward_bytes > backward_bytes ? forward_bytes : backward_bytes) + ALIGNMENT;
}

/* The workspace is 64-byte aligned, cuBLAS's part of it must be more. */
static void *in_workspace(const struct plora__linear_args *args, size_t offset)
{
    const uintptr_t first = (uintptr_t)args->workspace % ALIGNMENT;
    return (char *)args->workspace + (first == 0 ? 0 : ALIGNMENT - first) + offset;
}

/* ------------------------------------------------------------------------------------------------------------ launches */

static plora_status launch(struct cuda_device *device, enum cuda_kernel kernel, int64_t blocks, int threads,
                           const void *params, void *stream)
{
    PLORA_CHECK(blocks <= INT32_MAX, PLORA_ERROR_UNSUPPORTED, "%s: a grid of %lld blocks is too large",
                cuda_kernel_sources[kernel].name, (long long)blocks);
    return cuda_launch(device, kernel, (dim3){(unsigned)blocks, 1, 1}, (dim3){(unsigned)threads, 1, 1}, 0, params,
                       stream);
}

/* Rows of a matrix may be read `count` numbers at a time. */
static int32_t is_aligned(const void *data, int64_t stride, int32_t dtype, int64_t count)
{
    return (uintptr_t)data % ((size_t)count * plora__dtype_size(dtype)) == 0 && stride % count == 0;
}

/* What the kernels of one precision read at once. */
static int64_t access_count(const struct plan *plan)
{
    return plan->bf16 ? 8 : 4;
}

static const void *element(const void *data, int64_t index, int32_t dtype)
{
    return (const char *)data + index * (int64_t)plora__dtype_size(dtype);
}

static struct linear_dropout dropout_params(const struct plora__linear_args *args)
{
    const struct plora__dropout *dropout = &args->dropout;
    return (struct linear_dropout){.seed = dropout->seed,
                                   .step = dropout->step,
                                   .first_element = plora__dropout_element(dropout, 0, 0),
                                   .row_elements = (uint64_t)dropout->row_elements,
                                   .threshold = plora__dropout_threshold(dropout->probability),
                                   .scale = (float)(1.0 / (1.0 - dropout->probability)),
                                   .layer = dropout->layer};
}

static plora_status pack(struct cuda_device *device, const struct plora__linear_args *args, const struct plan *plan,
                         void *stream)
{
    const int64_t down = pieces(plan->padded_rank, PACK_TILE);
    const int64_t a_blocks = down * (plan->a_columns / PACK_TILE), b_blocks = down * (plan->b_columns / PACK_TILE);
    const struct pack_params params = {.a = args->a,
                                       .b = args->b,
                                       .packed_a = in_workspace(args, plan->packed_a),
                                       .packed_b = in_workspace(args, plan->packed_b),
                                       .rank = args->rank,
                                       .in_features = args->in_features,
                                       .out_features = args->out_features,
                                       .a_columns = plan->a_columns,
                                       .b_columns = plan->b_columns,
                                       .padded_rank = (int32_t)plan->padded_rank,
                                       .a_blocks = (uint32_t)a_blocks};
    return launch(device, plan->bf16 ? CUDA_KERNEL_PACK_BF16 : CUDA_KERNEL_PACK_F32, a_blocks + b_blocks,
                  LINEAR_FMA_THREADS, &params, stream);
}

static plora_status reduce(struct cuda_device *device, enum cuda_kernel kernel, struct reduce_params *params,
                           void *stream)
{
    for (int i = 0; i < 2; ++i)
        params->jobs[i].blocks = (uint32_t)pieces(params->jobs[i].count, CONVERT_THREADS);
    return launch(device, kernel, (int64_t)params->jobs[0].blocks + params->jobs[1].blocks, CONVERT_THREADS, params,
                  stream);
}

/* -------------------------------------------------------------------------------------------------- shrink and gradients */

/* One job of a shrink and of the reduction behind it. Returns the number of its blocks; *partials moves past its sums. */
static int64_t shrink_job(const struct cuda_device *device, const struct plora__linear_args *args,
                          const struct plan *plan, int is_u, float **partials, struct shrink_job *job,
                          struct reduce_job *sum)
{
    const plora_matrix *in = is_u ? &args->x : &args->y;
    const int64_t blocks = pieces(args->tokens, block_extent(plan)), tiles = pieces(in->columns, LINEAR_TILE);
    const int64_t split = tiles_of_split(device, blocks, tiles), splits = pieces(tiles, split);
    *job = (struct shrink_job){.in = in->data,
                               .factor = in_workspace(args, is_u ? plan->packed_a : plan->packed_b),
                               .partials = *partials,
                               .stride = in->stride,
                               .factor_stride = is_u ? plan->a_columns : plan->b_columns,
                               .columns = in->columns,
                               .dtype = in->dtype,
                               .aligned = is_aligned(in->data, in->stride, in->dtype, access_count(plan)),
                               .drop = is_u && args->dropout.probability > 0.0,
                               .split_columns = (int32_t)(split * LINEAR_TILE)};
    *sum = (struct reduce_job){.partials = *partials,
                               .out = in_workspace(args, is_u ? plan->u : plan->v),
                               .count = args->tokens * plan->padded_rank,
                               .splits = (int32_t)splits};
    *partials += splits * args->tokens * plan->padded_rank;
    return blocks * splits * pieces(plan->padded_rank, LINEAR_TILE);
}

/* u, and in the backward v */
static plora_status shrink(struct cuda_device *device, const struct plora__linear_args *args, const struct plan *plan,
                           int with_v, void *stream)
{
    float *partials = in_workspace(args, plan->partials);
    struct shrink_params params = {
        .padded_rank = (int32_t)plan->padded_rank, .tokens = args->tokens, .dropout = dropout_params(args)};
    struct reduce_params sums = {.scale = args->scale};
    int64_t blocks = shrink_job(device, args, plan, 1, &partials, &params.jobs[0], &sums.jobs[0]);
    params.first_blocks = (uint32_t)blocks;
    if (with_v) blocks += shrink_job(device, args, plan, 0, &partials, &params.jobs[1], &sums.jobs[1]);
    PLORA_TRY(launch(device, plan->bf16 ? CUDA_KERNEL_SHRINK_BF16 : CUDA_KERNEL_SHRINK_F32, blocks,
                     plan->bf16 ? LINEAR_TILE_THREADS : LINEAR_FMA_THREADS, &params, stream));
    return reduce(device, plan->bf16 ? CUDA_KERNEL_REDUCE_BF16 : CUDA_KERNEL_REDUCE_F32, &sums, stream);
}

/* As shrink_job(). */
static int64_t gradient_job(const struct cuda_device *device, const struct plora__linear_args *args,
                            const struct plan *plan, int is_a, float **partials, struct gradient_job *job,
                            struct reduce_job *sum)
{
    const plora_matrix *in = is_a ? &args->x : &args->y;
    const int64_t blocks = pieces(in->columns, block_extent(plan)), tiles = pieces(args->tokens, LINEAR_TILE);
    const int64_t split = tiles_of_split(device, 2 * blocks, tiles), splits = pieces(tiles, split);
    *job = (struct gradient_job){.in = in->data,
                                 .low = in_workspace(args, is_a ? plan->v : plan->u),
                                 .partials = *partials,
                                 .stride = in->stride,
                                 .columns = in->columns,
                                 .rank_stride = is_a ? in->columns : 1,
                                 .column_stride = is_a ? 1 : args->rank,
                                 .dtype = in->dtype,
                                 .aligned = is_aligned(in->data, in->stride, in->dtype, access_count(plan)),
                                 .drop = is_a && args->dropout.probability > 0.0,
                                 .split_tokens = (int32_t)(split * LINEAR_TILE)};
    *sum = (struct reduce_job){.partials = *partials,
                               .out = is_a ? args->a_gradient : args->b_gradient,
                               .count = args->rank * in->columns,
                               .splits = (int32_t)splits};
    *partials += splits * sum->count;
    return blocks * splits * pieces(plan->padded_rank, LINEAR_TILE);
}

static plora_status gradients(struct cuda_device *device, const struct plora__linear_args *args,
                              const struct plan *plan, void *stream)
{
    float *partials = in_workspace(args, plan->partials);
    struct gradient_params params = {.padded_rank = (int32_t)plan->padded_rank,
                                     .rank = args->rank,
                                     .tokens = args->tokens,
                                     .dropout = dropout_params(args)};
    struct reduce_params sums = {.scale = 1.0f, .accumulate = 1};
    int64_t blocks = gradient_job(device, args, plan, 1, &partials, &params.jobs[0], &sums.jobs[0]);
    params.first_blocks = (uint32_t)blocks;
    blocks += gradient_job(device, args, plan, 0, &partials, &params.jobs[1], &sums.jobs[1]);
    PLORA_TRY(launch(device, plan->bf16 ? CUDA_KERNEL_GRADIENT_BF16 : CUDA_KERNEL_GRADIENT_F32, blocks,
                     plan->bf16 ? LINEAR_TILE_THREADS : LINEAR_FMA_THREADS, &params, stream));
    return reduce(device, CUDA_KERNEL_REDUCE_F32, &sums, stream);
}

/* ------------------------------------------------------------------------------------------------------------ products */

/* A part of a matrix: `data` is its first element, in rows of `stride`. */
struct operand {
    const void *data;
    int64_t stride;
    int32_t dtype;
};

struct product {
    int64_t rows, columns, terms; /* out[rows, columns] = in[rows, terms] weight */
    struct operand in, weight;    /* weight is [columns, terms] by_output, else [terms, columns] */
    int32_t by_output;
    void *out;
    int64_t out_stride;
    int32_t out_dtype;
    int32_t accumulate;
};

static cudaDataType_t cublas_dtype(int32_t dtype)
{
    return dtype == PLORA_F32 ? CUDA_R_32F : dtype == PLORA_BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

/* cuBLAS is column-major, so it is given out^T[columns, rows] = weight^T in^T. Its handle is shared, its workspace is the call's. */
static plora_status multiply(struct cuda_device *device, const struct plora__linear_args *args, const struct plan *plan,
                             const struct product *p, void *stream)
{
    const float alpha = 1.0f, beta = p->accumulate ? 1.0f : 0.0f;
    plora_status status = PLORA_OK;
    int previous = 0;
    PLORA_TRY(cuda_enter(device, &previous));
    pthread_mutex_lock(&device->cublas_lock);
    CUBLAS_TRY_OUT(device, cublasSetStream_v2, device->cublas, stream);
    /* After the stream, which resets it. */
    CUBLAS_TRY_OUT(device, cublasSetWorkspace_v2, device->cublas, in_workspace(args, plan->cublas), plan->cublas_bytes);
    CUBLAS_TRY_OUT(device, cublasGemmEx_64, device->cublas, p->by_output ? CUDA_BLAS_T : CUDA_BLAS_N, CUDA_BLAS_N,
                   p->columns, p->rows, p->terms, &alpha, p->weight.data, cublas_dtype(p->weight.dtype),
                   p->weight.stride, p->in.data, cublas_dtype(p->in.dtype), p->in.stride, &beta, p->out,
                   cublas_dtype(p->out_dtype), p->out_stride, CUDA_BLAS_COMPUTE_32F, CUDA_BLAS_GEMM_DEFAULT);
out:
    pthread_mutex_unlock(&device->cublas_lock);
    cuda_leave(device, previous);
    return status;
}

/* Widens [rows, columns] of an operand into a panel, which takes its place. */
static plora_status widen(struct cuda_device *device, struct operand *operand, int64_t rows, int64_t columns,
                          void *panel, int64_t panel_stride, void *stream)
{
    const struct widen_params params = {.in = operand->data,
                                        .out = panel,
                                        .in_stride = operand->stride,
                                        .out_stride = panel_stride,
                                        .rows = rows,
                                        .columns = columns,
                                        .dtype = operand->dtype,
                                        .aligned = is_aligned(operand->data, operand->stride, operand->dtype, 4)};
    *operand = (struct operand){panel, panel_stride, PLORA_F32};
    return launch(device, CUDA_KERNEL_WIDEN, rows * pieces(columns, 4 * CONVERT_THREADS), CONVERT_THREADS, &params,
                  stream);
}

/* The panel of a quantised weight from (row, column) on. */
static plora_status dequantise(struct cuda_device *device, const struct plora__linear_args *args,
                               struct operand *operand, int64_t row, int64_t column, int64_t rows, int64_t columns,
                               void *panel, int64_t panel_stride, int32_t dtype, void *stream)
{
    const struct plora__dequantise_args panel_args = {.weight = *args->quantised,
                                                      .first_row = row,
                                                      .first_column = column,
                                                      .out = {panel, rows, columns, panel_stride, dtype, 0}};
    *operand = (struct operand){panel, panel_stride, dtype};
    return cuda_dequantise(device, &panel_args, stream);
}

/* [first, first + columns) of `out`: what it holds or not, the fp32 sum or NULL, bias, and the low-rank part. */
static plora_status expand(struct cuda_device *device, const struct side *side, const struct plan *plan, int64_t first,
                           int64_t columns, const float *sum, int32_t keep_out, void *stream)
{
    const struct plora__linear_args *args = side->args;
    const plora_matrix *out = side->out;
    const int32_t bf16 = plan->bf16 && args->rank > 0, factor_dtype = bf16 ? PLORA_BF16 : PLORA_F32;
    const void *bias = side->has_bias ? element(args->bias, first, args->bias_dtype) : NULL;
    struct expand_params params = {.out = (char *)out->data + first * (int64_t)plora__dtype_size(out->dtype),
                                   .sum = sum,
                                   .bias = bias,
                                   .stride = out->stride,
                                   .sum_stride = WIDTH,
                                   .tokens = args->tokens,
                                   .columns = columns,
                                   .first_column = first,
                                   .dtype = out->dtype,
                                   .keep_out = keep_out,
                                   .bias_dtype = args->bias_dtype};
    params.aligned = is_aligned(params.out, out->stride, out->dtype, bf16 ? 8 : 4);
    if (args->rank > 0) {
        params.low = in_workspace(args, side->low);
        params.factor = element(in_workspace(args, side->factor), first, factor_dtype);
        params.factor_stride = side->factor_stride;
        params.padded_rank = (int32_t)plan->padded_rank;
        params.drop = side->drop;
        params.dropout = dropout_params(args);
    }
    return launch(device, bf16 ? CUDA_KERNEL_EXPAND_BF16 : CUDA_KERNEL_EXPAND_F32,
                  pieces(args->tokens, bf16 ? LINEAR_BLOCK : LINEAR_TILE) * pieces(columns, LINEAR_TILE),
                  bf16 ? LINEAR_TILE_THREADS : LINEAR_FMA_THREADS, &params, stream);
}

/* The product of all terms for `columns` columns of the output from `first` on, into target. */
static plora_status base_panel(struct cuda_device *device, const struct side *side, const struct plan *plan,
                               int64_t first, int64_t columns, struct product *target, void *stream)
{
    const struct plora__linear_args *args = side->args;
    const plora_matrix *in = side->in, *weight = &args->weight;
    const int direct = is_direct(side);
    const int64_t depth = direct ? in->columns : DEPTH;
    struct product p = *target;
    p.rows = args->tokens;
    p.columns = columns;
    p.by_output = side->weight_by_output;
    for (int64_t begin = 0; begin < in->columns; begin += depth) {
        p.terms = at_most(in->columns - begin, depth);
        const int64_t row = p.by_output ? first : begin, column = p.by_output ? begin : first;
        p.in = (struct operand){element(in->data, begin, in->dtype), in->stride, in->dtype};
        if (!direct && p.in.dtype != panel_dtype(side))
            PLORA_TRY(widen(device, &p.in, p.rows, p.terms, in_workspace(args, plan->in_panel), DEPTH, stream));
        const int64_t weight_rows = p.by_output ? columns : p.terms, weight_columns = p.by_output ? p.terms : columns;
        void *panel = in_workspace(args, plan->weight_panel);
        if (args->quantised != NULL) {
            PLORA_TRY(dequantise(device, args, &p.weight, row, column, weight_rows, weight_columns, panel,
                                 p.by_output ? DEPTH : WIDTH, panel_dtype(side), stream));
        } else {
            p.weight = (struct operand){element(weight->data, row * weight->stride + column, weight->dtype),
                                        weight->stride, weight->dtype};
            if (!direct && p.weight.dtype != PLORA_F32)
                PLORA_TRY(
                    widen(device, &p.weight, weight_rows, weight_columns, panel, p.by_output ? DEPTH : WIDTH, stream));
        }
        PLORA_TRY(multiply(device, args, plan, &p, stream));
        p.accumulate = 1;
    }
    return PLORA_OK;
}

/* out = in W + bias + low factor */
static plora_status compute_side(struct cuda_device *device, const struct side *side, const struct plan *plan,
                                 void *stream)
{
    const struct plora__linear_args *args = side->args;
    const plora_matrix *out = side->out;
    const int32_t sums = needs_sum(side);
    const int64_t width = sums || !is_direct(side) ? WIDTH : out->columns;
    for (int64_t first = 0; first < out->columns && !args->delta_only; first += width) {
        const int64_t columns = at_most(out->columns - first, width);
        struct product target = {.out_dtype = out->dtype, .out_stride = out->stride, .accumulate = side->keep_out};
        target.out = (char *)out->data + first * (int64_t)plora__dtype_size(out->dtype);
        if (sums)
            target = (struct product){
                .out = in_workspace(args, plan->sum_panel), .out_dtype = PLORA_F32, .out_stride = WIDTH};
        PLORA_TRY(base_panel(device, side, plan, first, columns, &target, stream));
        if (sums) PLORA_TRY(expand(device, side, plan, first, columns, target.out, side->keep_out, stream));
    }
    if ((sums && !args->delta_only) || (args->rank == 0 && !side->has_bias)) return PLORA_OK;
    return expand(device, side, plan, 0, out->columns, NULL, 1, stream);
}

/* ------------------------------------------------------------------------------------------------------------- launchers */

plora_status cuda_linear_forward(void *device, const struct plora__linear_args *args, void *stream)
{
    const struct plan plan = make_plan(device, args, 1);
    if (args->rank > 0) {
        PLORA_TRY(pack(device, args, &plan, stream));
        PLORA_TRY(shrink(device, args, &plan, 0, stream));
    }
    const struct side side = forward_side(args, &plan);
    return compute_side(device, &side, &plan, stream);
}

plora_status cuda_linear_backward(void *device, const struct plora__linear_args *args, void *stream)
{
    const struct plan plan = make_plan(device, args, 0);
    if (args->rank > 0) {
        PLORA_TRY(pack(device, args, &plan, stream));
        PLORA_TRY(shrink(device, args, &plan, 1, stream));
        PLORA_TRY(gradients(device, args, &plan, stream));
    }
    if (args->dx.data == NULL) return PLORA_OK;
    const struct side side = backward_side(args, &plan);
    return compute_side(device, &side, &plan, stream);
}
