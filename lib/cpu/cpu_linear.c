/* cpu_linear.c: the linear layer with its adapter, on oneDNN products. Forward and backward are one form each way:
 *
 *     forward   low = s (in A^T)     out = in W^T + low B^T       in = x,  out = y
 *     backward  low = s (in B)       out = in W   + low A         in = dy, out = dx          [D] features in, [O] out
 *     gradient  dB += dy^T u, dA += v^T x                         both as  g[R,D] = low[T,R]^T in[T,D]
 *
 * Where the operands are what oneDNN multiplies, one product by all threads is fastest. In deterministic mode, and where W or
 * `out` must be converted, the output is cut into panels of PANEL columns, one thread each with sequential products: the bits do
 * not depend on the number of threads, and a converted tile of W stays in the cache.
 *
 * The low-rank products do little with much memory, so they are cut where the memory is: each thread takes neighbouring rows, those
 * of x, dy and `out` that its cache holds (low_rank_pass(), expand_rows()).
 *
 * A whole product whose sum is longer than REDUCTION (the gradient of a head's input) is cut along it: measured at
 * [256,49152] x [49152,576], pieces of 16384 run at 313 GFLOP/s in fp32 where one product runs at 217.
 *
 * Precision: operands are bf16 when x and W are (and the processor multiplies bf16), else fp32, widened here: `in` as a
 * whole, W one panel at a time, as is a quantised W, which panels make what the operands are. Accumulation is fp32. In bf16 the low-rank operands are rounded copies padded to `padded_rank`.
 *
 * Workspace (plan): what is marked * exists once per thread.
 *     in_wide[T,D] x_wide[T,K] dropped[T,K] low[T,R] u[T,R] v[T,R] a16[R,K] b16[N,R] gradient[R,N] bias[N] pieces[T,O] expand
 *     *gradient[R,K+N] instead of that *weight_tile[D,PANEL] *sum_tile[T,PANEL] *delta_tile[T,PANEL] */
#include "convert_kernels.h"
#include "cpu_backend.h"
#include "dequantise_kernels.h"
#include "dtype.h"
#include "isa.h"
#include "product.h"
#include "status.h"
#include "threads.h"

enum {
    PANEL = 96,
    TOKEN_TILE = 64,
    TOKEN_PANEL = 128,
    SHARES_MOST = 8, /* their gradients take memory */
    TILE_RANK = 32,
    REDUCTION = 16384,
    ALIGNMENT = 64
};

struct plan {
    int bf16;            /* operands are bf16 */
    int whole;           /* `out` in one product by all threads, not in panels */
    int shares;          /* of the tokens, each with gradients of its own: one per thread; 0 = not cut along them */
    int64_t padded_rank; /* R, on matrix tiles rounded up to a full one */
    /* offsets: */
    size_t in_wide, x_wide, dropped, low, u, v, a16, b16, gradient, bias, weight_tile, sum_tile, delta_tile, pieces,
        expand;
    size_t weight_tile_bytes, sum_tile_bytes; /* per thread */
    size_t bytes;
};

static size_t reserve(size_t *total, size_t bytes)
{
    const size_t offset = *total;
    *total += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return offset;
}

/* Of cpu_merge_rows() on [T,columns]. */
static size_t merge_bytes(const struct plora__linear_args *args, int64_t columns)
{
    const struct plora__merge_args merge = {.weight = {.rows = args->tokens, .columns = columns, .dtype = PLORA_F32},
                                            .rank = args->rank};
    return args->rank > 0 ? cpu_merge_workspace(NULL, &merge) : 0;
}

static struct plan make_plan(const struct cpu_device *cpu, const struct plora__linear_args *args, int is_forward)
{
    struct plan plan = {0};
    const size_t tokens = (size_t)args->tokens, in = (size_t)args->in_features, out = (size_t)args->out_features;
    const size_t threads = (size_t)cpu->threads;
    const int dropout = args->dropout.probability > 0.0;
    plan.bf16 = args->x.dtype == PLORA_BF16 && (is_forward || args->y.dtype == PLORA_BF16) &&
                args->weight.dtype == PLORA_BF16 && cpu_products_bf16(cpu);
    plan.padded_rank = args->rank;
    if (plan.bf16 && cpu_products_tiles(cpu)) plan.padded_rank = (args->rank + TILE_RANK - 1) / TILE_RANK * TILE_RANK;
    const size_t rank = (size_t)plan.padded_rank, wider = in > out ? in : out;
    const int widen_x = !plan.bf16 && args->x.dtype == PLORA_BF16, widen_y = !plan.bf16 && args->y.dtype == PLORA_BF16;
    const int narrow_out = !plan.bf16 && (args->x.dtype == PLORA_BF16 || args->y.dtype == PLORA_BF16 ||
                                          (args->dx.data != NULL && args->dx.dtype == PLORA_BF16));

