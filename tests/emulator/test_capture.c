/* test_capture.c: stream capture and graphs of the emulated libcudart: what is recorded, what a graph repeats, and what each
 * forbidden call does to a capture. */
#include "emulated.h"

enum { COUNT = 200 };

static void *image;
static cudaLibrary_t library;
static cudaKernel_t fill, affine;

static int setup(void **state)
{
    (void)state;
    image = emulated_image("order");
    if (cu.cudaLibraryLoadData(&library, image, NULL, NULL, 0, NULL, NULL, 0) != cudaSuccess) return -1;
    if (cu.cudaLibraryGetKernel(&fill, library, "fill_kernel") != cudaSuccess) return -1;
    return cu.cudaLibraryGetKernel(&affine, library, "affine_kernel") == cudaSuccess ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    const cudaError_t error = cu.cudaLibraryUnload(library);
    free(image);
    return error == cudaSuccess ? 0 : -1;
}

/* What the tests work with: two streams that capture, one that does not, an event, memory. */
static struct {
    cudaStream_t a, b, blocking;
    cudaEvent_t event, join;
    float *device, *pinned;
} it;

static int begin_test(void **state)
{
    (void)state;
    int errors = cu.cudaStreamCreateWithFlags(&it.a, cudaStreamNonBlocking) != cudaSuccess;
    errors += cu.cudaStreamCreateWithFlags(&it.b, cudaStreamNonBlocking) != cudaSuccess;
    errors += cu.cudaStreamCreate(&it.blocking) != cudaSuccess;
    errors += cu.cudaEventCreate(&it.event) != cudaSuccess;
    errors += cu.cudaEventCreate(&it.join) != cudaSuccess;
    void *memory = NULL;
    errors += cu.cudaMalloc(&memory, sizeof(float) * COUNT) != cudaSuccess;
    it.device = memory;
    errors += cu.cudaMallocHost(&memory, sizeof(float) * COUNT) != cudaSuccess;
    it.pinned = memory;
    return errors;
}

static int end_test(void **state)
{
    (void)state;
    cu.cudaGetLastError();
    int errors = cu.cudaStreamDestroy(it.a) != cudaSuccess;
    errors += cu.cudaStreamDestroy(it.b) != cudaSuccess;
    errors += cu.cudaStreamDestroy(it.blocking) != cudaSuccess;
    errors += cu.cudaEventDestroy(it.event) != cudaSuccess;
    errors += cu.cudaEventDestroy(it.join) != cudaSuccess;
    errors += cu.cudaFree(it.device) != cudaSuccess;
    errors += cu.cudaFreeHost(it.pinned) != cudaSuccess;
    return errors;
}

static void launch_fill(float value, cudaStream_t stream)
{
    int count = COUNT;
    CUDA_OK(cu.cudaLaunchKernel(fill, (dim3){2, 1, 1}, (dim3){128, 1, 1}, (void *[]){&it.device, &count, &value}, 0,
                                stream));
}

static void launch_affine(float factor, float term, cudaStream_t stream)
{
    int count = COUNT;
    void *arguments[] = {&it.device, &it.device, &count, &factor, &term};
    CUDA_OK(cu.cudaLaunchKernel(affine, (dim3){2, 1, 1}, (dim3){128, 1, 1}, arguments, 0, stream));
}

static void check_device(float want, const char *what)
{
    float back[COUNT];
    CUDA_OK(cu.cudaDeviceSynchronize());
    CUDA_OK(cu.cudaMemcpy(back, it.device, sizeof back, cudaMemcpyDeviceToHost));
    for (int i = 0; i < COUNT; ++i)
        CHECK(back[i] == want, "%s: [%d] is %g, want %g", what, i, back[i], want);
}

static enum cudaStreamCaptureStatus status_of(cudaStream_t stream)
{
    enum cudaStreamCaptureStatus status = (enum cudaStreamCaptureStatus)99;
    CUDA_OK(cu.cudaStreamIsCapturing(stream, &status));
    return status;
}

