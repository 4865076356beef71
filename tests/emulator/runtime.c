/* runtime.c: the emulated libcudart: start and end, the lock, errors, devices, planned failures.
 *
 * Nothing happens when the library is loaded; the first call starts it. Errors are as on hardware: a failing call keeps its
 * error for the thread's cudaGetLastError(), and a kernel's fault makes every later call of the process fail the same way until
 * cudaDeviceReset(). Streams are in queue.c, memory in transfer.c, kernels in launch.c, graphs in capture.c. */
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pthread_mutex_t lock;
static pthread_once_t started = PTHREAD_ONCE_INIT;
static pid_t process;
static cudaError_t sticky;
bool runtime_in_host_function;
static bool tracing;
static int devices;
static int cublas_handles;
static struct cudaDeviceProp properties;

static _Thread_local cudaError_t last_error;
static _Thread_local int current_device;

/* ------------------------------------------------------------------------------------------------------ planned failures */

static struct planned {
    const char *kind;
    long calls, fail_at;
} plan[] = {{"malloc", 0, 0}, {"host", 0, 0},   {"launch", 0, 0}, {"fault", 0, 0},    {"copy", 0, 0},
            {"set", 0, 0},    {"stream", 0, 0}, {"event", 0, 0},  {"wait", 0, 0},     {"library", 0, 0},
            {"kernel", 0, 0}, {"cublas", 0, 0}, {"gemm", 0, 0},   {"workspace", 0, 0}};

static struct planned *plan_find(const char *kind, size_t length)
{
    for (size_t i = 0; i < sizeof plan / sizeof plan[0]; ++i)
        if (strlen(plan[i].kind) == length && strncmp(plan[i].kind, kind, length) == 0) return &plan[i];
    emu_find(NULL, "there is no kind of call '%.*s' to fail or count", (int)length, kind);
    return NULL;
}

static void plan_read(const char *text) /* kind:k,kind:k */
{
    while (text != NULL && *text != '\0') {
        const size_t length = strcspn(text, ":,");
        struct planned *planned = plan_find(text, length);
        text += length;
        if (planned != NULL) planned->fail_at = *text == ':' ? strtol(text + 1, NULL, 10) : 1;
        text += strcspn(text, ",");
        text += *text == ',';
    }
}

bool emu_fails(const char *kind)
{
    struct planned *planned = plan_find(kind, strlen(kind));
    return planned != NULL && ++planned->calls == planned->fail_at;
}

/* ---------------------------------------------------------------------------------------------------------- start and end */

/* The figures that launches are checked against, from the tables of the CUDA C++ Programming Guide (compute capabilities). */
static void describe_device(void)
{
    const int sm = (int)emu_setting("EMU_SM", 80);
    const bool turing = sm < 80;
    const size_t optin = turing                              ? 64 << 10
                         : sm == 80                          ? 163 << 10
                         : sm == 86 || sm == 89 || sm == 120 ? 99 << 10
                                                             : 227 << 10;
    snprintf(properties.name, sizeof properties.name, "emulated sm_%d", sm);
    properties.major = sm / 10;
    properties.minor = sm % 10;
    properties.totalGlobalMem = emu_memory_total();
    properties.sharedMemPerBlock = 48 << 10;
    properties.sharedMemPerBlockOptin = optin;
    properties.sharedMemPerMultiprocessor = turing ? optin : optin + (1 << 10);
    properties.reservedSharedMemPerBlock = turing ? 0 : 1 << 10;
    properties.regsPerBlock = properties.regsPerMultiprocessor = 64 << 10;
    properties.warpSize = 32;
    properties.memPitch = 0x7fffffff;
    properties.maxThreadsPerBlock = 1024;
    properties.maxThreadsDim[0] = properties.maxThreadsDim[1] = 1024;
    properties.maxThreadsDim[2] = 64;
    properties.maxGridSize[0] = 0x7fffffff;
    properties.maxGridSize[1] = properties.maxGridSize[2] = 65535;
    properties.totalConstMem = 64 << 10;
    properties.textureAlignment = 512;
    properties.multiProcessorCount = (int)emu_setting("EMU_MULTIPROCESSORS", turing ? 40 : 108);
    properties.maxThreadsPerMultiProcessor = turing ? 1024 : sm == 86 || sm == 89 || sm == 120 ? 1536 : 2048;
    properties.maxBlocksPerMultiProcessor = turing || sm == 86 ? 16 : sm == 89 || sm == 120 ? 24 : 32;
    properties.l2CacheSize = turing ? 4 << 20 : 40 << 20;
    properties.memoryBusWidth = turing ? 256 : 5120;
    properties.canMapHostMemory = properties.concurrentKernels = properties.unifiedAddressing = 1;
    properties.asyncEngineCount = 2;
    properties.streamPrioritiesSupported = properties.globalL1CacheSupported = properties.localL1CacheSupported = 1;
    properties.hostRegisterSupported = properties.memoryPoolsSupported = 1;
}

