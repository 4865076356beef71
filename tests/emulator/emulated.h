/* emulated.h: what the tests of the emulator's libraries share: the functions, found with dlopen as libplora finds them, and
 * cases that must end with a finding, each in a process of its own.
 *
 *     emulated_open();                                fills cu: cu.cudaMalloc(...), cu.emu_fail(...)
 *     CUDA_OK(cu.cudaMalloc(&memory, 64));
 *     emulated_run("name", "EMU_SEED=2")              runs this program again, with one argument and one more variable
 */
#ifndef EMULATOR_EMULATED_H
#define EMULATOR_EMULATED_H

#include "check.h"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "services.h"

enum { FINDINGS = 86 }; /* the exit status of a process with findings */

#define RUNTIME_FUNCTIONS(X)                                                                                           \
    X(cudaRuntimeGetVersion)                                                                                           \
    X(cudaDriverGetVersion)                                                                                            \
    X(cudaGetErrorName)                                                                                                \
    X(cudaGetErrorString)                                                                                              \
    X(cudaGetLastError)                                                                                                \
    X(cudaPeekAtLastError)                                                                                             \
    X(cudaGetDeviceCount)                                                                                              \
    X(cudaSetDevice)                                                                                                   \
    X(cudaGetDevice)                                                                                                   \
    X(cudaDeviceGetAttribute)                                                                                          \
    X(cudaGetDeviceProperties)                                                                                         \
    X(cudaDeviceSynchronize)                                                                                           \
    X(cudaDeviceReset)                                                                                                 \
    X(cudaDeviceGetStreamPriorityRange)                                                                                \
    X(cudaMemGetInfo)                                                                                                  \
    X(cudaMalloc)                                                                                                      \
    X(cudaFree)                                                                                                        \
    X(cudaMallocAsync)                                                                                                 \
    X(cudaFreeAsync)                                                                                                   \
    X(cudaHostAlloc)                                                                                                   \
    X(cudaMallocHost)                                                                                                  \
    X(cudaFreeHost)                                                                                                    \
    X(cudaHostRegister)                                                                                                \
    X(cudaHostUnregister)                                                                                              \
    X(cudaHostGetDevicePointer)                                                                                        \
    X(cudaPointerGetAttributes)                                                                                        \
    X(cudaMemcpy)                                                                                                      \
    X(cudaMemcpyAsync)                                                                                                 \
    X(cudaMemcpy2D)                                                                                                    \
    X(cudaMemcpy2DAsync)                                                                                               \
    X(cudaMemset)                                                                                                      \
    X(cudaMemsetAsync)                                                                                                 \
    X(cudaMemset2D)                                                                                                    \
    X(cudaMemset2DAsync)                                                                                               \
    X(cudaStreamCreate)                                                                                                \
    X(cudaStreamCreateWithFlags)                                                                                       \
    X(cudaStreamCreateWithPriority)                                                                                    \
    X(cudaStreamDestroy)                                                                                               \
    X(cudaStreamSynchronize)                                                                                           \
    X(cudaStreamQuery)                                                                                                 \
    X(cudaStreamWaitEvent)                                                                                             \
    X(cudaStreamGetFlags)                                                                                              \
    X(cudaStreamGetPriority)                                                                                           \
    X(cudaStreamGetDevice)                                                                                             \
    X(cudaStreamGetId)                                                                                                 \
    X(cudaStreamBeginCapture)                                                                                          \
    X(cudaStreamEndCapture)                                                                                            \
    X(cudaStreamIsCapturing)                                                                                           \
    X(cudaStreamGetCaptureInfo)                                                                                        \
    X(cudaThreadExchangeStreamCaptureMode)                                                                             \
    X(cudaGraphInstantiate)                                                                                            \
    X(cudaGraphLaunch)                                                                                                 \
    X(cudaGraphUpload)                                                                                                 \
    X(cudaGraphDestroy)                                                                                                \
    X(cudaGraphExecDestroy)                                                                                            \
    X(cudaGraphGetNodes)                                                                                               \
    X(cudaGraphNodeGetType)                                                                                            \
    X(cudaEventCreate)                                                                                                 \
    X(cudaEventCreateWithFlags)                                                                                        \
    X(cudaEventRecord)                                                                                                 \
    X(cudaEventQuery)                                                                                                  \
    X(cudaEventSynchronize)                                                                                            \
    X(cudaEventElapsedTime)                                                                                            \
    X(cudaEventDestroy)                                                                                                \
    X(cudaLaunchHostFunc)                                                                                              \
    X(cudaLaunchKernel)                                                                                                \
    X(cudaLaunchKernelExC)                                                                                             \
    X(cudaLibraryLoadData)                                                                                             \
    X(cudaLibraryUnload)                                                                                               \
    X(cudaLibraryGetKernel)                                                                                            \
    X(cudaLibraryGetKernelCount)                                                                                       \
    X(cudaLibraryEnumerateKernels)                                                                                     \
    X(cudaLibraryGetGlobal)                                                                                            \
    X(cudaFuncGetAttributes)                                                                                           \
    X(cudaFuncSetAttribute)                                                                                            \
    X(cudaFuncGetName)                                                                                                 \
    X(cudaFuncGetParamInfo)                                                                                            \
    X(cudaOccupancyMaxActiveBlocksPerMultiprocessor)