    if (args->quantised != NULL)
        plan.weight_tile_bytes = wider * PANEL * (plan.bf16 ? sizeof(uint16_t) : sizeof(float));
    else if (!plan.bf16 && args->weight.dtype != PLORA_F32)
        plan.weight_tile_bytes = wider * PANEL * sizeof(float);
    plan.whole = !cpu->deterministic && plan.weight_tile_bytes == 0 && !narrow_out;
    const size_t tile_columns = plan.whole && wider > PANEL * threads ? wider : PANEL * threads;
    plan.sum_tile_bytes = (tokens * tile_columns + threads - 1) / threads * sizeof(float);
    plan.in_wide = reserve(&plan.bytes, widen_x || widen_y ? tokens * wider * sizeof(float) : 0);
    plan.x_wide = reserve(&plan.bytes, widen_x ? tokens * in * sizeof(float) : 0);
    plan.dropped = reserve(&plan.bytes, dropout ? tokens * in * sizeof(float) : 0);
    plan.low = reserve(&plan.bytes, tokens * rank * sizeof(float));
    plan.u = reserve(&plan.bytes, tokens * rank * sizeof(float));
    plan.v = reserve(&plan.bytes, tokens * rank * sizeof(float));
    plan.a16 = reserve(&plan.bytes, plan.bf16 ? rank * in * sizeof(uint16_t) : 0);
    plan.b16 = reserve(&plan.bytes, plan.bf16 ? rank * out * sizeof(uint16_t) : 0);
    plan.shares = cpu->deterministic || cpu->threads > SHARES_MOST ? 0 : cpu->threads;
    plan.gradient =
        reserve(&plan.bytes, rank * (plan.shares > 0 ? (size_t)plan.shares * (in + out) : out) * sizeof(float));
    plan.bias = reserve(&plan.bytes, out * sizeof(float));
    const size_t long_in = args->in_features > REDUCTION ? tokens * out : 0;
    const size_t long_out = args->out_features > REDUCTION ? tokens * in : 0;
    plan.pieces = reserve(&plan.bytes, plan.whole ? (long_in > long_out ? long_in : long_out) * sizeof(float) : 0);
    plan.expand = reserve(&plan.bytes, !plan.bf16 ? merge_bytes(args, (int64_t)wider) : 0);
    plan.weight_tile = reserve(&plan.bytes, plan.weight_tile_bytes * threads);
    plan.sum_tile = reserve(&plan.bytes, narrow_out ? plan.sum_tile_bytes * threads : 0);
    plan.delta_tile = reserve(&plan.bytes, dropout ? plan.sum_tile_bytes * threads : 0);
    return plan;
}

size_t cpu_linear_workspace(void *device, const struct plora__linear_args *args)
{
    const size_t forward_bytes = make_plan(device, args, 1).bytes, backward_bytes = make_plan(device, args, 0).bytes;
    return forward_bytes > backward_bytes ? forward_bytes : backward_bytes;
}

/* ------------------------------------------------------------------------------------------------ products cut in tiles */

static struct cpu_matrix rows_of(const void *data, int64_t stride, int32_t dtype)
{
    return (struct cpu_matrix){(void *)(uintptr_t)data, stride, 1, dtype};
}

static struct cpu_matrix transposed(struct cpu_matrix matrix)
{
    return (struct cpu_matrix){matrix.data, matrix.column_stride, matrix.row_stride, matrix.dtype};
}

static void *at(const struct cpu_matrix *matrix, int64_t row, int64_t column)
{
    return (char *)matrix->data +
           (row * matrix->row_stride + column * matrix->column_stride) * (int64_t)plora__dtype_size(matrix->dtype);
}

/* A product cut along m (rows) or n (columns) into tiles of fixed size: the same bits for any number of threads. Where that
 * is not asked for, oneDNN cuts it. */
static plora_status tiled_product(struct cpu_device *cpu, const struct cpu_product *product, int along_rows,
                                  int64_t tile)
{
    if (!cpu->deterministic) return cpu_product(cpu, product);
    const int64_t extent = along_rows ? product->m : product->n;
    const int64_t tiles = (extent + tile - 1) / tile;
    struct cpu_primitive *full = NULL, *last = NULL;
    struct cpu_product piece = *product;
    int64_t *const size = along_rows ? &piece.m : &piece.n;
    if (extent >= tile) {
        *size = tile;
        PLORA_TRY(cpu_product_prepare(cpu, &piece, 1, &full));
    }
    if (extent % tile != 0) {
        *size = extent % tile;
        PLORA_TRY(cpu_product_prepare(cpu, &piece, 1, &last));
    }
    int failed = 0;
    const int threads = cpu_threads_for(cpu, 2.0 * (double)product->m * (double)product->n * (double)product->k);
    (void)threads;                         /* unused without OpenMP */
    const int before = cpu_set_threads(1); /* of oneDNN, inside our region */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < tiles; ++i) {
        struct cpu_product own = *product;
        const int64_t begin = i * tile;
        if (along_rows)
            own.a.data = at(&product->a, begin, 0);
        else
            own.b.data = at(&product->b, 0, begin);
        own.c.data = at(&product->c, along_rows ? begin : 0, along_rows ? 0 : begin);
        const struct cpu_primitive *primitive = extent - begin >= tile ? full : last;
        const int status = cpu_product_run(cpu, primitive, &own, cpu_thread_index());
        if (status != 0) {
#pragma omp atomic write
            failed = status;
        }
    }
    cpu_set_threads(before);
    return failed == 0 ? PLORA_OK : cpu_product_failed(product, failed);
}

