/* cublas.h: the part of cuBLAS's C ABI that the library calls, so that building it does not take cuBLAS itself (700 MB). Since CUDA 11
 * it has not changed (cuBLAS manual, "cuBLAS Datatypes Reference", "cublasGemmEx()"). The emulator's cuBLAS is compiled against NVIDIA's
 * own headers, and the tests call it through these declarations. */
#ifndef PLORA_CUDA_CUBLAS_H
#define PLORA_CUDA_CUBLAS_H

#include <library_types.h>
#include <stddef.h>
#include <stdint.h>

struct cublasContext;
typedef struct cublasContext *cuda_blas;

enum { CUDA_BLAS_SUCCESS = 0, CUDA_BLAS_ALLOC_FAILED = 3 }; /* of cublasStatus_t */
enum { CUDA_BLAS_N = 0, CUDA_BLAS_T = 1 };                  /* of cublasOperation_t */
enum { CUDA_BLAS_COMPUTE_32F = 68 };                        /* of cublasComputeType_t */
enum { CUDA_BLAS_GEMM_DEFAULT = -1 };                       /* of cublasGemmAlgo_t */
/* Of cublasMath_t: sums of 16-bit products stay fp32 until they are complete. */
enum { CUDA_BLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16 };

/* X(result, name, parameters); an int stands for each enumeration. */
#define CUDA_BLAS_FUNCTIONS(X)                                                                                         \
    X(int, cublasCreate_v2, (cuda_blas *))                                                                             \
    X(int, cublasDestroy_v2, (cuda_blas))                                                                              \
    X(int, cublasSetStream_v2, (cuda_blas, void *stream))                                                              \
    X(int, cublasSetWorkspace_v2, (cuda_blas, void *workspace, size_t bytes))                                          \
    X(int, cublasSetMathMode, (cuda_blas, int mode))                                                                   \
    X(const char *, cublasGetStatusName, (int status))                                                                 \
    X(const char *, cublasGetStatusString, (int status))                                                               \
    X(int, cublasGemmEx_64,                                                                                            \
      (cuda_blas, int transa, int transb, int64_t m, int64_t n, int64_t k, const void *alpha, const void *a,           \
       cudaDataType_t a_type, int64_t lda, const void *b, cudaDataType_t b_type, int64_t ldb, const void *beta,        \
       void *c, cudaDataType_t c_type, int64_t ldc, int compute_type, int algorithm))

#endif
