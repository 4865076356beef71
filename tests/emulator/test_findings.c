/* test_findings.c: each misuse of the emulated libraries is found, with a text that names it, and ends the process with status 86;
 * the same thing done right ends with 0. Each case is a process of its own: this program again, with the case's name as argument. */
#include "emulated.h"

enum { COUNT = 64, BYTES = 4 * COUNT };

static const float one = 1, zero = 0;

/* In a case, nothing may fail that is not meant to. */
static void expect(cudaError_t error, cudaError_t want, int line)
{
    if (error == want) return;
    fprintf(stderr, "line %d: %s, want %s\n", line, cu.cudaGetErrorName(error), cu.cudaGetErrorName(want));
    _exit(3);
}
#define OK(expression) expect((expression), cudaSuccess, __LINE__)
#define FAILS(expression, error) expect((expression), (error), __LINE__)
#define BLAS(expression)                                                                                               \
    expect((expression) == CUBLAS_STATUS_SUCCESS ? cudaSuccess : cudaErrorUnknown, cudaSuccess, __LINE__)

static void *allocate(size_t bytes)
{
    void *memory = NULL;
    OK(cu.cudaMalloc(&memory, bytes));
    return memory;
}

static void *allocate_set(size_t bytes)
{
    void *memory = allocate(bytes);
    OK(cu.cudaMemset(memory, 0, bytes));
    OK(cu.cudaDeviceSynchronize());
    return memory;
}

