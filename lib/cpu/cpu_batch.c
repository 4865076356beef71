/* cpu_batch.c: many adapters in one batch: y[t] += s (x[t] A^T) B^T, in two passes over the segments (batch_kernels.h).
 *
 *     low[tokens, R] = s x A^T     by tiles of tokens: rows of x are read where they lie, for all targets at once; A stays in the cache
 *     y += low B^T                 by (target, segment, chunk of columns): each chunk of B is read and turned round once
 *
 * Workspace: [low of each target][panels of a chunk of B for each thread]. Nothing is shared with other calls, and no lock is taken. */
#include <string.h>

#include "batch_kernels.h"
#include "cpu_backend.h"
#include "isa.h"
#include "threads.h"

/* PANELS: bytes of B that a thread turns round at a time, unless one panel of a high rank is larger. */
enum { PANELS = 1 << 16, ALIGNMENT = 64 };

static size_t align(size_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static size_t low_bytes(const struct plora__batch_args *args, int32_t target)
{
    return align((size_t)(args->tokens * args->targets[target].max_rank) * sizeof(float));
}

static int64_t most_rank(const struct plora__batch_args *args)
{
    int64_t most = 0;
    for (int32_t i = 0; i < args->target_count; ++i)
        if (args->targets[i].max_rank > most) most = args->targets[i].max_rank;
    return most;
}

static size_t panels_bytes(const struct cpu_batch_kernels *kernels, const struct plora__batch_args *args)
{
    const size_t panel = align((size_t)(most_rank(args) * kernels->panel_columns) * sizeof(float));
    return panel > PANELS ? panel : PANELS;
}

size_t cpu_batch_workspace_with(const struct cpu_batch_kernels *kernels, int threads,
                                const struct plora__batch_args *args)
{
    size_t bytes = (size_t)threads * panels_bytes(kernels, args);
    for (int32_t i = 0; i < args->target_count; ++i)
        bytes += low_bytes(args, i);
    return bytes;
}

/* One call: the arguments, and where each target's parts of the workspace and of the work begin. */
struct run {
    const struct cpu_batch_kernels *kernels;
    const struct plora__batch_args *args;
    float *low[PLORA__BATCH_TARGETS];
    int64_t chunks[PLORA__BATCH_TARGETS]; /* columns of one */
    int64_t pieces[PLORA__BATCH_TARGETS + 1];
    char *panels;
    size_t panels_bytes;
};

/* As many columns as fit in PANELS bytes, but no fewer chunks of all segments than threads; whole panels. Results do not depend on it. */
static int64_t chunk_of(const struct cpu_batch_kernels *kernels, int threads, int32_t segments,
                        const struct plora__batch_target *target)
{
    const int64_t width = kernels->panel_columns, panels = (target->out_features + width - 1) / width;
    const int64_t most = PANELS / (int64_t)sizeof(float) / (width * (target->max_rank > 0 ? target->max_rank : 1));
    int64_t share = segments >= threads ? panels : (panels * segments + threads - 1) / threads;
    if (share > most) share = most;
    return (share < 1 ? 1 : share) * width;
}

static int64_t chunks_of(const struct run *run, int32_t target)
{
    return (run->args->targets[target].out_features + run->chunks[target] - 1) / run->chunks[target];
}

static void shrink_tile(const struct run *run, int32_t tile)
{
    const struct plora__batch_args *args = run->args;
    const struct plora__batch_segment *segment =
        &args->segments[plora__batch_find(args->segments, args->segment_count, tile)];
    const int64_t begin = (int64_t)(tile - segment->tile) * PLORA__BATCH_TILE, left = segment->count - begin;
    const struct cpu_batch_rows rows = {args->list, segment->first + begin,
                                        left < PLORA__BATCH_TILE ? left : PLORA__BATCH_TILE};
    struct cpu_batch_part parts[PLORA__BATCH_TARGETS];
    for (int32_t i = 0; i < args->target_count; ++i) {
        const struct plora__batch_target *target = &args->targets[i];
        parts[i] = (struct cpu_batch_part){&args->adapters[segment->slot][target->weight],
                                           run->low[i] + rows.first * target->max_rank, target->max_rank};
    }
    run->kernels->shrink(&args->x, &rows, parts, args->target_count);
}

static void expand_piece(const struct run *run, int64_t piece, int thread)
{
    const struct plora__batch_args *args = run->args;
    int32_t i = 0;
    while (piece >= run->pieces[i + 1])
        ++i;
    const struct plora__batch_target *target = &args->targets[i];
    const int64_t chunk = run->chunks[i], chunks = chunks_of(run, i), inside = piece - run->pieces[i];
    const struct plora__batch_segment *segment = &args->segments[inside / chunks];
    const int64_t begin = inside % chunks * chunk;
    const int64_t end = target->out_features - begin < chunk ? target->out_features : begin + chunk;
    const struct cpu_batch_rows rows = {args->list, segment->first, segment->count};
    if (segment->slot < 0) return;
    const struct plora__batch_slot *slot = &args->adapters[segment->slot][target->weight];
    if (slot->rank == 0) return;
    char *panels = run->panels + (size_t)thread * run->panels_bytes;
    run->kernels->expand(&target->y, &rows, slot, run->low[i] + rows.first * target->max_rank, target->max_rank, begin,
                         end, (float *)panels);
}

void cpu_batch_forward_with(const struct cpu_batch_kernels *kernels, int threads, const struct plora__batch_args *args)
{
    struct run run = {.kernels = kernels, .args = args, .panels_bytes = panels_bytes(kernels, args)};
    char *workspace = args->workspace;
    for (int32_t i = 0; i < args->target_count; ++i) {
        run.low[i] = (float *)workspace;
        workspace += low_bytes(args, i);
        run.chunks[i] = chunk_of(kernels, threads, args->segment_count, &args->targets[i]);
        run.pieces[i + 1] = run.pieces[i] + args->segment_count * chunks_of(&run, i);
    }
    run.panels = workspace;
    (void)threads; /* unused without OpenMP */
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int32_t tile = 0; tile < args->tiles; ++tile)
            shrink_tile(&run, tile);
#pragma omp for schedule(dynamic)
        for (int64_t piece = 0; piece < run.pieces[args->target_count]; ++piece)
            expand_piece(&run, piece, cpu_thread_index());
    }
}

