/* cublas.c: the emulated libcublas: products, C = alpha op(A) op(B) + beta C, column-major, by oneDNN.
 *
 * Operands are widened to fp32, multiplied and added up in fp32, and rounded once to the type of C: what CUBLAS_COMPUTE_32F
 * promises, with a summation order of its own. A product is queued on the handle's stream like a kernel, and like a kernel's
 * accesses its operands are checked when it runs: in bounds, alive, initialised (C too when beta is not 0). Two traps of the
 * real library are here too: cublasSetStream takes the caller's workspace away, and a product may write anywhere in the
 * workspace. Only the combinations of types are accepted that the cublasGemmEx documentation lists for CUBLAS_COMPUTE_32F. */
#include <cublas_v2.h>
#include <dnnl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "services.h"

enum { SCRIBBLE_BYTES = 64 << 10 };

struct cublasContext {
    bool alive;
    cudaStream_t stream;
    void *workspace;
    size_t workspace_bytes;
    cublasPointerMode_t pointer_mode;
    cublasMath_t math;
    cublasAtomicsMode_t atomics;
    struct cublasContext *next;
};

static struct cublasContext *handles; /* all that were ever made */

/* ---------------------------------------------------------------------------------------------------------------- handles */

static bool alive(const struct cublasContext *handle)
{
    const struct cublasContext *each = handles;
    while (each != NULL && each != handle)
        each = each->next;
    return each != NULL && each->alive;
}

/* Every call with a handle: enter, its body, leave. */
static cublasStatus_t enter(const struct cublasContext *handle)
{
    if (emu_enter() != cudaSuccess) return CUBLAS_STATUS_EXECUTION_FAILED;
    if (alive(handle)) return CUBLAS_STATUS_SUCCESS;
    if (handle != NULL)
        emu_find(NULL, "a cuBLAS handle that was destroyed, or never made, is used: %p", (const void *)handle);
    return CUBLAS_STATUS_NOT_INITIALIZED;
}

static cublasStatus_t leave(cublasStatus_t status)
{
    emu_leave(cudaSuccess);
    return status;
}

cublasStatus_t cublasCreate_v2(cublasHandle_t *out)
{
    cublasStatus_t status = emu_enter() == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_INITIALIZED;
    if (status == CUBLAS_STATUS_SUCCESS && out == NULL) status = CUBLAS_STATUS_INVALID_VALUE;
    if (status == CUBLAS_STATUS_SUCCESS && emu_may_allocate() != cudaSuccess) status = CUBLAS_STATUS_NOT_INITIALIZED;
    if (status == CUBLAS_STATUS_SUCCESS && emu_fails("cublas")) status = CUBLAS_STATUS_ALLOC_FAILED;
    if (status == CUBLAS_STATUS_SUCCESS) {
        struct cublasContext *handle = calloc(1, sizeof *handle);
        if (handle == NULL) abort(); /* the test machine is out of memory */
        handle->alive = true;
        handle->next = handles;
        handles = *out = handle;
        emu_count_cublas(1);
    }
    return leave(status);
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle)
{
    const cublasStatus_t status = enter(handle);
    if (status == CUBLAS_STATUS_SUCCESS) {
        handle->alive = false;
        emu_count_cublas(-1);
    }
    return leave(status);
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream)
{
    cublasStatus_t status = enter(handle);
    if (status == CUBLAS_STATUS_SUCCESS && emu_stream_alive(stream) != cudaSuccess)
        status = CUBLAS_STATUS_INVALID_VALUE;
    if (status == CUBLAS_STATUS_SUCCESS) {
        handle->stream = stream;
        handle->workspace = NULL; /* "unconditionally resets the workspace back to the default workspace pool" */
        handle->workspace_bytes = 0;
    }
    return leave(status);
}

cublasStatus_t cublasGetStream_v2(cublasHandle_t handle, cudaStream_t *stream)
{
    cublasStatus_t status = enter(handle);
    if (status == CUBLAS_STATUS_SUCCESS && stream == NULL) status = CUBLAS_STATUS_INVALID_VALUE;
    if (status == CUBLAS_STATUS_SUCCESS) *stream = handle->stream;
    return leave(status);
}

