// tensor.cu: kernels of test_tensor.c: cp.async pipelines, ldmatrix, mma.sync. One block of 4 warps computes
//
//     C[64,16] = A[64,K] B[16,K]^T (gemm_bf16, gemm_f16, gemm_tf32) or A[64,K] B[K,16] (gemm_trans: ldmatrix.trans)
//
// 16 rows a warp. For sm_75 there is no such kernel.
#include <stdint.h>

struct gemm_params {
    const void *a, *b;
    float *c;
    int k; // a multiple of 16
};

#if __CUDA_ARCH__ >= 800 || !defined __CUDA_ARCH__

static __device__ __forceinline__ uint32_t shared_address(const void *pointer)
{
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

static __device__ __forceinline__ void copy_async(void *to, const void *from, uint32_t bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

#define STAGES 3
#define PITCH 24 // halves a row in shared memory: 16 and a gap against bank conflicts

// The k-th 16 columns of A and B, 80 rows, two 16-byte pieces each.
static __device__ __forceinline__ void load_stage(uint16_t *a, uint16_t *b, const struct gemm_params &p, int step)
{
    for (int piece = threadIdx.x; piece < 160; piece += 128) {
        const int row = piece / 2, at = piece % 2 * 8;
        const bool in_b = row >= 64, inside = step * 16 < p.k;
        const uint16_t *from = (const uint16_t *)(in_b ? p.b : p.a) + (int64_t)(in_b ? row - 64 : row) * p.k + step * 16 + at;
        copy_async((in_b ? b + (row - 64) * PITCH : a + row * PITCH) + at, inside ? from : (const uint16_t *)p.a, inside ? 16 : 0);
    }
    asm volatile("cp.async.commit_group;" : : : "memory");
}

#define MMA(type)                                                                                                      \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <bool bf16> static __device__ __forceinline__ void gemm(const struct gemm_params &p)
{
    __shared__ __align__(16) uint16_t as[STAGES][64 * PITCH], bs[STAGES][16 * PITCH];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, steps = p.k / 16;
    float sum[2][4] = {};
    for (int s = 0; s < STAGES - 1; ++s) load_stage(as[s], bs[s], p, s);
    for (int step = 0; step < steps; ++step) {
        asm volatile("cp.async.wait_group %0;" : : "n"(STAGES - 2) : "memory");
        __syncthreads();
        load_stage(as[(step + STAGES - 1) % STAGES], bs[(step + STAGES - 1) % STAGES], p, step + STAGES - 1);
        const uint16_t *a_rows = as[step % STAGES] + 16 * warp * PITCH, *b_rows = bs[step % STAGES];
        uint32_t a[4], b[2];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                     : "r"(shared_address(a_rows + lane % 16 * PITCH + lane / 16 * 8)));
        for (int n = 0; n < 2; ++n) {
            float *c = sum[n];
            asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                         : "=r"(b[0]), "=r"(b[1])
                         : "r"(shared_address(b_rows + (8 * n + lane % 8) * PITCH + lane / 8 % 2 * 8)));
            if (bf16) MMA("bf16"); else MMA("f16");
        }
    }
    asm volatile("cp.async.wait_all;" : : : "memory");
    for (int n = 0; n < 2; ++n)
        for (int i = 0; i < 4; ++i)
            p.c[(16 * warp + lane / 4 + i / 2 * 8) * 16 + 8 * n + lane % 4 * 2 + i % 2] = sum[n][i];
}

extern "C" __global__ void gemm_bf16_kernel(const __grid_constant__ struct gemm_params p)
{
    gemm<true>(p);
}

extern "C" __global__ void gemm_f16_kernel(const __grid_constant__ struct gemm_params p)
{
    gemm<false>(p);
}

// B is [K,16]: its columns come by ldmatrix.trans. One stage, 4-byte and 8-byte copies.
extern "C" __global__ void gemm_trans_kernel(const __grid_constant__ struct gemm_params p)
{
    __shared__ __align__(16) uint16_t as[64 * PITCH], bs[16 * PITCH];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum[2][4] = {};
    for (int k = 0; k < p.k; k += 16) {
        __syncthreads();
        for (int i = threadIdx.x; i < 64 * 4; i += 128)
            asm volatile("cp.async.ca.shared.global [%0], [%1], 8;"
                         : : "r"(shared_address(as + i / 4 * PITCH + i % 4 * 4)), "l"((const uint16_t *)p.a + (int64_t)(i / 4) * p.k + k + i % 4 * 4));
        for (int i = threadIdx.x; i < 16 * 8; i += 128)
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                         : : "r"(shared_address(bs + i / 8 * PITCH + i % 8 * 2)), "l"((const uint16_t *)p.b + (int64_t)(k + i / 8) * 16 + i % 8 * 2));
        asm volatile("cp.async.wait_all;" : : : "memory");
        __syncthreads();
        uint32_t a[4], b[4];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                     : "r"(shared_address(as + (16 * warp + lane % 16) * PITCH + lane / 16 * 8)));
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(shared_address(bs + lane % 16 * PITCH + lane / 16 * 8)));
        for (int n = 0; n < 2; ++n)
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                         : "+f"(sum[n][0]), "+f"(sum[n][1]), "+f"(sum[n][2]), "+f"(sum[n][3])
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * n]), "r"(b[2 * n + 1]));
    }
    for (int n = 0; n < 2; ++n)
        for (int i = 0; i < 4; ++i)
            p.c[(16 * warp + lane / 4 + i / 2 * 8) * 16 + 8 * n + lane % 4 * 2 + i % 2] = sum[n][i];
}

// fp32 operands straight from global memory; what is below tf32's 19 bits is not seen. One m16n8k8 and one m16n8k4 in turn.
extern "C" __global__ void gemm_tf32_kernel(const __grid_constant__ struct gemm_params p)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t *a = (const uint32_t *)p.a + (int64_t)(16 * warp + g) * p.k, *a8 = a + 8 * (int64_t)p.k;
    for (int n = 0; n < 2; ++n) {
        const uint32_t *b = (const uint32_t *)p.b + (int64_t)(8 * n + g) * p.k;
        float c[4] = {};
        for (int k = 0; k < p.k; k += 16) {
            asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                         : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                         : "r"(a[k + t]), "r"(a8[k + t]), "r"(a[k + t + 4]), "r"(a8[k + t + 4]), "r"(b[k + t]), "r"(b[k + t + 4]));
            for (int i = 8; i < 16; i += 4)
                asm volatile("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                             : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                             : "r"(a[k + i + t]), "r"(a8[k + i + t]), "r"(b[k + i + t]));
        }
        for (int i = 0; i < 4; ++i) p.c[(16 * warp + g + i / 2 * 8) * 16 + 8 * n + t * 2 + i % 2] = c[i];
    }
}

#endif
