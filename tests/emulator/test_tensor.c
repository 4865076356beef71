/* test_tensor.c: cp.async, ldmatrix and mma.sync as kernels/tensor.cu use them, against products on the host. The numbers are small
 * whole ones, so that every sum is exact and a wrong fragment shows. */
#include "kernel_tests.h"

enum { ROWS = 64, COLUMNS = 16, MOST = 208 };

struct gemm_params {
    const void *a, *b;
    float *c;
    int k;
};

/* A[64,k] and B[16,k] (or [k,16]) of small whole numbers, in the dtype given. */
static void product(const char *name, int dtype, bool transposed, int k, float extra)
{
    static float a[ROWS * MOST], b[COLUMNS * MOST], c[ROWS * COLUMNS];
    static uint8_t a_bytes[4 * ROWS * MOST], b_bytes[4 * COLUMNS * MOST];
    const size_t size = plora__dtype_size(dtype);
    for (int i = 0; i < ROWS * k; ++i)
        plora__store(a_bytes, i, dtype, (a[i] = (float)check_integer(-8, 8)) * (1 + extra));
    for (int i = 0; i < COLUMNS * k; ++i)
        plora__store(b_bytes, i, dtype, (b[i] = (float)check_integer(-8, 8)) * (1 + extra));
    struct gemm_params p = {device_array(size * ROWS * (size_t)k, a_bytes),
                            device_array(size * COLUMNS * (size_t)k, b_bytes), device_array(sizeof c, NULL), k};
    CHECK_CUDA(kernels_launch(name, (dim3){1, 1, 1}, (dim3){128, 1, 1}, 0, &p), cudaSuccess);
    device_read(c, p.c, sizeof c);
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < COLUMNS; ++j) {
            float want = 0;
            for (int l = 0; l < k; ++l)
                want += a[i * k + l] * (transposed ? b[l * COLUMNS + j] : b[j * k + l]);
            CHECK(c[i * COLUMNS + j] == want, "%s, k = %d: [%d,%d] is %g, want %g", name, k, i, j,
                  (double)c[i * COLUMNS + j], (double)want);
        }
    }
    CUDA_OK(cu.cudaFree((void *)(uintptr_t)p.a));
    CUDA_OK(cu.cudaFree((void *)(uintptr_t)p.b));
    CUDA_OK(cu.cudaFree(p.c));
}

static void test_products(void **state)
{
    (void)state;
    for (int round = 0; round < 6; ++round) {
        const int k = 16 * (int)check_integer(1, MOST / 16);
        product("gemm_bf16", PLORA_BF16, false, k, 0);
        product("gemm_f16", PLORA_F16, false, k, 0);
        product("gemm_trans", PLORA_BF16, true, k, 0);
        /* Of the third bit below tf32 nothing may be seen. */
        product("gemm_tf32", PLORA_F32, false, k, 0x1p-16f);
    }
}

/* Real numbers: fp32 sums of exact products. */
static void test_rounding(void **state)
{
    (void)state;
    static uint16_t a[ROWS * 64], b[COLUMNS * 64];
    static float c[ROWS * COLUMNS];
    const int k = 64;
    for (int i = 0; i < ROWS * k; ++i)
        plora__store(a, i, PLORA_BF16, (float)check_uniform());
    for (int i = 0; i < COLUMNS * k; ++i)
        plora__store(b, i, PLORA_BF16, (float)check_uniform());
    struct gemm_params p = {device_array(sizeof a, a), device_array(sizeof b, b), device_array(sizeof c, NULL), k};
    CHECK_CUDA(kernels_launch("gemm_bf16", (dim3){1, 1, 1}, (dim3){128, 1, 1}, 0, &p), cudaSuccess);
    device_read(c, p.c, sizeof c);
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < COLUMNS; ++j) {
            double want = 0, sizes = 0;
            for (int l = 0; l < k; ++l) {
                const double term =
                    (double)plora__load(a, i * k + l, PLORA_BF16) * (double)plora__load(b, j * k + l, PLORA_BF16);
                want += term;
                sizes += fabs(term);
            }
            const double error = fabs((double)c[i * COLUMNS + j] - want);
            CHECK(error <= sizes * k * 0x1p-24, "[%d,%d]: %g, want %g", i, j, (double)c[i * COLUMNS + j], want);
        }
    }
    CUDA_OK(cu.cudaFree((void *)(uintptr_t)p.a));
    CUDA_OK(cu.cudaFree((void *)(uintptr_t)p.b));
    CUDA_OK(cu.cudaFree(p.c));
}

int main(void)
{
    check_begin("test_tensor");
    kernels_open("tensor");
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_products), cmocka_unit_test(test_rounding)};
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    kernels_close();
    return failed;
}
