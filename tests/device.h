/* device.h: the same test bodies on the CPU and on a GPU.
 *
 * PLORA_TEST_BACKEND=cuda makes check_context() (check.h) open CUDA contexts. Tests go on to compute with host memory; a block of it
 * can have a *twin* in device memory, and a call of the library stands between an upload and a download of all twins:
 *
 *     device_twin(x, bytes);                                         x -> its twin on the device
 *     CHECK_OK(DEVICE(plora_linear_forward(a, 0, &device_x, ...)));  with device_x = device_matrix(x.m)
 *     float *p = device_mirror(arena, bytes);                        device memory of the library -> a host copy
 *
 * On the CPU a twin is the block itself, and nothing is copied. The calls of the runtime are found as the library finds them, by the
 * name libcudart.so.13: the real one, or the emulator's (tests/emulator/). */
#ifndef PLORA_TESTS_DEVICE_H
#define PLORA_TESTS_DEVICE_H

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plora.h"

#define DEVICE_UNUSED __attribute__((unused))

static DEVICE_UNUSED int device_is_cuda(void)
{
    const char *backend = getenv("PLORA_TEST_BACKEND");
    return backend != NULL && strcmp(backend, "cuda") == 0;
}

static DEVICE_UNUSED int32_t device_backend(void)
{
    return device_is_cuda() ? PLORA_BACKEND_CUDA : PLORA_BACKEND_CPU;
}

/* ------------------------------------------------------------------------------------------------------------- runtime */

static DEVICE_UNUSED void device_fail(const char *what, int error)
{
    fprintf(stderr, "device.h: %s: error %d\n", what, error);
    abort();
}

static DEVICE_UNUSED void *device_function(const char *name)
{
    static void *runtime;
    if (runtime == NULL) runtime = dlopen("libcudart.so.13", RTLD_NOW | RTLD_LOCAL);
    void *function = runtime == NULL ? NULL : dlsym(runtime, name);
    if (function == NULL) {
        fprintf(stderr, "device.h: no %s in libcudart.so.13: %s\n", name, dlerror());
        abort();
    }
    return function;
}