const struct cpu_batch_kernels *cpu_batch_kernels(int isa)
{
    static const struct cpu_batch_kernels *const tables[CPU_ISA_COUNT] = {
        &cpu_batch_kernels_portable, &cpu_batch_kernels_avx2, &cpu_batch_kernels_avx512, &cpu_batch_kernels_amx};
    return tables[isa];
}

int64_t cpu_batch_panel_count(int64_t out_features, int64_t rank)
{
    const int64_t columns = cpu_batch_kernels(cpu_isa())->panel_columns;
    return (out_features + columns - 1) / columns * columns * rank;
}

void cpu_batch_pack(const float *b, int64_t out_features, int64_t rank, float *panels)
{
    cpu_batch_kernels(cpu_isa())->pack(b, rank, out_features, panels);
}

size_t cpu_batch_workspace(void *device, const struct plora__batch_args *args)
{
    const struct cpu_device *cpu = device;
    return cpu_batch_workspace_with(cpu_batch_kernels(cpu_isa()), cpu->threads, args);
}

plora_status cpu_batch_forward(void *device, const struct plora__batch_args *args, void *stream)
{
    (void)stream;
    double outputs = 0;
    for (int32_t i = 0; i < args->target_count; ++i)
        outputs += (double)(args->in_features + args->targets[i].out_features) * (double)args->targets[i].max_rank;
    cpu_batch_forward_with(cpu_batch_kernels(cpu_isa()), cpu_threads_for(device, 2.0 * (double)args->tokens * outputs),
                           args);
    return PLORA_OK;
}

plora_status cpu_write(void *device, void *destination, const void *source, size_t bytes, void *stream)
{
    (void)device;
    (void)stream;
    if (bytes > 0) memcpy(destination, source, bytes);
    return PLORA_OK;
}