static void test_graph(void **state)
{
    (void)state;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t executable = NULL;
    const size_t bytes = sizeof(float) * COUNT;
    launch_fill(1, it.a);
    CHECK(status_of(it.a) == cudaStreamCaptureStatusNone, "not capturing");
    CUDA_OK(cu.cudaStreamBeginCapture(it.a, cudaStreamCaptureModeGlobal));
    CHECK(status_of(it.a) == cudaStreamCaptureStatusActive, "capturing");
    CHECK(status_of(it.b) == cudaStreamCaptureStatusNone, "the other stream is not");
    CHECK_CUDA(cu.cudaStreamBeginCapture(it.a, cudaStreamCaptureModeGlobal), cudaErrorIllegalState);
    CUDA_OK(cu.cudaMemcpyAsync(it.device, it.pinned, bytes, cudaMemcpyHostToDevice, it.a));
    launch_affine(2, 1, it.a);
    CUDA_OK(cu.cudaMemcpyAsync(it.pinned, it.device, bytes, cudaMemcpyDeviceToHost, it.a));
    CUDA_OK(cu.cudaStreamEndCapture(it.a, &graph));
    CHECK(status_of(it.a) == cudaStreamCaptureStatusNone, "not any more");
    check_device(1, "a capture executes nothing, and what was queued before runs");

    cudaGraphNode_t nodes[3] = {NULL};
    size_t count = 0;
    enum cudaGraphNodeType type;
    CUDA_OK(cu.cudaGraphGetNodes(graph, NULL, &count));
    CHECK(count == 3, "%zu nodes", count);
    CUDA_OK(cu.cudaGraphGetNodes(graph, nodes, &count));
    CUDA_OK(cu.cudaGraphNodeGetType(nodes[1], &type));
    CHECK(type == cudaGraphNodeTypeKernel, "type %d", (int)type);

    CUDA_OK(cu.cudaGraphInstantiate(&executable, graph, 0));
    CUDA_OK(cu.cudaGraphDestroy(graph)); /* the executable one stays */
    CUDA_OK(cu.cudaGraphUpload(executable, it.b));
    for (int i = 0; i < COUNT; ++i)
        it.pinned[i] = 5;
    for (int i = 0; i < 3; ++i)
        CUDA_OK(cu.cudaGraphLaunch(executable, it.b));
    CHECK(it.pinned[0] == 5, "%g: a graph is lazy too", it.pinned[0]);
    CUDA_OK(cu.cudaStreamSynchronize(it.b));
    CHECK(it.pinned[0] == 47 && it.pinned[COUNT - 1] == 47, "%g: 5 -> 11 -> 23 -> 47", it.pinned[0]);
    CUDA_OK(cu.cudaGraphLaunch(executable, it.b));
    CUDA_OK(cu.cudaGraphExecDestroy(executable)); /* what was launched still runs */
    check_device(95, "the last launch");
}

/* a forks to b and joins it: the last node sees the work of both. The two in between are not ordered. */
static void test_fork_and_join(void **state)
{
    (void)state;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t executable = NULL;
    int orders[2] = {0, 0};
    CUDA_OK(cu.cudaStreamBeginCapture(it.a, cudaStreamCaptureModeThreadLocal));
    launch_fill(1, it.a);
    CUDA_OK(cu.cudaEventRecord(it.event, it.a));
    CUDA_OK(cu.cudaStreamWaitEvent(it.b, it.event, 0));
    CHECK(status_of(it.b) == cudaStreamCaptureStatusActive, "the waiting stream joins the capture");
    unsigned long long ids[2] = {0, 0};
    enum cudaStreamCaptureStatus status;
    CUDA_OK(cu.cudaStreamGetCaptureInfo(it.a, &status, &ids[0], NULL, NULL, NULL, NULL));
    CUDA_OK(cu.cudaStreamGetCaptureInfo(it.b, &status, &ids[1], NULL, NULL, NULL, NULL));
    CHECK(ids[0] != 0 && ids[0] == ids[1], "captures %llu and %llu", ids[0], ids[1]);
    launch_affine(3, 0, it.a);
    launch_affine(1, 4, it.b);
    CUDA_OK(cu.cudaEventRecord(it.join, it.b));
    CUDA_OK(cu.cudaStreamWaitEvent(it.a, it.join, 0));
    launch_affine(10, 0, it.a);
    CHECK_CUDA(cu.cudaEventQuery(it.join), cudaErrorCapturedEvent);
    CHECK_CUDA(cu.cudaEventSynchronize(it.join), cudaErrorCapturedEvent);
    CUDA_OK(cu.cudaStreamEndCapture(it.a, &graph));
    CUDA_OK(cu.cudaGraphInstantiate(&executable, graph, 0));
    for (int i = 0; i < 64; ++i) {
        float value;
        CUDA_OK(cu.cudaGraphLaunch(executable, it.a));
        CUDA_OK(cu.cudaStreamSynchronize(it.a));
        CUDA_OK(cu.cudaMemcpy(&value, it.device, sizeof value, cudaMemcpyDeviceToHost));
        CHECK(value == 70 || value == 150, "%g: (1 * 3 + 4) * 10 or (1 + 4) * 3 * 10", value);
        orders[value == 150]++;
    }
    CHECK(orders[0] > 0 && orders[1] > 0, "the branches ran in one order only: %d, %d", orders[0], orders[1]);
    CHECK_CUDA(cu.cudaStreamWaitEvent(it.b, it.join, 0), cudaErrorCapturedEvent); /* that capture is over */
    CUDA_OK(cu.cudaGraphDestroy(graph));
    CUDA_OK(cu.cudaGraphExecDestroy(executable));
}

