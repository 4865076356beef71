/* queue.c: streams and events. Work is executed as late as the API allows:
 *
 *     stream 1   [k1] [copy] (event A) [k2]      cudaStreamSynchronize(stream 2) executes, in stream 2's order, what stream 2
 *     stream 2   (wait A) [k3] [k4]              has, and of stream 1 only what A stands for: k2 does not run.
 *
 * An entry runs when all before it in its stream ran, the event it waits for, and, by the rules of the legacy default stream,
 * what came before it there (for an entry of a blocking stream) or in any blocking stream (for one of the legacy stream).
 * Whatever else must run, e.g. at cudaDeviceSynchronize, runs in an order drawn from EMU_SEED. So two operations that the host
 * has not ordered do run in the wrong order, sooner or later, and mostly at once. */
#include "runtime.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { QUEUE_LIMIT = 4096 }; /* a launch into a full queue waits for room, as on hardware */

struct entry {
    uint64_t sequence;
    struct work *work;    /* NULL: only waits */
    struct position wait; /* of another stream; stream NULL: nothing */
    struct entry *next;
};

struct CUstream_st *queue_streams; /* all that were ever made, the newest first */
static struct CUevent_st *events;
static struct CUstream_st *legacy[RUNTIME_MAX_DEVICES];
static _Thread_local struct CUstream_st *per_thread[RUNTIME_MAX_DEVICES];
static uint64_t sequence; /* one for all streams: it orders the legacy stream's entries against the others' */
static int stream_count, event_count;
static struct emu_random orders;

/* ------------------------------------------------------------------------------------------------------------------ work */

struct work *work_new(size_t bytes, enum cudaGraphNodeType type, cudaError_t (*run)(const struct work *work))
{
    struct work *work = calloc(1, bytes);
    if (work == NULL) abort(); /* the test machine is out of memory */
    work->references = 1;
    work->type = type;
    work->run = run;
    return work;
}

void work_release(struct work *work)
{
    if (work == NULL || --work->references > 0) return;
    if (work->destroy != NULL) work->destroy(work);
    free(work);
}

/* ---------------------------------------------------------------------------------------------------------------- streams */

static struct CUstream_st *stream_new(unsigned flags, int priority)
{
    struct CUstream_st *stream = calloc(1, sizeof *stream);
    if (stream == NULL) abort();
    if (stream_count == 0) orders = emu_random_new(0x57);
    stream->state = HANDLE_ALIVE;
    stream->id = ++stream_count;
    stream->device = runtime_device();
    stream->flags = flags;
    stream->priority = priority;
    stream->next = queue_streams;
    queue_streams = stream;
    return stream;
}

static struct CUstream_st *standard_stream(struct CUstream_st **slot)
{
    if (*slot == NULL || (*slot)->state != HANDLE_ALIVE) *slot = stream_new(cudaStreamDefault, 0);
    (*slot)->standard = true;
    return *slot;
}

static bool known(const struct CUstream_st *stream)
{
    const struct CUstream_st *each = queue_streams;
    while (each != NULL && each != stream)
        each = each->next;
    return each != NULL && each->state == HANDLE_ALIVE;
}

cudaError_t queue_stream(cudaStream_t handle, struct CUstream_st **stream)
{
    const int device = runtime_device();
    if (handle == NULL || handle == cudaStreamLegacy) {
        *stream = standard_stream(&legacy[device]);
        (*stream)->legacy = true;
        return cudaSuccess;
    }
    if (handle == cudaStreamPerThread) {
        *stream = standard_stream(&per_thread[device]);
        return cudaSuccess;
    }
    *stream = handle;
    return known(handle) ? cudaSuccess : runtime_bad_handle("a stream", handle);
}

static bool blocking(const struct CUstream_st *stream)
{
    return !stream->legacy && (stream->flags & cudaStreamNonBlocking) == 0;
}

/* -------------------------------------------------------------------------------------------------------------- execution */

static cudaError_t run_until(struct CUstream_st *stream, uint64_t until);

static void execute(const struct CUstream_st *stream, const struct work *work)
{
    if (runtime_sticky() != cudaSuccess) return; /* a lost context runs nothing more */
    if (runtime_tracing()) fprintf(stderr, "emulator: stream %d: %s\n", stream->id, work->name);
    const cudaError_t error = work->run(work);
    if (error != cudaSuccess) runtime_fault(error);
}

/* What must have run before this entry does, in other streams. */
static void run_dependencies(const struct CUstream_st *stream, const struct entry *entry)
{
    if (entry->wait.stream != NULL) run_until(entry->wait.stream, entry->wait.sequence);
    if (stream->legacy) {
        for (struct CUstream_st *other = queue_streams; other != NULL; other = other->next)
            if (other->device == stream->device && blocking(other)) run_until(other, entry->sequence);
    } else if (blocking(stream) && legacy[stream->device] != NULL) {
        run_until(legacy[stream->device], entry->sequence);
    }
}

