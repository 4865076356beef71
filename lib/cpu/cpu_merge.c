/* cpu_merge.c: the launchers of the unload: W += factor * left right over all threads, and the magnitudes checked before it.
 *
 *     workspace   [right, packed][left, packed][partial sums of each block][with sums: three R x R matrices of doubles]
 *
 * W is cut into blocks of rows whose size depends on the kernel alone, and the sums of the blocks are added in order: the same
 * bits for any number of threads. The tiles themselves are in merge_kernels.c. */
#include <math.h>

#include "cpu_backend.h"
#include "dtype.h"
#include "isa.h"
#include "merge_kernels.h"

enum { ALIGNMENT = 64 };

struct partial {
    struct plora__merge_sums sums;
    int64_t overflows;
};

struct layout {
    int64_t tiles, panels, blocks;       /* of rows, of columns, of block_rows rows */
    int64_t left_panels;                 /* `left` packed like `right`, for its Gram matrix */
    size_t left, partials, grams, bytes; /* offsets; `right` is at 0 */
};

static int64_t pieces(int64_t whole, int64_t piece)
{
    return (whole + piece - 1) / piece;
}

static size_t align(size_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static struct layout layout(const struct cpu_merge_kernels *kernels, const struct plora__merge_args *args)
{
    const int64_t rows = args->weight.rows, height = kernels->tile_rows, width = kernels->tile_columns;
    struct layout layout;
    layout.tiles = pieces(rows, height);
    layout.panels = pieces(args->weight.columns, width);
    layout.blocks = pieces(rows, kernels->block_rows);
    layout.left_panels = pieces(rows, width);
    const int64_t left_tiles = layout.tiles * height, left_panels = layout.left_panels * width;
    const size_t row = (size_t)kernels->depth(args->rank) * sizeof(float);
    layout.left = align((size_t)(layout.panels * width) * row);
    layout.partials = layout.left + align((size_t)(left_tiles > left_panels ? left_tiles : left_panels) * row);
    layout.grams = layout.partials + align((size_t)layout.blocks * sizeof(struct partial));
    layout.bytes = layout.grams + 3 * (size_t)(args->rank * args->rank) * sizeof(double);
    return layout;
}

size_t cpu_merge_workspace_with(const struct cpu_merge_kernels *kernels, const struct plora__merge_args *args)
{
    return layout(kernels, args).bytes;
}

static int64_t at_most(int64_t value, int64_t limit)
{
    return value < limit ? value : limit;
}

static void compute_gram(const struct cpu_merge_kernels *kernels, int threads, const float *panels, int64_t panel_count,
                         int64_t rank, double *gram)
{
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t row = 0; row < rank; row += kernels->gram_rows)
        kernels->gram(panels, panel_count, rank, row, gram);
}

static void pack_panels(const struct cpu_merge_kernels *kernels, int threads, const float *source, int64_t stride,
                        int64_t rank_stride, int64_t rank, int64_t count, float *panels)
{
    const int64_t width = kernels->tile_columns;
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < count; first += width)
        kernels->pack(source + first * stride, stride, rank_stride, rank, at_most(width, count - first), width,
                      panels + first * rank);
}

/* With M = (L^T L) (Q Q^T), L = left, Q = right, the eigenvalues of M are the squares of the singular values of L Q, so the
 * effective rank is (tr M)^2 / tr(M^2): no decomposition. Overwrites `left` and `right` in the workspace. */
static double effective_rank(const struct cpu_merge_kernels *kernels, int threads, const struct plora__merge_args *args,
                             const struct layout *layout)
{
    const int64_t rank = args->rank;
    char *base = args->workspace;
    float *right = (float *)base, *left = (float *)(base + layout->left);
    double *left_gram = (double *)(base + layout->grams), *right_gram = left_gram + rank * rank;
    double *product = right_gram + rank * rank;
    pack_panels(kernels, threads, args->left, args->left_row_stride, args->left_rank_stride, rank, args->weight.rows,
                left);
    pack_panels(kernels, threads, args->right, args->right_column_stride, args->right_rank_stride, rank,
                args->weight.columns, right);
    compute_gram(kernels, threads, left, layout->left_panels, rank, left_gram);
    compute_gram(kernels, threads, right, layout->panels, rank, right_gram);

#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rank; ++i) {
        double *row = product + i * rank;
        memset(row, 0, (size_t)rank * sizeof *row);
        for (int64_t k = 0; k < rank; ++k)
            for (int64_t j = 0; j < rank; ++j)
                row[j] += left_gram[i * rank + k] * right_gram[k * rank + j];
    }
    double trace = 0, trace_square = 0;
    for (int64_t i = 0; i < rank; ++i) {
        trace += product[i * rank + i];
        for (int64_t j = 0; j < rank; ++j)
            trace_square += product[i * rank + j] * product[j * rank + i];
    }
    return trace > 0 && trace_square > 0 ? trace * trace / trace_square : 0;
}