/* What is left at the end: first what is queued, so that its accesses are checked too. Not after a fault, when nothing could
 * be given back any more, nor in a process that forked, which owns nothing. */
static void finish(void)
{
    if (getpid() != process || sticky != cudaSuccess) return;
    pthread_mutex_lock(&lock);
    for (int device = 0; device < devices && sticky == cudaSuccess; ++device)
        queue_drain(device);
    if (sticky == cudaSuccess) {
        transfer_leaks();
        launch_leaks();
        capture_leaks();
        queue_leaks();
        if (cublas_handles > 0) emu_find(NULL, "leak: %d cuBLAS handles were not destroyed", cublas_handles);
    }
    pthread_mutex_unlock(&lock);
}

static void start(void)
{
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&lock, &attributes);
    pthread_mutexattr_destroy(&attributes);
    process = getpid();
    tracing = emu_setting("EMU_TRACE", 0) != 0;
    devices = (int)emu_setting("EMU_DEVICES", 1);
    if (devices > RUNTIME_MAX_DEVICES) devices = RUNTIME_MAX_DEVICES;
    describe_device();
    atexit(finish);
    plan_read(getenv("EMU_FAIL"));
}

cudaError_t runtime_enter(void)
{
    pthread_once(&started, start);
    pthread_mutex_lock(&lock);
    if (getpid() != process) return cudaErrorInitializationError; /* a context does not survive fork() */
    if (devices < 1) return cudaErrorNoDevice;
    if (runtime_in_host_function) return cudaErrorNotPermitted;
    return sticky;
}

cudaError_t runtime_leave(cudaError_t error)
{
    if (error != cudaSuccess) last_error = error;
    pthread_mutex_unlock(&lock);
    return error;
}

cudaError_t emu_enter(void)
{
    return runtime_enter();
}

cudaError_t emu_leave(cudaError_t error)
{
    return runtime_leave(error);
}

void emu_fail(const char *kind, long k)
{
    runtime_enter();
    struct planned *planned = plan_find(kind, strlen(kind));
    if (planned != NULL) planned->fail_at = k > 0 ? planned->calls + k : 0;
    runtime_leave(cudaSuccess);
}

long emu_calls(const char *kind)
{
    runtime_enter();
    const struct planned *planned = plan_find(kind, strlen(kind));
    const long calls = planned != NULL ? planned->calls : -1;
    runtime_leave(cudaSuccess);
    return calls;
}

void emu_count_cublas(int change)
{
    cublas_handles += change;
}

int runtime_device(void)
{
    return current_device;
}

int runtime_device_count(void)
{
    return devices;
}

const struct cudaDeviceProp *runtime_properties(void)
{
    return &properties;
}

cudaError_t runtime_sticky(void)
{
    return sticky;
}

void runtime_fault(cudaError_t error)
{
    if (sticky == cudaSuccess) sticky = error;
}

bool runtime_tracing(void)
{
    return tracing;
}

cudaError_t runtime_bad_handle(const char *what, const void *handle)
{
    emu_find(NULL, "%s that was destroyed, or never made, is used: %p", what, handle);
    return cudaErrorInvalidResourceHandle;
}

/* ----------------------------------------------------------------------------------------------------------------- errors */