static void run_first(struct CUstream_st *stream)
{
    struct entry *entry = stream->first;
    run_dependencies(stream, entry);
    stream->first = entry->next;
    if (stream->first == NULL) stream->last = NULL;
    stream->pending--;
    if (entry->work != NULL) execute(stream, entry->work);
    stream->done = entry->sequence;
    work_release(entry->work);
    free(entry);
}

static cudaError_t run_until(struct CUstream_st *stream, uint64_t until)
{
    while (stream->first != NULL && stream->first->sequence <= until)
        run_first(stream);
    return runtime_sticky();
}

cudaError_t queue_drain(int device)
{
    for (;;) {
        uint32_t ready = 0;
        for (const struct CUstream_st *stream = queue_streams; stream != NULL; stream = stream->next)
            ready += stream->device == device && stream->first != NULL;
        if (ready == 0) return runtime_sticky();
        uint32_t chosen = emu_random_below(&orders, ready);
        struct CUstream_st *stream = queue_streams;
        while (stream->device != device || stream->first == NULL || chosen-- > 0)
            stream = stream->next;
        run_first(stream);
    }
}

static void append(struct CUstream_st *stream, struct work *work, struct position wait)
{
    struct entry *entry = calloc(1, sizeof *entry);
    if (entry == NULL) abort();
    entry->sequence = stream->added = ++sequence;
    entry->work = work;
    entry->wait = wait;
    if (stream->first == NULL) stream->first = entry;
    if (stream->last != NULL) stream->last->next = entry;
    stream->last = entry;
    if (++stream->pending > QUEUE_LIMIT) run_first(stream);
}

cudaError_t queue_add(struct CUstream_st *stream, struct work *work)
{
    cudaError_t error = stream->device != runtime_device() ? cudaErrorInvalidResourceHandle : cudaSuccess;
    if (error == cudaSuccess && stream->capture != NULL) return capture_add(stream, work);
    if (error == cudaSuccess) error = capture_forbids_legacy(stream);
    if (error != cudaSuccess) {
        work_release(work);
        return error;
    }
    append(stream, work, (struct position){NULL, 0});
    return cudaSuccess;
}

cudaError_t queue_add_and_wait(struct CUstream_st *stream, struct work *work)
{
    cudaError_t error = capture_forbids_wait(stream);
    if (error != cudaSuccess) {
        work_release(work);
        return error;
    }
    error = queue_add(stream, work);
    return error == cudaSuccess ? run_until(stream, stream->added) : error;
}

static void drop(struct CUstream_st *stream)
{
    while (stream->first != NULL) {
        struct entry *entry = stream->first;
        stream->first = entry->next;
        work_release(entry->work);
        free(entry);
    }
    stream->last = NULL;
    stream->pending = 0;
    stream->done = stream->added;
}

void queue_reset(void)
{
    for (struct CUstream_st *stream = queue_streams; stream != NULL; stream = stream->next) {
        drop(stream);
        stream->state = HANDLE_DEAD;
    }
    for (struct CUevent_st *event = events; event != NULL; event = event->next)
        event->state = HANDLE_DEAD;
}

void queue_leaks(void)
{
    for (const struct CUstream_st *stream = queue_streams; stream != NULL; stream = stream->next) {
        if (stream->standard || stream->state != HANDLE_ALIVE) continue;
        emu_find(NULL, "leak: stream %d was not destroyed", stream->id);
    }
    for (const struct CUevent_st *event = events; event != NULL; event = event->next) {
        if (event->state != HANDLE_ALIVE) continue;
        emu_find(NULL, "leak: event %d was not destroyed", event->id);
    }
}

