/* cpu_batch.c: many adapters in one batch: y[t] += s (x[t] A^T) B^T, in two passes over the segments (batch_kernels.h).
 *
 *     low[tokens, R] = s x A^T     by tiles of tokens: rows of x are read where they lie, A stays in the cache
 *     y += low B^T                 by (segment, CHUNK columns): each part of B is read and turned round once
 *
 * Workspace: [low][a panel of B for each thread]. Nothing is shared with other calls, and no lock is taken. */
#include "batch_kernels.h"
#include "cpu_backend.h"
#include "isa.h"
#include "threads.h"

enum { CHUNK = 128, ALIGNMENT = 64 };

static size_t align(size_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static size_t low_bytes(const struct plora__batch_args *args)
{
    return align((size_t)(args->tokens * args->max_rank) * sizeof(float));
}

static size_t panel_bytes(const struct cpu_batch_kernels *kernels, const struct plora__batch_args *args)
{
    return align((size_t)(args->max_rank * kernels->panel_columns) * sizeof(float));
}

size_t cpu_batch_workspace_with(const struct cpu_batch_kernels *kernels, int threads,
                                const struct plora__batch_args *args)
{
    return low_bytes(args) + (size_t)threads * panel_bytes(kernels, args);
}

static void shrink_tile(const struct cpu_batch_kernels *kernels, const struct plora__batch_args *args, int32_t tile)
{
    const struct plora__batch_segment *segment =
        &args->segments[plora__batch_find(args->segments, args->segment_count, tile)];
    const int64_t begin = (int64_t)(tile - segment->tile) * PLORA__BATCH_TILE, left = segment->count - begin;
    const struct cpu_batch_rows rows = {args->list, segment->first + begin,
                                        left < PLORA__BATCH_TILE ? left : PLORA__BATCH_TILE};
    float *low = (float *)args->workspace + rows.first * args->max_rank;
    kernels->shrink(&args->x, &rows, &args->slots[segment->slot], low, args->max_rank);
}

static void expand_chunk(const struct cpu_batch_kernels *kernels, const struct plora__batch_args *args,
                         const struct plora__batch_segment *segment, int64_t begin, int thread)
{
    const int64_t end = args->out_features - begin < CHUNK ? args->out_features : begin + CHUNK;
    const struct cpu_batch_rows rows = {args->list, segment->first, segment->count};
    const float *low = (const float *)args->workspace + rows.first * args->max_rank;
    char *panel = (char *)args->workspace + low_bytes(args) + (size_t)thread * panel_bytes(kernels, args);
    if (segment->slot < 0 || args->slots[segment->slot].rank == 0) return;
    kernels->expand(&args->y, &rows, &args->slots[segment->slot], low, args->max_rank, begin, end, (float *)panel);
}

void cpu_batch_forward_with(const struct cpu_batch_kernels *kernels, int threads, const struct plora__batch_args *args)
{
    const int64_t chunks = (args->out_features + CHUNK - 1) / CHUNK, pieces = args->segment_count * chunks;
    (void)threads; /* unused without OpenMP */
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int32_t tile = 0; tile < args->tiles; ++tile)
            shrink_tile(kernels, args, tile);
#pragma omp for schedule(dynamic)
        for (int64_t piece = 0; piece < pieces; ++piece)
            expand_chunk(kernels, args, &args->segments[piece / chunks], piece % chunks * CHUNK, cpu_thread_index());
    }
}

const struct cpu_batch_kernels *cpu_batch_kernels(int isa)
{
    static const struct cpu_batch_kernels *const tables[CPU_ISA_COUNT] = {
        &cpu_batch_kernels_portable, &cpu_batch_kernels_avx2, &cpu_batch_kernels_avx512, &cpu_batch_kernels_amx};
    return tables[isa];
}

size_t cpu_batch_workspace(void *device, const struct plora__batch_args *args)
{
    const struct cpu_device *cpu = device;
    return cpu_batch_workspace_with(cpu_batch_kernels(cpu_isa()), cpu->threads, args);
}

plora_status cpu_batch_forward(void *device, const struct plora__batch_args *args, void *stream)
{
    (void)stream;
    const double operations =
        2.0 * (double)args->tokens * (double)(args->in_features + args->out_features) * (double)args->max_rank;
    cpu_batch_forward_with(cpu_batch_kernels(cpu_isa()), cpu_threads_for(device, operations), args);
    return PLORA_OK;
}