#define CUBLAS_FUNCTIONS(X)                                                                                            \
    X(cublasCreate_v2)                                                                                                 \
    X(cublasDestroy_v2)                                                                                                \
    X(cublasSetStream_v2)                                                                                              \
    X(cublasGetStream_v2)                                                                                              \
    X(cublasSetWorkspace_v2)                                                                                           \
    X(cublasSetPointerMode_v2)                                                                                         \
    X(cublasGetPointerMode_v2)                                                                                         \
    X(cublasSetMathMode)                                                                                               \
    X(cublasGetMathMode)                                                                                               \
    X(cublasGetVersion_v2)                                                                                             \
    X(cublasGetStatusName)                                                                                             \
    X(cublasGetStatusString)                                                                                           \
    X(cublasGemmEx)                                                                                                    \
    X(cublasGemmEx_64)                                                                                                 \
    X(cublasSgemm_v2)                                                                                                  \
    X(cublasSgemm_v2_64)

#define SERVICE_FUNCTIONS(X)                                                                                           \
    X(emu_fail)                                                                                                        \
    X(emu_calls)                                                                                                       \
    X(emu_findings)                                                                                                    \
    X(emu_findings_clear)                                                                                              \
    X(emu_last_finding)

static struct {
#define MEMBER(function) __typeof__(&(function)) function;
    RUNTIME_FUNCTIONS(MEMBER)
    CUBLAS_FUNCTIONS(MEMBER)
    SERVICE_FUNCTIONS(MEMBER)
#undef MEMBER
} cu;

static void *emulated_symbol(void *library, const char *function, const char *version)
{
    void *symbol = dlvsym(library, function, version);
    if (symbol == NULL) {
        fprintf(stderr, "%s@%s: %s\n", function, version, dlerror());
        exit(2);
    }
    return symbol;
}

/* Opens both libraries, through the loader's path. */
static CHECK_UNUSED void emulated_open(void)
{
    void *runtime = dlopen("libcudart.so.13", RTLD_NOW | RTLD_LOCAL);
    void *cublas = runtime == NULL ? NULL : dlopen("libcublas.so.13", RTLD_NOW | RTLD_LOCAL);
    if (runtime == NULL || cublas == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        exit(2);
    }
#define RESOLVE(function)                                                                                              \
    {                                                                                                                  \
        void *symbol = emulated_symbol(library, #function, version);                                                   \
        memcpy(&cu.function, &symbol, sizeof symbol);                                                                  \
    }
    void *library = runtime;
    const char *version = "libcudart.so.13";
    RUNTIME_FUNCTIONS(RESOLVE)
    SERVICE_FUNCTIONS(RESOLVE)
    library = cublas;
    version = "libcublas.so.13";
    CUBLAS_FUNCTIONS(RESOLVE)
#undef RESOLVE
}

/* The call must give the error. */
#define CHECK_CUDA(expression, error)                                                                                  \
    do {                                                                                                               \
        const cudaError_t check_error_ = (expression);                                                                 \
        CHECK(check_error_ == (error), "%s: %s, want %s", #expression, cu.cudaGetErrorName(check_error_), #error);     \
    } while (0)
#define CUDA_OK(expression) CHECK_CUDA(expression, cudaSuccess)
#define CHECK_CUBLAS(expression, status)                                                                               \
    do {                                                                                                               \
        const cublasStatus_t check_status_ = (expression);                                                             \
        CHECK(check_status_ == (status), "%s: %s, want %s", #expression, cu.cublasGetStatusName(check_status_),        \
              #status);                                                                                                \
    } while (0)
#define CUBLAS_OK(expression) CHECK_CUBLAS(expression, CUBLAS_STATUS_SUCCESS)

/* The bytes of $EMU_KERNELS/NAME.fatbin. To be freed when the library is unloaded. */
static CHECK_UNUSED void *emulated_image(const char *name)
{
    char path[1024];
    const char *folder = getenv("EMU_KERNELS");
    snprintf(path, sizeof path, "%s/%s.fatbin", folder != NULL ? folder : ".", name);
    FILE *file = fopen(path, "rb");
    long size = 0;
    void *image = NULL;
    if (file != NULL && fseek(file, 0, SEEK_END) == 0 && (size = ftell(file)) > 0) image = malloc((size_t)size);
    if (image == NULL || fseek(file, 0, SEEK_SET) != 0 || fread(image, 1, (size_t)size, file) != (size_t)size) {
        fprintf(stderr, "cannot read %s\n", path);
        exit(2);
    }
    fclose(file);
    return image;
}

/* -------------------------------------------------------------------------------------------------------- child processes */

struct emulated_result {
    int status; /* of the exit; -signal */
    char output[16384];
};

/* Runs this program with one argument. setting is "NAME=value" for its environment, or NULL. */
static CHECK_UNUSED struct emulated_result emulated_run(const char *name, const char *setting)
{
    struct emulated_result result = {0, ""};
    int ends[2];
    CHECK(pipe(ends) == 0, "pipe");
    fflush(NULL);
    const pid_t child = fork();
    CHECK(child >= 0, "fork");
    if (child == 0) {
        char text[256];
        dup2(ends[1], STDERR_FILENO);
        dup2(ends[1], STDOUT_FILENO);
        close(ends[0]);
        close(ends[1]);
        snprintf(text, sizeof text, "%s", setting != NULL ? setting : "PLORA_TEST_CHILD=1");
        putenv(text);
        execl("/proc/self/exe", "child", name, (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    size_t length = 0;
    ssize_t got;
    while ((got = read(ends[0], result.output + length, sizeof result.output - 1 - length)) > 0)
        length += (size_t)got;
    close(ends[0]);
    result.output[length] = '\0';
    int status;
    CHECK(waitpid(child, &status, 0) == child, "waitpid");
    result.status = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    return result;
}

#endif