/* ----------------------------------------------------------------------------------------------------- calls with streams */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && (out == NULL || (flags & ~(unsigned)cudaStreamNonBlocking) != 0))
        error = cudaErrorInvalidValue;
    if (error == cudaSuccess && emu_fails("stream")) error = cudaErrorMemoryAllocation;
    if (error == cudaSuccess) *out = stream_new(flags, priority);
    return runtime_leave(error);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags)
{
    return cudaStreamCreateWithPriority(out, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *out)
{
    return cudaStreamCreateWithPriority(out, cudaStreamDefault, 0);
}

/* The call does not wait: what is queued runs later. */
cudaError_t cudaStreamDestroy(cudaStream_t handle)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    const bool standard = handle == NULL || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
    if (error == cudaSuccess && standard) error = cudaErrorInvalidResourceHandle;
    if (error == cudaSuccess) error = queue_stream(handle, &stream);
    if (error == cudaSuccess) {
        capture_stream_destroyed(stream);
        stream->state = HANDLE_DEAD;
    }
    return runtime_leave(error);
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = queue_stream(handle, &stream);
    if (error == cudaSuccess) error = capture_forbids_wait(stream);
    if (error == cudaSuccess) error = capture_forbids_legacy(stream);
    if (error == cudaSuccess && emu_fails("wait")) error = cudaErrorUnknown;
    if (error == cudaSuccess) error = run_until(stream, stream->added);
    if (error == cudaSuccess && stream->legacy) { /* an empty legacy stream still waits for the blocking ones */
        const struct entry now = {++sequence, NULL, {NULL, 0}, NULL};
        run_dependencies(stream, &now);
        error = runtime_sticky();
    }
    return runtime_leave(error);
}

/* One step for each question, so that a loop that asks ends. */
cudaError_t cudaStreamQuery(cudaStream_t handle)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = queue_stream(handle, &stream);
    if (error == cudaSuccess) error = capture_forbids_wait(stream);
    if (error == cudaSuccess && stream->first != NULL) {
        run_first(stream);
        error = runtime_sticky();
        if (error == cudaSuccess && stream->first != NULL) error = cudaErrorNotReady;
    }
    return runtime_leave(error);
}

cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned *flags)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = flags == NULL ? cudaErrorInvalidValue : queue_stream(handle, &stream);
    if (error == cudaSuccess) *flags = stream->flags;
    return runtime_leave(error);
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *priority)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = priority == NULL ? cudaErrorInvalidValue : queue_stream(handle, &stream);
    if (error == cudaSuccess) *priority = stream->priority;
    return runtime_leave(error);
}

cudaError_t cudaStreamGetId(cudaStream_t handle, unsigned long long *id)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = id == NULL ? cudaErrorInvalidValue : queue_stream(handle, &stream);
    if (error == cudaSuccess) *id = (unsigned long long)stream->id;
    return runtime_leave(error);
}

cudaError_t cudaStreamGetDevice(cudaStream_t handle, int *device)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = device == NULL ? cudaErrorInvalidValue : queue_stream(handle, &stream);
    if (error == cudaSuccess) *device = stream->device;
    return runtime_leave(error);
}

/* ----------------------------------------------------------------------------------------------------------- host functions */

struct host_work {
    struct work base;
    cudaHostFn_t function;
    void *argument;
};

static cudaError_t run_host(const struct work *work)
{
    const struct host_work *host = (const struct host_work *)work;
    runtime_in_host_function = true;
    host->function(host->argument);
    runtime_in_host_function = false;
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *argument)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = function == NULL ? cudaErrorInvalidValue : queue_stream(handle, &stream);
    if (error == cudaSuccess) {
        struct host_work *work = (struct host_work *)work_new(sizeof *work, cudaGraphNodeTypeHost, run_host);
        work->function = function;
        work->argument = argument;
        snprintf(work->base.name, sizeof work->base.name, "host function");
        error = queue_add(stream, &work->base);
    }
    return runtime_leave(error);
}

struct service_work {
    struct work base;
    cudaError_t (*run)(const void *state);
    unsigned char state[];
};

static cudaError_t run_service(const struct work *work)
{
    const struct service_work *service = (const struct service_work *)work;
    return service->run(service->state);
}

cudaError_t emu_enqueue(cudaStream_t handle, const char *name, cudaError_t (*run)(const void *state), const void *state,
                        size_t bytes)
{
    struct CUstream_st *stream;
    const cudaError_t error = queue_stream(handle, &stream);
    if (error != cudaSuccess) return error;
    struct service_work *work =
        (struct service_work *)work_new(sizeof *work + bytes, cudaGraphNodeTypeKernel, run_service);
    work->run = run;
    memcpy(work->state, state, bytes);
    snprintf(work->base.name, sizeof work->base.name, "%s", name);
    return queue_add(stream, &work->base);
}

cudaError_t emu_stream_alive(cudaStream_t handle)
{
    struct CUstream_st *stream;
    return queue_stream(handle, &stream);
}

bool emu_stream_capturing(cudaStream_t handle)
{
    struct CUstream_st *stream;
    return queue_stream(handle, &stream) == cudaSuccess && stream->capture != NULL;
}

cudaError_t emu_may_allocate(void)
{
    return capture_forbids_unsafe_call();
}

/* ----------------------------------------------------------------------------------------------------------------- events */