/* All of it is in one live allocation. The state of each of its bytes, often many millions, is of no interest. */
static bool workspace_alive(const char *who, const void *workspace, size_t bytes)
{
    void *base = NULL;
    size_t size = 0;
    if (bytes == 0) return true;
    if (emu_memory_find(workspace, &base, &size) && bytes <= size &&
        (size_t)((const char *)workspace - (const char *)base) <= size - bytes)
        return true;
    if (emu_memory_is_device(workspace))
        emu_memory_check(who, workspace, bytes, EMU_READ_ANY); /* says what is wrong */
    else
        emu_find(NULL, "%s: %p is not device memory", who, workspace);
    return false;
}

cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void *workspace, size_t bytes)
{
    cublasStatus_t status = enter(handle);
    if (status == CUBLAS_STATUS_SUCCESS && ((uintptr_t)workspace % 256 != 0 || (workspace == NULL && bytes > 0)))
        status = CUBLAS_STATUS_INVALID_VALUE;
    if (status == CUBLAS_STATUS_SUCCESS && !workspace_alive("cublasSetWorkspace", workspace, bytes))
        status = CUBLAS_STATUS_INVALID_VALUE;
    if (status == CUBLAS_STATUS_SUCCESS) {
        handle->workspace = workspace;
        handle->workspace_bytes = bytes;
    }
    return leave(status);
}

cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode)
{
    cublasStatus_t status = enter(handle);
    if (status == CUBLAS_STATUS_SUCCESS && mode != CUBLAS_POINTER_MODE_HOST && mode != CUBLAS_POINTER_MODE_DEVICE)
        status = CUBLAS_STATUS_INVALID_VALUE;
    if (status == CUBLAS_STATUS_SUCCESS) handle->pointer_mode = mode;
    return leave(status);
}

cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode)
{
    cublasStatus_t status = enter(handle);
    if (status == CUBLAS_STATUS_SUCCESS && mode == NULL) status = CUBLAS_STATUS_INVALID_VALUE;
    if (status == CUBLAS_STATUS_SUCCESS) *mode = handle->pointer_mode;
    return leave(status);
}

/* TF32 and the other modes that round operands are refused: results would not be what these products promise. */
cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode)
{
    cublasStatus_t status = enter(handle);
    const unsigned plain = (unsigned)mode & ~(unsigned)CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    if (status == CUBLAS_STATUS_SUCCESS && plain != CUBLAS_DEFAULT_MATH && plain != CUBLAS_PEDANTIC_MATH)
        status = CUBLAS_STATUS_NOT_SUPPORTED;
    if (status == CUBLAS_STATUS_SUCCESS) handle->math = mode;
    return leave(status);
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode)
{
    cublasStatus_t status = enter(handle);
    if (status == CUBLAS_STATUS_SUCCESS && mode == NULL) status = CUBLAS_STATUS_INVALID_VALUE;
    if (status == CUBLAS_STATUS_SUCCESS) *mode = handle->math;
    return leave(status);
}

cublasStatus_t cublasSetAtomicsMode(cublasHandle_t handle, cublasAtomicsMode_t mode)
{
    const cublasStatus_t status = enter(handle);
    if (status == CUBLAS_STATUS_SUCCESS) handle->atomics = mode;
    return leave(status);
}

cublasStatus_t cublasGetAtomicsMode(cublasHandle_t handle, cublasAtomicsMode_t *mode)
{
    const cublasStatus_t status = enter(handle);
    if (status == CUBLAS_STATUS_SUCCESS) *mode = handle->atomics;
    return leave(status);
}

cublasStatus_t cublasGetVersion_v2(cublasHandle_t handle, int *version)
{
    (void)handle;
    if (version == NULL) return CUBLAS_STATUS_INVALID_VALUE;
    *version = CUBLAS_VERSION;
    return CUBLAS_STATUS_SUCCESS;
}

