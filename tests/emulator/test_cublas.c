/* test_cublas.c: the emulated libcublas against products in double: every type, transposition, stride and pointer mode, and that
 * its products are queued like everything else. Operands that are wrong are in test_findings.c. */
#include "emulated.h"

static cublasHandle_t handle;

static int setup(void **state)
{
    (void)state;
    return cu.cublasCreate_v2(&handle) == CUBLAS_STATUS_SUCCESS ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    return cu.cublasDestroy_v2(handle) == CUBLAS_STATUS_SUCCESS ? 0 : -1;
}

/* A column-major matrix, as the rows of a check_matrix of its transpose, on the host and on the device. */
struct operand {
    struct check_matrix host;
    void *device;
};

static void *device_address(const struct operand *operand)
{
    return (char *)operand->device + ((char *)operand->host.m.data - (char *)operand->host.memory);
}

static struct operand operand_new(int64_t rows, int64_t columns, int64_t stride, int32_t dtype)
{
    struct operand operand = {check_matrix_new(columns, rows, stride, dtype), NULL};
    check_matrix_random(&operand.host, 1);
    CUDA_OK(cu.cudaMalloc(&operand.device, operand.host.bytes));
    CUDA_OK(cu.cudaMemcpy(operand.device, operand.host.memory, operand.host.bytes, cudaMemcpyHostToDevice));
    return operand;
}

static void operand_free(struct operand *operand)
{
    CUDA_OK(cu.cudaFree(operand->device));
    check_matrix_free(&operand->host);
}

