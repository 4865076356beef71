/* report.cu: what an unload finds out: the largest magnitudes of an arena, and the sums of a merge.
 *
 *     merge_report_*_kernel  ->  partial sums of the tiles of W                              \
 *     gram_kernel            ->  left^T left, right right^T, in slices                        |
 *     gram_sum_kernel        ->  the same, slices added up                                    |-> merge_total_kernel
 *     gram_trace_kernel      ->  tr M and tr M^2 of tiles of M = (left^T left)(right right^T) /
 *
 * The eigenvalues of M are the squares of the singular values of left right, so the effective rank is (tr M)^2 / tr
 * M^2. All of it is in double, in an order that depends on the shapes alone: the same bits every time. */
#include "backend.h"
#include "cuda_common.cuh"
#include "kernels.h"
#include "report.cuh"

enum { TILE = GRAM_TILE, THREADS = GRAM_TILE * GRAM_TILE, CHUNK = GRAM_CHUNK };

/* One tile of a Gram matrix, sum_c v(c, i) v(c, j), over one slice of c. Tiles below the diagonal are mirror images.
 * Grid: (tiles of the matrix, slices, sides). Block: 256 threads, one element each. Shared memory: 16.25 KiB.
 * Reads 4 bytes of each v(c, r) R / 8 times, from L2. */
extern "C" __global__ void __launch_bounds__(THREADS) gram_kernel(const __grid_constant__ struct gram_params p)
{
    __shared__ double left[TILE][CHUNK + 1], right[TILE][CHUNK + 1];
    const int side = blockIdx.z, tiles = (p.rank + TILE - 1) / TILE;
    const int first_i = blockIdx.x / tiles * TILE, first_j = blockIdx.x % tiles * TILE;
    if ((int)blockIdx.y >= p.slices[side] || first_j < first_i) return;
    const int64_t stride = p.stride[side], rank_stride = p.rank_stride[side], begin = blockIdx.y * p.slice[side],
                  end = min(begin + p.slice[side], p.count[side]);
    const int i = threadIdx.x / TILE, j = threadIdx.x % TILE;
    double sum = 0;
    for (int64_t c = begin; c < end; c += CHUNK) {
        for (int n = threadIdx.x; n < TILE * CHUNK; n += THREADS) { /* along the direction that is contiguous */
            const int r = rank_stride == 1 ? n % TILE : n / CHUNK, at = rank_stride == 1 ? n / TILE : n % CHUNK;
            const float *from = p.vectors[side] + (c + at) * stride;
            const int inside = c + at < end;
            left[r][at] = inside && first_i + r < p.rank ? from[(first_i + r) * rank_stride] : 0.0f;
            right[r][at] = inside && first_j + r < p.rank ? from[(first_j + r) * rank_stride] : 0.0f;
        }
        __syncthreads();
#pragma unroll 4
        for (int at = 0; at < CHUNK; ++at)
            sum = fma(left[i][at], right[j][at], sum);
        __syncthreads();
    }
    if (first_i + i < p.rank && first_j + j < p.rank)
        p.grams[side][((int64_t)blockIdx.y * p.rank + first_i + i) * p.rank + first_j + j] = sum;
}

/* Adds the slices into the first, and completes it below the diagonal.
 * Grid: (256 elements a block, sides). Reads 8 bytes of each slice of an element, writes 8. */
extern "C" __global__ void __launch_bounds__(THREADS) gram_sum_kernel(const __grid_constant__ struct gram_params p)
{
    const int64_t element = (int64_t)blockIdx.x * THREADS + threadIdx.x, rank = p.rank;
    const int64_t i = element / rank, j = element % rank;
    double *gram = p.grams[blockIdx.y];
    if (i >= rank || j / TILE < i / TILE) return;
    double sum = 0;
    for (int slice = 0; slice < p.slices[blockIdx.y]; ++slice)
        sum += gram[slice * rank * rank + element];
    gram[element] = sum;
    if (j / TILE > i / TILE) gram[j * rank + i] = sum;
}

/* The contribution of one tile of M to its traces: with L and Q the Gram matrices, M = L Q and M^T = Q L are both
 * computed there. Grid: one block a tile of M. Block: 256 threads, one element each. Shared memory: 8.5 KiB. Reads R /
 * 4 times 8 bytes an element. */