/* Adds the blocks up in order. */
static void combine(const struct partial *partials, int64_t blocks, struct plora__merge_sums *sums, int64_t *overflows)
{
    struct plora__merge_sums total = {.effective_rank = 0};
    int64_t overflow_count = 0;
    for (int64_t i = 0; i < blocks; ++i) {
        const struct plora__merge_sums *part = &partials[i].sums;
        if (overflows != NULL) overflow_count += partials[i].overflows;
        if (sums == NULL) continue;
        total.dd += part->dd;
        total.gd += part->gd;
        total.ww += part->ww;
        total.ll += part->ll;
        total.changed += part->changed;
        if (part->lost_max > total.lost_max) total.lost_max = part->lost_max;
    }
    if (sums != NULL) *sums = total;
    if (overflows != NULL) *overflows = overflow_count;
}

static void pack_right(const struct cpu_merge_kernels *kernels, int threads, const struct plora__merge_args *args,
                       const struct layout *places)
{
    const int64_t width = kernels->tile_columns, columns = args->weight.columns, depth = kernels->depth(args->rank);
    float *right = args->workspace;
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < places->panels; ++panel)
        kernels->pack_panel(args->right + panel * width * args->right_column_stride, args->right_column_stride,
                            args->right_rank_stride, args->rank, at_most(width, columns - panel * width),
                            args->weight.dtype, right + panel * width * depth);
}

/* The rows [first, first + count), of which `first` is a multiple of tile_rows. `partial` receives the sums or overflows that args asks
 * for; NULL = it asks for neither. */
static void merge_block(const struct cpu_merge_kernels *kernels, const struct plora__merge_args *args,
                        const struct layout *places, int64_t first, int64_t count, struct partial *partial)
{
    const plora_matrix *weight = &args->weight;
    const int64_t rank = args->rank, depth = kernels->depth(rank), tile = kernels->tile_rows;
    const int dry = args->overflows != NULL;
    char *base = args->workspace;
    float *left = (float *)(base + places->left) + first * depth;
    for (int64_t row = 0; row < count; row += tile)
        kernels->pack_tile(args->left + (first + row) * args->left_row_stride, args->left_row_stride,
                           args->left_rank_stride, rank, at_most(tile, count - row), left + row * depth);
    struct cpu_merge_block block = {
        .weight = (char *)weight->data + (size_t)(first * weight->stride) * plora__dtype_size(weight->dtype),
        .stride = weight->stride,
        .rows = count,
        .columns = weight->columns,
        .rank = rank,
        .dtype = weight->dtype,
        .rounding = weight->dtype == PLORA_F32 ? PLORA_ROUND_NEAREST : args->rounding,
        .residual = args->residual == NULL ? NULL : args->residual + first * args->residual_stride,
        .residual_stride = args->residual_stride,
        .draw = args->draw,
        .factor = args->factor,
        .left = left,
        .right = (const float *)base,
        .sums = args->sums != NULL && !dry ? &partial->sums : NULL,
        .overflows = dry ? &partial->overflows : NULL,
    };
    block.draw.first_element += first * args->draw.row_elements;
    kernels->block(&block);
}