static cudaError_t event_alive(const struct CUevent_st *event)
{
    const struct CUevent_st *each = events;
    while (each != NULL && each != event)
        each = each->next;
    return each != NULL && each->state == HANDLE_ALIVE ? cudaSuccess : runtime_bad_handle("an event", event);
}

struct record_work {
    struct work base;
    struct CUevent_st *event;
    uint64_t record;
};

static cudaError_t run_record(const struct work *work)
{
    const struct record_work *record = (const struct record_work *)work;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (record->event->record == record->record)
        record->event->time = 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && (out == NULL || (flags & ~3u) != 0)) error = cudaErrorInvalidValue;
    if (error == cudaSuccess && emu_fails("event")) error = cudaErrorMemoryAllocation;
    if (error == cudaSuccess) {
        struct CUevent_st *event = calloc(1, sizeof *event);
        if (event == NULL) abort();
        event->state = HANDLE_ALIVE;
        event->id = ++event_count;
        event->device = runtime_device();
        event->flags = flags;
        event->next = events;
        events = *out = event;
    }
    return runtime_leave(error);
}

cudaError_t cudaEventCreate(cudaEvent_t *out)
{
    return cudaEventCreateWithFlags(out, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = event_alive(event);
    if (error == cudaSuccess) {
        event->state = HANDLE_DEAD;
        free(event->frontier.nodes);
        event->frontier = (struct frontier){0, NULL};
        event->capture = NULL;
    }
    return runtime_leave(error);
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned flags)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = event_alive(event);
    if (error == cudaSuccess) error = queue_stream(handle, &stream);
    if (error == cudaSuccess && (flags != cudaEventRecordDefault || stream->device != event->device))
        error = flags != cudaEventRecordDefault ? cudaErrorNotSupported : cudaErrorInvalidResourceHandle;
    if (error == cudaSuccess && stream->capture != NULL) {
        capture_record(stream, event);
    } else if (error == cudaSuccess) {
        struct record_work *work =
            (struct record_work *)work_new(sizeof *work, cudaGraphNodeTypeEventRecord, run_record);
        work->event = event;
        work->record = event->record + 1;
        snprintf(work->base.name, sizeof work->base.name, "record event %d", event->id);
        error = queue_add(stream, &work->base);
        if (error == cudaSuccess) {
            event->record++;
            event->recorded = true;
            event->capture = NULL;
            event->position = (struct position){stream, stream->added};
        }
    }
    return runtime_leave(error);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags)
{
    struct CUstream_st *stream;
    bool captured = false;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && flags != cudaEventWaitDefault) error = cudaErrorNotSupported;
    if (error == cudaSuccess) error = event_alive(event);
    if (error == cudaSuccess) error = queue_stream(handle, &stream);
    if (error == cudaSuccess) error = capture_wait(stream, event, &captured);
    if (error == cudaSuccess && !captured && event->recorded) append(stream, NULL, event->position);
    return runtime_leave(error);
}

static bool complete(const struct CUevent_st *event)
{
    return !event->recorded || event->position.stream->done >= event->position.sequence;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = event_alive(event);
    if (error == cudaSuccess && event->capture != NULL) error = cudaErrorCapturedEvent;
    if (error == cudaSuccess) error = capture_forbids_unsafe_call();
    if (error == cudaSuccess && !complete(event)) {
        run_first(event->position.stream);
        error = runtime_sticky();
        if (error == cudaSuccess && !complete(event)) error = cudaErrorNotReady;
    }
    return runtime_leave(error);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = event_alive(event);
    if (error == cudaSuccess && event->capture != NULL) error = cudaErrorCapturedEvent;
    if (error == cudaSuccess) error = capture_forbids_unsafe_call();
    if (error == cudaSuccess && emu_fails("wait")) error = cudaErrorUnknown;
    if (error == cudaSuccess && event->recorded) error = run_until(event->position.stream, event->position.sequence);
    return runtime_leave(error);
}

/* The time the emulator took, which says nothing about a GPU. */
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && milliseconds == NULL) error = cudaErrorInvalidValue;
    if (error == cudaSuccess) error = event_alive(start);
    if (error == cudaSuccess) error = event_alive(end);
    if (error == cudaSuccess && (start->capture != NULL || end->capture != NULL)) error = cudaErrorCapturedEvent;
    if (error == cudaSuccess &&
        (!start->recorded || !end->recorded || ((start->flags | end->flags) & cudaEventDisableTiming)))
        error = cudaErrorInvalidResourceHandle;
    if (error == cudaSuccess && (!complete(start) || !complete(end))) error = cudaErrorNotReady;
    if (error == cudaSuccess) *milliseconds = (float)(end->time - start->time);
    return runtime_leave(error);
}
