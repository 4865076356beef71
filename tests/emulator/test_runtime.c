/* test_runtime.c: the emulated libcudart: memory, streams, events, launches, errors. When things run is what most of it is about.
 * Capture is in test_capture.c, products in test_cublas.c, findings in test_findings.c. */
#include "emulated.h"

static void *image;
static cudaLibrary_t library;
static cudaKernel_t fill, affine, sum;

static int setup(void **state)
{
    (void)state;
    image = emulated_image("order");
    if (cu.cudaLibraryLoadData(&library, image, NULL, NULL, 0, NULL, NULL, 0) != cudaSuccess) return -1;
    if (cu.cudaLibraryGetKernel(&fill, library, "fill_kernel") != cudaSuccess) return -1;
    if (cu.cudaLibraryGetKernel(&affine, library, "affine_kernel") != cudaSuccess) return -1;
    return cu.cudaLibraryGetKernel(&sum, library, "sum_kernel") == cudaSuccess ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    const cudaError_t error = cu.cudaLibraryUnload(library);
    free(image);
    return error == cudaSuccess ? 0 : -1;
}

enum { COUNT = 300 };

static float *device_floats(int count)
{
    void *memory = NULL;
    CUDA_OK(cu.cudaMalloc(&memory, sizeof(float) * (size_t)count));
    return memory;
}

static float *pinned_floats(int count, float value)
{
    void *memory = NULL;
    CUDA_OK(cu.cudaHostAlloc(&memory, sizeof(float) * (size_t)count, cudaHostAllocDefault));
    for (int i = 0; i < count; ++i)
        ((float *)memory)[i] = value;
    return memory;
}

static void launch_fill(float *out, int count, float value, cudaStream_t stream)
{
    void *arguments[] = {&out, &count, &value};
    CUDA_OK(cu.cudaLaunchKernel(fill, (dim3){(unsigned)(count + 127) / 128, 1, 1}, (dim3){128, 1, 1}, arguments, 0,
                                stream));
}

static void launch_affine(float *out, const float *in, int count, float factor, float term, cudaStream_t stream)
{
    void *arguments[] = {&out, &in, &count, &factor, &term};
    const cudaLaunchConfig_t config = {
        .gridDim = {(unsigned)(count + 63) / 64, 1, 1}, .blockDim = {64, 1, 1}, .stream = stream};
    CUDA_OK(cu.cudaLaunchKernelExC(&config, affine, arguments));
}

static void check_all(const float *values, int count, float want, const char *what)
{
    for (int i = 0; i < count; ++i)
        CHECK(values[i] == want, "%s: [%d] is %g, want %g", what, i, values[i], want);
}

static cudaStream_t stream_of(unsigned flags)
{
    cudaStream_t stream = NULL;
    CUDA_OK(cu.cudaStreamCreateWithFlags(&stream, flags));
    return stream;
}

/* ----------------------------------------------------------------------------------------------------------------- basics */

