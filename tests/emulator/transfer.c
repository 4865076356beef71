/* transfer.c: memory of the emulated libcudart: cudaMalloc, pinned host memory, copies, sets.
 *
 * Device memory itself is in memory.c. What is here is when a copy happens, as late as the documentation allows ("API
 * synchronization behavior"):
 *     from pageable host memory    the source is read at the call, the destination written later
 *     from pinned host memory      both later, so the source must not change before the stream was waited for
 *     to pageable host memory      done when the call returns
 *     to pinned host memory        later
 *     device to device, cudaMemset later, also without Async
 * An uninitialised byte copied to the host is a finding, as in compute-sanitizer; between device addresses the state of each
 * byte moves along with it. */
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* What cudaMalloc gave out, and its device. */
struct block {
    void *base;
    int device;
    bool async;
    struct block *next;
};

/* Pinned host memory: cudaHostAlloc's own, or the application's, registered. */
struct pinned {
    void *base;
    size_t bytes;
    unsigned flags;
    int device;
    bool own;
    struct pinned *next;
};

static struct block *blocks;
static struct pinned *pinned;

/* ---------------------------------------------------------------------------------------------------------- device memory */

static cudaError_t device_allocate(void **out, size_t bytes)
{
    if (emu_fails("malloc")) return cudaErrorMemoryAllocation;
    *out = NULL;
    if (bytes == 0) return cudaSuccess;
    void *base = emu_memory_allocate(bytes);
    if (base == NULL) return cudaErrorMemoryAllocation;
    struct block *block = calloc(1, sizeof *block);
    if (block == NULL) abort();
    *block = (struct block){base, runtime_device(), false, blocks};
    blocks = block;
    *out = base;
    return cudaSuccess;
}

static cudaError_t device_free(void *base)
{
    struct block **link = &blocks;
    while (*link != NULL && (*link)->base != base)
        link = &(*link)->next;
    if (*link != NULL) {
        struct block *block = *link;
        *link = block->next;
        free(block);
    }
    return emu_memory_free(base) ? cudaSuccess : cudaErrorInvalidValue; /* memory.c says what is wrong */
}

cudaError_t cudaMalloc(void **out, size_t bytes)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && out == NULL) error = cudaErrorInvalidValue;
    if (error == cudaSuccess) error = capture_forbids_unsafe_call();
    if (error == cudaSuccess) error = device_allocate(out, bytes);
    return runtime_leave(error);
}

/* Waits for the device, as the real one does. */
cudaError_t cudaFree(void *base)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = capture_forbids_unsafe_call();
    for (int device = 0; error == cudaSuccess && base != NULL && device < runtime_device_count(); ++device)
        error = queue_drain(device);
    if (error == cudaSuccess && base != NULL) error = device_free(base);
    return runtime_leave(error);
}

/* The address is there at once; that nobody uses it before its place in the stream is not checked. */
cudaError_t cudaMallocAsync(void **out, size_t bytes, cudaStream_t handle)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = out == NULL ? cudaErrorInvalidValue : queue_stream(handle, &stream);
    if (error == cudaSuccess && stream->capture != NULL) error = cudaErrorNotSupported; /* allocation nodes */
    if (error == cudaSuccess) error = device_allocate(out, bytes);
    return runtime_leave(error);
}

struct free_work {
    struct work base;
    void *memory;
};

static cudaError_t run_free(const struct work *work)
{
    device_free(((const struct free_work *)work)->memory);
    return cudaSuccess;
}

cudaError_t cudaFreeAsync(void *base, cudaStream_t handle)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = queue_stream(handle, &stream);
    if (error == cudaSuccess && stream->capture != NULL) error = cudaErrorNotSupported;
    if (error == cudaSuccess && base != NULL) {
        struct free_work *work = (struct free_work *)work_new(sizeof *work, cudaGraphNodeTypeMemFree, run_free);
        work->memory = base;
        snprintf(work->base.name, sizeof work->base.name, "free %p", base);
        error = queue_add(stream, &work->base);
    }
    return runtime_leave(error);
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && (available == NULL || total == NULL)) error = cudaErrorInvalidValue;
    if (error == cudaSuccess) {
        *total = emu_memory_total();
        *available = *total - emu_memory_live_bytes();
    }
    return runtime_leave(error);
}

