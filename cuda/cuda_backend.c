/* cuda_backend.c: CUDA's operation table; opening and closing a device, its memory, its errors, and the launch.
 *
 * Everything is put on the caller's stream. Only open, allocate, release, copies from or to pageable host memory and synchronize
 * wait for the device. The operations are in cuda_<noun>.c, the kernels in <noun>.cu, the libraries' functions in loader.c. */
#include "cuda.h"

#include <string.h>

/* -------------------------------------------------------------------------------------------------------------- errors */

/* The errors of which the runtime says that every further call returns them again. */
static int loses_device(cudaError_t error)
{
    switch ((int)error) {
    case cudaErrorContained:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorTensorMemoryLeak:
    case cudaErrorMpsClientTerminated:
    case cudaErrorExternalDevice: return 1;
    default: return 0;
    }
}

/* A late error is met by whatever call comes next: the first to meet it reports it, with the kernel that was launched last; the
 * calls after it only say that the device is lost. */
plora_status cuda_check(struct cuda_device *device, cudaError_t error, const char *call)
{
    if (error == cudaSuccess) return PLORA_OK;
    const struct cuda_api *api = device->api;
    api->cudaGetLastError();
    const char *name = api->cudaGetErrorName(error), *text = api->cudaGetErrorString(error);
    if (!loses_device(error))
        return plora__fail(error == cudaErrorMemoryAllocation ? PLORA_ERROR_OUT_OF_MEMORY : PLORA_ERROR_BACKEND,
                           "CUDA device %d: %s: %s (%s)", device->ordinal, call, name, text);
    int none = 0;
    if (!atomic_compare_exchange_strong(&device->lost, &none, (int)error))
        return plora__fail(PLORA_ERROR_BACKEND, "CUDA device %d: %s: the device was lost to an earlier error, %s",
                           device->ordinal, call, api->cudaGetErrorName((cudaError_t)none));
    const char *kernel = atomic_load(&device->last_launch);
    return plora__fail(PLORA_ERROR_BACKEND,
                       "CUDA device %d: %s met the error of earlier work: %s (%s); the library's last launch was %s",
                       device->ordinal, call, name, text, kernel == NULL ? "none" : kernel);
}

plora_status cuda_check_cublas(struct cuda_device *device, int error, const char *call)
{
    if (error == CUDA_BLAS_SUCCESS) return PLORA_OK;
    const struct cuda_api *api = device->api;
    /* cuBLAS hides the runtime's error behind its own. */
    PLORA_TRY(cuda_check(device, api->cudaGetLastError(), call));
    return plora__fail(error == CUDA_BLAS_ALLOC_FAILED ? PLORA_ERROR_OUT_OF_MEMORY : PLORA_ERROR_BACKEND,
                       "CUDA device %d: %s: %s (%s)", device->ordinal, call, api->cublasGetStatusName(error),
                       api->cublasGetStatusString(error));
}

plora_status cuda_enter(struct cuda_device *device, int *previous)
{
    CUDA_TRY(device, cudaGetDevice, previous);
    if (*previous != device->ordinal) CUDA_TRY(device, cudaSetDevice, device->ordinal);
    return PLORA_OK;
}

void cuda_leave(struct cuda_device *device, int previous)
{
    if (previous != device->ordinal) device->api->cudaSetDevice(previous);
}