static cudaStream_t stream_new(void)
{
    cudaStream_t stream = NULL;
    OK(cu.cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
}

/* -------------------------------------------------------------------------------------------------------------- done right */

static void clean(void)
{
    float host[COUNT] = {0};
    void *memory = allocate(BYTES), *pinned = NULL, *image = emulated_image("order");
    cudaStream_t stream = stream_new();
    cudaEvent_t event = NULL;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t executable = NULL;
    cudaLibrary_t library = NULL;
    cublasHandle_t handle = NULL;
    OK(cu.cudaEventCreate(&event));
    OK(cu.cudaMallocHost(&pinned, BYTES));
    OK(cu.cudaLibraryLoadData(&library, image, NULL, NULL, 0, NULL, NULL, 0));
    BLAS(cu.cublasCreate_v2(&handle));
    BLAS(cu.cublasSetStream_v2(handle, stream));
    OK(cu.cudaMemcpyAsync(memory, host, BYTES, cudaMemcpyHostToDevice, stream));
    float *a = memory;
    BLAS(cu.cublasSgemm_v2(handle, CUBLAS_OP_N, CUBLAS_OP_N, 4, 4, 4, &one, a, 4, a + 16, 4, &one, a + 32, 4));
    OK(cu.cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    OK(cu.cudaMemcpyAsync(pinned, memory, BYTES, cudaMemcpyDeviceToHost, stream));
    OK(cu.cudaStreamEndCapture(stream, &graph));
    OK(cu.cudaGraphInstantiate(&executable, graph, 0));
    OK(cu.cudaGraphLaunch(executable, stream));
    OK(cu.cudaEventRecord(event, stream));
    OK(cu.cudaEventSynchronize(event));
    BLAS(cu.cublasDestroy_v2(handle));
    OK(cu.cudaGraphExecDestroy(executable));
    OK(cu.cudaGraphDestroy(graph));
    OK(cu.cudaLibraryUnload(library));
    OK(cu.cudaEventDestroy(event));
    OK(cu.cudaStreamDestroy(stream));
    OK(cu.cudaFreeHost(pinned));
    OK(cu.cudaFree(memory));
    free(image);
}

/* A child process of fork() has no context, and owns nothing that could leak. */
static void forked(void)
{
    void *memory = allocate(BYTES);
    const pid_t child = fork();
    if (child == 0) {
        int count;
        exit(cu.cudaGetDeviceCount(&count) == cudaErrorInitializationError ? 0 : 4);
    }
    int status = 0;
    if (waitpid(child, &status, 0) != child || status != 0) _exit(5);
    OK(cu.cudaFree(memory));
}

/* ------------------------------------------------------------------------------------------------------------------- leaks */

static void leak_memory(void)
{
    allocate(12345);
}

static void leak_pinned(void)
{
    void *memory;
    OK(cu.cudaMallocHost(&memory, 777));
}

static void leak_registered(void)
{
    static char memory[999];
    OK(cu.cudaHostRegister(memory, sizeof memory, 0));
}

static void leak_stream(void)
{
    stream_new();
}

static void leak_event(void)
{
    cudaEvent_t event;
    OK(cu.cudaEventCreate(&event));
}

static void leak_library(void)
{
    cudaLibrary_t library;
    OK(cu.cudaLibraryLoadData(&library, emulated_image("order"), NULL, NULL, 0, NULL, NULL, 0));
}

static void leak_graph(void)
{
    cudaStream_t stream = stream_new();
    cudaGraph_t graph;
    OK(cu.cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    OK(cu.cudaStreamEndCapture(stream, &graph));
    OK(cu.cudaStreamDestroy(stream));
}

static void leak_handle(void)
{
    cublasHandle_t handle;
    BLAS(cu.cublasCreate_v2(&handle));
}

/* ------------------------------------------------------------------------------------------------------------ dead handles */

static void dead_stream(void)
{
    cudaStream_t stream = stream_new();
    OK(cu.cudaStreamDestroy(stream));
    FAILS(cu.cudaStreamSynchronize(stream), cudaErrorInvalidResourceHandle);
}

static void dead_event(void)
{
    cudaEvent_t event;
    OK(cu.cudaEventCreate(&event));
    OK(cu.cudaEventDestroy(event));
    FAILS(cu.cudaEventRecord(event, NULL), cudaErrorInvalidResourceHandle);
}

static void dead_kernel(void)
{
    void *image = emulated_image("order");
    cudaLibrary_t library;
    cudaKernel_t kernel;
    float *out = NULL;
    int count = 0;
    OK(cu.cudaLibraryLoadData(&library, image, NULL, NULL, 0, NULL, NULL, 0));
    OK(cu.cudaLibraryGetKernel(&kernel, library, "fill_kernel"));
    OK(cu.cudaLibraryUnload(library));
    FAILS(
        cu.cudaLaunchKernel(kernel, (dim3){1, 1, 1}, (dim3){1, 1, 1}, (void *[]){&out, &count, (void *)&one}, 0, NULL),
        cudaErrorInvalidResourceHandle);
}

static void dead_handle(void)
{
    cublasHandle_t handle;
    BLAS(cu.cublasCreate_v2(&handle));
    BLAS(cu.cublasDestroy_v2(handle));
    cu.cublasSetStream_v2(handle, NULL);
}

static void dead_handle_stream(void)
{
    cublasHandle_t handle;
    cudaStream_t stream = stream_new();
    BLAS(cu.cublasCreate_v2(&handle));
    BLAS(cu.cublasSetStream_v2(handle, stream));
    OK(cu.cudaStreamDestroy(stream));
    float *a = allocate_set(BYTES);
    cu.cublasSgemm_v2(handle, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, 2, &one, a, 2, a, 2, &zero, a + 8, 2);
    OK(cu.cudaFree(a));
    BLAS(cu.cublasDestroy_v2(handle));
}

/* ----------------------------------------------------------------------------------------------------------------- memory */

static void free_twice(void)
{
    void *memory = allocate(BYTES);
    OK(cu.cudaFree(memory));
    FAILS(cu.cudaFree(memory), cudaErrorInvalidValue);
}

static void free_inside(void)
{
    char *memory = allocate(BYTES);
    FAILS(cu.cudaFree(memory + 4), cudaErrorInvalidValue);
    OK(cu.cudaFree(memory));
}

static void copy_beyond(void)
{
    float host[COUNT + 1] = {0};
    void *memory = allocate(BYTES);
    FAILS(cu.cudaMemcpy(memory, host, BYTES + 4, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    OK(cu.cudaFree(memory));
}

static void copy_unset(void)
{
    float host[COUNT];
    void *memory = allocate(BYTES);
    OK(cu.cudaMemset(memory, 0, BYTES - 4));
    OK(cu.cudaMemcpy(host, memory, BYTES, cudaMemcpyDeviceToHost));
    OK(cu.cudaFree(memory));
}

/* Not initialised is handed on by copies between device addresses. */
static void copy_unset_twice(void)
{
    float host[COUNT];
    void *memory = allocate(BYTES), *other = allocate_set(BYTES);
    OK(cu.cudaMemcpy(other, memory, BYTES, cudaMemcpyDeviceToDevice));
    OK(cu.cudaMemcpy(host, other, BYTES, cudaMemcpyDeviceToHost));
    OK(cu.cudaFree(memory));
    OK(cu.cudaFree(other));
}

static void copy_freed_later(void)
{
    cudaStream_t a = stream_new(), b = stream_new();
    void *memory = allocate_set(BYTES), *other = allocate(BYTES);
    OK(cu.cudaMemcpyAsync(other, memory, BYTES, cudaMemcpyDeviceToDevice, a));
    OK(cu.cudaFreeAsync(memory, b)); /* not ordered after the copy */
    OK(cu.cudaStreamSynchronize(b));
    FAILS(cu.cudaStreamSynchronize(a), cudaErrorIllegalAddress);
}

static void host_access(void)
{
    volatile float *memory = allocate_set(BYTES);
    memory[3] = 1;
}

static void pinned_freed(void)
{
    void *memory = NULL;
    OK(cu.cudaMallocHost(&memory, 4096));
    OK(cu.cudaFreeHost(memory));
    *(volatile char *)memory = 1;
}

/* The kernel of one stream fills what the other stream copies out: without an event between them nothing is there yet. */
static void no_order(void)
{
    void *image = emulated_image("order"), *pinned = NULL;
    cudaLibrary_t library;
    cudaKernel_t kernel;
    cudaStream_t a = stream_new(), b = stream_new();
    float *memory = allocate(BYTES);
    int count = COUNT;
    OK(cu.cudaMallocHost(&pinned, BYTES));
    OK(cu.cudaLibraryLoadData(&library, image, NULL, NULL, 0, NULL, NULL, 0));
    OK(cu.cudaLibraryGetKernel(&kernel, library, "fill_kernel"));
    OK(cu.cudaLaunchKernel(kernel, (dim3){1, 1, 1}, (dim3){COUNT, 1, 1}, (void *[]){&memory, &count, (void *)&one}, 0,
                           a));
    OK(cu.cudaMemcpyAsync(pinned, memory, BYTES, cudaMemcpyDeviceToHost, b));
    OK(cu.cudaStreamSynchronize(b));
    OK(cu.cudaStreamDestroy(a));
    OK(cu.cudaStreamDestroy(b));
    OK(cu.cudaFreeHost(pinned));
    OK(cu.cudaFree(memory));
    OK(cu.cudaLibraryUnload(library));
    free(image);
}

/* --------------------------------------------------------------------------------------------------------------- products */

/* A product of 4 x 4 matrices at a, b, c; everything is given back. */
static void product(float *memory, const float *a, const float *b, float *c, int stride, cudaError_t error)
{
    cublasHandle_t handle;
    BLAS(cu.cublasCreate_v2(&handle));
    BLAS(cu.cublasSgemm_v2(handle, CUBLAS_OP_N, CUBLAS_OP_N, 4, 4, 4, &one, a, 4, b, stride, &zero, c, 4));
    FAILS(cu.cudaDeviceSynchronize(), error);
    if (error != cudaSuccess) return;
    BLAS(cu.cublasDestroy_v2(handle));
    OK(cu.cudaFree(memory));
}

static void product_beyond(void)
{
    float *memory = allocate_set(BYTES);
    product(memory, memory, memory + 16, memory + 49, 4, cudaErrorIllegalAddress);
}

static void product_stride(void)
{
    float *memory = allocate_set(BYTES);
    product(memory, memory, memory + 16, memory + 32, 20, cudaErrorIllegalAddress);
}

static void product_unset(void)
{
    float *memory = allocate(BYTES);
    OK(cu.cudaMemset(memory, 0, 31 * 4));
    product(memory, memory, memory + 16, memory + 32, 4, cudaSuccess);
}

static void product_freed(void)
{
    float *memory = allocate_set(BYTES), *freed = allocate_set(BYTES);
    OK(cu.cudaFree(freed));
    product(memory, memory, freed, memory + 32, 4, cudaErrorIllegalAddress);
}

static void product_misaligned(void)
{
    float *memory = allocate_set(BYTES);
    product(memory, (const float *)((char *)memory + 2), memory + 16, memory + 32, 4, cudaErrorIllegalAddress);
}

/* What the caller keeps in the workspace of cuBLAS is gone after a product. */
static void workspace_used(void)
{
    float host;
    cublasHandle_t handle;
    float *memory = allocate_set(BYTES), *workspace = allocate_set(1 << 20);
    BLAS(cu.cublasCreate_v2(&handle));
    BLAS(cu.cublasSetWorkspace_v2(handle, workspace, 1 << 20));
    BLAS(cu.cublasSgemm_v2(handle, CUBLAS_OP_N, CUBLAS_OP_N, 4, 4, 4, &one, memory, 4, memory, 4, &zero, memory + 16,
                           4));
    OK(cu.cudaMemcpy(&host, workspace + 5, 4, cudaMemcpyDeviceToHost));
    BLAS(cu.cublasDestroy_v2(handle));
    OK(cu.cudaFree(memory));
    OK(cu.cudaFree(workspace));
}

static void workspace_freed(void)
{
    cublasHandle_t handle;
    float *memory = allocate_set(BYTES), *workspace = allocate(1 << 20);
    BLAS(cu.cublasCreate_v2(&handle));
    BLAS(cu.cublasSetWorkspace_v2(handle, workspace, 1 << 20));
    OK(cu.cudaFree(workspace));
    BLAS(cu.cublasSgemm_v2(handle, CUBLAS_OP_N, CUBLAS_OP_N, 4, 4, 4, &one, memory, 4, memory, 4, &zero, memory + 16,
                           4));
    FAILS(cu.cudaDeviceSynchronize(), cudaErrorIllegalAddress);
}

static void workspace_short(void)
{
    cublasHandle_t handle;
    void *workspace = allocate(1000);
    BLAS(cu.cublasCreate_v2(&handle));
    if (cu.cublasSetWorkspace_v2(handle, workspace, 1001) != CUBLAS_STATUS_INVALID_VALUE) _exit(3);
    BLAS(cu.cublasDestroy_v2(handle));
    OK(cu.cudaFree(workspace));
}

/* --------------------------------------------------------------------------------------------------------------- settings */

static void planned(void)
{
    void *memory;
    FAILS(cu.cudaMalloc(&memory, 4), cudaErrorMemoryAllocation);
}

static void devices(void)
{
    int count = -1, current = -1;
    void *memory;
    struct cudaPointerAttributes attributes;
    OK(cu.cudaGetDeviceCount(&count));
    OK(cu.cudaSetDevice(count - 1));
    cudaStream_t stream = stream_new();
    OK(cu.cudaStreamGetDevice(stream, &current));
    memory = allocate(4);
    OK(cu.cudaPointerGetAttributes(&attributes, memory));
    fprintf(stderr, "device %d of %d, pointer of %d\n", current, count, attributes.device);
    OK(cu.cudaSetDevice(0));
    FAILS(cu.cudaMemsetAsync(memory, 0, 4, stream), cudaErrorInvalidResourceHandle);
    OK(cu.cudaFree(memory));
    OK(cu.cudaStreamDestroy(stream));
}

static void no_device(void)
{
    int count = -1;
    FAILS(cu.cudaGetDeviceCount(&count), cudaErrorNoDevice);
    fprintf(stderr, "%d devices\n", count);
}

static void architecture(void)
{
    struct cudaDeviceProp properties;
    OK(cu.cudaGetDeviceProperties(&properties, 0));
    fprintf(stderr, "%d.%d, %zu bytes\n", properties.major, properties.minor, properties.sharedMemPerBlockOptin);
}

static void traced(void)
{
    OK(cu.cudaFree(allocate_set(48)));
}

/* Which of two streams that nothing orders runs last, many times. */
static void orders(void)
{
    cudaStream_t a = stream_new(), b = stream_new();
    unsigned char *memory = allocate_set(1), last;
    for (int i = 0; i < 32; ++i) {
        OK(cu.cudaMemsetAsync(memory, 'a', 1, a));
        OK(cu.cudaMemsetAsync(memory, 'b', 1, b));
        OK(cu.cudaDeviceSynchronize());
        OK(cu.cudaMemcpy(&last, memory, 1, cudaMemcpyDeviceToHost));
        fputc(last, stderr);
    }
    OK(cu.cudaFree(memory));
    OK(cu.cudaStreamDestroy(a));
    OK(cu.cudaStreamDestroy(b));
}

static void bad_image(void)
{
    static const char image[64] = "not a fat binary";
    cudaLibrary_t library;
    if (cu.cudaLibraryLoadData(&library, image, NULL, NULL, 0, NULL, NULL, 0) == cudaSuccess) _exit(3);
}

/* ------------------------------------------------------------------------------------------------------------------ table */

static const struct {
    const char *name;
    void (*run)(void);
    const char *setting;
    int status;
    const char *text;
} cases[] = {
    {"clean", clean, NULL, 0, ""},
    {"forked", forked, NULL, 0, ""},
    {"leak_memory", leak_memory, NULL, FINDINGS, "leak: 12345 bytes of device memory"},
    {"leak_pinned", leak_pinned, NULL, FINDINGS, "leak: 777 bytes of pinned host memory"},
    {"leak_registered", leak_registered, NULL, FINDINGS, "were not unregistered"},
    {"leak_stream", leak_stream, NULL, FINDINGS, "leak: stream 1 was not destroyed"},
    {"leak_event", leak_event, NULL, FINDINGS, "leak: event 1 was not destroyed"},
    {"leak_library", leak_library, NULL, FINDINGS, "leak: library 1, of 4 kernels"},
    {"leak_graph", leak_graph, NULL, FINDINGS, "leak: 1 graphs"},
    {"leak_handle", leak_handle, NULL, FINDINGS, "leak: 1 cuBLAS handles"},
    {"dead_stream", dead_stream, NULL, FINDINGS, "a stream that was destroyed"},
    {"dead_event", dead_event, NULL, FINDINGS, "an event that was destroyed"},
    {"dead_kernel", dead_kernel, NULL, FINDINGS, "a kernel of a library that was destroyed"},
    {"dead_handle", dead_handle, NULL, FINDINGS, "a cuBLAS handle that was destroyed"},
    {"dead_handle_stream", dead_handle_stream, NULL, FINDINGS, "a stream that was destroyed"},
    {"free_twice", free_twice, NULL, FINDINGS, "freed twice"},
    {"free_inside", free_inside, NULL, FINDINGS, "which is not an allocation"},
    {"copy_beyond", copy_beyond, NULL, FINDINGS, "cudaMemcpy, destination"},
    {"copy_unset", copy_unset, NULL, FINDINGS, "uninitialised"},
    {"copy_unset_twice", copy_unset_twice, NULL, FINDINGS, "uninitialised"},
    {"copy_freed_later", copy_freed_later, NULL, FINDINGS, "freed"},
    {"host_access", host_access, NULL, -SIGSEGV, "host access to device memory"},
    {"pinned_freed", pinned_freed, NULL, -SIGSEGV, ""},
    {"no_order", no_order, NULL, FINDINGS, "uninitialised"},
    {"product_beyond", product_beyond, NULL, FINDINGS, "cublasSgemm, operand C"},
    {"product_stride", product_stride, NULL, FINDINGS, "cublasSgemm, operand B"},
    {"product_unset", product_unset, NULL, FINDINGS, "cublasSgemm, operand B"},
    {"product_freed", product_freed, NULL, FINDINGS, "cublasSgemm, operand B"},
    {"product_misaligned", product_misaligned, NULL, FINDINGS, "cublasSgemm, operand A"},
    {"workspace_used", workspace_used, NULL, FINDINGS, "uninitialised"},
    {"workspace_freed", workspace_freed, NULL, FINDINGS, "cublas, the workspace"},
    {"workspace_short", workspace_short, NULL, FINDINGS, "cublasSetWorkspace"},
    {"planned", planned, "EMU_FAIL=launch:1,malloc:1", 0, ""},
    {"traced", traced, "EMU_FAIL=mallok:1", FINDINGS, "no kind of call 'mallok'"},
    {"devices", devices, "EMU_DEVICES=2", 0, "device 1 of 2, pointer of 1"},
    {"no_device", no_device, "EMU_DEVICES=0", 0, "0 devices"},
    {"architecture", architecture, NULL, 0, "8.0, 166912 bytes"},
    {"architecture", architecture, "EMU_SM=75", 0, "7.5, 65536 bytes"},
    {"traced", traced, "EMU_TRACE=1", 0, "emulator: stream 1: cudaMemset"},
    {"orders", orders, NULL, 0, ""},
    {"bad_image", bad_image, NULL, FINDINGS, "cudaLibraryLoadData"},
};

static void test_cases(void **state)
{
    (void)state;
    for (int i = 0; i < CHECK_COUNT(cases); ++i) {
        const struct emulated_result result = emulated_run(cases[i].name, cases[i].setting);
        CHECK(result.status == cases[i].status && strstr(result.output, cases[i].text) != NULL,
              "%s, %s: status %d, want %d and '%s' in:\n%s", cases[i].name,
              cases[i].setting != NULL ? cases[i].setting : "", result.status, cases[i].status, cases[i].text,
              result.output);
        CHECK(cases[i].status == FINDINGS || strstr(result.output, "finding") == NULL, "%s:\n%s", cases[i].name,
              result.output);
    }
}

/* The same seed draws the same orders, another one others. */
static void test_seeds(void **state)
{
    (void)state;
    const struct emulated_result first = emulated_run("orders", "EMU_SEED=5"),
                                 again = emulated_run("orders", "EMU_SEED=5"),
                                 other = emulated_run("orders", "EMU_SEED=6");
    CHECK(strlen(first.output) == 32 && strspn(first.output, "ab") == 32, "'%s'", first.output);
    CHECK(strcmp(first.output, again.output) == 0, "'%s' and '%s' with one seed", first.output, again.output);
    CHECK(strcmp(first.output, other.output) != 0, "'%s' with two seeds", first.output);
}

int main(int argc, char **argv)
{
    if (argc == 2) { /* a case */
        emulated_open();
        for (int i = 0; i < CHECK_COUNT(cases); ++i) {
            if (strcmp(argv[1], cases[i].name) != 0) continue;
            cases[i].run();
            return 0;
        }
        return 2;
    }
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_cases), cmocka_unit_test(test_seeds)};
    check_begin("test_findings");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
