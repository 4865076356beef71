// bugs.cu: for each check of the emulator a kernel that is right and the same with a bug: good_NAME_kernel, bad_NAME_kernel, one
// template. test_bugs.c wants findings at lines marked BUG; of a race both sides are.
#include <stdint.h>

struct bug_params {
    float *in;         // BLOCKS * THREADS numbers
    float *out;        // as many, not initialised
    float *sum;        // two numbers, 0
    unsigned *counter; // two, 0
    float *freed;      // was as large as in
};

enum { THREADS = 128 };

#define ASYNC(to, from)                                                                                                \
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from) : "memory")
#define COMMIT() asm volatile("cp.async.commit_group;" : : : "memory")
#define WAIT(groups) asm volatile("cp.async.wait_group %0;" : : "n"(groups) : "memory")

#define BODY(name) template <bool bad> static __device__ __forceinline__ void name(const struct bug_params &p)
#define KERNELS(name)                                                                                                  \
    extern "C" __global__ void good_##name##_kernel(const __grid_constant__ struct bug_params p)                       \
    {                                                                                                                  \
        name<false>(p);                                                                                                \
    }                                                                                                                  \
    extern "C" __global__ void bad_##name##_kernel(const __grid_constant__ struct bug_params p)                        \
    {                                                                                                                  \
        name<true>(p);                                                                                                 \
    }

static __device__ __forceinline__ int thread_of_grid()
{
    return blockIdx.x * THREADS + threadIdx.x;
}

// ------------------------------------------------------------------------------------------------------- global memory
BODY(read_bound)
{
    const int i = thread_of_grid(), last = gridDim.x * THREADS - 1;
    const float next = bad || i < last ? p.in[i + 1] : 0.0f; // BUG one past the end
    p.out[i] = next;
}
KERNELS(read_bound)

BODY(write_bound)
{
    const int i = thread_of_grid(), last = gridDim.x * THREADS - 1;
    if (i < last + bad) p.out[i + 1] = 1.0f; // BUG one past the end
}
KERNELS(write_bound)

BODY(before_start)
{
    const int i = thread_of_grid();
    if (bad || i > 0) p.out[i - 1] = 1.0f; // BUG one before the start
}
KERNELS(before_start)

BODY(null_pointer)
{
    const float *from = bad ? (const float *)(uintptr_t)p.counter[1] : p.in;
    p.out[thread_of_grid()] = from[thread_of_grid()]; // BUG a null pointer
}
KERNELS(null_pointer)

BODY(misaligned)
{
    const int i = blockIdx.x * (THREADS / 8) + threadIdx.x;
    if (threadIdx.x >= THREADS / 8) return;
    ((float4 *)p.out)[i] = *(const float4 *)(p.in + 4 * i + 2 * bad); // BUG 16 bytes at an address of 8
}
KERNELS(misaligned)

BODY(after_free)
{
    p.out[thread_of_grid()] = (bad ? p.freed : p.in)[thread_of_grid()]; // BUG this memory was freed
}
KERNELS(after_free)

BODY(not_initialised)
{
    const int i = thread_of_grid();
    if (!bad) p.out[i] = 0.0f;
    p.out[i] += p.in[i]; // BUG nobody has written to out
}
KERNELS(not_initialised)

BODY(half_initialised)
{
    const int i = thread_of_grid();
    ((uint16_t *)(p.out + i))[0] = 1;
    if (!bad) ((uint16_t *)(p.out + i))[1] = 1;
    asm volatile("" : : : "memory");
    if (*(volatile float *)(p.out + i) == 3.0f) p.sum[0] = 1.0f; // BUG only two of the four bytes are written
}
KERNELS(half_initialised)

// ------------------------------------------------------------------------------------------------------- shared memory
BODY(shared_bound)
{
    __shared__ float a[THREADS], b[THREADS];
    const int t = threadIdx.x;
    b[t] = 0.0f;
    if (bad || t < THREADS - 1) a[t + 1] = p.in[thread_of_grid()]; // BUG the end of a
    __syncthreads();
    p.out[thread_of_grid()] = a[t > 0 ? t : 1] + b[t];
}
KERNELS(shared_bound)

BODY(shared_not_initialised)
{
    __shared__ float a[THREADS + 1];
    a[threadIdx.x] = p.in[thread_of_grid()];
    if (!bad && threadIdx.x == 0) a[THREADS] = 0.0f;
    __syncthreads();
    p.out[thread_of_grid()] = a[threadIdx.x + 1]; // BUG nobody has written the last one
}
KERNELS(shared_not_initialised)

BODY(missing_barrier)
{
    __shared__ float a[THREADS];
    a[threadIdx.x] = p.in[thread_of_grid()]; // BUG the other side
    if (!bad) __syncthreads();
    p.out[thread_of_grid()] = a[THREADS - 1 - threadIdx.x]; // BUG another warp's
}
KERNELS(missing_barrier)