/* ----------------------------------------------------------------------------------------------------- what is forbidden */

static cudaError_t try_malloc(void)
{
    void *memory;
    return cu.cudaMalloc(&memory, 16);
}

static cudaError_t try_free(void)
{
    return cu.cudaFree(NULL);
}

static cudaError_t try_host(void)
{
    void *memory;
    return cu.cudaMallocHost(&memory, 16);
}

static cudaError_t try_stream_synchronize(void)
{
    return cu.cudaStreamSynchronize(it.blocking);
}

static cudaError_t try_stream_query(void)
{
    return cu.cudaStreamQuery(it.blocking);
}

static cudaError_t try_device_synchronize(void)
{
    return cu.cudaDeviceSynchronize();
}

static cudaError_t try_event_query(void)
{
    return cu.cudaEventQuery(it.event);
}

static cudaError_t try_pageable_copy(void)
{
    char host[4];
    return cu.cudaMemcpyAsync(host, it.device, sizeof host, cudaMemcpyDeviceToHost, it.blocking);
}

static cudaError_t try_pageable_source(void)
{
    const char host[4] = {0};
    return cu.cudaMemcpyAsync(it.device, host, sizeof host, cudaMemcpyHostToDevice, it.blocking);
}

static cudaError_t try_blocking_copy(void)
{
    char host[4];
    return cu.cudaMemcpy(host, it.device, sizeof host, cudaMemcpyDeviceToHost);
}

static cudaError_t try_library(void)
{
    cudaLibrary_t other;
    return cu.cudaLibraryLoadData(&other, image, NULL, NULL, 0, NULL, NULL, 0);
}

static cudaError_t try_legacy_launch(void)
{
    return cu.cudaMemsetAsync(it.device, 0, 4, NULL);
}

static cudaError_t try_legacy_synchronize(void)
{
    return cu.cudaStreamSynchronize(NULL);
}

static cudaError_t try_uncaptured_event(void)
{
    cu.cudaEventRecord(it.event, it.b);
    return cu.cudaStreamWaitEvent(it.blocking, it.event, 0);
}

static cudaError_t try_second_capture(void)
{
    cu.cudaStreamBeginCapture(it.b, cudaStreamCaptureModeGlobal);
    cu.cudaEventRecord(it.event, it.blocking);
    const cudaError_t error = cu.cudaStreamWaitEvent(it.b, it.event, 0);
    cudaGraph_t graph;
    CHECK_CUDA(cu.cudaStreamEndCapture(it.b, &graph), cudaErrorStreamCaptureInvalidated);
    return error;
}