/* ------------------------------------------------------------------------------------------------ out = in W + low E */

struct side {
    const struct plora__linear_args *args;
    const struct plan *plan;
    int64_t tokens, d, o, rank; /* rank is the padded one, 0 = no low-rank part */
    struct cpu_matrix in;       /* [T,D], in the operands' dtype */
    struct cpu_matrix weight;   /* [D,O], in its own dtype */
    struct cpu_matrix low;      /* [T,rank] */
    struct cpu_matrix factor;   /* [rank,O] */
    struct cpu_matrix out;      /* [T,O] */
    const float *bias;          /* [O] or NULL */
    int base;                   /* add the product with W */
    int accumulate;             /* to what `out` holds */
    int drop;                   /* dropout on the low-rank part of the output */
};

struct panel_primitives {
    struct cpu_primitive *base, *expand;
};

static struct cpu_product base_product(const struct side *side, int64_t width, struct cpu_matrix weight,
                                       struct cpu_matrix target)
{
    return (struct cpu_product){.m = side->tokens,
                                .n = width,
                                .k = side->d,
                                .a = side->in,
                                .b = weight,
                                .c = target,
                                .bias = side->bias,
                                .accumulate = side->accumulate};
}

static struct cpu_product expand_product(const struct side *side, int64_t width, struct cpu_matrix target,
                                         int accumulate)
{
    return (struct cpu_product){.m = side->tokens,
                                .n = width,
                                .k = side->rank,
                                .a = side->low,
                                .b = side->factor,
                                .c = target,
                                .accumulate = accumulate};
}

/* Whether expand_rows() adds the low-rank part. */
static int expands_by_rows(const struct side *side)
{
    return side->plan->whole && !side->plan->bf16 && !side->drop && side->rank > 0;
}

/* out += low factor by the kernels of the merge. Where `out` comes from a product just before, each thread finds its rows in its
 * own cache; oneDNN deals them otherwise, and takes 1.5 times as long. */
static void expand_rows(const struct side *side, int threads)
{
    const struct plora__merge_args args = {
        .weight = {side->out.data, side->tokens, side->o, side->out.row_stride, side->out.dtype, 0},
        .rank = side->rank,
        .factor = 1.0f,
        .left = side->low.data,
        .left_row_stride = side->low.row_stride,
        .left_rank_stride = side->low.column_stride,
        .right = side->factor.data,
        .right_rank_stride = side->factor.row_stride,
        .right_column_stride = side->factor.column_stride,
        .workspace = (char *)side->args->workspace + side->plan->expand,
    };
    cpu_merge_rows(threads, &args);
}

/* Where one panel's operands lie: `out` itself or fp32 tiles of this thread. */
struct panel {
    struct cpu_matrix weight; /* [D,width] */
    struct cpu_matrix sum;    /* [T,width]: receives base and low-rank part */
    struct cpu_matrix delta;  /* [T,width]: receives the low-rank part before dropout */
    int narrow;               /* sum is a tile to be rounded into out */
};

static struct panel place_panel(const struct side *side, int64_t begin, int64_t width, int64_t panel_width, int thread)
{
    const struct plan *plan = side->plan;
    char *workspace = side->args->workspace;
    struct panel panel = {.weight = side->weight, .sum = side->out};
    if (side->args->quantised == NULL) panel.weight.data = at(&side->weight, 0, begin);
    panel.sum.data = at(&side->out, 0, begin);
    if (plan->weight_tile_bytes > 0) {
        void *tile = workspace + plan->weight_tile + plan->weight_tile_bytes * (size_t)thread;
        const int32_t dtype = plan->bf16 ? PLORA_BF16 : PLORA_F32;
        panel.weight =
            side->weight.column_stride == 1 ? rows_of(tile, width, dtype) : transposed(rows_of(tile, side->d, dtype));
    }
    panel.narrow = !plan->bf16 && side->out.dtype != PLORA_F32;
    if (panel.narrow)
        panel.sum = rows_of(workspace + plan->sum_tile + plan->sum_tile_bytes * (size_t)thread, panel_width, PLORA_F32);
    panel.delta = panel.sum;
    if (side->drop)
        panel.delta =
            rows_of(workspace + plan->delta_tile + plan->sum_tile_bytes * (size_t)thread, panel_width, PLORA_F32);
    return panel;
}