#define STATUSES(X)                                                                                                    \
    X(CUBLAS_STATUS_SUCCESS, "success")                                                                                \
    X(CUBLAS_STATUS_NOT_INITIALIZED, "the library was not initialized")                                                \
    X(CUBLAS_STATUS_ALLOC_FAILED, "the resource allocation failed")                                                    \
    X(CUBLAS_STATUS_INVALID_VALUE, "an unsupported value or parameter was passed to the function")                     \
    X(CUBLAS_STATUS_ARCH_MISMATCH, "the function requires an architectural feature absent from the device")            \
    X(CUBLAS_STATUS_MAPPING_ERROR, "an access to GPU memory space failed")                                             \
    X(CUBLAS_STATUS_EXECUTION_FAILED, "the function failed to launch on the GPU")                                      \
    X(CUBLAS_STATUS_INTERNAL_ERROR, "an internal operation failed")                                                    \
    X(CUBLAS_STATUS_NOT_SUPPORTED, "the requested functionality is not supported")                                     \
    X(CUBLAS_STATUS_LICENSE_ERROR, "the license check failed")

const char *cublasGetStatusName(cublasStatus_t status)
{
#define NAME(code, text)                                                                                               \
    if (status == code) return #code;
    STATUSES(NAME)
    return "unrecognized status";
}

const char *cublasGetStatusString(cublasStatus_t status)
{
#define TEXT(code, text)                                                                                               \
    if (status == code) return text;
    STATUSES(TEXT)
    return "unrecognized status";
}

/* --------------------------------------------------------------------------------------------------------------- products */

/* A column-major matrix as it lies in memory, before op(). */
struct operand {
    const void *data;
    int32_t dtype; /* PLORA_... */
    int64_t rows, columns, stride;
};

struct product {
    const char *who;
    bool transpose_a, transpose_b, device_scalars;
    int64_t m, n, k;
    float alpha, beta;
    const float *alpha_address, *beta_address; /* when they are on the device */
    struct operand a, b, c;
    void *workspace;
    size_t workspace_bytes;
};

static bool check_operand(const struct product *product, const struct operand *operand, const char *name,
                          enum emu_access access)
{
    char who[64];
    const size_t size = plora__dtype_size(operand->dtype);
    snprintf(who, sizeof who, "%s, operand %s", product->who, name);
    if ((uintptr_t)operand->data % size != 0) {
        emu_find(NULL, "%s: %p is not aligned to its elements of %zu bytes", who, operand->data, size);
        return false;
    }
    return emu_memory_check_rows(who, operand->data, (size_t)operand->columns, size * (size_t)operand->rows,
                                 size * (size_t)operand->stride, access);
}

static float *fresh(int64_t count)
{
    float *memory = malloc(sizeof *memory * (size_t)(count > 0 ? count : 1));
    if (memory == NULL) abort();
    return memory;
}

/* A dense fp32 copy. */
static float *widen(const struct operand *operand)
{
    const char *data = emu_memory_host(operand->data);
    float *copy = fresh(operand->rows * operand->columns);
    for (int64_t j = 0; j < operand->columns; ++j)
        for (int64_t i = 0; i < operand->rows; ++i)
            copy[j * operand->rows + i] = plora__load(data, j * operand->stride + i, operand->dtype);
    return copy;
}

static bool read_scalars(const struct product *product, float *alpha, float *beta)
{
    *alpha = product->alpha;
    *beta = product->beta;
    if (!product->device_scalars) return true;
    if (!emu_memory_check("cublas, alpha", product->alpha_address, sizeof *alpha, EMU_READ)) return false;
    if (!emu_memory_check("cublas, beta", product->beta_address, sizeof *beta, EMU_READ)) return false;
    memcpy(alpha, emu_memory_host(product->alpha_address), sizeof *alpha);
    memcpy(beta, emu_memory_host(product->beta_address), sizeof *beta);
    return true;
}