#define ERRORS(X)                                                                                                      \
    X(cudaSuccess, "no error")                                                                                         \
    X(cudaErrorInvalidValue, "invalid argument")                                                                       \
    X(cudaErrorMemoryAllocation, "out of memory")                                                                      \
    X(cudaErrorInitializationError, "initialization error")                                                            \
    X(cudaErrorCudartUnloading, "driver shutting down")                                                                \
    X(cudaErrorInvalidConfiguration, "invalid configuration argument")                                                 \
    X(cudaErrorInvalidPitchValue, "invalid pitch argument")                                                            \
    X(cudaErrorInvalidSymbol, "invalid device symbol")                                                                 \
    X(cudaErrorInvalidDevicePointer, "invalid device pointer")                                                         \
    X(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy")                                            \
    X(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version")                     \
    X(cudaErrorInvalidDeviceFunction, "invalid device function")                                                       \
    X(cudaErrorNoDevice, "no CUDA-capable device is detected")                                                         \
    X(cudaErrorInvalidDevice, "invalid device ordinal")                                                                \
    X(cudaErrorInvalidKernelImage, "device kernel image is invalid")                                                   \
    X(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device")                     \
    X(cudaErrorInvalidPtx, "a PTX JIT compilation failed")                                                             \
    X(cudaErrorInvalidResourceHandle, "invalid resource handle")                                                       \
    X(cudaErrorIllegalState, "the operation cannot be performed in the present state")                                 \
    X(cudaErrorSymbolNotFound, "named symbol not found")                                                               \
    X(cudaErrorNotReady, "device not ready")                                                                           \
    X(cudaErrorIllegalAddress, "an illegal memory access was encountered")                                             \
    X(cudaErrorLaunchOutOfResources, "too many resources requested for launch")                                        \
    X(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped")             \
    X(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region")                   \
    X(cudaErrorIllegalInstruction, "an illegal instruction was encountered")                                           \
    X(cudaErrorMisalignedAddress, "misaligned address")                                                                \
    X(cudaErrorInvalidAddressSpace, "operation not supported on global/shared address space")                          \
    X(cudaErrorLaunchFailure, "unspecified launch failure")                                                            \
    X(cudaErrorNotPermitted, "operation not permitted")                                                                \
    X(cudaErrorNotSupported, "operation not supported")                                                                \
    X(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing")                           \
    X(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture")                    \
    X(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences")                  \
    X(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began")                         \
    X(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work")                                            \
    X(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream")                      \
    X(cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing blocking stream")  \
    X(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream")               \
    X(cudaErrorStreamCaptureWrongThread, "attempt to terminate a thread-local capture sequence from another thread")   \
    X(cudaErrorUnknown, "unknown error")

const char *cudaGetErrorName(cudaError_t error)
{
#define NAME(code, text)                                                                                               \
    if (error == code) return #code;
    ERRORS(NAME)
    return "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t error)
{
#define TEXT(code, text)                                                                                               \
    if (error == code) return text;
    ERRORS(TEXT)
    return "unrecognized error code";
}

cudaError_t cudaGetLastError(void)
{
    const cudaError_t lost = runtime_enter();
    const cudaError_t error = lost != cudaSuccess ? lost : last_error;
    last_error = cudaSuccess;
    pthread_mutex_unlock(&lock);
    return error;
}

cudaError_t cudaPeekAtLastError(void)
{
    const cudaError_t lost = runtime_enter();
    pthread_mutex_unlock(&lock);
    return lost != cudaSuccess ? lost : last_error;
}

/* ---------------------------------------------------------------------------------------------------------------- devices */

cudaError_t cudaRuntimeGetVersion(int *version)
{
    if (version == NULL) return cudaErrorInvalidValue;
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    return cudaRuntimeGetVersion(version);
}

cudaError_t cudaGetDeviceCount(int *count)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && count == NULL) error = cudaErrorInvalidValue;
    if (error == cudaSuccess) *count = devices;
    if (error == cudaErrorNoDevice && count != NULL) *count = 0;
    return runtime_leave(error);
}