static cudaDataType type_of(int32_t dtype)
{
    return dtype == PLORA_F32 ? CUDA_R_32F : dtype == PLORA_BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

/* Element (i, j) of op(operand). */
static double element(const struct operand *operand, int transposed, int64_t i, int64_t j)
{
    return transposed ? check_element(&operand->host.m, i, j) : check_element(&operand->host.m, j, i);
}

struct form {
    int64_t m, n, k;
    int transpose_a, transpose_b;
    int32_t in, out;
    float alpha, beta;
};

/* The error of k products and sums in fp32 in any order, with alpha and beta, and of the rounding to the type of C. */
static void check_product(const struct form *form, const struct operand *a, const struct operand *b,
                          const struct operand *c, const struct operand *before)
{
    for (int64_t j = 0; j < form->n; ++j) {
        for (int64_t i = 0; i < form->m; ++i) {
            double sum = 0, magnitude = 0;
            for (int64_t l = 0; l < form->k; ++l) {
                const double term = element(a, form->transpose_a, i, l) * element(b, form->transpose_b, l, j);
                sum += term;
                magnitude += fabs(term);
            }
            const double old = form->beta != 0 ? (double)form->beta * check_element(&before->host.m, j, i) : 0;
            const double want = (double)form->alpha * sum + old;
            const double scale = fabs((double)form->alpha) * magnitude + fabs(old);
            const double bound =
                (double)(form->k + 4) * 0x1p-24 * scale + check_roundoff(form->out) * fabs(want) * 1.01 + 0x1p-24;
            CHECK_CLOSE(check_element(&c->host.m, j, i), want, bound,
                        "C(%lld,%lld), m %lld n %lld k %lld op %d %d dtypes %d %d", (long long)i, (long long)j,
                        (long long)form->m, (long long)form->n, (long long)form->k, form->transpose_a,
                        form->transpose_b, form->in, form->out);
        }
    }
}

static void run_form(const struct form *form, int64_t gap, int device_scalars)
{
    const int64_t a_rows = form->transpose_a ? form->k : form->m, b_rows = form->transpose_b ? form->n : form->k;
    struct operand a = operand_new(a_rows, form->transpose_a ? form->m : form->k, a_rows + gap, form->in);
    struct operand b = operand_new(b_rows, form->transpose_b ? form->k : form->n, b_rows + 2 * gap, form->in);
    struct operand c = operand_new(form->m, form->n, form->m + gap, form->out);
    struct operand before = {check_matrix_new(form->n, form->m, form->m + gap, form->out), NULL};
    for (int64_t j = 0; j < form->n; ++j)
        for (int64_t i = 0; i < form->m; ++i)
            plora__store(before.host.m.data, j * before.host.m.stride + i, form->out,
                         (float)check_element(&c.host.m, j, i));
    const float *alpha = &form->alpha, *beta = &form->beta;
    void *scalars = NULL;
    if (device_scalars) {
        CUDA_OK(cu.cudaMalloc(&scalars, 8));
        CUDA_OK(cu.cudaMemcpy(scalars, alpha, 4, cudaMemcpyHostToDevice));
        CUDA_OK(cu.cudaMemcpy((char *)scalars + 4, beta, 4, cudaMemcpyHostToDevice));
        alpha = scalars;
        beta = alpha + 1;
    }
    if (form->beta == 0) /* C is not read then, whatever is there */
        CUDA_OK(cu.cudaMemcpy(c.device, memset(c.host.memory, CHECK_POISON, c.host.bytes), c.host.bytes,
                              cudaMemcpyHostToDevice));
    CUBLAS_OK(
        cu.cublasSetPointerMode_v2(handle, device_scalars ? CUBLAS_POINTER_MODE_DEVICE : CUBLAS_POINTER_MODE_HOST));
    CUBLAS_OK(cu.cublasGemmEx_64(handle, form->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N,
                                 form->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N, form->m, form->n, form->k, alpha,
                                 device_address(&a), type_of(form->in), a.host.m.stride, device_address(&b),
                                 type_of(form->in), b.host.m.stride, beta, device_address(&c), type_of(form->out),
                                 c.host.m.stride, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    CUDA_OK(cu.cudaDeviceSynchronize());
    CUDA_OK(cu.cudaMemcpy(c.host.memory, c.device, c.host.bytes, cudaMemcpyDeviceToHost));
    check_product(form, &a, &b, &c, &before);
    check_matrix_guards(&c.host, "C");
    CUDA_OK(cu.cudaFree(scalars));
    operand_free(&a);
    operand_free(&b);
    operand_free(&c);
    check_matrix_free(&before.host);
}

static void test_products(void **state)
{
    (void)state;
    static const int32_t types[][2] = {{PLORA_F32, PLORA_F32},
                                       {PLORA_BF16, PLORA_BF16},
                                       {PLORA_BF16, PLORA_F32},
                                       {PLORA_F16, PLORA_F16},
                                       {PLORA_F16, PLORA_F32}};
    static const int64_t shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {17, 2, 33}, {40, 31, 1}, {8, 64, 48}};
    static const float scalars[][2] = {{1, 0}, {1, 1}, {-0.5f, 2}, {0, 1}};
    for (int t = 0; t < CHECK_COUNT(types); ++t)
        for (int s = 0; s < CHECK_COUNT(shapes); ++s)
            for (int op = 0; op < 4; ++op) {
                const int f = (int)check_integer(0, 3);
                const struct form form = {shapes[s][0], shapes[s][1], shapes[s][2],  op & 1,       op >> 1,
                                          types[t][0],  types[t][1],  scalars[f][0], scalars[f][1]};
                run_form(&form, check_integer(0, 3), (int)check_integer(0, 1));
            }
}

/* As the library calls it: y[T,N] = x[T,K] W[N,K]^T row-major is C = op(W)^T x column-major; 32-bit and Sgemm entry points. */
static void test_entry_points(void **state)
{
    (void)state;
    enum { M = 4, N = 3, K = 2 };
    const float a[M * K] = {1, 2, 3, 4, 5, 6, 7, 8}, b[K * N] = {1, 2, 3, 4, 5, 6}, one = 1, zero = 0;
    float want[M * N], got[M * N];
    void *device = NULL;
    for (int j = 0; j < N; ++j)
        for (int i = 0; i < M; ++i) {
            want[j * M + i] = 0;
            for (int l = 0; l < K; ++l)
                want[j * M + i] += a[l * M + i] * b[j * K + l];
        }
    CUDA_OK(cu.cudaMalloc(&device, sizeof a + sizeof b + sizeof got));
    float *da = device, *db = da + M * K, *dc = db + K * N;
    CUDA_OK(cu.cudaMemcpy(da, a, sizeof a, cudaMemcpyHostToDevice));
    CUDA_OK(cu.cudaMemcpy(db, b, sizeof b, cudaMemcpyHostToDevice));
    CUBLAS_OK(cu.cublasSetPointerMode_v2(handle, CUBLAS_POINTER_MODE_HOST));
    for (int entry = 0; entry < 3; ++entry) {
        CUDA_OK(cu.cudaMemset(dc, 0xff, sizeof got));
        if (entry == 0)
            CUBLAS_OK(cu.cublasSgemm_v2(handle, CUBLAS_OP_N, CUBLAS_OP_N, M, N, K, &one, da, M, db, K, &zero, dc, M));
        else if (entry == 1)
            CUBLAS_OK(
                cu.cublasSgemm_v2_64(handle, CUBLAS_OP_N, CUBLAS_OP_N, M, N, K, &one, da, M, db, K, &zero, dc, M));
        else
            CUBLAS_OK(cu.cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, M, N, K, &one, da, CUDA_R_32F, M, db,
                                      CUDA_R_32F, K, &zero, dc, CUDA_R_32F, M, CUBLAS_COMPUTE_32F_PEDANTIC,
                                      CUBLAS_GEMM_DEFAULT_TENSOR_OP));
        CUDA_OK(cu.cudaMemcpy(got, dc, sizeof got, cudaMemcpyDeviceToHost));
        CHECK(memcmp(got, want, sizeof got) == 0, "entry point %d: C(0,0) is %g, want %g", entry, got[0], want[0]);
    }
    CUDA_OK(cu.cudaFree(device));
}

static void test_refusals(void **state)
{
    (void)state;
    const float one = 1, zero = 0;
    void *memory = NULL;
    int version = 0;
    cublasMath_t mode;
    CUDA_OK(cu.cudaMalloc(&memory, 4096));
    CUDA_OK(cu.cudaMemset(memory, 0, 4096));
    CUBLAS_OK(cu.cublasGetVersion_v2(handle, &version));
    CHECK(version == CUBLAS_VERSION, "version %d", version);
    CHECK(strcmp(cu.cublasGetStatusName(CUBLAS_STATUS_NOT_SUPPORTED), "CUBLAS_STATUS_NOT_SUPPORTED") == 0, "name");
    CHECK(strcmp(cu.cublasGetStatusString(CUBLAS_STATUS_SUCCESS), "success") == 0, "text");
    static const struct {
        cudaDataType a, b, c;
        cublasComputeType_t compute;
        int lda, m;
        cublasStatus_t status;
    } cases[] = {{CUDA_R_32F, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, 4, 4, CUBLAS_STATUS_SUCCESS},
                 {CUDA_R_16BF, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, 4, 4, CUBLAS_STATUS_NOT_SUPPORTED},
                 {CUDA_R_32F, CUDA_R_32F, CUDA_R_16BF, CUBLAS_COMPUTE_32F, 4, 4, CUBLAS_STATUS_NOT_SUPPORTED},
                 {CUDA_R_16BF, CUDA_R_16BF, CUDA_R_16F, CUBLAS_COMPUTE_32F, 4, 4, CUBLAS_STATUS_NOT_SUPPORTED},
                 {CUDA_R_64F, CUDA_R_64F, CUDA_R_64F, CUBLAS_COMPUTE_32F, 4, 4, CUBLAS_STATUS_NOT_SUPPORTED},
                 {CUDA_R_32F, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_TF32, 4, 4, CUBLAS_STATUS_NOT_SUPPORTED},
                 {CUDA_R_16F, CUDA_R_16F, CUDA_R_16F, CUBLAS_COMPUTE_16F, 4, 4, CUBLAS_STATUS_NOT_SUPPORTED},
                 {CUDA_R_32F, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, 3, 4, CUBLAS_STATUS_INVALID_VALUE},
                 {CUDA_R_32F, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, 4, -1, CUBLAS_STATUS_INVALID_VALUE}};
    for (int i = 0; i < CHECK_COUNT(cases); ++i)
        CHECK_CUBLAS(cu.cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, cases[i].m, 4, 4, &one, memory, cases[i].a,
                                     cases[i].lda, (char *)memory + 1024, cases[i].b, 4, &zero, (char *)memory + 2048,
                                     cases[i].c, 4, cases[i].compute, CUBLAS_GEMM_DEFAULT),
                     cases[i].status);
    CHECK_CUBLAS(cu.cublasSetMathMode(handle, CUBLAS_TF32_TENSOR_OP_MATH), CUBLAS_STATUS_NOT_SUPPORTED);
    CUBLAS_OK(cu.cublasSetMathMode(handle, CUBLAS_PEDANTIC_MATH));
    CUBLAS_OK(cu.cublasGetMathMode(handle, &mode));
    CHECK(mode == CUBLAS_PEDANTIC_MATH, "mode %d", (int)mode);
    CUBLAS_OK(cu.cublasSetMathMode(handle, CUBLAS_DEFAULT_MATH));
    CHECK_CUBLAS(cu.cublasSetWorkspace_v2(handle, (char *)memory + 4, 1024), CUBLAS_STATUS_INVALID_VALUE);
    CHECK_CUBLAS(cu.cublasSetStream_v2(NULL, NULL), CUBLAS_STATUS_NOT_INITIALIZED);
    cublasHandle_t other = NULL;
    cu.emu_fail("cublas", 1);
    CHECK_CUBLAS(cu.cublasCreate_v2(&other), CUBLAS_STATUS_ALLOC_FAILED);
    cu.emu_fail("gemm", 1);
    CHECK_CUBLAS(cu.cublasSgemm_v2(handle, CUBLAS_OP_N, CUBLAS_OP_N, 1, 1, 1, &one, memory, 1, memory, 1, &zero,
                                   (float *)memory + 9, 1),
                 CUBLAS_STATUS_EXECUTION_FAILED);
    CUDA_OK(cu.cudaFree(memory));
}

