/* cuda.h: private to cuda/: the state of one CUDA context, the calls of the CUDA libraries, and the way to launch a kernel.
 *
 * libcudart and libcublas are opened at run time (loader.c), so their functions are called through device->api. Every entry runs
 * with the context's device current and gives the host's back: cuda_launch() does that itself, other calls stand between
 * cuda_enter() and cuda_leave(). */
#ifndef PLORA_CUDA_H
#define PLORA_CUDA_H

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdatomic.h>

#include "backend.h"
#include "cublas.h"
#include "kernels.h"
#include "status.h"

/* What the library calls of libcudart.so.13; of libcublas.so.13: cublas.h. */
#define CUDA_RUNTIME_FUNCTIONS(X)                                                                                      \
    X(cudaRuntimeGetVersion)                                                                                           \
    X(cudaGetErrorName)                                                                                                \
    X(cudaGetErrorString)                                                                                              \
    X(cudaGetLastError)                                                                                                \
    X(cudaGetDeviceCount)                                                                                              \
    X(cudaGetDevice)                                                                                                   \
    X(cudaSetDevice)                                                                                                   \
    X(cudaDeviceGetAttribute)                                                                                          \
    X(cudaDeviceSynchronize)                                                                                           \
    X(cudaStreamSynchronize)                                                                                           \
    X(cudaStreamIsCapturing)                                                                                           \
    X(cudaMalloc)                                                                                                      \
    X(cudaFree)                                                                                                        \
    X(cudaMemcpyAsync)                                                                                                 \
    X(cudaMemsetAsync)                                                                                                 \
    X(cudaLibraryLoadData)                                                                                             \
    X(cudaLibraryUnload)                                                                                               \
    X(cudaLibraryGetKernel)                                                                                            \
    X(cudaFuncGetAttributes)                                                                                           \
    X(cudaFuncSetAttribute)                                                                                            \
    X(cudaLaunchKernelExC)

struct cuda_api {
#define CUDA_MEMBER(function) __typeof__(&(function)) function;
    CUDA_RUNTIME_FUNCTIONS(CUDA_MEMBER)
#undef CUDA_MEMBER
#define CUDA_MEMBER(result, function, parameters) result(*function) parameters;
    CUDA_BLAS_FUNCTIONS(CUDA_MEMBER)
#undef CUDA_MEMBER
};

/* loader.c: opens the libraries, once in a process. BACKEND_UNAVAILABLE names what was not found, and where it was looked for. */
plora_status cuda_load(const struct cuda_api **api);

/* fatbins.c: where a kernel comes from. */
struct cuda_kernel_source {
    const unsigned char *image; /* the fat binary of its .cu file */
    const char *name;           /* of the function */
};
extern const struct cuda_kernel_source cuda_kernel_sources[CUDA_KERNEL_COUNT];

struct cuda_device {
    const struct cuda_api *api;
    int ordinal;
    int capability;                             /* 10 * major + minor: 75, 80, 86 ... */
    int multiprocessors;                        /* what a grid that must not be larger than the machine is cut for */
    int shared_memory_limit;                    /* bytes of one block, static and dynamic; every kernel may use them */
    cudaLibrary_t libraries[CUDA_KERNEL_COUNT]; /* one for each fat binary */
    int library_count;
    cudaKernel_t kernels[CUDA_KERNEL_COUNT];
    /* Held from cublasSetStream_v2() to the product: a handle has one stream. */
    pthread_mutex_t cublas_lock;
    cuda_blas cublas;
    plora_context_options options;
    struct plora__host_memory memory;
    _Atomic(const char *)
        last_launch; /* the name of the kernel launched last: a guess at the culprit of a late error */
    atomic_int lost; /* the error after which the device can do no more work, or 0 */
};

/* cuda_backend.c: the names the error of a call, keeps in mind one that lost the device, and clears the runtime's last error, so
 * that the host does not meet it as its own. */
plora_status cuda_check(struct cuda_device *device, cudaError_t error, const char *call);
plora_status cuda_check_cublas(struct cuda_device *device, int error, const char *call);

/* Call functions of the runtime and of cuBLAS, return from the caller on an error. */
#define CUDA_TRY(device, function, ...) PLORA_TRY(cuda_check((device), (device)->api->function(__VA_ARGS__), #function))
#define CUDA_TRY_OUT(device, function, ...)                                                                            \
    PLORA_TRY_OUT(cuda_check((device), (device)->api->function(__VA_ARGS__), #function))
#define CUBLAS_TRY_OUT(device, function, ...)                                                                          \
    PLORA_TRY_OUT(cuda_check_cublas((device), (device)->api->function(__VA_ARGS__), #function))

/* Makes the context's device current; leave() gives back the host's, which enter() stored in *previous. */
plora_status cuda_enter(struct cuda_device *device, int *previous);
void cuda_leave(struct cuda_device *device, int previous);

/* Puts one launch on the stream. params points to the kernel's struct; an empty grid is no work. */
plora_status cuda_launch(struct cuda_device *device, enum cuda_kernel kernel, dim3 grid, dim3 block,
                         size_t shared_bytes, const void *params, void *stream);

/* cuda_init.c */
plora_status cuda_init_adapter(void *device, const struct plora__init_args *args, void *stream);

/* cuda_optimizer.c */
size_t cuda_step_workspace(void *device, const struct plora__step_args *args);
plora_status cuda_optimizer_step(void *device, const struct plora__step_args *args, void *stream);
plora_status cuda_scale(void *device, float *values, int64_t count, float factor, void *stream);

/* cuda_linear.c */
size_t cuda_linear_workspace(void *device, const struct plora__linear_args *args);
plora_status cuda_linear_forward(void *device, const struct plora__linear_args *args, void *stream);
plora_status cuda_linear_backward(void *device, const struct plora__linear_args *args, void *stream);

/* cuda_merge.c */
plora_status cuda_magnitudes(void *device, const struct plora__magnitude_args *args, void *stream);
size_t cuda_merge_workspace(void *device, const struct plora__merge_args *args);
plora_status cuda_merge(void *device, const struct plora__merge_args *args, void *stream);

/* cuda_batch.c */
size_t cuda_batch_workspace(void *device, const struct plora__batch_args *args);
plora_status cuda_batch_forward(void *device, const struct plora__batch_args *args, void *stream);
plora_status cuda_write(void *device, void *destination, const void *source, size_t bytes, void *stream);

/* cuda_dequantise.c */
plora_status cuda_dequantise(void *device, const struct plora__dequantise_args *args, void *stream);

#endif
