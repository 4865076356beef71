/* report.cuh: sums over a block in double, the same bits every time: lanes are added to lanes by halving distances,
 * then warps in order. The result is thread 0's. */
#ifndef PLORA_CUDA_REPORT_CUH
#define PLORA_CUDA_REPORT_CUH

template <bool maximum> static __device__ __forceinline__ double block_combine(double value)
{
    __shared__ double warps[32];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const double other = __shfl_down_sync(~0u, value, distance);
        value = maximum ? fmax(value, other) : value + other;
    }
    __syncthreads(); /* the last use of `warps` is over */
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 1; i < (int)blockDim.x / 32; ++i)
            value = maximum ? fmax(value, warps[i]) : value + warps[i];
    return value;
}

static __device__ __forceinline__ double block_sum(double value)
{
    return block_combine<false>(value);
}

/* NaN only when all are. */
static __device__ __forceinline__ double block_max(double value)
{
    return block_combine<true>(value);
}

#endif