BODY(missing_second_barrier)
{
    __shared__ float a[THREADS];
    float sum = 0.0f;
    for (int i = 0; i < 3; ++i) {
        a[threadIdx.x] = p.in[thread_of_grid()] + i; // BUG others may still read
        __syncthreads();
        sum += a[(threadIdx.x + 64) % THREADS]; // BUG or has been overwritten
        if (!bad) __syncthreads();
    }
    p.out[thread_of_grid()] = sum;
}
KERNELS(missing_second_barrier)

BODY(missing_syncwarp)
{
    __shared__ float a[THREADS];
    a[threadIdx.x] = p.in[thread_of_grid()]; // BUG the other side
    if (!bad) __syncwarp();
    p.out[thread_of_grid()] = a[threadIdx.x ^ 1]; // BUG lanes need not run in step
}
KERNELS(missing_syncwarp)

BODY(same_place)
{
    __shared__ int flag;
    if (threadIdx.x % 40 == 0) flag = bad ? threadIdx.x : 1; // BUG which value stays?
    __syncthreads();
    p.out[thread_of_grid()] = flag;
}
KERNELS(same_place)

BODY(shared_not_atomic)
{
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    if (bad && threadIdx.x == 40)
        count += 1; // BUG the others use atomics
    else
        atomicAdd(&count, 1); // BUG or seen from here
    __syncthreads();
    p.out[thread_of_grid()] = count;
}
KERNELS(shared_not_atomic)

// ---------------------------------------------------------------------------------------------------------- local memory
BODY(local_bound)
{
    float a[8];
    const int i = (int)p.in[thread_of_grid()];
    for (int j = 0; j < 8; ++j) a[j] = p.in[j];
    a[(i + 1) % 8] = 5.0f;
    p.out[thread_of_grid()] = a[bad ? i % 8 + 8 : i % 8]; // BUG behind the array
}
KERNELS(local_bound)

BODY(local_not_initialised)
{
    volatile float a[8];
    const int i = (int)p.in[thread_of_grid()] % 8;
    for (int j = 0; j < 8 - bad; ++j) a[j] = p.in[j];
    if (a[i | 7] == 77.0f) p.sum[0] = 1.0f; // BUG the last one is not written
}
KERNELS(local_not_initialised)

// ------------------------------------------------------------------------------------------------------- between blocks
BODY(not_atomic)
{
    if (threadIdx.x != 0) return;
    if (bad)
        p.sum[0] += p.in[thread_of_grid()]; // BUG blocks overwrite one another's sums
    else
        atomicAdd(p.sum, p.in[thread_of_grid()]);
}
KERNELS(not_atomic)

BODY(other_blocks_data)
{
    const int i = thread_of_grid();
    p.out[i] = p.in[i]; // BUG the other side
    if (bad) p.sum[0] = p.out[(i + THREADS) % (gridDim.x * THREADS)]; // BUG blocks have no order
}
KERNELS(other_blocks_data)