void cpu_merge_with(const struct cpu_merge_kernels *kernels, int threads, const struct plora__merge_args *args)
{
    const struct layout places = layout(kernels, args);
    const int dry = args->overflows != NULL;
    struct partial *partials = (struct partial *)((char *)args->workspace + places.partials);
    const int ranked = args->sums != NULL && !dry && args->part != PLORA__MERGE_ROWS;
    const double effective = ranked ? effective_rank(kernels, threads, args, &places) : 0;
    if (args->part == PLORA__MERGE_RANK) {
        if (args->sums != NULL) *args->sums = (struct plora__merge_sums){.effective_rank = effective};
        return;
    }
    pack_right(kernels, threads, args, &places);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t number = 0; number < places.blocks; ++number) {
        const int64_t first = number * kernels->block_rows;
        merge_block(kernels, args, &places, first, at_most(kernels->block_rows, args->weight.rows - first),
                    partials + number);
    }
    combine(partials, places.blocks, dry ? NULL : args->sums, args->overflows);
    if (args->sums != NULL && !dry) args->sums->effective_rank = effective;
}

void cpu_magnitudes_with(const struct cpu_merge_kernels *kernels, int threads, const struct plora__magnitude_args *args)
{
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int32_t i = 0; i < args->segment_count; ++i) {
        const struct plora__segment *segment = &args->segments[i];
        const uint32_t bits = kernels->magnitude(args->values + segment->begin, segment->end - segment->begin);
        args->magnitudes[i] = bits < 0x7f800000u ? plora__float_from_bits(bits) : INFINITY;
    }
}

const struct cpu_merge_kernels *cpu_merge_kernels(int isa)
{
    static const struct cpu_merge_kernels *const tables[CPU_ISA_COUNT] = {
        &cpu_merge_kernels_portable,
        &cpu_merge_kernels_avx2,
        &cpu_merge_kernels_avx512,
        &cpu_merge_kernels_amx,
    };
    return tables[isa];
}

/* Matrix tiles take as long for a rank of 1 as for one of 32: up to about 16, or 8 in a 16-bit weight that is rounded to nearest,
 * vectors are faster. */
static const struct cpu_merge_kernels *kernels_for(const struct plora__merge_args *args)
{
    const int isa = cpu_isa(), narrow = args->weight.dtype != PLORA_F32 && args->rounding == PLORA_ROUND_NEAREST;
    return cpu_merge_kernels(isa == CPU_ISA_AMX && args->rank <= (narrow ? 8 : 16) ? CPU_ISA_AVX512 : isa);
}

void cpu_merge_rows(int threads, const struct plora__merge_args *args)
{
    const struct cpu_merge_kernels *kernels = kernels_for(args);
    const struct layout places = layout(kernels, args);
    const int64_t share = pieces(places.tiles, threads) * kernels->tile_rows; /* of a thread */
    pack_right(kernels, threads, args, &places);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t begin = 0; begin < args->weight.rows; begin += share) {
        const int64_t end = at_most(begin + share, args->weight.rows);
        for (int64_t first = begin; first < end; first += kernels->block_rows)
            merge_block(kernels, args, &places, first, at_most(kernels->block_rows, end - first), NULL);
    }
}

size_t cpu_merge_workspace(void *device, const struct plora__merge_args *args)
{
    (void)device;
    struct plora__merge_args other = *args; /* whichever way it will be rounded */
    other.rounding = args->rounding == PLORA_ROUND_NEAREST ? PLORA_ROUND_RESIDUAL : PLORA_ROUND_NEAREST;
    const size_t bytes = cpu_merge_workspace_with(kernels_for(args), args),
                 other_bytes = cpu_merge_workspace_with(kernels_for(&other), &other);
    return bytes > other_bytes ? bytes : other_bytes;
}

plora_status cpu_magnitudes(void *device, const struct plora__magnitude_args *args, void *stream)
{
    (void)stream;
    if (args->segment_count == 0) return PLORA_OK;
    const int threads = cpu_threads_for(device, 2.0 * (double)args->segments[args->segment_count - 1].end);
    cpu_magnitudes_with(cpu_merge_kernels(cpu_isa()), threads, args);
    return PLORA_OK;
}

plora_status cpu_merge(void *device, const struct plora__merge_args *args, void *stream)
{
    (void)stream;
    const double elements = (double)args->weight.rows * (double)args->weight.columns;
    const int threads = cpu_threads_for(device, (2.0 * (double)args->rank + 8.0) * elements);
    cpu_merge_with(kernels_for(args), threads, args);
    return PLORA_OK;
}