/* The product runs on the handle's stream, late; in a graph, again and again; cublasSetStream takes the workspace away. */
static void test_streams(void **state)
{
    (void)state;
    enum { SIDE = 4, BYTES = SIDE * SIDE * 4, WORKSPACE = 1 << 20 };
    const float one = 1, zero = 0;
    float *host = NULL;
    void *device = NULL, *workspace = NULL;
    cudaStream_t stream = NULL, got_stream = NULL;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t executable = NULL;
    CUDA_OK(cu.cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA_OK(cu.cudaMallocHost((void **)&host, BYTES));
    CUDA_OK(cu.cudaMalloc(&device, 3 * BYTES));
    CUDA_OK(cu.cudaMalloc(&workspace, WORKSPACE));
    float *a = device, *c = a + SIDE * SIDE;
    for (int i = 0; i < SIDE * SIDE; ++i)
        host[i] = 1;
    CUBLAS_OK(cu.cublasSetStream_v2(handle, stream));
    CUBLAS_OK(cu.cublasGetStream_v2(handle, &got_stream));
    CHECK(got_stream == stream, "the handle's stream");
    const long before = cu.emu_calls("workspace");
    CUDA_OK(cu.cudaMemcpyAsync(a, host, BYTES, cudaMemcpyHostToDevice, stream));
    CUBLAS_OK(
        cu.cublasSgemm_v2(handle, CUBLAS_OP_N, CUBLAS_OP_T, SIDE, SIDE, SIDE, &one, a, SIDE, a, SIDE, &zero, c, SIDE));
    CHECK(cu.emu_calls("workspace") == before + 1, "no workspace of the caller");
    CUBLAS_OK(cu.cublasSetWorkspace_v2(handle, workspace, WORKSPACE));
    CUDA_OK(cu.cudaMemsetAsync(workspace, 0, WORKSPACE, stream));
    CUBLAS_OK(
        cu.cublasSgemm_v2(handle, CUBLAS_OP_N, CUBLAS_OP_T, SIDE, SIDE, SIDE, &one, a, SIDE, a, SIDE, &zero, c, SIDE));
    CHECK(cu.emu_calls("workspace") == before + 1, "the caller's workspace is not used");
    for (int i = 0; i < SIDE * SIDE; ++i)
        host[i] = 2; /* before anything ran */
    CUDA_OK(cu.cudaMemcpyAsync(host, c, BYTES, cudaMemcpyDeviceToHost, stream));
    CUDA_OK(cu.cudaStreamSynchronize(stream));
    CHECK(host[0] == 16 && host[SIDE * SIDE - 1] == 16, "%g: the product runs when the stream is waited for", host[0]);

    CUDA_OK(cu.cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    CUDA_OK(cu.cudaMemcpyAsync(a, host, BYTES, cudaMemcpyHostToDevice, stream));
    CUBLAS_OK(
        cu.cublasSgemm_v2(handle, CUBLAS_OP_N, CUBLAS_OP_N, SIDE, SIDE, SIDE, &one, a, SIDE, a, SIDE, &zero, c, SIDE));
    CUDA_OK(cu.cudaMemcpyAsync(host, c, BYTES, cudaMemcpyDeviceToHost, stream));
    CUDA_OK(cu.cudaStreamEndCapture(stream, &graph));
    CUDA_OK(cu.cudaGraphInstantiate(&executable, graph, 0));
    for (int i = 0; i < SIDE * SIDE; ++i)
        host[i] = 1;
    CUDA_OK(cu.cudaGraphLaunch(executable, stream));
    CUDA_OK(cu.cudaGraphLaunch(executable, stream));
    CUDA_OK(cu.cudaStreamSynchronize(stream));
    CHECK(host[0] == 64, "%g: 1 -> 4 -> 64", host[0]);

    CUBLAS_OK(cu.cublasSetStream_v2(handle, NULL));
    const long without = cu.emu_calls("workspace");
    CUBLAS_OK(
        cu.cublasSgemm_v2(handle, CUBLAS_OP_N, CUBLAS_OP_N, SIDE, SIDE, SIDE, &one, a, SIDE, a, SIDE, &zero, c, SIDE));
    CHECK(cu.emu_calls("workspace") == without + 1, "cublasSetStream takes the workspace away");
    CUDA_OK(cu.cudaGraphExecDestroy(executable));
    CUDA_OK(cu.cudaGraphDestroy(graph));
    CUDA_OK(cu.cudaFree(device));
    CUDA_OK(cu.cudaFree(workspace));
    CUDA_OK(cu.cudaFreeHost(host));
    CUDA_OK(cu.cudaStreamDestroy(stream));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_products), cmocka_unit_test(test_entry_points),
                                       cmocka_unit_test(test_refusals), cmocka_unit_test(test_streams)};
    check_begin("test_cublas");
    emulated_open();
    return cmocka_run_group_tests(tests, setup, teardown);
}