/* The product may have used it for anything: what others left there is gone. */
static bool scribble(const struct product *product)
{
    char *workspace = product->workspace;
    const size_t bytes = product->workspace_bytes, part = bytes < SCRIBBLE_BYTES ? bytes : SCRIBBLE_BYTES;
    if (!workspace_alive("cublas, the workspace", workspace, bytes)) return false;
    char *ends[] = {workspace, workspace + bytes - part};
    for (int i = 0; i < 2 && part > 0; ++i) {
        memset(emu_memory_host(ends[i]), 0xff, part);
        emu_memory_mark(ends[i], part, false);
    }
    return true;
}

/* Row-major, the column-major product is C^T = op(B)^T op(A)^T. */
static cudaError_t run_product(const void *state)
{
    const struct product *product = state;
    const int64_t m = product->m, n = product->n, k = product->k;
    float alpha, beta;
    if (!read_scalars(product, &alpha, &beta) || !scribble(product)) return cudaErrorIllegalAddress;
    if (m == 0 || n == 0) return cudaSuccess;
    const bool reads_c = beta != 0.0f, multiplies = k > 0 && alpha != 0.0f;
    if (multiplies &&
        (!check_operand(product, &product->a, "A", EMU_READ) || !check_operand(product, &product->b, "B", EMU_READ)))
        return cudaErrorIllegalAddress;
    if (reads_c && !check_operand(product, &product->c, "C", EMU_READ)) return cudaErrorIllegalAddress;
    if (!check_operand(product, &product->c, "C", EMU_WRITE)) return cudaErrorIllegalAddress;

    float *sums = fresh(m * n);
    memset(sums, 0, sizeof *sums * (size_t)(m * n));
    if (multiplies) {
        float *a = widen(&product->a), *b = widen(&product->b);
        const dnnl_status_t status = dnnl_sgemm(product->transpose_b ? 'T' : 'N', product->transpose_a ? 'T' : 'N', n,
                                                m, k, 1.0f, b, product->b.rows, a, product->a.rows, 0.0f, sums, m);
        if (status != dnnl_success) emu_find(NULL, "%s: oneDNN failed with status %d", product->who, (int)status);
        free(a);
        free(b);
    }
    char *c = emu_memory_host(product->c.data);
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < m; ++i) {
            const int64_t element = j * product->c.stride + i;
            const float before = reads_c ? beta * plora__load(c, element, product->c.dtype) : 0.0f;
            plora__store(c, element, product->c.dtype, alpha * sums[j * m + i] + before);
        }
    }
    free(sums);
    return cudaSuccess;
}

static int32_t dtype_of(cudaDataType type)
{
    return type == CUDA_R_32F ? PLORA_F32 : type == CUDA_R_16BF ? PLORA_BF16 : type == CUDA_R_16F ? PLORA_F16 : -1;
}

/* The table of cublasGemmEx for CUBLAS_COMPUTE_32F, real types: A and B alike, C of their type or fp32. */
static bool types_supported(const struct product *product)
{
    if (product->a.dtype < 0 || product->b.dtype != product->a.dtype) return false;
    return product->c.dtype == product->a.dtype || product->c.dtype == PLORA_F32;
}

static bool shapes_valid(const struct product *product)
{
    const struct operand *operands[] = {&product->a, &product->b, &product->c};
    if (product->m < 0 || product->n < 0 || product->k < 0) return false;
    for (int i = 0; i < 3; ++i)
        if (operands[i]->stride < (operands[i]->rows > 1 ? operands[i]->rows : 1)) return false;
    return true;
}