/* Each call gives its error, makes the capture invalid, and leaves the stream usable after cudaStreamEndCapture. */
static void test_forbidden_calls(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        cudaError_t (*call)(void);
        cudaError_t error;
    } cases[] = {{"cudaMalloc", try_malloc, cudaErrorStreamCaptureUnsupported},
                 {"cudaFree", try_free, cudaErrorStreamCaptureUnsupported},
                 {"cudaMallocHost", try_host, cudaErrorStreamCaptureUnsupported},
                 {"cudaStreamSynchronize", try_stream_synchronize, cudaErrorStreamCaptureUnsupported},
                 {"cudaStreamQuery", try_stream_query, cudaErrorStreamCaptureUnsupported},
                 {"cudaDeviceSynchronize", try_device_synchronize, cudaErrorStreamCaptureUnsupported},
                 {"cudaEventQuery", try_event_query, cudaErrorStreamCaptureUnsupported},
                 {"a pageable copy", try_pageable_copy, cudaErrorStreamCaptureUnsupported},
                 {"a pageable source", try_pageable_source, cudaErrorStreamCaptureUnsupported},
                 {"cudaMemcpy", try_blocking_copy, cudaErrorStreamCaptureUnsupported},
                 {"cudaLibraryLoadData", try_library, cudaErrorStreamCaptureUnsupported},
                 {"the legacy stream", try_legacy_launch, cudaErrorStreamCaptureImplicit},
                 {"waiting for the legacy stream", try_legacy_synchronize, cudaErrorStreamCaptureImplicit},
                 {"an event outside", try_uncaptured_event, cudaErrorStreamCaptureIsolation},
                 {"two captures", try_second_capture, cudaErrorStreamCaptureMerge}};
    for (int i = 0; i < CHECK_COUNT(cases); ++i) {
        cudaGraph_t graph = (cudaGraph_t)cases;
        CUDA_OK(cu.cudaStreamBeginCapture(it.blocking, cudaStreamCaptureModeGlobal));
        launch_fill(1, it.blocking);
        const cudaError_t error = cases[i].call();
        CHECK(error == cases[i].error, "%s: %s, want %s", cases[i].name, cu.cudaGetErrorName(error),
              cu.cudaGetErrorName(cases[i].error));
        CHECK(status_of(it.blocking) == cudaStreamCaptureStatusInvalidated, "%s: the capture is still valid",
              cases[i].name);
        CHECK_CUDA(cu.cudaMemsetAsync(it.device, 0, 4, it.blocking), cudaErrorStreamCaptureInvalidated);
        CHECK_CUDA(cu.cudaStreamEndCapture(it.blocking, &graph), cudaErrorStreamCaptureInvalidated);
        CHECK(graph == NULL, "%s: a graph of an invalid capture", cases[i].name);
        launch_fill((float)i, it.blocking);
        check_device((float)i, cases[i].name);
    }
}

static void *free_elsewhere(void *error)
{
    *(cudaError_t *)error = cu.cudaFree(NULL);
    return NULL;
}