static plora_status prepare_panel(struct cpu_device *cpu, const struct side *side, int64_t width, int64_t panel_width,
                                  int sequential, struct panel_primitives *primitives)
{
    const struct panel panel = place_panel(side, 0, width, panel_width, 0);
    const struct cpu_product base = base_product(side, width, panel.weight, panel.sum);
    const struct cpu_product expand = expand_product(side, width, panel.delta, !side->drop);
    if (side->base) PLORA_TRY(cpu_product_prepare(cpu, &base, sequential, &primitives->base));
    if (side->rank > 0 && !expands_by_rows(side))
        PLORA_TRY(cpu_product_prepare(cpu, &expand, sequential, &primitives->expand));
    return PLORA_OK;
}

/* The panel's part of W, in its tile. */
static void fill_weight(const struct side *side, int64_t begin, int64_t width, const struct panel *panel)
{
    const struct cpu_convert_kernels *convert = cpu_convert_kernels(cpu_isa());
    const int by_rows = side->weight.column_stride == 1;
    const int64_t lines = by_rows ? side->d : width, length = by_rows ? width : side->d;
    if (side->args->quantised != NULL) {
        const struct plora__dequantise_args args = {
            .weight = *side->args->quantised,
            .first_row = by_rows ? 0 : begin,
            .first_column = by_rows ? begin : 0,
            .out = {panel->weight.data, lines, length, length, panel->weight.dtype, 0}};
        cpu_dequantise_with(cpu_dequantise_kernels(cpu_isa()), 1, &args);
        return;
    }
    for (int64_t i = 0; i < lines; ++i)
        convert->widen((float *)panel->weight.data + i * length,
                       by_rows ? at(&side->weight, i, begin) : at(&side->weight, 0, begin + i), side->weight.dtype,
                       length);
}

/* One panel of the output by the calling thread (or, with a whole product, by all). Returns oneDNN's status. */
static int run_panel(const struct cpu_device *cpu, const struct side *side, const struct panel_primitives *primitives,
                     int64_t begin, int64_t width, int64_t panel_width, int thread)
{
    const struct cpu_convert_kernels *convert = cpu_convert_kernels(cpu_isa());
    const struct panel panel = place_panel(side, begin, width, panel_width, thread);
    const int keep = side->accumulate || !side->base;
    if (panel.narrow && keep)
        for (int64_t t = 0; t < side->tokens; ++t)
            convert->widen(at(&panel.sum, t, 0), at(&side->out, t, begin), side->out.dtype, width);
    if (side->base) {
        if (side->plan->weight_tile_bytes > 0) fill_weight(side, begin, width, &panel);
        struct cpu_product base = base_product(side, width, panel.weight, panel.sum);
        if (base.bias != NULL) base.bias += begin;
        const int status = cpu_product_run(cpu, primitives->base, &base, thread);
        if (status != 0) return status;
    }
    if (primitives->expand != NULL) {
        struct cpu_product expand = expand_product(side, width, panel.delta, !side->drop);
        expand.b.data = at(&side->factor, 0, begin);
        const int status = cpu_product_run(cpu, primitives->expand, &expand, thread);
        if (status != 0) return status;
    }
    if (side->rank > 0 && side->drop) {
        const struct plora__dropout *dropout = &side->args->dropout;
        for (int64_t t = 0; t < side->tokens; ++t)
            convert->dropout_add(at(&panel.sum, t, 0), panel.sum.dtype, at(&panel.delta, t, 0), dropout,
                                 plora__dropout_element(dropout, t, begin), width);
    }
    if (panel.narrow)
        for (int64_t t = 0; t < side->tokens; ++t)
            convert->narrow(at(&side->out, t, begin), at(&panel.sum, t, 0), width);
    return 0;
}

static plora_status compute_panels(struct cpu_device *cpu, const struct side *side)
{
    const int whole = side->plan->whole;
    const int threads =
        cpu_threads_for(cpu, 2.0 * (double)side->tokens * (double)side->o * (double)(side->d + side->rank));
    const int sequential = !whole || threads == 1;
    const int64_t panel_width = whole ? side->o : PANEL;
    const int64_t panels = (side->o + panel_width - 1) / panel_width, last_width = side->o - (panels - 1) * panel_width;
    struct panel_primitives full = {0}, last = {0};
    PLORA_TRY(prepare_panel(cpu, side, last_width, panel_width, sequential, &last));
    if (panels > 1) PLORA_TRY(prepare_panel(cpu, side, panel_width, panel_width, sequential, &full));
    int failed = 0;
    const int before = cpu_set_threads(sequential ? 1 : threads); /* of oneDNN */
    if (whole) {
        failed = run_panel(cpu, side, &last, 0, last_width, panel_width, 0);
        if (failed == 0 && expands_by_rows(side)) expand_rows(side, threads);
    } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int64_t i = 0; i < panels; ++i) {
            const int64_t width = i + 1 < panels ? panel_width : last_width;
            const int status = run_panel(cpu, side, i + 1 < panels ? &full : &last, i * panel_width, width, panel_width,
                                         cpu_thread_index());
            if (status != 0) {
#pragma omp atomic write
                failed = status;
            }
        }
    }
    cpu_set_threads(before);
    if (failed == 0) return PLORA_OK;
    const struct cpu_product product = base_product(side, side->o, side->weight, side->out);
    return cpu_product_failed(&product, failed);
}