/* A call of the runtime on the context's device. */
#define CUDA_CALL(device, function, ...)                                                                               \
    do {                                                                                                               \
        int previous_;                                                                                                 \
        PLORA_TRY(cuda_enter((device), &previous_));                                                                   \
        const cudaError_t error_ = (device)->api->function(__VA_ARGS__);                                               \
        cuda_leave((device), previous_);                                                                               \
        PLORA_TRY(cuda_check((device), error_, #function));                                                            \
    } while (0)

/* -------------------------------------------------------------------------------------------------------------- launch */

plora_status cuda_launch(struct cuda_device *device, enum cuda_kernel kernel, dim3 grid, dim3 block,
                         size_t shared_bytes, const void *params, void *stream)
{
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return PLORA_OK;
    const char *name = cuda_kernel_sources[kernel].name;
    const cudaLaunchConfig_t config = {
        .gridDim = grid, .blockDim = block, .dynamicSmemBytes = shared_bytes, .stream = stream};
    void *arguments[1];
    memcpy(&arguments[0], &params, sizeof params); /* the runtime only reads it, its type does not say so */
    int previous;
    PLORA_TRY(cuda_enter(device, &previous));
    const cudaError_t error = device->api->cudaLaunchKernelExC(&config, device->kernels[kernel], arguments);
    cuda_leave(device, previous);
    PLORA_TRY(cuda_check(device, error, name));
    atomic_store(&device->last_launch, name);
    return PLORA_OK;
}

/* ------------------------------------------------------------------------------------------------------ open and close */

static void cuda_close(void *opened)
{
    struct cuda_device *device = opened;
    const struct plora__host_memory memory = device->memory;
    int previous;
    if (cuda_enter(device, &previous) == PLORA_OK) {
        if (device->cublas != NULL) device->api->cublasDestroy_v2(device->cublas);
        for (int i = 0; i < device->library_count; ++i)
            device->api->cudaLibraryUnload(device->libraries[i]);
        cuda_leave(device, previous);
    }
    pthread_mutex_destroy(&device->cublas_lock);
    memory.release(memory.owner, device, sizeof *device);
}

/* The device exists and is one that the kernels were compiled for. */
static plora_status find_device(struct cuda_device *device)
{
    const struct cuda_api *api = device->api;
    int count = 0;
    const cudaError_t error = api->cudaGetDeviceCount(&count);
    if (error != cudaSuccess) api->cudaGetLastError();
    PLORA_CHECK(error == cudaSuccess, PLORA_ERROR_BACKEND_UNAVAILABLE,
                "CUDA backend: the runtime finds no device: %s (%s)", api->cudaGetErrorString(error),
                api->cudaGetErrorName(error));
    PLORA_CHECK(device->ordinal >= 0 && device->ordinal < count, PLORA_ERROR_INVALID_ARGUMENT,
                "device is %d: there are %d CUDA devices", device->ordinal, count);
    return PLORA_OK;
}

static plora_status read_attributes(struct cuda_device *device)
{
    int major = 0, minor = 0;
    CUDA_TRY(device, cudaDeviceGetAttribute, &major, cudaDevAttrComputeCapabilityMajor, device->ordinal);
    CUDA_TRY(device, cudaDeviceGetAttribute, &minor, cudaDevAttrComputeCapabilityMinor, device->ordinal);
    CUDA_TRY(device, cudaDeviceGetAttribute, &device->multiprocessors, cudaDevAttrMultiProcessorCount, device->ordinal);
    CUDA_TRY(device, cudaDeviceGetAttribute, &device->shared_memory_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin,
             device->ordinal);
    device->capability = 10 * major + minor;
    PLORA_CHECK(device->capability >= 75, PLORA_ERROR_BACKEND_UNAVAILABLE,
                "CUDA backend: device %d has compute capability %d.%d: at least 7.5 is needed", device->ordinal, major,
                minor);
    return PLORA_OK;
}

/* Loaded to the end here, so that no launch has to, and each kernel is allowed all the shared memory that a block can have. */
static plora_status load_kernel(struct cuda_device *device, enum cuda_kernel kernel)
{
    const struct cuda_kernel_source *source = &cuda_kernel_sources[kernel];
    int owner = 0; /* kernels of one image follow each other in the list */
    if (kernel > 0 && source[-1].image == source->image) {
        owner = device->library_count - 1;
    } else {
        owner = device->library_count;
        CUDA_TRY(device, cudaLibraryLoadData, &device->libraries[owner], source->image, NULL, NULL, 0, NULL, NULL, 0);
        device->library_count++;
    }
    struct cudaFuncAttributes attributes;
    CUDA_TRY(device, cudaLibraryGetKernel, &device->kernels[kernel], device->libraries[owner], source->name);
    CUDA_TRY(device, cudaFuncGetAttributes, &attributes, device->kernels[kernel]);
    CUDA_TRY(device, cudaFuncSetAttribute, device->kernels[kernel], cudaFuncAttributeMaxDynamicSharedMemorySize,
             device->shared_memory_limit - (int)attributes.sharedSizeBytes);
    return PLORA_OK;
}

static plora_status set_up(struct cuda_device *device)
{
    PLORA_TRY(read_attributes(device));
    for (int kernel = 0; kernel < CUDA_KERNEL_COUNT; ++kernel) {
        const plora_status status = load_kernel(device, (enum cuda_kernel)kernel);
        if (status != PLORA_OK) return plora__fail_in(status, cuda_kernel_sources[kernel].name);
    }
    PLORA_TRY(cuda_check_cublas(device, device->api->cublasCreate_v2(&device->cublas), "cublasCreate_v2"));
    const int mode = CUDA_BLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    return cuda_check_cublas(device, device->api->cublasSetMathMode(device->cublas, mode), "cublasSetMathMode");
}

static plora_status cuda_open(const plora_context_options *options, const struct plora__host_memory *memory,
                              void **opened)
{
    const struct cuda_api *api;
    PLORA_TRY(cuda_load(&api));
    void *allocated;
    PLORA_TRY(memory->allocate(memory->owner, sizeof(struct cuda_device), &allocated));
    struct cuda_device *device = allocated;
    memset(device, 0, sizeof *device);
    device->api = api;
    device->ordinal = options->device;
    device->options = *options;
    device->memory = *memory;
    pthread_mutex_init(&device->cublas_lock, NULL);
    int previous;
    plora_status status = find_device(device);
    if (status == PLORA_OK) status = cuda_enter(device, &previous);
    if (status != PLORA_OK) {
        pthread_mutex_destroy(&device->cublas_lock);
        memory->release(memory->owner, device, sizeof *device);
        return status;
    }
    status = set_up(device);
    cuda_leave(device, previous);
    if (status != PLORA_OK) {
        cuda_close(device);
        return status;
    }
    *opened = device;
    return PLORA_OK;
}

/* -------------------------------------------------------------------------------------------------------------- memory */

static plora_status cuda_allocate(void *opened, size_t bytes, void **memory)
{
    struct cuda_device *device = opened;
    const plora_context_options *options = &device->options;
    if (options->device_allocate == NULL) {
        CUDA_CALL(device, cudaMalloc, memory, bytes);
        return PLORA_OK;
    }
    int previous;
    PLORA_TRY(cuda_enter(device, &previous));
    *memory = options->device_allocate(bytes, options->device_user);
    cuda_leave(device, previous);
    PLORA_CHECK(*memory != NULL, PLORA_ERROR_OUT_OF_MEMORY, "out of memory: %zu bytes on CUDA device %d", bytes,
                device->ordinal);
    const int aligned = (uintptr_t)*memory % 64 == 0;
    if (!aligned) options->device_free(*memory, bytes, options->device_user);
    PLORA_CHECK(aligned, PLORA_ERROR_BACKEND, "device_allocate gave %p: must be aligned to 64 bytes", *memory);
    return PLORA_OK;
}

/* The host's allocator may hand the memory on at once: nothing that was enqueued may still use it. cudaFree() waits by itself. */
static void cuda_release(void *opened, void *memory, size_t bytes)
{
    struct cuda_device *device = opened;
    int previous;
    if (cuda_enter(device, &previous) != PLORA_OK) return;
    if (device->options.device_free != NULL) {
        cuda_check(device, device->api->cudaDeviceSynchronize(), "cudaDeviceSynchronize");
        device->options.device_free(memory, bytes, device->options.device_user);
    } else {
        cuda_check(device, device->api->cudaFree(memory), "cudaFree");
    }
    cuda_leave(device, previous);
}

static plora_status cuda_copy(void *opened, void *destination, const void *source, size_t bytes, void *stream)
{
    struct cuda_device *device = opened;
    if (bytes > 0) CUDA_CALL(device, cudaMemcpyAsync, destination, source, bytes, cudaMemcpyDefault, stream);
    return PLORA_OK;
}

static plora_status cuda_clear(void *opened, void *memory, size_t bytes, void *stream)
{
    struct cuda_device *device = opened;
    if (bytes > 0) CUDA_CALL(device, cudaMemsetAsync, memory, 0, bytes, stream);
    return PLORA_OK;
}

/* ------------------------------------------------------------------------------------------------------------- streams */

static plora_status cuda_synchronize(void *opened, void *stream)
{
    struct cuda_device *device = opened;
    if (stream == NULL)
        CUDA_CALL(device, cudaDeviceSynchronize, );
    else
        CUDA_CALL(device, cudaStreamSynchronize, stream);
    return PLORA_OK;
}

static plora_status cuda_check_stream(void *opened, void *stream, int waits)
{
    struct cuda_device *device = opened;
    if (!waits) return PLORA_OK;
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    int previous;
    PLORA_TRY(cuda_enter(device, &previous));
    const cudaError_t error = device->api->cudaStreamIsCapturing(stream, &capture);
    cuda_leave(device, previous);
    if (error == cudaErrorStreamCaptureImplicit)
        device->api->cudaGetLastError(); /* the NULL stream, another captures */
    else
        PLORA_TRY(cuda_check(device, error, "cudaStreamIsCapturing"));
    PLORA_CHECK(error == cudaSuccess && capture == cudaStreamCaptureStatusNone, PLORA_ERROR_UNSUPPORTED,
                "stream %p is being captured in a CUDA graph: this call waits for the device, or would not be the same "
                "when it is repeated",
                stream);
    return PLORA_OK;
}

const struct plora_backend plora__cuda_backend = {
    .name = "cuda",
    .asynchronous = 1,
    .open = cuda_open,
    .close = cuda_close,
    .allocate = cuda_allocate,
    .release = cuda_release,
    .copy = cuda_copy,
    .clear = cuda_clear,
    .synchronize = cuda_synchronize,
    .check_stream = cuda_check_stream,
    .init_adapter = cuda_init_adapter,
    .linear_workspace = cuda_linear_workspace,
    .linear_forward = cuda_linear_forward,
    .linear_backward = cuda_linear_backward,
    .step_workspace = cuda_step_workspace,
    .optimizer_step = cuda_optimizer_step,
    .scale = cuda_scale,
    .magnitudes = cuda_magnitudes,
    .merge_workspace = cuda_merge_workspace,
    .merge = cuda_merge,
    .write = cuda_write,
    .batch_workspace = cuda_batch_workspace,
    .batch_forward = cuda_batch_forward,
    .dequantise = cuda_dequantise,
};
