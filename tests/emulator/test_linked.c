/* test_linked.c: a program that was linked to the real libcudart and libcublas runs on the emulated ones: same names, same symbol
 * versions, same layouts. */
#include "check.h"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

static void test_linked(void **state)
{
    (void)state;
    enum { SIDE = 3 };
    const float matrix[SIDE * SIDE] = {1, 2, 3, 4, 5, 6, 7, 8, 9}, one = 1, zero = 0;
    float got[SIDE * SIDE];
    void *device = NULL;
    struct cudaDeviceProp properties;
    cublasHandle_t handle = NULL;
    cudaStream_t stream = NULL;
    CHECK(cudaGetDeviceProperties(&properties, 0) == cudaSuccess, "cudaGetDeviceProperties");
    CHECK(strncmp(properties.name, "emulated sm_", 12) == 0 && properties.warpSize == 32, "the device is '%s'",
          properties.name);
    CHECK(cudaStreamCreate(&stream) == cudaSuccess && cudaMalloc(&device, 2 * sizeof matrix) == cudaSuccess,
          "creation");
    CHECK(cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS, "cublasCreate");
    CHECK(cublasSetStream(handle, stream) == CUBLAS_STATUS_SUCCESS, "cublasSetStream");
    float *a = device, *c = a + SIDE * SIDE;
    CHECK(cudaMemcpyAsync(a, matrix, sizeof matrix, cudaMemcpyHostToDevice, stream) == cudaSuccess, "cudaMemcpyAsync");
    CHECK(cublasSgemm(handle, CUBLAS_OP_N, CUBLAS_OP_T, SIDE, SIDE, SIDE, &one, a, SIDE, a, SIDE, &zero, c, SIDE) ==
              CUBLAS_STATUS_SUCCESS,
          "cublasSgemm");
    CHECK(cudaMemcpyAsync(got, c, sizeof got, cudaMemcpyDeviceToHost, stream) == cudaSuccess, "cudaMemcpyAsync");
    for (int j = 0; j < SIDE; ++j)
        for (int i = 0; i < SIDE; ++i) {
            float want = 0;
            for (int k = 0; k < SIDE; ++k)
                want += matrix[k * SIDE + i] * matrix[k * SIDE + j];
            CHECK(got[j * SIDE + i] == want, "C(%d,%d) is %g, want %g", i, j, got[j * SIDE + i], want);
        }
    CHECK(cublasDestroy(handle) == CUBLAS_STATUS_SUCCESS, "cublasDestroy");
    CHECK(cudaFree(device) == cudaSuccess && cudaStreamDestroy(stream) == cudaSuccess, "destruction");
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_linked)};
    check_begin("test_linked");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