/* Calls a function of the runtime that has the given types of arguments; the test ends when it fails. */
#define DEVICE_CALL(name, types, ...)                                                                                  \
    do {                                                                                                               \
        int(*function_) types;                                                                                         \
        void *const symbol_ = device_function(#name);                                                                  \
        memcpy(&function_, &symbol_, sizeof symbol_);                                                                  \
        const int error_ = function_(__VA_ARGS__);                                                                     \
        if (error_ != 0) device_fail(#name, error_);                                                                   \
    } while (0)

static DEVICE_UNUSED void *device_malloc(size_t bytes)
{
    void *memory = NULL;
    DEVICE_CALL(cudaMalloc, (void **, size_t), &memory, bytes);
    return memory;
}

static DEVICE_UNUSED void device_free(void *memory)
{
    DEVICE_CALL(cudaFree, (void *), memory);
}

/* In any direction; complete when it returns. */
static DEVICE_UNUSED void device_copy(void *destination, const void *source, size_t bytes)
{
    enum { ANY_DIRECTION = 4 };
    DEVICE_CALL(cudaMemcpy, (void *, const void *, size_t, int), destination, source, bytes, ANY_DIRECTION);
}

static DEVICE_UNUSED void device_wait(void)
{
    if (device_is_cuda()) DEVICE_CALL(cudaDeviceSynchronize, (void), );
}

/* A stream that does not wait for the default stream, nor that for it. */
static DEVICE_UNUSED void *device_stream_create(void)
{
    enum { NON_BLOCKING = 1 };
    void *stream = NULL;
    DEVICE_CALL(cudaStreamCreateWithFlags, (void **, unsigned), &stream, NON_BLOCKING);
    return stream;
}

static DEVICE_UNUSED void device_stream_destroy(void *stream)
{
    DEVICE_CALL(cudaStreamDestroy, (void *), stream);
}

/* Work put on the stream between the two is kept in a graph, not done. */
static DEVICE_UNUSED void device_capture_begin(void *stream)
{
    enum { THREAD_LOCAL = 1 };
    DEVICE_CALL(cudaStreamBeginCapture, (void *, int), stream, THREAD_LOCAL);
}

static DEVICE_UNUSED void *device_capture_end(void *stream)
{
    void *graph = NULL, *executable = NULL;
    DEVICE_CALL(cudaStreamEndCapture, (void *, void **), stream, &graph);
    DEVICE_CALL(cudaGraphInstantiate, (void **, void *, unsigned long long), &executable, graph, 0);
    DEVICE_CALL(cudaGraphDestroy, (void *), graph);
    return executable;
}

static DEVICE_UNUSED void device_graph_launch(void *executable, void *stream)
{
    DEVICE_CALL(cudaGraphLaunch, (void *, void *), executable, stream);
}

static DEVICE_UNUSED void device_graph_destroy(void *executable)
{
    DEVICE_CALL(cudaGraphExecDestroy, (void *), executable);
}

/* Between memory of the backend under test and the host's, either way. */
static DEVICE_UNUSED void device_transfer(void *destination, const void *source, size_t bytes)
{
    if (device_is_cuda())
        device_copy(destination, source, bytes);
    else
        memcpy(destination, source, bytes);
}

/* --------------------------------------------------------------------------------------------------------------- twins */

struct device_twin {
    unsigned char *host, *device;
    size_t bytes;
    int mirror; /* the device memory is the library's, the host memory ours */
};

enum { DEVICE_TWINS = 512 };

static struct device_twin device_twins[DEVICE_TWINS] DEVICE_UNUSED;
static int device_twin_count DEVICE_UNUSED;

static DEVICE_UNUSED void device_add(void *host, void *device, size_t bytes, int mirror)
{
    if (device_twin_count == DEVICE_TWINS) device_fail("too many twins", device_twin_count);
    device_twins[device_twin_count++] = (struct device_twin){host, device, bytes, mirror};
}

static DEVICE_UNUSED void device_twin(void *host, size_t bytes)
{
    if (!device_is_cuda()) return;
    void *device = device_malloc(bytes > 0 ? bytes : 1);
    device_copy(device, host, bytes);
    device_add(host, device, bytes, 0);
}

/* A host copy of memory of the library, until device_forget(); on the CPU the memory itself. */
static DEVICE_UNUSED void *device_mirror(void *device, size_t bytes)
{
    if (!device_is_cuda() || device == NULL) return device;
    void *host = malloc(bytes > 0 ? bytes : 1);
    if (host == NULL) device_fail("out of host memory", 0);
    device_copy(host, device, bytes);
    device_add(host, device, bytes, 1);
    return host;
}

/* Ends a twin or a mirror; the memory that is the test's or the library's own stays. */
static DEVICE_UNUSED void device_forget(void *host)
{
    for (int i = 0; i < device_twin_count; ++i) {
        struct device_twin *twin = &device_twins[i];
        if (twin->host != host) continue;
        if (twin->mirror)
            free(twin->host);
        else
            device_free(twin->device);
        *twin = device_twins[--device_twin_count];
        return;
    }
}

/* Where the library finds what the test has at `host`, inside a twin: there, on the CPU. */
static DEVICE_UNUSED void *device_of(const void *host)
{
    const uintptr_t at = (uintptr_t)host;
    for (int i = 0; i < device_twin_count; ++i) {
        const uintptr_t begin = (uintptr_t)device_twins[i].host;
        if (at == begin || (at > begin && at < begin + device_twins[i].bytes))
            return device_twins[i].device + (at - begin);
    }
    void *same;
    memcpy(&same, &host, sizeof same);
    return same;
}

/* The other way round. */
static DEVICE_UNUSED void *device_host_of(const void *device)
{
    const uintptr_t at = (uintptr_t)device;
    for (int i = 0; i < device_twin_count; ++i) {
        const uintptr_t begin = (uintptr_t)device_twins[i].device;
        if (at == begin || (at > begin && at < begin + device_twins[i].bytes))
            return device_twins[i].host + (at - begin);
    }
    void *same;
    memcpy(&same, &device, sizeof same);
    return same;
}

static DEVICE_UNUSED plora_matrix device_matrix(plora_matrix matrix)
{
    matrix.data = device_of(matrix.data);
    return matrix;
}

/* Uploads the one twin of a block that the test has filled, for calls that are not made through DEVICE(). */
static DEVICE_UNUSED void device_refresh(const void *host)
{
    for (int i = 0; i < device_twin_count; ++i)
        if (device_twins[i].host == host) device_copy(device_twins[i].device, host, device_twins[i].bytes);
}

static DEVICE_UNUSED void device_upload(void)
{
    for (int i = 0; i < device_twin_count; ++i)
        device_copy(device_twins[i].device, device_twins[i].host, device_twins[i].bytes);
}

static DEVICE_UNUSED plora_status device_download(plora_status status)
{
    device_wait();
    for (int i = 0; i < device_twin_count; ++i)
        device_copy(device_twins[i].host, device_twins[i].device, device_twins[i].bytes);
    return status;
}

/* A call of the library, between an upload and a download of all twins. */
#define DEVICE(call) (device_upload(), device_download(call))

#endif
