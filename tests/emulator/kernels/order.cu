// order.cu: kernels of test_runtime.c, plain enough that each shows one thing about when it runs.
#include <stdint.h>

// out[i] = value
extern "C" __global__ void fill_kernel(float *out, int count, float value)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = value;
}

// out[i] = factor * in[i] + term
extern "C" __global__ void affine_kernel(float *out, const float *in, int count, float factor, float term)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = factor * in[i] + term;
}

struct sum_params {
    const float *in;
    float *out;
    int64_t count;
    int32_t scale;
};

// One block: out[0] = scale * sum of in, through dynamic shared memory.
extern "C" __global__ void sum_kernel(const __grid_constant__ struct sum_params p)
{
    extern __shared__ float partial[];
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < p.count; i += blockDim.x) sum += p.in[i];
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned step = blockDim.x / 2; step > 0; step /= 2) {
        if (threadIdx.x < step) partial[threadIdx.x] += partial[threadIdx.x + step];
        __syncthreads();
    }
    if (threadIdx.x == 0) p.out[0] = (float)p.scale * partial[0];
}

__device__ float offset_variable = 3.0f;

// out[0] = the module's variable
extern "C" __global__ void variable_kernel(float *out)
{
    out[0] = offset_variable;
}