/* A long sum in pieces, in fp32: a bf16 output is rounded once, at the end. */
static plora_status compute_pieces(struct cpu_device *cpu, const struct side *side)
{
    const struct cpu_convert_kernels *convert = cpu_convert_kernels(cpu_isa());
    const int narrow = side->out.dtype != PLORA_F32;
    struct side piece = *side;
    if (narrow) piece.out = rows_of((char *)side->args->workspace + side->plan->pieces, side->o, PLORA_F32);
    if (narrow && side->accumulate)
        for (int64_t t = 0; t < side->tokens; ++t)
            convert->widen(at(&piece.out, t, 0), at(&side->out, t, 0), side->out.dtype, side->o);
    for (int64_t begin = 0; begin < side->d; begin += REDUCTION) {
        const int last = side->d - begin <= REDUCTION;
        piece.d = last ? side->d - begin : REDUCTION;
        piece.in.data = at(&side->in, 0, begin);
        piece.weight.data = at(&side->weight, begin, 0);
        piece.accumulate = side->accumulate || begin > 0;
        piece.bias = begin == 0 ? side->bias : NULL;
        piece.rank = last ? side->rank : 0;
        PLORA_TRY(compute_panels(cpu, &piece));
    }
    if (narrow)
        for (int64_t t = 0; t < side->tokens; ++t)
            convert->narrow(at(&side->out, t, 0), at(&piece.out, t, 0), side->o);
    return PLORA_OK;
}

static plora_status compute_side(struct cpu_device *cpu, const struct side *side)
{
    if (!side->base && side->rank == 0) return PLORA_OK;
    return side->plan->whole && side->base && side->d > REDUCTION ? compute_pieces(cpu, side)
                                                                  : compute_panels(cpu, side);
}

/* --------------------------------------------------------------------------------------------- operands of the products */

/* x or dy as an operand: itself, or widened to fp32 into `wide`. */
static struct cpu_matrix operand(const struct cpu_device *cpu, const struct plan *plan, const plora_matrix *matrix,
                                 void *wide)
{
    if (plan->bf16 || matrix->dtype == PLORA_F32) return rows_of(matrix->data, matrix->stride, matrix->dtype);
    const struct cpu_convert_kernels *convert = cpu_convert_kernels(cpu_isa());
    const struct cpu_matrix source = rows_of(matrix->data, matrix->stride, matrix->dtype);
    const struct cpu_matrix target = rows_of(wide, matrix->columns, PLORA_F32);
    const int threads = cpu_threads_for(cpu, 4.0 * (double)matrix->rows * (double)matrix->columns);
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < matrix->rows; ++t)
        convert->widen(at(&target, t, 0), at(&source, t, 0), matrix->dtype, matrix->columns);
    return target;
}

/* dropout(x), or x itself without dropout. */
static struct cpu_matrix dropped_input(const struct cpu_device *cpu, const struct plora__linear_args *args,
                                       const struct plan *plan, struct cpu_matrix x)
{
    const struct plora__dropout *dropout = &args->dropout;
    if (dropout->probability <= 0.0) return x;
    const struct cpu_convert_kernels *convert = cpu_convert_kernels(cpu_isa());
    const struct cpu_matrix target = rows_of((char *)args->workspace + plan->dropped, args->in_features, x.dtype);
    const int threads = cpu_threads_for(cpu, 32.0 * (double)args->tokens * (double)args->in_features);
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < args->tokens; ++t)
        convert->dropout(at(&target, t, 0), at(&x, t, 0), x.dtype, dropout, plora__dropout_element(dropout, t, 0),
                         args->in_features);
    return target;
}

/* A as [padded_rank, K] and B as [N, padded_rank] operands: themselves in fp32, rounded and zero-padded copies in bf16. */
static void low_rank_factors(const struct cpu_device *cpu, const struct plora__linear_args *args,
                             const struct plan *plan, struct cpu_matrix *a, struct cpu_matrix *b)
{
    if (!plan->bf16) {
        *a = rows_of(args->a, args->in_features, PLORA_F32);
        *b = rows_of(args->b, args->rank, PLORA_F32);
        return;
    }
    const struct cpu_convert_kernels *convert = cpu_convert_kernels(cpu_isa());
    *a = rows_of((char *)args->workspace + plan->a16, args->in_features, PLORA_BF16);
    *b = rows_of((char *)args->workspace + plan->b16, plan->padded_rank, PLORA_BF16);
    const int64_t pad = plan->padded_rank - args->rank;
    convert->narrow(a->data, args->a, args->rank * args->in_features);
    memset(at(a, args->rank, 0), 0, (size_t)(pad * args->in_features) * sizeof(uint16_t));
    const int threads = cpu_threads_for(cpu, 4.0 * (double)args->out_features * (double)plan->padded_rank);
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < args->out_features; ++n) {
        convert->narrow(at(b, n, 0), args->b + n * args->rank, args->rank);
        memset(at(b, n, args->rank), 0, (size_t)pad * sizeof(uint16_t));
    }
}