/* ----------------------------------------------------------------------------------------------------- pinned host memory */

static cudaError_t pin(void *base, size_t bytes, unsigned flags, bool own)
{
    struct pinned *memory = calloc(1, sizeof *memory);
    if (memory == NULL) abort();
    *memory = (struct pinned){base, bytes, flags, runtime_device(), own, pinned};
    pinned = memory;
    emu_memory_add_host(base, bytes);
    return cudaSuccess;
}

static struct pinned *find_pinned(const void *address)
{
    struct pinned *memory = pinned;
    const char *wanted = address;
    while (memory != NULL && !(wanted >= (char *)memory->base && wanted < (char *)memory->base + memory->bytes))
        memory = memory->next;
    return memory;
}

static void unpin(struct pinned *memory)
{
    struct pinned **link = &pinned;
    while (*link != memory)
        link = &(*link)->next;
    *link = memory->next;
    emu_memory_remove_host(memory->base);
    if (memory->own) munmap(memory->base, memory->bytes); /* a later access faults */
    free(memory);
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && (out == NULL || flags > 7)) error = cudaErrorInvalidValue;
    if (error == cudaSuccess) error = capture_forbids_unsafe_call();
    if (error == cudaSuccess && emu_fails("host")) error = cudaErrorMemoryAllocation;
    if (error == cudaSuccess) *out = NULL;
    if (error == cudaSuccess && bytes > 0) {
        void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) return runtime_leave(cudaErrorMemoryAllocation);
        memset(base, 0xff, bytes);
        error = pin(base, bytes, flags, true);
        *out = base;
    }
    return runtime_leave(error);
}

cudaError_t cudaMallocHost(void **out, size_t bytes)
{
    return cudaHostAlloc(out, bytes, cudaHostAllocDefault);
}

cudaError_t cudaFreeHost(void *base)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = capture_forbids_unsafe_call();
    for (int device = 0; error == cudaSuccess && base != NULL && device < runtime_device_count(); ++device)
        error = queue_drain(device);
    if (error == cudaSuccess && base != NULL) {
        struct pinned *memory = find_pinned(base);
        if (memory == NULL || memory->base != base || !memory->own) {
            emu_find(NULL, "cudaFreeHost of %p, which is not (or no longer) of cudaHostAlloc", base);
            error = cudaErrorInvalidValue;
        } else {
            unpin(memory);
        }
    }
    return runtime_leave(error);
}

cudaError_t cudaHostRegister(void *base, size_t bytes, unsigned flags)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && (base == NULL || bytes == 0 || emu_memory_is_device(base)))
        error = cudaErrorInvalidValue;
    if (error == cudaSuccess) error = capture_forbids_unsafe_call();
    if (error == cudaSuccess && emu_fails("host")) error = cudaErrorMemoryAllocation;
    if (error == cudaSuccess && (find_pinned(base) != NULL || find_pinned((char *)base + bytes - 1) != NULL))
        error = cudaErrorHostMemoryAlreadyRegistered;
    if (error == cudaSuccess) error = pin(base, bytes, flags, false);
    return runtime_leave(error);
}

cudaError_t cudaHostUnregister(void *base)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = capture_forbids_unsafe_call();
    for (int device = 0; error == cudaSuccess && device < runtime_device_count(); ++device)
        error = queue_drain(device);
    if (error == cudaSuccess) {
        struct pinned *memory = find_pinned(base);
        if (memory == NULL || memory->base != base || memory->own)
            error = cudaErrorHostMemoryNotRegistered;
        else
            unpin(memory);
    }
    return runtime_leave(error);
}