extern "C" __global__ void __launch_bounds__(THREADS) gram_trace_kernel(const __grid_constant__ struct gram_params p)
{
    __shared__ double rows[2][TILE][TILE + 1], columns[2][TILE][TILE + 1];
    const int tiles = (p.rank + TILE - 1) / TILE, rank = p.rank;
    const int i = threadIdx.x / TILE, j = threadIdx.x % TILE;
    const int row = blockIdx.x / tiles * TILE + i, column = blockIdx.x % tiles * TILE + j;
    double element = 0, mirrored = 0;
    for (int k = 0; k < rank; k += TILE) {
        for (int side = 0; side < 2; ++side) {
            const double *gram = p.grams[side];
            rows[side][i][j] = row < rank && k + j < rank ? gram[(int64_t)row * rank + k + j] : 0.0;
            columns[side][i][j] = column < rank && k + i < rank ? gram[(int64_t)(k + i) * rank + column] : 0.0;
        }
        __syncthreads();
        for (int n = 0; n < TILE; ++n) {
            element = fma(rows[0][i][n], columns[1][n][j], element);
            mirrored = fma(rows[1][i][n], columns[0][n][j], mirrored);
        }
        __syncthreads();
    }
    const struct gram_traces traces = {block_sum(row == column ? element : 0.0), block_sum(element * mirrored)};
    if (threadIdx.x == 0) p.traces[blockIdx.x] = traces;
}

/* Adds up the partial sums of all tiles. Grid: one block of 256 threads. Reads 56 bytes a tile of W, 16 a tile of M.
 * Alone on its multiprocessor, so it may have all registers: with fewer it spills. */
extern "C" __global__ void __launch_bounds__(MERGE_THREADS, 1)
    merge_total_kernel(const __grid_constant__ struct merge_total_params p)
{
    double dd = 0, gd = 0, ww = 0, ll = 0, changed = 0, lost_max = 0, overflows = 0, trace = 0, trace_square = 0;
    for (int64_t i = threadIdx.x; i < p.partial_count; i += MERGE_THREADS) {
        const struct merge_partial *part = &p.partials[i];
        dd += part->dd;
        gd += part->gd;
        ww += part->ww;
        ll += part->ll;
        changed += part->changed;
        lost_max = fmax(lost_max, part->lost_max);
        overflows += part->overflows;
    }
    for (int64_t i = threadIdx.x; i < p.trace_count; i += MERGE_THREADS) {
        trace += p.traces[i].trace;
        trace_square += p.traces[i].trace_square;
    }
    dd = block_sum(dd);
    gd = block_sum(gd);
    ww = block_sum(ww);
    ll = block_sum(ll);
    changed = block_sum(changed);
    lost_max = block_max(lost_max);
    overflows = block_sum(overflows);
    trace = block_sum(trace);
    trace_square = block_sum(trace_square);
    if (threadIdx.x != 0) return;
    if (p.overflows != NULL) *p.overflows = (int64_t)overflows;
    if (p.sums == NULL) return;
    const double effective_rank = trace > 0 && trace_square > 0 ? trace * trace / trace_square : 0.0;
    *p.sums = {dd, gd, ww, ll, changed, lost_max, effective_rank};
}

static __device__ __forceinline__ uint32_t magnitude_bits(uint4 quad)
{
    return max(max(quad.x & 0x7fffffffu, quad.y & 0x7fffffffu), max(quad.z & 0x7fffffffu, quad.w & 0x7fffffffu));
}

/* The largest |value| of a segment, +inf when one is inf or NaN: as integers, the bits without the sign are in that
 * order. Grid: one block a segment. Block: 1024 threads. Reads 4 bytes an element, 16 at a time. */
extern "C" __global__ void __launch_bounds__(MAGNITUDE_THREADS)
    magnitudes_kernel(const __grid_constant__ struct magnitudes_params p)
{
    const struct plora__segment segment = p.segments[blockIdx.x];
    const uint32_t *bits = (const uint32_t *)p.values + segment.begin;
    const int64_t count = segment.end - segment.begin, lead = min((int64_t)(-(intptr_t)bits / 4 & 3), count);
    const int64_t quads = (count - lead) / 4, rest = lead + 4 * quads;
    const uint4 *middle = (const uint4 *)(bits + lead);
    uint32_t largest = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < quads; i += MAGNITUDE_THREADS)
        largest = max(largest, magnitude_bits(middle[i]));
    if (threadIdx.x < lead) largest = max(largest, bits[threadIdx.x] & 0x7fffffffu);
    if (rest + threadIdx.x < count) largest = max(largest, bits[rest + threadIdx.x] & 0x7fffffffu);
    const double result = block_max(largest < 0x7f800000u ? (double)__uint_as_float(largest) : HUGE_VAL);
    if (threadIdx.x == 0) p.magnitudes[blockIdx.x] = result;
}