/* low = s in factor, as an operand: fp32 at `rounded`'s place, or rounded to bf16. */
static plora_status shrink(struct cpu_device *cpu, const struct plora__linear_args *args, const struct plan *plan,
                           struct cpu_matrix in, int64_t d, struct cpu_matrix factor, size_t place,
                           struct cpu_matrix *low)
{
    float *sum = (float *)(void *)((char *)args->workspace + (plan->bf16 ? plan->low : place));
    const struct cpu_product product = {.m = args->tokens,
                                        .n = plan->padded_rank,
                                        .k = d,
                                        .a = in,
                                        .b = factor,
                                        .c = rows_of(sum, plan->padded_rank, PLORA_F32)};
    PLORA_TRY(tiled_product(cpu, &product, 1, TOKEN_TILE));
    uint16_t *rounded = plan->bf16 ? (uint16_t *)(void *)((char *)args->workspace + place) : NULL;
    cpu_convert_kernels(cpu_isa())->scale(sum, rounded, args->scale, args->tokens * plan->padded_rank);
    *low = plan->bf16 ? rows_of(rounded, plan->padded_rank, PLORA_BF16) : product.c;
    return PLORA_OK;
}

/* W as the [D,O] operand of the forward (W^T) or the backward (W). */
static struct cpu_matrix weight_operand(const struct plora__linear_args *args, int forward)
{
    const struct cpu_matrix stored = rows_of(args->weight.data, args->weight.stride, args->weight.dtype);
    return forward != args->fan_in_fan_out ? transposed(stored) : stored;
}

/* ------------------------------------------------------------------------------------------------------------- launchers */

static plora_status forward(struct cpu_device *cpu, const struct plora__linear_args *args)
{
    const struct plan plan = make_plan(cpu, args, 1);
    char *workspace = args->workspace;
    struct side side = {.args = args,
                        .plan = &plan,
                        .tokens = args->tokens,
                        .d = args->in_features,
                        .o = args->out_features,
                        .rank = plan.padded_rank,
                        .base = !args->delta_only};
    side.in = operand(cpu, &plan, &args->x, workspace + plan.in_wide);
    side.weight = weight_operand(args, 1);
    side.out = rows_of(args->y.data, args->y.stride, args->y.dtype);
    if (args->bias != NULL && side.base) {
        float *bias = (float *)(void *)(workspace + plan.bias);
        cpu_convert_kernels(cpu_isa())->widen(bias, args->bias, args->bias_dtype, args->out_features);
        side.bias = bias;
    }
    if (args->rank > 0) {
        struct cpu_matrix a, b;
        low_rank_factors(cpu, args, &plan, &a, &b);
        const struct cpu_matrix x = dropped_input(cpu, args, &plan, side.in);
        PLORA_TRY(shrink(cpu, args, &plan, x, args->in_features, transposed(a), plan.u, &side.low));
        side.factor = transposed(b);
    }
    return compute_side(cpu, &side);
}

/* dA += v^T x and dB += dy^T u */
static plora_status gradients(struct cpu_device *cpu, const struct plora__linear_args *args, const struct plan *plan,
                              struct cpu_matrix x, struct cpu_matrix dy, struct cpu_matrix u, struct cpu_matrix v)
{
    const struct cpu_product a_gradient = {.m = args->rank,
                                           .n = args->in_features,
                                           .k = args->tokens,
                                           .a = transposed(v),
                                           .b = x,
                                           .c = rows_of(args->a_gradient, args->in_features, PLORA_F32),
                                           .accumulate = 1};
    PLORA_TRY(tiled_product(cpu, &a_gradient, 0, PANEL));
    float *sum = (float *)(void *)((char *)args->workspace + plan->gradient);
    const struct cpu_product b_gradient = {.m = args->rank,
                                           .n = args->out_features,
                                           .k = args->tokens,
                                           .a = transposed(u),
                                           .b = dy,
                                           .c = rows_of(sum, args->out_features, PLORA_F32)};
    PLORA_TRY(tiled_product(cpu, &b_gradient, 0, PANEL));
    const struct cpu_convert_kernels *convert = cpu_convert_kernels(cpu_isa());
    const int64_t n = args->out_features, panels = (n + PANEL - 1) / PANEL;
    const int threads = cpu_threads_for(cpu, 4.0 * (double)n * (double)args->rank);
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < panels; ++i)
        convert->transpose_add(args->b_gradient, sum, args->rank, n, i * PANEL,
                               i * PANEL + PANEL < n ? i * PANEL + PANEL : n);
    return PLORA_OK;
}

/* One pass over x and dy instead of four: each thread takes a share of the tokens in panels of TOKEN_PANEL, which stay in its
 * cache for all of u, v, dA and dB. The shares' gradients are added up in order. */
enum { SHRINK_U, SHRINK_V, GRADIENT_A, GRADIENT_B, PASS_PRODUCTS };