BODY(missing_fence)
{
    __shared__ bool last;
    if (threadIdx.x == 0) {
        p.out[blockIdx.x] = 1.0f;
        if (!bad) __threadfence();
        last = atomicAdd(p.counter, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x >= gridDim.x) return;
    p.sum[threadIdx.x & 1] = p.out[threadIdx.x] * 0.0f; // BUG the others' numbers need not have arrived
}
KERNELS(missing_fence)

BODY(early_fence)
{
    __shared__ bool last;
    if (threadIdx.x == 0) {
        if (bad) __threadfence();
        p.out[blockIdx.x] = 1.0f;
        if (!bad) __threadfence();
        last = atomicAdd(p.counter, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x >= gridDim.x) return;
    p.sum[threadIdx.x & 1] = p.out[threadIdx.x] * 0.0f; // BUG the fence came before what it should send
}
KERNELS(early_fence)

// ------------------------------------------------------------------------------------------------------------- barriers
BODY(divergent_barrier)
{
    __shared__ float a[THREADS];
    a[threadIdx.x] = p.in[thread_of_grid()];
    if (bad && threadIdx.x % 32 < 16) asm volatile("barrier.sync 0;" : : : "memory"); // BUG half a warp
    __syncthreads();
    p.out[thread_of_grid()] = a[THREADS - 1 - threadIdx.x];
}
KERNELS(divergent_barrier)

BODY(barrier_after_exit)
{
    if (bad && threadIdx.x >= 100) return;
    __syncthreads(); // BUG 28 threads are gone
    p.out[thread_of_grid()] = 1.0f;
}
KERNELS(barrier_after_exit)

BODY(two_barriers)
{
    if (bad && threadIdx.x < 32)
        asm volatile("bar.sync 0;" : : : "memory"); // BUG one warp waits here
    else
        __syncthreads(); // BUG the others there
    p.out[thread_of_grid()] = 1.0f;
}
KERNELS(two_barriers)

BODY(endless_barrier)
{
    if (threadIdx.x < 64) asm volatile("bar.sync 1, %0;" : : "r"(bad ? 96 : 64) : "memory"); // BUG a third warp never comes
    p.out[thread_of_grid()] = 1.0f;
}
KERNELS(endless_barrier)

// ---------------------------------------------------------------------------------------------------------------- masks
BODY(absent_lane)
{
    float x = p.in[thread_of_grid()];
    if (threadIdx.x % 32 < 16) x += __shfl_xor_sync(bad ? ~0u : 0xffffu, x, 1); // BUG the upper lanes are not here
    p.out[thread_of_grid()] = x;
}
KERNELS(absent_lane)

BODY(exited_lane)
{
    if (threadIdx.x % 32 >= 16) return;
    if (__any_sync(bad ? ~0u : 0xffffu, p.in[thread_of_grid()] > 1e30f)) p.sum[0] = 1.0f; // BUG the upper lanes have exited
}
KERNELS(exited_lane)

BODY(unnamed_lane)
{
    float x = p.in[thread_of_grid()];
    x += __shfl_xor_sync(bad ? 0x7fffffffu : ~0u, x, 0); // BUG lane 31 is not in the mask
    p.out[thread_of_grid()] = x;
}
KERNELS(unnamed_lane)

BODY(inactive_source)
{
    float x = p.in[thread_of_grid()];
    if (threadIdx.x % 32 < 16) x = __shfl_sync(0xffffu, x, bad ? 20 : 2); // BUG lane 20 does not take part
    p.out[thread_of_grid()] = x;
}
KERNELS(inactive_source)

// ----------------------------------------------------------------------------------------------------------------- trap
BODY(trapped)
{
    if (bad && thread_of_grid() == 77) asm volatile("trap;"); // BUG trap
    p.out[thread_of_grid()] = 1.0f;
}
KERNELS(trapped)

#if __CUDA_ARCH__ >= 800 || !defined __CUDA_ARCH__
// ------------------------------------------------------------------------------------------------------------- cp.async
BODY(missing_wait)
{
    __shared__ float a[THREADS];
    ASYNC(a + threadIdx.x, p.in + thread_of_grid());
    COMMIT();
    if (!bad) WAIT(0);
    p.out[thread_of_grid()] = a[threadIdx.x]; // BUG the bytes are under way
}
KERNELS(missing_wait)

BODY(short_wait)
{
    __shared__ float a[2][THREADS];
    for (int i = 0; i < 2; ++i) {
        ASYNC(a[i] + threadIdx.x, p.in + thread_of_grid());
        COMMIT();
    }
    if (bad)
        WAIT(1);
    else
        WAIT(0);
    p.out[thread_of_grid()] = a[0][threadIdx.x] + a[1][threadIdx.x]; // BUG the second group is under way
}
KERNELS(short_wait)

BODY(wait_without_barrier)
{
    __shared__ float a[THREADS];
    ASYNC(a + threadIdx.x, p.in + thread_of_grid()); // BUG the other side
    COMMIT();
    WAIT(0); // BUG the other side: they land
    if (!bad) __syncthreads();
    p.out[thread_of_grid()] = a[THREADS - 1 - threadIdx.x]; // BUG the other thread may not have waited
}
KERNELS(wait_without_barrier)

BODY(copy_too_early)
{
    __shared__ float a[THREADS];
    ASYNC(a + threadIdx.x, p.in + thread_of_grid());
    WAIT(0);
    asm volatile("cp.async.wait_all;" : : : "memory");
    __syncthreads();
    const float x = a[THREADS - 1 - threadIdx.x]; // BUG the other side
    if (!bad) __syncthreads();
    ASYNC(a + threadIdx.x, p.in + thread_of_grid()); // BUG others may still read the last ones
    asm volatile("cp.async.wait_all;" : : : "memory"); // BUG they land
    p.out[thread_of_grid()] = x + a[threadIdx.x];
}
KERNELS(copy_too_early)

// --------------------------------------------------------------------------------------------------------- tensor cores
BODY(divergent_mma)
{
    float c[4] = {};
    if (!bad || threadIdx.x % 32 < 31)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4}, {%4}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(threadIdx.x)); // BUG lane 31 is elsewhere
    p.out[thread_of_grid()] = c[0];
}
KERNELS(divergent_mma)

BODY(misaligned_rows)
{
    __shared__ __align__(16) uint16_t a[8 * 24];
    uint32_t x;
    a[threadIdx.x] = 0;
    if (threadIdx.x < 64) a[128 + threadIdx.x] = 0;
    __syncthreads();
    const uint32_t row = (uint32_t)__cvta_generic_to_shared(a + threadIdx.x % 8 * (bad ? 12 : 24));
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(x) : "r"(row)); // BUG rows of 24 bytes
    p.out[thread_of_grid()] = x;
}
KERNELS(misaligned_rows)
#endif