/* What the modes allow, and what has nothing to do with the capture. */
static void test_allowed_calls(void **state)
{
    (void)state;
    cudaGraph_t graph;
    void *memory;
    enum cudaStreamCaptureStatus status;
    CUDA_OK(cu.cudaStreamBeginCapture(it.a, cudaStreamCaptureModeRelaxed));
    CUDA_OK(cu.cudaMalloc(&memory, 16));
    CUDA_OK(cu.cudaFree(memory));
    CUDA_OK(cu.cudaStreamSynchronize(it.b));
    CUDA_OK(cu.cudaMemsetAsync(it.device, 0, 4,
                               NULL)); /* a non-blocking stream is captured: no order with the legacy one */
    CUDA_OK(cu.cudaStreamEndCapture(it.a, &graph));
    CUDA_OK(cu.cudaGraphDestroy(graph));

    /* A thread-local capture forbids its own thread what it allows others, a global one forbids it all. */
    for (int global = 0; global < 2; ++global) {
        cudaError_t error = cudaSuccess;
        pthread_t thread;
        CUDA_OK(
            cu.cudaStreamBeginCapture(it.a, global ? cudaStreamCaptureModeGlobal : cudaStreamCaptureModeThreadLocal));
        CHECK(pthread_create(&thread, NULL, free_elsewhere, &error) == 0, "pthread_create");
        pthread_join(thread, NULL);
        CHECK(error == (global ? cudaErrorStreamCaptureUnsupported : cudaSuccess), "the other thread: %s",
              cu.cudaGetErrorName(error));
        CHECK_CUDA(cu.cudaFree(NULL), cudaErrorStreamCaptureUnsupported);
        CHECK_CUDA(cu.cudaStreamEndCapture(it.a, &graph), cudaErrorStreamCaptureInvalidated);
    }

    CUDA_OK(cu.cudaStreamBeginCapture(it.a, cudaStreamCaptureModeGlobal));
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    CUDA_OK(cu.cudaThreadExchangeStreamCaptureMode(&mode));
    CHECK(mode == cudaStreamCaptureModeGlobal, "the thread's mode was %d", (int)mode);
    CUDA_OK(cu.cudaMalloc(&memory, 16));
    CUDA_OK(cu.cudaThreadExchangeStreamCaptureMode(&mode));
    CHECK(mode == cudaStreamCaptureModeRelaxed, "the thread's mode was %d", (int)mode);
    CUDA_OK(cu.cudaStreamEndCapture(it.a, &graph));
    CUDA_OK(cu.cudaGraphDestroy(graph));
    CUDA_OK(cu.cudaFree(memory));

    CUDA_OK(cu.cudaStreamBeginCapture(it.blocking, cudaStreamCaptureModeGlobal));
    CHECK_CUDA(cu.cudaStreamIsCapturing(NULL, &status), cudaErrorStreamCaptureImplicit);
    CHECK(status_of(it.blocking) == cudaStreamCaptureStatusActive, "asking does no harm");
    CUDA_OK(cu.cudaStreamEndCapture(it.blocking, &graph));
    CUDA_OK(cu.cudaGraphDestroy(graph));
    CHECK_CUDA(cu.cudaStreamBeginCapture(NULL, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported);
    CHECK_CUDA(cu.cudaStreamEndCapture(it.a, &graph), cudaErrorIllegalState);
}

static void *end_elsewhere(void *error)
{
    cudaGraph_t graph;
    *(cudaError_t *)error = cu.cudaStreamEndCapture(it.a, &graph);
    return NULL;
}

static void test_wrong_ends(void **state)
{
    (void)state;
    cudaGraph_t graph;
    cudaError_t error = cudaSuccess;
    pthread_t thread;
    CUDA_OK(cu.cudaStreamBeginCapture(it.a, cudaStreamCaptureModeGlobal));
    CHECK(pthread_create(&thread, NULL, end_elsewhere, &error) == 0, "pthread_create");
    pthread_join(thread, NULL);
    CHECK_CUDA(error, cudaErrorStreamCaptureWrongThread);
    CUDA_OK(cu.cudaEventRecord(it.event, it.a));
    CUDA_OK(cu.cudaStreamWaitEvent(it.b, it.event, 0));
    launch_fill(1, it.b); /* never joined */
    CHECK_CUDA(cu.cudaStreamEndCapture(it.a, &graph), cudaErrorStreamCaptureUnjoined);
    CHECK(status_of(it.b) == cudaStreamCaptureStatusNone, "the capture is over for every stream");

    CUDA_OK(cu.cudaStreamBeginCapture(it.a, cudaStreamCaptureModeGlobal));
    CUDA_OK(cu.cudaEventRecord(it.event, it.a));
    CUDA_OK(cu.cudaStreamWaitEvent(it.b, it.event, 0));
    CHECK_CUDA(cu.cudaStreamEndCapture(it.b, &graph), cudaErrorStreamCaptureUnmatched);
    CHECK_CUDA(cu.cudaStreamEndCapture(it.a, &graph), cudaErrorStreamCaptureInvalidated);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, begin_test, end_test)
    const struct CMUnitTest tests[] = {TEST(test_graph), TEST(test_fork_and_join), TEST(test_forbidden_calls),
                                       TEST(test_allowed_calls), TEST(test_wrong_ends)};
    check_begin("test_capture");
    emulated_open();
    return cmocka_run_group_tests(tests, setup, teardown);
}