struct pass {
    const struct plora__linear_args *args;
    const struct plan *plan;
    struct cpu_matrix x, dy, a, b; /* operands */
    struct cpu_matrix sum[2];      /* x A^T and dy B before rounding, [T,R] */
    struct cpu_matrix low[2];      /* u and v, [T,R] */
    float *gradients;              /* of each share: [R,K][R,N] */
    struct cpu_primitive
        *primitives[2][2][PASS_PRODUCTS]; /* of a full or the last panel; the first of a share, or later */
};

static struct cpu_matrix from_row(struct cpu_matrix matrix, int64_t row)
{
    matrix.data = at(&matrix, row, 0);
    return matrix;
}

static void pass_products(const struct pass *pass, int64_t begin, int64_t tokens, int share, int accumulate,
                          struct cpu_product products[PASS_PRODUCTS])
{
    const struct plora__linear_args *args = pass->args;
    const int64_t rank = pass->plan->padded_rank, k = args->in_features, n = args->out_features;
    float *gradient = pass->gradients + share * rank * (k + n);
    const struct cpu_matrix x = from_row(pass->x, begin), dy = from_row(pass->dy, begin);
    const struct cpu_matrix u = from_row(pass->low[0], begin), v = from_row(pass->low[1], begin);
    products[SHRINK_U] = (struct cpu_product){
        .m = tokens, .n = rank, .k = k, .a = x, .b = transposed(pass->a), .c = from_row(pass->sum[0], begin)};
    products[SHRINK_V] =
        (struct cpu_product){.m = tokens, .n = rank, .k = n, .a = dy, .b = pass->b, .c = from_row(pass->sum[1], begin)};
    products[GRADIENT_A] = (struct cpu_product){.m = args->rank,
                                                .n = k,
                                                .k = tokens,
                                                .a = transposed(v),
                                                .b = x,
                                                .c = rows_of(gradient, k, PLORA_F32),
                                                .accumulate = accumulate};
    products[GRADIENT_B] = (struct cpu_product){.m = args->rank,
                                                .n = n,
                                                .k = tokens,
                                                .a = transposed(u),
                                                .b = dy,
                                                .c = rows_of(gradient + rank * k, n, PLORA_F32),
                                                .accumulate = accumulate};
}

static plora_status prepare_pass(struct cpu_device *cpu, struct pass *pass, int64_t tokens, int is_last, int accumulate)
{
    struct cpu_product products[PASS_PRODUCTS];
    pass_products(pass, 0, tokens, 0, accumulate, products);
    for (int i = 0; i < PASS_PRODUCTS; ++i)
        PLORA_TRY(cpu_product_prepare(cpu, &products[i], 1, &pass->primitives[is_last][accumulate][i]));
    return PLORA_OK;
}

/* Returns oneDNN's status. */
static int run_pass(const struct cpu_device *cpu, const struct pass *pass, int64_t begin, int share, int accumulate)
{
    const int64_t rank = pass->plan->padded_rank, rest = pass->args->tokens - begin;
    const int is_last = rest <= TOKEN_PANEL;
    const int64_t tokens = is_last ? rest : TOKEN_PANEL;
    struct cpu_product products[PASS_PRODUCTS];
    pass_products(pass, begin, tokens, share, accumulate, products);
    int status = 0;
    for (int i = 0; i < PASS_PRODUCTS && status == 0; ++i) {
        status = cpu_product_run(cpu, pass->primitives[is_last][accumulate][i], &products[i], share);
        if (i <= SHRINK_V)
            cpu_convert_kernels(cpu_isa())->scale(products[i].c.data,
                                                  pass->plan->bf16 ? at(&pass->low[i], begin, 0) : NULL,
                                                  pass->args->scale, tokens * rank);
    }
    return status;
}

static void add_shares(const struct cpu_device *cpu, const struct pass *pass, int shares)
{
    const struct plora__linear_args *args = pass->args;
    const struct cpu_convert_kernels *convert = cpu_convert_kernels(cpu_isa());
    const int64_t rank = args->rank, k = args->in_features, n = args->out_features, panels = (n + PANEL - 1) / PANEL;
    const int64_t share_floats = pass->plan->padded_rank * (k + n);
    const int threads = cpu_threads_for(cpu, 4.0 * (double)shares * (double)(n + k) * (double)rank);
    (void)threads; /* unused without OpenMP */
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t r = 0; r < rank; ++r)
            for (int share = 0; share < shares; ++share)
                convert->add(args->a_gradient + r * k, pass->gradients + share * share_floats + r * k, k);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < panels; ++i)
            for (int share = 0; share < shares; ++share)
                convert->transpose_add(args->b_gradient,
                                       pass->gradients + share * share_floats + pass->plan->padded_rank * k, rank, n,
                                       i * PANEL, i * PANEL + PANEL < n ? i * PANEL + PANEL : n);
    }
}