cudaError_t cudaSetDevice(int device)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && (device < 0 || device >= devices)) error = cudaErrorInvalidDevice;
    if (error == cudaSuccess) current_device = device;
    return runtime_leave(error);
}

cudaError_t cudaGetDevice(int *device)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && device == NULL) error = cudaErrorInvalidValue;
    if (error == cudaSuccess) *device = current_device;
    return runtime_leave(error);
}

cudaError_t cudaSetDeviceFlags(unsigned flags)
{
    (void)flags;
    return runtime_leave(runtime_enter());
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *out, int device)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && out == NULL) error = cudaErrorInvalidValue;
    if (error == cudaSuccess && (device < 0 || device >= devices)) error = cudaErrorInvalidDevice;
    if (error == cudaSuccess) *out = properties;
    return runtime_leave(error);
}

static cudaError_t attribute(int *value, enum cudaDeviceAttr attr)
{
    const struct cudaDeviceProp *p = &properties;
    switch (attr) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p->maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: *value = p->maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimY: *value = p->maxThreadsDim[1]; break;
    case cudaDevAttrMaxBlockDimZ: *value = p->maxThreadsDim[2]; break;
    case cudaDevAttrMaxGridDimX: *value = p->maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p->maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = p->maxGridSize[2]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p->sharedMemPerBlock; break;
    case cudaDevAttrTotalConstantMemory: *value = (int)p->totalConstMem; break;
    case cudaDevAttrWarpSize: *value = p->warpSize; break;
    case cudaDevAttrMaxPitch: *value = (int)p->memPitch; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p->regsPerBlock; break;
    case cudaDevAttrClockRate: *value = 1410000; break;       /* kHz, an A100's */
    case cudaDevAttrMemoryClockRate: *value = 1215000; break; /* kHz, an A100's */
    case cudaDevAttrTextureAlignment: *value = (int)p->textureAlignment; break;
    case cudaDevAttrMultiProcessorCount: *value = p->multiProcessorCount; break;
    case cudaDevAttrGpuOverlap:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrGlobalL1CacheSupported:
    case cudaDevAttrLocalL1CacheSupported:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
    case cudaDevAttrKernelExecTimeout:
    case cudaDevAttrIntegrated:
    case cudaDevAttrEccEnabled:
    case cudaDevAttrComputeMode:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrPageableMemoryAccess:
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrClusterLaunch: *value = 0; break;
    case cudaDevAttrAsyncEngineCount: *value = p->asyncEngineCount; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = p->memoryBusWidth; break;
    case cudaDevAttrL2CacheSize: *value = p->l2CacheSize; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p->maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p->major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p->minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p->sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p->regsPerMultiprocessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p->sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p->maxBlocksPerMultiProcessor; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = (int)p->reservedSharedMemPerBlock; break;
    default: return cudaErrorNotSupported; /* not emulated */
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attr, int device)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && value == NULL) error = cudaErrorInvalidValue;
    if (error == cudaSuccess && (device < 0 || device >= devices)) error = cudaErrorInvalidDevice;
    if (error == cudaSuccess) error = attribute(value, attr);
    return runtime_leave(error);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    const cudaError_t error = runtime_enter();
    if (error == cudaSuccess && least != NULL) *least = 0;
    if (error == cudaSuccess && greatest != NULL) *greatest = -5;
    return runtime_leave(error);
}

cudaError_t cudaDeviceSynchronize(void)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = capture_forbids_wait(NULL);
    if (error == cudaSuccess && emu_fails("wait")) error = cudaErrorUnknown;
    if (error == cudaSuccess) error = queue_drain(current_device);
    return runtime_leave(error);
}

/* As after a new start, on all devices at once: the one way on after a sticky error. */
cudaError_t cudaDeviceReset(void)
{
    const cudaError_t error = runtime_enter();
    if (error == cudaErrorInitializationError || error == cudaErrorNoDevice) return runtime_leave(error);
    capture_reset();
    queue_reset();
    launch_reset();
    transfer_reset();
    sticky = cudaSuccess;
    last_error = cudaSuccess;
    return runtime_leave(cudaSuccess);
}