cudaError_t cudaHostGetDevicePointer(void **out, void *host, unsigned flags)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && (out == NULL || flags != 0 || find_pinned(host) == NULL)) error = cudaErrorInvalidValue;
    if (error == cudaSuccess) *out = host;
    return runtime_leave(error);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && attributes == NULL) error = cudaErrorInvalidValue;
    if (error == cudaSuccess) {
        void *base = NULL;
        size_t bytes = 0;
        const struct pinned *memory = find_pinned(address);
        memset(attributes, 0, sizeof *attributes);
        attributes->device = -2; /* as the real one for memory that CUDA does not know */
        attributes->type = cudaMemoryTypeUnregistered;
        attributes->hostPointer = (void *)address;
        if (emu_memory_find(address, &base, &bytes)) {
            const struct block *block = blocks;
            while (block != NULL && block->base != base)
                block = block->next;
            attributes->type = cudaMemoryTypeDevice;
            attributes->device = block != NULL ? block->device : 0; /* a variable of a module is no block */
            attributes->devicePointer = (void *)address;
            attributes->hostPointer = NULL;
        } else if (memory != NULL) {
            attributes->type = cudaMemoryTypeHost;
            attributes->device = memory->device;
            attributes->devicePointer = (void *)address;
        }
    }
    return runtime_leave(error);
}

/* ----------------------------------------------------------------------------------------------------------------- copies */

/* `rows` rows of `width` bytes; a plain copy has one. */
struct copy_work {
    struct work base;
    const char *who;
    char *to;
    const char *from;
    void *staged; /* a pageable source, read at the call, rows without gaps */
    size_t to_pitch, from_pitch, width, rows;
};

static void destroy_copy(struct work *work)
{
    free(((struct copy_work *)work)->staged);
}

static cudaError_t run_copy(const struct work *work)
{
    const struct copy_work *copy = (const struct copy_work *)work;
    const bool to_device = emu_memory_is_device(copy->to);
    const char *from = copy->staged != NULL ? copy->staged : copy->from;
    const size_t from_pitch = copy->staged != NULL ? copy->width : copy->from_pitch;
    if (copy->staged == NULL && !emu_memory_check_rows(copy->who, from, copy->rows, copy->width, from_pitch,
                                                       to_device ? EMU_READ_ANY : EMU_READ))
        return cudaErrorIllegalAddress;
    if (!emu_memory_check_rows(copy->who, copy->to, copy->rows, copy->width, copy->to_pitch, EMU_WRITE))
        return cudaErrorIllegalAddress;
    for (size_t i = 0; i < copy->rows; ++i) {
        char *target = copy->to + i * copy->to_pitch;
        const char *source = from + i * from_pitch;
        memmove(emu_memory_host(target), emu_memory_host(source), copy->width);
        if (to_device && copy->staged == NULL) emu_memory_copy_state(target, source, copy->width);
    }
    return cudaSuccess;
}