static cublasStatus_t enqueue(struct cublasContext *handle, struct product *product, cublasOperation_t transpose_a,
                              cublasOperation_t transpose_b, const void *alpha, const void *beta)
{
    const int64_t m = product->m, n = product->n, k = product->k;
    product->transpose_a = transpose_a != CUBLAS_OP_N;
    product->transpose_b = transpose_b != CUBLAS_OP_N;
    if (transpose_a < CUBLAS_OP_N || transpose_a > CUBLAS_OP_C || transpose_b < CUBLAS_OP_N ||
        transpose_b > CUBLAS_OP_C)
        return CUBLAS_STATUS_INVALID_VALUE;
    product->a.rows = product->transpose_a ? k : m;
    product->a.columns = product->transpose_a ? m : k;
    product->b.rows = product->transpose_b ? n : k;
    product->b.columns = product->transpose_b ? k : n;
    product->c.rows = m;
    product->c.columns = n;
    if (!shapes_valid(product) || alpha == NULL || beta == NULL) return CUBLAS_STATUS_INVALID_VALUE;
    if (!types_supported(product)) return CUBLAS_STATUS_NOT_SUPPORTED;
    product->device_scalars = handle->pointer_mode == CUBLAS_POINTER_MODE_DEVICE;
    product->alpha_address = alpha;
    product->beta_address = beta;
    if (!product->device_scalars) {
        product->alpha = *product->alpha_address;
        product->beta = *product->beta_address;
    }
    product->workspace = handle->workspace;
    product->workspace_bytes = handle->workspace_bytes;
    if (handle->workspace_bytes == 0) (void)emu_fails("workspace");
    if (emu_fails("gemm")) return CUBLAS_STATUS_EXECUTION_FAILED;
    char name[96];
    snprintf(name, sizeof name, "%s m=%lld n=%lld k=%lld", product->who, (long long)m, (long long)n, (long long)k);
    const cudaError_t error = emu_enqueue(handle->stream, name, run_product, product, sizeof *product);
    return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

cublasStatus_t cublasGemmEx_64(cublasHandle_t handle, cublasOperation_t transpose_a, cublasOperation_t transpose_b,
                               int64_t m, int64_t n, int64_t k, const void *alpha, const void *a, cudaDataType a_type,
                               int64_t lda, const void *b, cudaDataType b_type, int64_t ldb, const void *beta, void *c,
                               cudaDataType c_type, int64_t ldc, cublasComputeType_t compute,
                               cublasGemmAlgo_t algorithm)
{
    (void)algorithm;
    struct product product = {.who = "cublasGemmEx",
                              .m = m,
                              .n = n,
                              .k = k,
                              .a = {a, dtype_of(a_type), 0, 0, lda},
                              .b = {b, dtype_of(b_type), 0, 0, ldb},
                              .c = {c, dtype_of(c_type), 0, 0, ldc}};
    cublasStatus_t status = enter(handle);
    if (status == CUBLAS_STATUS_SUCCESS && compute != CUBLAS_COMPUTE_32F && compute != CUBLAS_COMPUTE_32F_PEDANTIC)
        status = CUBLAS_STATUS_NOT_SUPPORTED;
    if (status == CUBLAS_STATUS_SUCCESS) status = enqueue(handle, &product, transpose_a, transpose_b, alpha, beta);
    return leave(status);
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transpose_a, cublasOperation_t transpose_b, int m,
                            int n, int k, const void *alpha, const void *a, cudaDataType a_type, int lda, const void *b,
                            cudaDataType b_type, int ldb, const void *beta, void *c, cudaDataType c_type, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algorithm)
{
    return cublasGemmEx_64(handle, transpose_a, transpose_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c,
                           c_type, ldc, compute, algorithm);
}

cublasStatus_t cublasSgemm_v2_64(cublasHandle_t handle, cublasOperation_t transpose_a, cublasOperation_t transpose_b,
                                 int64_t m, int64_t n, int64_t k, const float *alpha, const float *a, int64_t lda,
                                 const float *b, int64_t ldb, const float *beta, float *c, int64_t ldc)
{
    struct product product = {.who = "cublasSgemm",
                              .m = m,
                              .n = n,
                              .k = k,
                              .a = {a, PLORA_F32, 0, 0, lda},
                              .b = {b, PLORA_F32, 0, 0, ldb},
                              .c = {c, PLORA_F32, 0, 0, ldc}};
    cublasStatus_t status = enter(handle);
    if (status == CUBLAS_STATUS_SUCCESS) status = enqueue(handle, &product, transpose_a, transpose_b, alpha, beta);
    return leave(status);
}

cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t transpose_a, cublasOperation_t transpose_b,
                              int m, int n, int k, const float *alpha, const float *a, int lda, const float *b, int ldb,
                              const float *beta, float *c, int ldc)
{
    return cublasSgemm_v2_64(handle, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
