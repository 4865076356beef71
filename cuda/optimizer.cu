/* optimizer.cu: a step of the optimizer in two launches, and the scaling of an arena. The arithmetic is that of
 * lib/cpu/optimizer_kernels.c, operation for operation, so that given the same factor an element gets the same bits; compiled without
 * contraction, fused products are written out.
 *
 *     gradient_norm_kernel   sum of squares in double -> norm -> refuse, or the factor on the gradients    4 bytes read an element
 *     adamw_kernel           p, m, v from p, g, m, v                                                      28 bytes an element
 *     sgd_kernel             p, m from p, g, m                                                            20
 *     scale_kernel                                                                                         8
 *
 * All accesses are of 16 bytes. The norm's blocks take a number of elements that depends on the count alone, and the block that ends
 * last adds their sums in order: the same bits every time. */
#include "backend.h"
#include "kernels.h"

/* --------------------------------------------------------------------------------------------------------------- norm */

/* The sum over a block, in thread 0. */
static __device__ double block_sum(double value)
{
    __shared__ double sums[OPTIMIZER_THREADS / 32];
    for (int lane = 16; lane > 0; lane /= 2)
        value += __shfl_down_sync(0xffffffffu, value, lane);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0.0;
    if (threadIdx.x == 0)
        for (int warp = 0; warp < OPTIMIZER_THREADS / 32; ++warp)
            sum += sums[warp];
    __syncthreads();
    return sum;
}

static __device__ double sum_of_squares(const float *values, int64_t count)
{
    double sum = 0.0;
    const int64_t stride = 4LL * OPTIMIZER_THREADS * gridDim.x;
    for (int64_t i = 4 * ((int64_t)blockIdx.x * OPTIMIZER_THREADS + threadIdx.x); i < count; i += stride) {
        if (i + 4 <= count) {
            const float4 v = *(const float4 *)(values + i);
            sum = fma((double)v.x, (double)v.x, sum);
            sum = fma((double)v.y, (double)v.y, sum);
            sum = fma((double)v.z, (double)v.z, sum);
            sum = fma((double)v.w, (double)v.w, sum);
        } else {
            for (int64_t j = i; j < count; ++j)
                sum = fma((double)values[j], (double)values[j], sum);
        }
    }
    return sum;
}

/* Grid: at most NORM_BLOCKS_MAX blocks, which stride through the gradients. */
extern "C" __global__ void __launch_bounds__(OPTIMIZER_THREADS)
    gradient_norm_kernel(const __grid_constant__ struct gradient_norm_params p)
{
    __shared__ int is_last;
    struct optimizer_scratch *scratch = p.scratch;
    const double own = block_sum(sum_of_squares(p.gradients, p.count));
    if (threadIdx.x == 0) {
        scratch->sums[blockIdx.x] = own;
        __threadfence();
        is_last = atomicAdd(&scratch->blocks_done, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    double rest = 0.0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += OPTIMIZER_THREADS)
        rest += *(volatile double *)&scratch->sums[i];
    const double total = block_sum(rest);
    if (threadIdx.x != 0) return;
    const double norm = sqrt(total) * p.gradient_scale;
    const int refused = !isfinite(norm);
    const double clip = p.max_norm > 0.0 && norm > p.max_norm ? p.max_norm / norm : 1.0;
    scratch->factor = (float)(p.gradient_scale * clip);
    scratch->refused = refused;
    scratch->blocks_done = 0;
    p.state->norm = norm;
    if (refused) p.state->refused += 1;
}

/* -------------------------------------------------------------------------------------------------------------- update */

/* Four elements, or the fewer that are left. */
struct quad {
    float value[4];
};

static __device__ __forceinline__ struct quad load_quad(const float *from, int64_t left)
{
    struct quad q = {{0.0f, 0.0f, 0.0f, 0.0f}};
    if (left >= 4) {
        const float4 v = *(const float4 *)from;
        q = {{v.x, v.y, v.z, v.w}};
    } else {
#pragma unroll
        for (int i = 0; i < 3; ++i)
            if (i < left) q.value[i] = from[i];
    }
    return q;
}

static __device__ __forceinline__ void store_quad(float *to, int64_t left, struct quad q)
{
    if (left >= 4) {
        *(float4 *)to = make_float4(q.value[0], q.value[1], q.value[2], q.value[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 3; ++i)
            if (i < left) to[i] = q.value[i];
    }
}

/* The segment that holds element `begin`. */
static __device__ int find_segment(const struct plora__segment *segments, int count, int64_t begin)
{
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (segments[middle].end <= begin)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Grid: a block takes OPTIMIZER_TILE elements in quads; it looks its first segment up, and its threads walk on from there. */
template <int ADAMW> static __device__ __forceinline__ void update(const struct optimizer_params &p)
{
    if (p.scratch->refused) return;
    const float factor = p.scratch->factor;
    const int64_t tile = (int64_t)blockIdx.x * OPTIMIZER_TILE;
    int segment = find_segment(p.segments, p.segment_count, tile);
#pragma unroll 1
    for (int64_t i = tile + 4 * threadIdx.x; i < tile + OPTIMIZER_TILE && i < p.count; i += 4 * OPTIMIZER_THREADS) {
        const int64_t left = p.count - i;
        struct quad parameter = load_quad(p.parameters + i, left), first = load_quad(p.first_moment + i, left), second;
        const struct quad gradients = load_quad(p.gradients + i, left);
        if (ADAMW) second = load_quad(p.second_moment + i, left);
        while (p.segments[segment].end <= i)
            ++segment;
        const struct optimizer_rates rates = p.rates[p.segments[segment].is_b != 0];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float gradient = gradients.value[j] * factor;
            const float kept = parameter.value[j] * rates.decay;
            float step;
            if (ADAMW) {
                first.value[j] = fmaf(first.value[j], p.beta1, gradient * p.beta1_rest);
                second.value[j] = fmaf(second.value[j], p.beta2, gradient * p.beta2_rest * gradient);
                step = first.value[j] / fmaf(sqrtf(second.value[j]), p.root, p.epsilon);
            } else {
                step = first.value[j] = fmaf(first.value[j], p.beta1, gradient);
            }
            parameter.value[j] = fmaf(step, -rates.rate, kept);
        }
        store_quad(p.parameters + i, left, parameter);
        store_quad(p.first_moment + i, left, first);
        if (ADAMW) store_quad(p.second_moment + i, left, second);
    }
}

extern "C" __global__ void __launch_bounds__(OPTIMIZER_THREADS)
    adamw_kernel(const __grid_constant__ struct optimizer_params p)
{
    update<1>(p);
}

extern "C" __global__ void __launch_bounds__(OPTIMIZER_THREADS)
    sgd_kernel(const __grid_constant__ struct optimizer_params p)
{
    update<0>(p);
}

/* Grid: a block takes OPTIMIZER_TILE elements. */
extern "C" __global__ void __launch_bounds__(OPTIMIZER_THREADS)
    scale_kernel(const __grid_constant__ struct scale_params p)
{
    const int64_t tile = (int64_t)blockIdx.x * OPTIMIZER_TILE;
    for (int64_t i = tile + 4 * threadIdx.x; i < tile + OPTIMIZER_TILE && i < p.count; i += 4 * OPTIMIZER_THREADS) {
        struct quad q = load_quad(p.values + i, p.count - i);
#pragma unroll
        for (int j = 0; j < 4; ++j)
            q.value[j] *= p.factor;
        store_quad(p.values + i, p.count - i, q);
    }
}
