// programs.cu: kernels of test_programs.c: the programs of programs.h, and what the threads of a block and of a grid do together.
#include "programs.h"

#define PARAMS const __grid_constant__ struct program_params p

struct program_params {
    const uint64_t *in;
    uint64_t *out;
    int count;
};

#define KERNEL(name)                                                                                                   \
    extern "C" __global__ void program_##name##_kernel(PARAMS)                                                         \
    {                                                                                                                  \
        const int i = blockIdx.x * blockDim.x + threadIdx.x;                                                           \
        if (i >= p.count) return;                                                                                      \
        p.out[i] = name(p.in[i]);                                                                                      \
    }
PROGRAMS(KERNEL)

// out: for each warp of 32 numbers sum, prefix sums, neighbour, ballot ...
extern "C" __global__ void warp_kernel(PARAMS)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
    const int x = (int)p.in[i];
    int sum = x, prefix = x;
    for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, prefix, step);
        if (lane >= step) prefix += other;
    }
    const int next = __shfl_down_sync(~0u, x, 3, 8), first = __shfl_sync(~0u, x, 5, 16);
    const unsigned odd = __ballot_sync(~0u, x & 1);
    const bool any = __any_sync(~0u, x == 77), all = __all_sync(~0u, x < 1000);
    uint64_t half = 0;
    if (lane < 11) half = __shfl_sync(0x7ffu, x, (lane + 1) % 11) + __popc(__activemask());
    __syncwarp();
    uint64_t *out = p.out + 8 * (int64_t)i;
    out[0] = sum;
    out[1] = prefix;
    out[2] = next;
    out[3] = first;
    out[4] = odd;
    out[5] = any | all << 1;
    out[6] = half;
#if __CUDA_ARCH__ >= 800
    out[7] = __reduce_add_sync(~0u, (unsigned)x) ^ __reduce_max_sync(~0u, x) ^ __reduce_or_sync(~0u, (unsigned)x);
#else
    int most = x;
    unsigned bits = x;
    for (int step = 16; step; step >>= 1) {
        most = max(most, __shfl_xor_sync(~0u, most, step));
        bits |= __shfl_xor_sync(~0u, bits, step);
    }
    out[7] = sum ^ most ^ bits;
#endif
}

__device__ uint64_t device_table[4] = {3, 5, 7, 11};
__constant__ uint32_t constant_table[3] = {100, 200, 300};

// One block of 8 x 4 x 8 threads: reversed through shared memory, static and dynamic; votes of the block; generic pointers.
extern "C" __global__ void block_kernel(PARAMS)
{
    __shared__ uint32_t tile[256];
    __shared__ uint8_t bytes[256];
    extern __shared__ uint64_t dynamic[];
    const int t = threadIdx.x + 8 * (threadIdx.y + 4 * threadIdx.z), i = 256 * (blockIdx.x + 3 * blockIdx.y) + t;
    const uint64_t x = p.in[i];
    tile[t] = (uint32_t)x;
    bytes[255 - t] = (uint8_t)(x >> 32);
    dynamic[t] = x;
    __syncthreads();
    const int odd = __syncthreads_count(x & 1), all = __syncthreads_and(t < 256), some = __syncthreads_or(x == 12345);
    uint64_t local[2] = {x, x + 1};
    const uint64_t *pointer = x % 3 == 0 ? &dynamic[(t + 7) % 256] : x % 3 == 1 ? &local[x >> 2 & 1] : &p.in[i];
    p.out[i] = tile[255 - t] + ((uint64_t)bytes[t] << 32) + (dynamic[t ^ 33] << 1) + odd + 1000 * all + 2000 * some + *pointer +
               device_table[t & 3] + constant_table[t % 3];
}

struct atomic_params {
    uint32_t *word;    // 10: one for each operation
    uint64_t *wide;    // 3
    float *number;     // 1
    double *precise;   // 1
    uint32_t *bins;    // 16
    const uint32_t *in;
    int count;
};

extern "C" __global__ void atomic_kernel(const __grid_constant__ struct atomic_params p)
{
    __shared__ uint32_t bins[16];
    if (threadIdx.x < 16) bins[threadIdx.x] = 0;
    __syncthreads();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t x = p.in[i];
    atomicAdd(p.word + 0, x);
    atomicMin(p.word + 1, x);
    atomicMax((int *)p.word + 2, (int)x);
    atomicAnd(p.word + 3, x | 0xff);
    atomicOr(p.word + 4, x & 0xff00);
    atomicXor(p.word + 5, x);
    atomicInc(p.word + 6, 1000);
    atomicDec(p.word + 7, 700);
    atomicExch(p.word + 8, 5);
    uint32_t seen = 0, old;
    while ((old = atomicCAS(p.word + 9, seen, seen + 3)) != seen) seen = old;
    atomicAdd((unsigned long long *)p.wide, (unsigned long long)x << 20);
    atomicMax((unsigned long long *)p.wide + 1, (unsigned long long)x * x);
    atomicMin((long long *)p.wide + 2, -(long long)x * x);
    atomicAdd(p.number, (float)(x & 7));
    atomicAdd(p.precise, (double)x);
    atomicAdd(bins + x % 16, 1u);
    __syncthreads();
    if (threadIdx.x < 16) atomicAdd(p.bins + threadIdx.x, bins[threadIdx.x]);
}

struct total_params {
    const float *in;
    float *partial, *total;
    unsigned *ticket;
    int64_t count;
};

// The last block to arrive adds the partial sums of all.
extern "C" __global__ void total_kernel(const __grid_constant__ struct total_params p)
{
    __shared__ float sums[8];
    __shared__ bool last;
    float sum = 0;
    for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += gridDim.x * blockDim.x) sum += p.in[i];
    for (int step = 16; step; step >>= 1) sum += __shfl_down_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < 8; ++i) sum += sums[i];
        p.partial[blockIdx.x] = sum;
        __threadfence();
        last = atomicInc(p.ticket, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    float total = 0;
    for (int i = threadIdx.x; i < gridDim.x; i += blockDim.x) total += p.partial[i];
    atomicAdd(p.total, total);
}

struct vector_params {
    const void *in;
    void *out;
    int count; // bytes / 16
};

// Every width of a load and store, in another order.
extern "C" __global__ void vector_kernel(const __grid_constant__ struct vector_params p)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    const uint4 a = ((const uint4 *)p.in)[i];
    const uint2 b = ((const uint2 *)p.in)[2 * i + 1];
    const double2 c = ((const double2 *)p.in)[i];
    const ushort4 d = ((const ushort4 *)p.in)[2 * i];
    const char4 e = ((const char4 *)p.in)[4 * i + 2];
    uint4 *out = (uint4 *)p.out + 4 * i;
    out[0] = make_uint4(a.w, a.z, a.y, a.x);
    ((uint2 *)out)[2] = make_uint2(b.y, b.x);
    ((short *)out)[12] = e.w;
    ((uint16_t *)out)[13] = d.z;
    ((int8_t *)out)[28] = e.x;
    ((uint8_t *)out)[29] = e.y;
    ((uint16_t *)out)[15] = d.w;
    ((double2 *)out)[2] = make_double2(c.y, c.x);
    ((ushort4 *)out)[6] = make_ushort4(d.w, d.z, d.y, d.x);
    ((char2 *)out)[28] = make_char2(e.z, e.x);
    ((char2 *)out)[29] = make_char2(e.y, e.w);
    ((uint32_t *)out)[15] = a.x + a.y;
}