static plora_status compute_pass(struct cpu_device *cpu, struct pass *pass)
{
    const struct plora__linear_args *args = pass->args;
    const int64_t panels = (args->tokens + TOKEN_PANEL - 1) / TOKEN_PANEL;
    const double flop =
        8.0 * (double)args->tokens * (double)(args->in_features + args->out_features) * (double)args->rank;
    int shares = cpu_threads_for(cpu, flop);
    if (shares > panels) shares = (int)panels;
    const int64_t last = args->tokens - (panels - 1) * TOKEN_PANEL;
    for (int later = 0; later < 2; ++later) {
        if (panels > shares || !later) PLORA_TRY(prepare_pass(cpu, pass, last, 1, later));
        if (panels > 1) PLORA_TRY(prepare_pass(cpu, pass, TOKEN_PANEL, 0, later));
    }
    int failed = 0;
    const int before = cpu_set_threads(1); /* of oneDNN, inside our region */
#pragma omp parallel for num_threads(shares) schedule(static)
    for (int share = 0; share < shares; ++share) {
        const int64_t first = panels * share / shares, end = panels * (share + 1) / shares;
        for (int64_t panel = first; panel < end; ++panel) {
            const int status = run_pass(cpu, pass, panel * TOKEN_PANEL, share, panel > first);
            if (status != 0) {
#pragma omp atomic write
                failed = status;
            }
        }
    }
    cpu_set_threads(before);
    if (failed != 0) {
        struct cpu_product products[PASS_PRODUCTS];
        pass_products(pass, 0, last, 0, 0, products);
        return cpu_product_failed(&products[0], failed);
    }
    add_shares(cpu, pass, shares);
    return PLORA_OK;
}

static plora_status low_rank_pass(struct cpu_device *cpu, const struct plora__linear_args *args,
                                  const struct plan *plan, struct cpu_matrix x, struct cpu_matrix dy,
                                  struct cpu_matrix a, struct cpu_matrix b, struct cpu_matrix *v)
{
    char *workspace = args->workspace;
    struct pass pass = {.args = args, .plan = plan, .x = x, .dy = dy, .a = a, .b = b};
    const size_t places[2] = {plan->u, plan->v};
    for (int i = 0; i < 2; ++i) {
        pass.low[i] = rows_of(workspace + places[i], plan->padded_rank, plan->bf16 ? PLORA_BF16 : PLORA_F32);
        pass.sum[i] = plan->bf16 ? rows_of(workspace + plan->low, plan->padded_rank, PLORA_F32) : pass.low[i];
    }
    pass.gradients = (float *)(void *)(workspace + plan->gradient);
    *v = pass.low[1];
    return compute_pass(cpu, &pass);
}

static plora_status backward(struct cpu_device *cpu, const struct plora__linear_args *args)
{
    const struct plan plan = make_plan(cpu, args, 0);
    char *workspace = args->workspace;
    const struct cpu_matrix dy = operand(cpu, &plan, &args->y, workspace + plan.in_wide);
    struct cpu_matrix v = {0}, a = {0};
    if (args->rank > 0) {
        struct cpu_matrix b, u;
        low_rank_factors(cpu, args, &plan, &a, &b);
        const struct cpu_matrix x =
            dropped_input(cpu, args, &plan, operand(cpu, &plan, &args->x, workspace + plan.x_wide));
        if (plan.shares > 0) {
            PLORA_TRY(low_rank_pass(cpu, args, &plan, x, dy, a, b, &v));
        } else {
            PLORA_TRY(shrink(cpu, args, &plan, x, args->in_features, transposed(a), plan.u, &u));
            PLORA_TRY(shrink(cpu, args, &plan, dy, args->out_features, b, plan.v, &v));
            PLORA_TRY(gradients(cpu, args, &plan, x, dy, u, v));
        }
    }
    if (args->dx.data == NULL) return PLORA_OK;
    const struct side side = {.args = args,
                              .plan = &plan,
                              .tokens = args->tokens,
                              .d = args->out_features,
                              .o = args->in_features,
                              .rank = plan.padded_rank,
                              .in = dy,
                              .weight = weight_operand(args, 0),
                              .low = v,
                              .factor = a,
                              .out = rows_of(args->dx.data, args->dx.stride, args->dx.dtype),
                              .base = !args->delta_only,
                              .accumulate = args->accumulate,
                              .drop = args->dropout.probability > 0.0};
    return compute_side(cpu, &side);
}

static plora_status locked(struct cpu_device *cpu, const struct plora__linear_args *args,
                           plora_status (*compute)(struct cpu_device *, const struct plora__linear_args *))
{
    pthread_mutex_lock(&cpu->lock);
    const plora_status status = compute(cpu, args);
    pthread_mutex_unlock(&cpu->lock);
    return status;
}

plora_status cpu_linear_forward(void *device, const struct plora__linear_args *args, void *stream)
{
    (void)stream;
    return locked(device, args, forward);
}

plora_status cpu_linear_backward(void *device, const struct plora__linear_args *args, void *stream)
{
    (void)stream;
    return locked(device, args, backward);
}