static void test_device(void **state)
{
    (void)state;
    int value = -1, major = 0, minor = 0;
    CUDA_OK(cu.cudaRuntimeGetVersion(&value));
    CHECK(value == CUDART_VERSION, "runtime version %d", value);
    CUDA_OK(cu.cudaGetDeviceCount(&value));
    CHECK(value == 1, "%d devices", value);
    CUDA_OK(cu.cudaSetDevice(0));
    CHECK_CUDA(cu.cudaSetDevice(1), cudaErrorInvalidDevice);
    CUDA_OK(cu.cudaGetDevice(&value));
    CHECK(value == 0, "device %d", value);
    struct cudaDeviceProp properties;
    CUDA_OK(cu.cudaGetDeviceProperties(&properties, 0));
    CUDA_OK(cu.cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    CUDA_OK(cu.cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
    CHECK(properties.major == major && properties.minor == minor && 10 * major + minor >= 75, "sm_%d%d", major, minor);
    CUDA_OK(cu.cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    CHECK((size_t)value == properties.sharedMemPerBlockOptin && value > 48 << 10, "%d bytes of shared memory", value);
    CHECK_CUDA(cu.cudaDeviceGetAttribute(&value, cudaDevAttrWarpSize, 3), cudaErrorInvalidDevice);
    CHECK_CUDA(cu.cudaDeviceGetAttribute(&value, (enum cudaDeviceAttr)9999, 0), cudaErrorNotSupported);
}

static void test_errors(void **state)
{
    (void)state;
    CHECK(strcmp(cu.cudaGetErrorName(cudaErrorIllegalAddress), "cudaErrorIllegalAddress") == 0, "name");
    CHECK(strcmp(cu.cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory") == 0, "text");
    CHECK(strcmp(cu.cudaGetErrorName((cudaError_t)5000), "unrecognized error code") == 0, "unknown code");
    cu.cudaGetLastError();
    CUDA_OK(cu.cudaGetLastError());
    CHECK_CUDA(cu.cudaMalloc(NULL, 4), cudaErrorInvalidValue);
    CUDA_OK(cu.cudaSetDevice(0)); /* a success does not clear it */
    CHECK_CUDA(cu.cudaPeekAtLastError(), cudaErrorInvalidValue);
    CHECK_CUDA(cu.cudaGetLastError(), cudaErrorInvalidValue);
    CUDA_OK(cu.cudaGetLastError());
}

static void test_memory(void **state)
{
    (void)state;
    size_t before = 0, during = 0, total = 0;
    void *nothing = &nothing;
    CUDA_OK(cu.cudaMemGetInfo(&before, &total));
    CUDA_OK(cu.cudaMalloc(&nothing, 0));
    CHECK(nothing == NULL, "no bytes are NULL");
    CUDA_OK(cu.cudaFree(NULL));
    CHECK_CUDA(cu.cudaMalloc(&nothing, total + 1), cudaErrorMemoryAllocation);
    CHECK_CUDA(cu.cudaGetLastError(), cudaErrorMemoryAllocation);

    float *a = device_floats(COUNT), *b = device_floats(COUNT), host[COUNT], back[COUNT];
    CUDA_OK(cu.cudaMemGetInfo(&during, &total));
    CHECK(during <= before - 2 * sizeof host, "%zu bytes free, before %zu", during, before);
    CHECK((uintptr_t)a % 256 == 0 && (uintptr_t)b % 256 == 0 && a != b, "%p %p", (void *)a, (void *)b);
    for (int i = 0; i < COUNT; ++i)
        host[i] = (float)check_uniform();
    CUDA_OK(cu.cudaMemcpy(a, host, sizeof host, cudaMemcpyHostToDevice));
    CUDA_OK(cu.cudaMemcpy(b, a, sizeof host, cudaMemcpyDeviceToDevice));
    CUDA_OK(cu.cudaMemcpy(back, b, sizeof host, cudaMemcpyDefault));
    CHECK(memcmp(back, host, sizeof host) == 0, "there and back");
    CHECK_CUDA(cu.cudaMemcpy(back, b, sizeof host, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    CHECK_CUDA(cu.cudaMemcpy(back, b, sizeof host, (enum cudaMemcpyKind)7), cudaErrorInvalidMemcpyDirection);
    CUDA_OK(cu.cudaMemset(a + 1, 0x7f, 8));
    CUDA_OK(cu.cudaMemcpy(back, a, 16, cudaMemcpyDeviceToHost));
    CHECK(back[0] == host[0] && back[3] == host[3], "cudaMemset wrote beside its bytes");
    CHECK(((unsigned char *)back)[4] == 0x7f && ((unsigned char *)back)[11] == 0x7f, "cudaMemset");

    struct cudaPointerAttributes attributes;
    CUDA_OK(cu.cudaPointerGetAttributes(&attributes, a + 2));
    CHECK(attributes.type == cudaMemoryTypeDevice && attributes.device == 0 && attributes.devicePointer == a + 2,
          "device");
    CUDA_OK(cu.cudaPointerGetAttributes(&attributes, host));
    CHECK(attributes.type == cudaMemoryTypeUnregistered, "type %d", (int)attributes.type);
    CUDA_OK(cu.cudaHostRegister(host, sizeof host, cudaHostRegisterDefault));
    CHECK_CUDA(cu.cudaHostRegister(host, sizeof host, cudaHostRegisterDefault), cudaErrorHostMemoryAlreadyRegistered);
    CUDA_OK(cu.cudaPointerGetAttributes(&attributes, host + 1));
    CHECK(attributes.type == cudaMemoryTypeHost && attributes.hostPointer == host + 1, "type %d", (int)attributes.type);
    CUDA_OK(cu.cudaHostUnregister(host));
    CHECK_CUDA(cu.cudaHostUnregister(host), cudaErrorHostMemoryNotRegistered);
    CUDA_OK(cu.cudaFree(a));
    CUDA_OK(cu.cudaFree(b));
    CUDA_OK(cu.cudaMemGetInfo(&during, &total));
    CHECK(during == before, "%zu bytes free, before %zu", during, before);
}

static void test_rows(void **state)
{
    (void)state;
    enum { ROWS = 7, WIDTH = 5, HOST_PITCH = 9, DEVICE_PITCH = 11 };
    unsigned char host[ROWS * HOST_PITCH], back[ROWS * HOST_PITCH];
    void *device = NULL;
    for (size_t i = 0; i < sizeof host; ++i)
        host[i] = (unsigned char)check_next();
    memset(back, 0xcc, sizeof back);
    CUDA_OK(cu.cudaMalloc(&device, ROWS * DEVICE_PITCH));
    CUDA_OK(cu.cudaMemcpy2D(device, DEVICE_PITCH, host, HOST_PITCH, WIDTH, ROWS, cudaMemcpyHostToDevice));
    CUDA_OK(cu.cudaMemset2D((char *)device + 1, DEVICE_PITCH, 0x5a, 2, ROWS));
    CUDA_OK(cu.cudaMemcpy2D(back, HOST_PITCH, device, DEVICE_PITCH, WIDTH, ROWS, cudaMemcpyDeviceToHost));
    for (int i = 0; i < ROWS * HOST_PITCH; ++i) {
        const int column = i % HOST_PITCH;
        const int want = column >= WIDTH ? 0xcc : column == 1 || column == 2 ? 0x5a : host[i];
        CHECK(back[i] == want, "row %d, byte %d: %d, want %d", i / HOST_PITCH, column, back[i], want);
    }
    CHECK_CUDA(cu.cudaMemcpy2D(device, WIDTH - 1, host, HOST_PITCH, WIDTH, ROWS, cudaMemcpyHostToDevice),
               cudaErrorInvalidPitchValue);
    CUDA_OK(cu.cudaFree(device));
}

/* ---------------------------------------------------------------------------------------------------------- when things run */

static void test_lazy_copies(void **state)
{
    (void)state;
    cudaStream_t stream = stream_of(cudaStreamNonBlocking);
    float *device = device_floats(COUNT), *pinned = pinned_floats(COUNT, 1), *result = pinned_floats(COUNT, 0);
    float pageable[COUNT];
    const size_t bytes = sizeof pageable;
    /* From pinned memory: the source is read when the copy runs. */
    CUDA_OK(cu.cudaMemcpyAsync(device, pinned, bytes, cudaMemcpyHostToDevice, stream));
    pinned[3] = 2;
    CUDA_OK(cu.cudaMemcpyAsync(result, device, bytes, cudaMemcpyDeviceToHost, stream));
    check_all(result, COUNT, 0, "before the synchronisation");
    CUDA_OK(cu.cudaStreamSynchronize(stream));
    CHECK(result[2] == 1 && result[3] == 2, "%g %g: the pinned source is read late", result[2], result[3]);
    /* From pageable memory: at the call. */
    for (int i = 0; i < COUNT; ++i)
        pageable[i] = 5;
    CUDA_OK(cu.cudaMemcpyAsync(device, pageable, bytes, cudaMemcpyHostToDevice, stream));
    memset(pageable, 0, sizeof pageable);
    /* To pageable memory: done when the call returns, with all that is before it. */
    launch_affine(device, device, COUNT, 2, 1, stream);
    CUDA_OK(cu.cudaMemcpyAsync(pageable, device, bytes, cudaMemcpyDeviceToHost, stream));
    check_all(pageable, COUNT, 11, "to pageable memory");
    /* cudaMemset does not wait. */
    CUDA_OK(cu.cudaMemset(device, 0, bytes));
    CUDA_OK(cu.cudaMemcpyAsync(result, device, bytes, cudaMemcpyDeviceToHost, stream));
    CUDA_OK(cu.cudaStreamSynchronize(stream));
    check_all(result, COUNT, 11, "a non-blocking stream does not wait for the legacy one");
    CUDA_OK(cu.cudaDeviceSynchronize());
    CUDA_OK(cu.cudaMemcpy(pageable, device, bytes, cudaMemcpyDeviceToHost));
    check_all(pageable, COUNT, 0, "after the device");
    CUDA_OK(cu.cudaFree(device));
    CUDA_OK(cu.cudaFreeHost(pinned));
    CUDA_OK(cu.cudaFreeHost(result));
    CUDA_OK(cu.cudaStreamDestroy(stream));
}

static void rest(void *nothing)
{
    (void)nothing;
    usleep(10000);
}

/* Copies out of one buffer that kernels of stream a fill: each says which kernel ran before it. */
static void test_events(void **state)
{
    (void)state;
    cudaStream_t a = stream_of(cudaStreamNonBlocking), b = stream_of(cudaStreamNonBlocking);
    cudaEvent_t event = NULL, quiet = NULL;
    float *device = device_floats(COUNT), *result = pinned_floats(COUNT, 0), milliseconds = -1;
    const size_t bytes = sizeof(float) * COUNT;
    CUDA_OK(cu.cudaEventCreate(&event));
    CUDA_OK(cu.cudaEventCreateWithFlags(&quiet, cudaEventDisableTiming));
    CUDA_OK(cu.cudaEventQuery(event)); /* never recorded: complete */
    launch_fill(device, COUNT, 1, NULL);
    CUDA_OK(cu.cudaDeviceSynchronize());

    launch_fill(device, COUNT, 2, a);
    CUDA_OK(cu.cudaEventRecord(event, a));
    launch_fill(device, COUNT, 3, a);
    CUDA_OK(cu.cudaMemcpyAsync(result, device, bytes, cudaMemcpyDeviceToHost, b));
    CUDA_OK(cu.cudaStreamSynchronize(b));
    check_all(result, COUNT, 1, "no order between the streams");
    CUDA_OK(cu.cudaStreamWaitEvent(b, event, 0));
    CUDA_OK(cu.cudaMemcpyAsync(result, device, bytes, cudaMemcpyDeviceToHost, b));
    CUDA_OK(cu.cudaStreamSynchronize(b));
    check_all(result, COUNT, 2, "after the event, and no further");
    CUDA_OK(cu.cudaEventRecord(quiet, a));
    CUDA_OK(cu.cudaStreamWaitEvent(b, quiet, 0));
    CUDA_OK(cu.cudaEventRecord(quiet, b)); /* recorded anew: the wait above keeps its meaning */
    CUDA_OK(cu.cudaMemcpyAsync(result, device, bytes, cudaMemcpyDeviceToHost, b));
    CHECK_CUDA(cu.cudaEventElapsedTime(&milliseconds, event, quiet), cudaErrorInvalidResourceHandle);
    CUDA_OK(cu.cudaStreamSynchronize(b));
    check_all(result, COUNT, 3, "after the second event");

    launch_fill(device, COUNT, 4, a);
    CUDA_OK(cu.cudaEventRecord(quiet, a));
    CHECK_CUDA(cu.cudaEventQuery(quiet), cudaErrorNotReady);
    CUDA_OK(cu.cudaEventSynchronize(quiet));
    CUDA_OK(cu.cudaEventQuery(quiet));
    CUDA_OK(cu.cudaMemcpyAsync(result, device, bytes, cudaMemcpyDeviceToHost, b));
    CUDA_OK(cu.cudaStreamSynchronize(b));
    check_all(result, COUNT, 4, "after cudaEventSynchronize");

    cudaEvent_t late = NULL;
    CUDA_OK(cu.cudaEventCreate(&late));
    launch_fill(device, COUNT, 5, a);
    launch_fill(device, COUNT, 6, a);
    CUDA_OK(cu.cudaEventRecord(late, a));
    CHECK_CUDA(cu.cudaEventElapsedTime(&milliseconds, event, late), cudaErrorNotReady);
    CHECK_CUDA(cu.cudaStreamQuery(a), cudaErrorNotReady);
    int asked = 1;
    while (cu.cudaStreamQuery(a) == cudaErrorNotReady && asked < 100)
        asked++;
    CHECK(asked < 100, "a loop of cudaStreamQuery ends");
    CUDA_OK(cu.cudaEventElapsedTime(&milliseconds, event, late));
    CHECK(milliseconds >= 0 && milliseconds < 1e6, "%g ms", milliseconds);
    for (int i = 0; i < 2; ++i) { /* the second record of an event is the one that counts */
        CUDA_OK(cu.cudaEventRecord(event, a));
        if (i == 1) CUDA_OK(cu.cudaLaunchHostFunc(a, rest, NULL));
        CUDA_OK(cu.cudaEventRecord(late, a));
    }
    CUDA_OK(cu.cudaStreamSynchronize(a));
    CUDA_OK(cu.cudaEventElapsedTime(&milliseconds, event, late));
    CHECK(milliseconds >= 10 && milliseconds < 1e6, "%g ms, of which 10 were a rest", milliseconds);
    cu.cudaGetLastError();
    CUDA_OK(cu.cudaEventDestroy(late));
    CUDA_OK(cu.cudaEventDestroy(event));
    CUDA_OK(cu.cudaEventDestroy(quiet));
    CUDA_OK(cu.cudaFree(device));
    CUDA_OK(cu.cudaFreeHost(result));
    CUDA_OK(cu.cudaStreamDestroy(a));
    CUDA_OK(cu.cudaStreamDestroy(b));
}

/* The legacy stream waits for blocking streams and they for it; non-blocking streams and it do not know each other. */
static void test_legacy_stream(void **state)
{
    (void)state;
    cudaStream_t blocking = stream_of(cudaStreamDefault), free_stream = stream_of(cudaStreamNonBlocking);
    float *device = device_floats(COUNT), *result = pinned_floats(COUNT, 0), back[COUNT];
    const size_t bytes = sizeof back;
    launch_fill(device, COUNT, 1, blocking);
    launch_affine(device, device, COUNT, 10, 0, NULL);
    launch_affine(device, device, COUNT, 1, 5, blocking);
    CUDA_OK(cu.cudaMemcpyAsync(result, device, bytes, cudaMemcpyDeviceToHost, blocking));
    CUDA_OK(cu.cudaStreamSynchronize(blocking));
    check_all(result, COUNT, 15, "blocking, legacy, blocking");
    launch_affine(device, device, COUNT, 1, 1, blocking);
    CUDA_OK(cu.cudaMemcpy(back, device, bytes, cudaMemcpyDeviceToHost));
    check_all(back, COUNT, 16, "cudaMemcpy waits for blocking streams");
    launch_affine(device, device, COUNT, 1, 1, free_stream);
    CUDA_OK(cu.cudaMemcpy(back, device, bytes, cudaMemcpyDeviceToHost));
    check_all(back, COUNT, 16, "cudaMemcpy does not wait for non-blocking streams");
    CUDA_OK(cu.cudaStreamSynchronize(free_stream));
    CUDA_OK(cu.cudaMemcpy(back, device, bytes, cudaMemcpyDeviceToHost));
    check_all(back, COUNT, 17, "after the non-blocking stream");
    launch_affine(device, device, COUNT, 1, 1, blocking);
    CUDA_OK(cu.cudaStreamSynchronize(cudaStreamLegacy)); /* empty itself */
    CUDA_OK(cu.cudaMemcpyAsync(result, device, bytes, cudaMemcpyDeviceToHost, free_stream));
    CUDA_OK(cu.cudaStreamSynchronize(free_stream));
    check_all(result, COUNT, 18, "cudaStreamSynchronize of the legacy stream waits for blocking streams");
    launch_affine(device, device, COUNT, 2, 0, blocking);
    CUDA_OK(cu.cudaStreamDestroy(blocking)); /* what is queued still runs */
    CUDA_OK(cu.cudaMemcpy(back, device, bytes, cudaMemcpyDeviceToHost));
    check_all(back, COUNT, 36, "a destroyed stream's work");
    CUDA_OK(cu.cudaFree(device));
    CUDA_OK(cu.cudaFreeHost(result));
    CUDA_OK(cu.cudaStreamDestroy(free_stream));
}

/* Two streams write the same place: over many times each must win. */
static void test_orders(void **state)
{
    (void)state;
    cudaStream_t a = stream_of(cudaStreamNonBlocking), b = stream_of(cudaStreamNonBlocking);
    float *device = device_floats(1), value;
    int wins[2] = {0, 0};
    for (int i = 0; i < 64; ++i) {
        launch_fill(device, 1, 0, a);
        launch_fill(device, 1, 1, b);
        CUDA_OK(cu.cudaDeviceSynchronize());
        CUDA_OK(cu.cudaMemcpy(&value, device, sizeof value, cudaMemcpyDeviceToHost));
        CHECK(value == 0 || value == 1, "%g", value);
        wins[(int)value]++;
    }
    CHECK(wins[0] > 0 && wins[1] > 0, "stream a was last %d times, b %d times", wins[0], wins[1]);
    CUDA_OK(cu.cudaFree(device));
    CUDA_OK(cu.cudaStreamDestroy(a));
    CUDA_OK(cu.cudaStreamDestroy(b));
}

static void add_one(void *counter)
{
    *(int *)counter += 1;
}

static void call_back(void *result)
{
    int count;
    *(cudaError_t *)result = cu.cudaGetDeviceCount(&count);
}

static void test_host_functions(void **state)
{
    (void)state;
    cudaStream_t stream = stream_of(cudaStreamNonBlocking);
    int counter = 0;
    cudaError_t result = cudaSuccess;
    for (int i = 0; i < 5000; ++i)
        CUDA_OK(cu.cudaLaunchHostFunc(stream, add_one, &counter));
    CHECK(counter > 0 && counter < 5000, "%d: a full queue makes room, and no more", counter);
    CUDA_OK(cu.cudaStreamSynchronize(stream));
    CHECK(counter == 5000, "%d", counter);
    CUDA_OK(cu.cudaLaunchHostFunc(stream, call_back, &result));
    CUDA_OK(cu.cudaStreamSynchronize(stream));
    CHECK_CUDA(result, cudaErrorNotPermitted);
    cu.cudaGetLastError();
    CUDA_OK(cu.cudaStreamDestroy(stream));
}

static void test_async_allocation(void **state)
{
    (void)state;
    cudaStream_t stream = stream_of(cudaStreamNonBlocking);
    void *memory = NULL;
    float *result = pinned_floats(COUNT, 0);
    CUDA_OK(cu.cudaMallocAsync(&memory, sizeof(float) * COUNT, stream));
    launch_fill(memory, COUNT, 7, stream);
    CUDA_OK(cu.cudaMemcpyAsync(result, memory, sizeof(float) * COUNT, cudaMemcpyDeviceToHost, stream));
    CUDA_OK(cu.cudaFreeAsync(memory, stream));
    CUDA_OK(cu.cudaStreamSynchronize(stream));
    check_all(result, COUNT, 7, "before cudaFreeAsync");
    struct cudaPointerAttributes attributes;
    CUDA_OK(cu.cudaPointerGetAttributes(&attributes, memory));
    CHECK(attributes.type != cudaMemoryTypeDevice, "freed");
    CUDA_OK(cu.cudaFreeHost(result));
    CUDA_OK(cu.cudaStreamDestroy(stream));
}

/* --------------------------------------------------------------------------------------------------------------- launches */

struct sum_params {
    const float *in;
    float *out;
    int64_t count;
    int32_t scale;
};

static void test_launches(void **state)
{
    (void)state;
    unsigned count = 0;
    const char *name = NULL;
    cudaKernel_t kernels[8], missing;
    CUDA_OK(cu.cudaLibraryGetKernelCount(&count, library));
    CHECK(count == 4, "%u kernels", count);
    CUDA_OK(cu.cudaLibraryEnumerateKernels(kernels, 8, library));
    CHECK_CUDA(cu.cudaLibraryGetKernel(&missing, library, "no_kernel"), cudaErrorSymbolNotFound);
    CUDA_OK(cu.cudaFuncGetName(&name, sum));
    CHECK(strcmp(name, "sum_kernel") == 0, "%s", name);
    size_t offset = 9, bytes = 0;
    CUDA_OK(cu.cudaFuncGetParamInfo(affine, 3, &offset, &bytes));
    CHECK(offset == 20 && bytes == 4, "parameter 3 at %zu, %zu bytes", offset, bytes);
    CHECK_CUDA(cu.cudaFuncGetParamInfo(affine, 5, &offset, &bytes), cudaErrorInvalidValue);

    float host[COUNT], got = 0;
    double want = 0;
    float *in = device_floats(COUNT), *out = device_floats(1);
    for (int i = 0; i < COUNT; ++i)
        want += host[i] = (float)check_integer(-9, 9);
    CUDA_OK(cu.cudaMemcpy(in, host, sizeof host, cudaMemcpyHostToDevice));
    struct sum_params params = {in, out, COUNT, 3};
    void *arguments[] = {&params};
    const struct {
        dim3 grid, block;
        size_t shared;
        cudaError_t error;
    } cases[] = {{{1, 1, 1}, {256, 1, 1}, 1024, cudaSuccess},
                 {{1, 1, 1}, {32, 1, 1}, 48 << 10, cudaSuccess},
                 {{0, 1, 1}, {256, 1, 1}, 1024, cudaErrorInvalidConfiguration},
                 {{1, 65536, 1}, {256, 1, 1}, 1024, cudaErrorInvalidConfiguration},
                 {{1, 1, 1}, {0, 1, 1}, 1024, cudaErrorInvalidConfiguration},
                 {{1, 1, 1}, {1, 1, 65}, 1024, cudaErrorInvalidConfiguration},
                 {{1, 1, 1}, {1025, 1, 1}, 8192, cudaErrorInvalidConfiguration},
                 {{1, 1, 1}, {512, 3, 1}, 8192, cudaErrorInvalidConfiguration},
                 {{1, 1, 1}, {256, 1, 1}, (48 << 10) + 1, cudaErrorInvalidValue}};
    for (int i = 0; i < CHECK_COUNT(cases); ++i)
        CHECK_CUDA(cu.cudaLaunchKernel(sum, cases[i].grid, cases[i].block, arguments, cases[i].shared, NULL),
                   cases[i].error);
    params.scale = 1000; /* too late: parameters are copied at the call */
    CUDA_OK(cu.cudaMemcpy(&got, out, sizeof got, cudaMemcpyDeviceToHost));
    CHECK(got == (float)(3 * want), "%g, want %g", got, 3 * want);
    CHECK_CUDA(cu.cudaLaunchKernel(&params, (dim3){1, 1, 1}, (dim3){1, 1, 1}, arguments, 0, NULL),
               cudaErrorInvalidDeviceFunction);

    int optin = 0, blocks = 0;
    CUDA_OK(cu.cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    CHECK_CUDA(cu.cudaFuncSetAttribute(sum, cudaFuncAttributeMaxDynamicSharedMemorySize, optin + 1),
               cudaErrorInvalidValue);
    CUDA_OK(cu.cudaFuncSetAttribute(sum, cudaFuncAttributeMaxDynamicSharedMemorySize, optin));
    struct cudaFuncAttributes attributes;
    CUDA_OK(cu.cudaFuncGetAttributes(&attributes, sum));
    CHECK(attributes.maxDynamicSharedSizeBytes == optin && attributes.maxThreadsPerBlock == 1024, "attributes");
    CUDA_OK(cu.cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, sum, 256, (size_t)optin));
    CHECK(blocks == 1, "%d blocks with all shared memory", blocks);
    CUDA_OK(cu.cudaLaunchKernel(sum, (dim3){1, 1, 1}, (dim3){256, 1, 1}, arguments, (size_t)optin, NULL));
    CUDA_OK(cu.cudaMemcpy(&got, out, sizeof got, cudaMemcpyDeviceToHost));
    CHECK(got == (float)(1000 * want), "%g, want %g", got, 1000 * want);

    /* A library that goes waits for its kernels. */
    cudaLibrary_t other = NULL;
    cudaKernel_t other_sum = NULL;
    params.scale = 7;
    CUDA_OK(cu.cudaLibraryLoadData(&other, image, NULL, NULL, 0, NULL, NULL, 0));
    CUDA_OK(cu.cudaLibraryGetKernel(&other_sum, other, "sum_kernel"));
    CUDA_OK(cu.cudaLaunchKernel(other_sum, (dim3){1, 1, 1}, (dim3){64, 1, 1}, arguments, 256, NULL));
    CUDA_OK(cu.cudaLibraryUnload(other));
    CUDA_OK(cu.cudaMemcpy(&got, out, sizeof got, cudaMemcpyDeviceToHost));
    CHECK(got == (float)(7 * want), "%g, want %g", got, 7 * want);

    void *variable = NULL;
    const float value = 12.5f;
    CUDA_OK(cu.cudaLibraryGetGlobal(&variable, &bytes, library, "offset_variable"));
    CHECK(bytes == sizeof value, "%zu bytes", bytes);
    cudaKernel_t read_variable;
    CUDA_OK(cu.cudaLibraryGetKernel(&read_variable, library, "variable_kernel"));
    for (int i = 0; i < 2; ++i) {
        if (i == 1) CUDA_OK(cu.cudaMemcpy(variable, &value, sizeof value, cudaMemcpyHostToDevice));
        CUDA_OK(cu.cudaLaunchKernel(read_variable, (dim3){1, 1, 1}, (dim3){1, 1, 1}, (void *[]){&out}, 0, NULL));
        CUDA_OK(cu.cudaMemcpy(&got, out, sizeof got, cudaMemcpyDeviceToHost));
        CHECK(got == (i == 0 ? 3.0f : value), "the variable is %g", got);
    }
    CUDA_OK(cu.cudaFree(in));
    CUDA_OK(cu.cudaFree(out));
    cu.cudaGetLastError();
}

/* -------------------------------------------------------------------------------------------------------- planned failures */

static void test_planned_failures(void **state)
{
    (void)state;
    void *memory = NULL, *second = NULL;
    cudaStream_t stream;
    cudaEvent_t event;
    char host[64] = {0};
    const long before = cu.emu_calls("malloc");
    cu.emu_fail("malloc", 2);
    CUDA_OK(cu.cudaMalloc(&memory, 64));
    CHECK_CUDA(cu.cudaMalloc(&second, 64), cudaErrorMemoryAllocation);
    CUDA_OK(cu.cudaMalloc(&second, 64));
    CHECK(cu.emu_calls("malloc") == before + 3, "%ld allocations", cu.emu_calls("malloc") - before);
    CUDA_OK(cu.cudaFree(second));
    cu.emu_fail("copy", 1);
    CHECK_CUDA(cu.cudaMemcpy(memory, host, 64, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    CUDA_OK(cu.cudaMemcpy(memory, host, 64, cudaMemcpyHostToDevice));
    cu.emu_fail("set", 1);
    CHECK_CUDA(cu.cudaMemsetAsync(memory, 0, 64, NULL), cudaErrorInvalidValue);
    cu.emu_fail("stream", 1);
    CHECK_CUDA(cu.cudaStreamCreate(&stream), cudaErrorMemoryAllocation);
    cu.emu_fail("event", 1);
    CHECK_CUDA(cu.cudaEventCreate(&event), cudaErrorMemoryAllocation);
    cu.emu_fail("host", 1);
    CHECK_CUDA(cu.cudaMallocHost(&second, 64), cudaErrorMemoryAllocation);
    cu.emu_fail("wait", 1);
    CHECK_CUDA(cu.cudaDeviceSynchronize(), cudaErrorUnknown);
    cu.emu_fail("library", 1);
    cudaLibrary_t other;
    CHECK_CUDA(cu.cudaLibraryLoadData(&other, image, NULL, NULL, 0, NULL, NULL, 0), cudaErrorMemoryAllocation);
    cudaKernel_t kernel;
    cu.emu_fail("kernel", 1);
    CHECK_CUDA(cu.cudaLibraryGetKernel(&kernel, library, "fill_kernel"), cudaErrorSymbolNotFound);
    float one = 1, *out = memory;
    int count = 16;
    cu.emu_fail("launch", 1);
    CHECK_CUDA(cu.cudaLaunchKernel(fill, (dim3){1, 1, 1}, (dim3){32, 1, 1}, (void *[]){&out, &count, &one}, 0, NULL),
               cudaErrorLaunchOutOfResources);
    CUDA_OK(cu.cudaDeviceSynchronize());
    CHECK_CUDA(cu.cudaGetLastError(), cudaErrorLaunchOutOfResources);
    cu.emu_fail("launch", 1);
    cu.emu_fail("launch", 0); /* taken back */
    launch_fill(out, count, 1, NULL);
    CUDA_OK(cu.cudaFree(memory));
}

/* ---------------------------------------------------------------------------------------------------------------- threads */

struct worker {
    pthread_t thread;
    int failures;
    float seed;
};

static void *work(void *state)
{
    struct worker *worker = state;
    cudaStream_t stream = NULL;
    void *device = NULL;
    float host[COUNT];
    int count = COUNT, errors = cu.cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess;
    for (int round = 0; round < 20; ++round) {
        float value = worker->seed + (float)round;
        errors += cu.cudaMalloc(&device, sizeof host) != cudaSuccess;
        errors += cu.cudaLaunchKernel(fill, (dim3){3, 1, 1}, (dim3){128, 1, 1}, (void *[]){&device, &count, &value}, 0,
                                      stream) != cudaSuccess;
        errors += cu.cudaMemcpyAsync(host, device, sizeof host, cudaMemcpyDeviceToHost, stream) != cudaSuccess;
        errors += cu.cudaStreamSynchronize(stream) != cudaSuccess;
        for (int i = 0; i < COUNT; ++i)
            errors += host[i] != value;
        errors += cu.cudaFree(device) != cudaSuccess;
    }
    errors += cu.cudaMalloc(NULL, 4) != cudaErrorInvalidValue; /* this thread's last error, not the others' */
    errors += cu.cudaStreamDestroy(stream) != cudaSuccess;
    worker->failures = errors + (cu.cudaGetLastError() != cudaErrorInvalidValue);
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    struct worker workers[4] = {{0}};
    for (int i = 0; i < 4; ++i) {
        workers[i].seed = 100.0f * (float)(i + 1);
        CHECK(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0, "pthread_create");
    }
    for (int i = 0; i < 4; ++i) {
        pthread_join(workers[i].thread, NULL);
        CHECK(workers[i].failures == 0, "thread %d: %d failures", i, workers[i].failures);
    }
    CUDA_OK(cu.cudaGetLastError());
}

/* Last: everything is lost, and the reset makes a new start. */
static void test_sticky_error(void **state)
{
    (void)state;
    cudaStream_t stream = stream_of(cudaStreamNonBlocking);
    float *device = device_floats(COUNT);
    void *more = NULL;
    int count = 0;
    cu.emu_fail("fault", 1);
    launch_fill(device, COUNT, 1, stream);
    CUDA_OK(cu.cudaGetDeviceCount(&count)); /* not yet: it is asynchronous */
    CHECK_CUDA(cu.cudaStreamSynchronize(stream), cudaErrorLaunchFailure);
    CHECK_CUDA(cu.cudaMalloc(&more, 4), cudaErrorLaunchFailure);
    CHECK_CUDA(cu.cudaFree(device), cudaErrorLaunchFailure);
    CHECK_CUDA(cu.cudaGetLastError(), cudaErrorLaunchFailure);
    CHECK_CUDA(cu.cudaGetLastError(), cudaErrorLaunchFailure);
    CHECK_CUDA(cu.cudaPeekAtLastError(), cudaErrorLaunchFailure);
    CUDA_OK(cu.cudaDeviceReset());
    CUDA_OK(cu.cudaGetLastError());
    CHECK(cu.emu_findings() == 0, "%u findings: %s", cu.emu_findings(), cu.emu_last_finding());
    free(image);
    CHECK(setup(NULL) == 0, "the kernels again");
    device = device_floats(COUNT);
    float back[COUNT];
    launch_fill(device, COUNT, 8, NULL);
    CUDA_OK(cu.cudaMemcpy(back, device, sizeof back, cudaMemcpyDeviceToHost));
    check_all(back, COUNT, 8, "after the reset");
    CUDA_OK(cu.cudaFree(device));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_device),         cmocka_unit_test(test_errors),
                                       cmocka_unit_test(test_memory),         cmocka_unit_test(test_rows),
                                       cmocka_unit_test(test_lazy_copies),    cmocka_unit_test(test_events),
                                       cmocka_unit_test(test_legacy_stream),  cmocka_unit_test(test_orders),
                                       cmocka_unit_test(test_host_functions), cmocka_unit_test(test_async_allocation),
                                       cmocka_unit_test(test_launches),       cmocka_unit_test(test_planned_failures),
                                       cmocka_unit_test(test_threads),        cmocka_unit_test(test_sticky_error)};
    check_begin("test_runtime");
    emulated_open();
    return cmocka_run_group_tests(tests, setup, teardown);
}