/* Which side is the host's, from the addresses; the kind must agree where it says anything. */
static cudaError_t check_kind(enum cudaMemcpyKind kind, bool to_device, bool from_device)
{
    static const bool to_is_device[] = {false, true, false, true}, from_is_device[] = {false, false, true, true};
    if (kind == cudaMemcpyDefault) return cudaSuccess;
    if ((int)kind < 0 || kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
    return to_is_device[kind] == to_device && from_is_device[kind] == from_device ? cudaSuccess : cudaErrorInvalidValue;
}

static bool is_pinned(const void *address, size_t bytes)
{
    const struct pinned *memory = find_pinned(address);
    return memory != NULL && (const char *)address + bytes <= (const char *)memory->base + memory->bytes;
}

static cudaError_t copy_rows(const struct copy_work *request, enum cudaMemcpyKind kind, struct CUstream_st *stream,
                             bool async)
{
    const bool to_device = emu_memory_is_device(request->to), from_device = emu_memory_is_device(request->from);
    if (request->to == NULL || request->from == NULL) return cudaErrorInvalidValue;
    if (request->rows > 1 && (request->to_pitch < request->width || request->from_pitch < request->width))
        return cudaErrorInvalidPitchValue;
    cudaError_t error = check_kind(kind, to_device, from_device);
    if (error == cudaSuccess && emu_fails("copy")) error = cudaErrorInvalidValue;
    if (error == cudaSuccess && !async) error = capture_forbids_unsafe_call();
    if (error != cudaSuccess) return error;
    /* Addresses are checked at the call, and again when the copy runs. */
    char who[64];
    snprintf(who, sizeof who, "%s, destination", request->who);
    if (!emu_memory_check_rows(request->who, request->from, request->rows, request->width, request->from_pitch,
                               EMU_READ_ANY) ||
        !emu_memory_check_rows(who, request->to, request->rows, request->width, request->to_pitch, EMU_READ_ANY))
        return cudaErrorInvalidValue;

    const size_t to_extent = (request->rows - 1) * request->to_pitch + request->width;
    const size_t from_extent = (request->rows - 1) * request->from_pitch + request->width;
    const bool from_pageable = !from_device && !is_pinned(request->from, from_extent);
    const bool to_pageable = !to_device && !is_pinned(request->to, to_extent);
    if (stream->capture != NULL && (from_pageable || to_pageable)) { /* it would have to be staged at each launch */
        error = capture_forbids_wait(stream);
        return error;
    }
    struct copy_work *copy = (struct copy_work *)work_new(sizeof *copy, cudaGraphNodeTypeMemcpy, run_copy);
    const struct work base = copy->base;
    *copy = *request;
    copy->base = base;
    copy->base.destroy = destroy_copy;
    snprintf(copy->base.name, sizeof copy->base.name, "%s %p <- %p, %zu x %zu bytes", request->who, (void *)request->to,
             (const void *)request->from, request->rows, request->width);
    if (from_pageable && to_device) {
        copy->staged = malloc(request->width * request->rows);
        if (copy->staged == NULL) abort();
        for (size_t i = 0; i < request->rows; ++i)
            memcpy((char *)copy->staged + i * request->width, request->from + i * request->from_pitch, request->width);
    }
    const bool waits = to_pageable || (!async && !(to_device && from_device));
    return waits ? queue_add_and_wait(stream, &copy->base) : queue_add(stream, &copy->base);
}

static cudaError_t copy_call(struct copy_work request, enum cudaMemcpyKind kind, cudaStream_t handle, bool async)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = queue_stream(handle, &stream);
    if (error == cudaSuccess && request.width > 0 && request.rows > 0) error = copy_rows(&request, kind, stream, async);
    return runtime_leave(error);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    const struct copy_work request = {.who = "cudaMemcpyAsync",
                                      .to = to,
                                      .from = from,
                                      .to_pitch = bytes,
                                      .from_pitch = bytes,
                                      .width = bytes,
                                      .rows = 1};
    return copy_call(request, kind, stream, true);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind)
{
    const struct copy_work request = {
        .who = "cudaMemcpy", .to = to, .from = from, .to_pitch = bytes, .from_pitch = bytes, .width = bytes, .rows = 1};
    return copy_call(request, kind, NULL, false);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows,
                              enum cudaMemcpyKind kind, cudaStream_t stream)
{
    const struct copy_work request = {.who = "cudaMemcpy2DAsync",
                                      .to = to,
                                      .from = from,
                                      .to_pitch = to_pitch,
                                      .from_pitch = from_pitch,
                                      .width = width,
                                      .rows = rows};
    return copy_call(request, kind, stream, true);
}

cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows,
                         enum cudaMemcpyKind kind)
{
    const struct copy_work request = {.who = "cudaMemcpy2D",
                                      .to = to,
                                      .from = from,
                                      .to_pitch = to_pitch,
                                      .from_pitch = from_pitch,
                                      .width = width,
                                      .rows = rows};
    return copy_call(request, kind, NULL, false);
}

/* ------------------------------------------------------------------------------------------------------------------- sets */

struct set_work {
    struct work base;
    char *to;
    int value;
    size_t pitch, width, rows;
};

static cudaError_t run_set(const struct work *work)
{
    const struct set_work *set = (const struct set_work *)work;
    if (!emu_memory_check_rows("cudaMemset", set->to, set->rows, set->width, set->pitch, EMU_WRITE))
        return cudaErrorIllegalAddress;
    for (size_t i = 0; i < set->rows; ++i)
        memset(emu_memory_host(set->to + i * set->pitch), set->value, set->width);
    return cudaSuccess;
}

static cudaError_t set_call(struct set_work request, cudaStream_t handle, bool async)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = queue_stream(handle, &stream);
    if (error != cudaSuccess || request.width == 0 || request.rows == 0) return runtime_leave(error);
    const bool host = !emu_memory_is_device(request.to);
    if (host && !is_pinned(request.to, (request.rows - 1) * request.pitch + request.width))
        error = cudaErrorInvalidValue;
    if (error == cudaSuccess && emu_fails("set")) error = cudaErrorInvalidValue;
    if (error == cudaSuccess && !async) error = capture_forbids_unsafe_call();
    if (error == cudaSuccess &&
        !emu_memory_check_rows("cudaMemset", request.to, request.rows, request.width, request.pitch, EMU_READ_ANY))
        error = cudaErrorInvalidValue;
    if (error == cudaSuccess) {
        struct set_work *set = (struct set_work *)work_new(sizeof *set, cudaGraphNodeTypeMemset, run_set);
        const struct work base = set->base;
        *set = request;
        set->base = base;
        snprintf(set->base.name, sizeof set->base.name, "cudaMemset %p, %zu x %zu bytes of %d", (void *)request.to,
                 request.rows, request.width, request.value);
        error = host && !async ? queue_add_and_wait(stream, &set->base) : queue_add(stream, &set->base);
    }
    return runtime_leave(error);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    return set_call((struct set_work){.to = to, .value = value, .pitch = bytes, .width = bytes, .rows = 1}, stream,
                    true);
}

cudaError_t cudaMemset(void *to, int value, size_t bytes)
{
    return set_call((struct set_work){.to = to, .value = value, .pitch = bytes, .width = bytes, .rows = 1}, NULL,
                    false);
}

cudaError_t cudaMemset2DAsync(void *to, size_t pitch, int value, size_t width, size_t rows, cudaStream_t stream)
{
    return set_call((struct set_work){.to = to, .value = value, .pitch = pitch, .width = width, .rows = rows}, stream,
                    true);
}

cudaError_t cudaMemset2D(void *to, size_t pitch, int value, size_t width, size_t rows)
{
    return set_call((struct set_work){.to = to, .value = value, .pitch = pitch, .width = width, .rows = rows}, NULL,
                    false);
}

/* ----------------------------------------------------------------------------------------------------------- start and end */

void transfer_reset(void)
{
    while (blocks != NULL)
        device_free(blocks->base);
    while (pinned != NULL)
        unpin(pinned);
}

void transfer_leaks(void)
{
    for (const struct block *block = blocks; block != NULL; block = block->next) {
        void *base = NULL;
        size_t bytes = 0;
        emu_memory_find(block->base, &base, &bytes);
        emu_find(NULL, "leak: %zu bytes of device memory at %p were not freed", bytes, block->base);
    }
    for (const struct pinned *memory = pinned; memory != NULL; memory = memory->next)
        emu_find(NULL, "leak: %zu bytes of pinned host memory at %p were not %s", memory->bytes, memory->base,
                 memory->own ? "freed" : "unregistered");
}
