/* convert.cu: the small kernels around the products of a linear layer.
 *
 *     widen     a panel of x, dy or W as fp32, where cuBLAS does not multiply the dtypes as they are
 *     pack      A and B as two matrices of one layout, [padded_rank, columns]: zero-padded, 16-byte rows, fp32 or bf16
 *     reduce    out = scale * (sum of partial sums, always in the same order) (+ out) */
#include "cuda_common.cuh"

/* Grid: rows * ceil(columns / 512) blocks of 128 threads, 4 numbers a thread. No shared memory. 2 or 4 bytes read and 4 written for
 * each number. */
extern "C" __global__ void __launch_bounds__(CONVERT_THREADS)
    widen_kernel(const __grid_constant__ struct widen_params p)
{
    const uint32_t parts = (uint32_t)((p.columns + 4 * CONVERT_THREADS - 1) / (4 * CONVERT_THREADS));
    const int64_t row = blockIdx.x / parts;
    const int64_t column = (int64_t)(blockIdx.x % parts * CONVERT_THREADS + threadIdx.x) * 4;
    if (column >= p.columns) return;
    *(float4 *)(p.out + row * p.out_stride + column) =
        load_four(p.in, row * p.in_stride + column, p.dtype, p.aligned, p.columns - column);
}

/* Grid: one block of 32 x 8 threads for each 32 x 32 tile of packed A, then of packed B. B is transposed through shared memory (4.1
 * KB), so that both sides are read and written in runs. 4 bytes read and 4 (bf16: 2) written for each number. */
template <bool bf16> static __device__ __forceinline__ void pack(const struct pack_params &p)
{
    __shared__ float tile[PACK_TILE][PACK_TILE + 1];
    const bool is_b = blockIdx.x >= p.a_blocks;
    const int64_t columns = is_b ? p.out_features : p.in_features, stride = is_b ? p.b_columns : p.a_columns;
    const uint32_t block = is_b ? blockIdx.x - p.a_blocks : blockIdx.x, across = (uint32_t)(stride / PACK_TILE);
    const int64_t rank = block / across * PACK_TILE, column = (int64_t)(block % across) * PACK_TILE;
    const int x = (int)threadIdx.x % PACK_TILE, y = (int)threadIdx.x / PACK_TILE;
    for (int i = y; i < PACK_TILE; i += LINEAR_FMA_THREADS / PACK_TILE) {
        if (is_b)
            tile[x][i] = rank + x < p.rank && column + i < columns ? p.b[(column + i) * p.rank + rank + x] : 0.0f;
        else
            tile[i][x] = rank + i < p.rank && column + x < columns ? p.a[(rank + i) * columns + column + x] : 0.0f;
    }
    __syncthreads();
    void *out = is_b ? p.packed_b : p.packed_a;
    for (int i = y; i < PACK_TILE && rank + i < p.padded_rank; i += LINEAR_FMA_THREADS / PACK_TILE)
        store_number(out, (rank + i) * stride + column + x, bf16 ? PLORA_BF16 : PLORA_F32, tile[i][x]);
}

extern "C" __global__ void __launch_bounds__(LINEAR_FMA_THREADS)
    pack_f32_kernel(const __grid_constant__ struct pack_params p)
{
    pack<false>(p);
}

extern "C" __global__ void __launch_bounds__(LINEAR_FMA_THREADS)
    pack_bf16_kernel(const __grid_constant__ struct pack_params p)
{
    pack<true>(p);
}

/* Grid: one thread for each number of both jobs, 128 a block. No shared memory. 4 bytes read for each partial sum, 4 (bf16: 2)
 * written, and 4 read where accumulated. */
template <bool bf16> static __device__ __forceinline__ void reduce(const struct reduce_params &p)
{
    const bool second = blockIdx.x >= p.jobs[0].blocks;
    const struct reduce_job job = second ? p.jobs[1] : p.jobs[0];
    const int64_t i =
        (int64_t)(second ? blockIdx.x - p.jobs[0].blocks : blockIdx.x) * CONVERT_THREADS + (int64_t)threadIdx.x;
    if (i >= job.count) return;
    float sum = 0.0f;
#pragma unroll 8
    for (int split = 0; split < job.splits; ++split)
        sum += job.partials[split * job.count + i];
    sum *= p.scale;
    if (p.accumulate) sum += ((const float *)job.out)[i];
    store_number(job.out, i, bf16 ? PLORA_BF16 : PLORA_F32, sum);
}

extern "C" __global__ void __launch_bounds__(CONVERT_THREADS)
    reduce_f32_kernel(const __grid_constant__ struct reduce_params p)
{
    reduce<false>(p);
}

extern "C" __global__ void __launch_bounds__(CONVERT_THREADS)
    reduce_bf16_kernel(const __grid_constant__ struct reduce_params p)
{
    reduce<true>(p);
}
