/* runtime.h: what the files of the emulated libcudart share.
 *
 *     cudaMemcpyAsync  transfer.c \
 *     cudaLaunchKernel launch.c    } -> queue_add(stream, work) -> the stream's queue  -> work->run, when something waits for it
 *     cublasGemmEx     cublas.c   /                             -> or a node of the graph being captured (capture.c)
 *
 * Every call of the API is runtime_enter(), its body, runtime_leave(error): one lock around all of it. Handles are pointers to
 * the structs here. They are never freed, only marked dead, so that a use after the end has a name. */
#ifndef EMULATOR_RUNTIME_H
#define EMULATOR_RUNTIME_H

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "emulator.h"
#include "services.h"

enum { RUNTIME_MAX_DEVICES = 8 };

/* ------------------------------------------------------------------------------------------------------------- runtime.c */

/* Locks, and gives the error that every call returns now: the sticky one of a kernel that faulted, a process that forked. */
cudaError_t runtime_enter(void);
/* Keeps a failure for cudaGetLastError(), unlocks, and gives the error back. */
cudaError_t runtime_leave(cudaError_t error);
int runtime_device(void);       /* the calling thread's */
int runtime_device_count(void); /* EMU_DEVICES */
const struct cudaDeviceProp *runtime_properties(void);
cudaError_t runtime_sticky(void);
void runtime_fault(cudaError_t error); /* the context is lost */
bool runtime_tracing(void);
extern bool runtime_in_host_function; /* of cudaLaunchHostFunc, which may not call the API */

/* A handle that is not alive: the finding, and cudaErrorInvalidResourceHandle. `what` is "a stream" ... */
cudaError_t runtime_bad_handle(const char *what, const void *handle);

/* --------------------------------------------------------------------------------------------------------------- queue.c */

/* One operation. It does not change once it is queued, so that a graph and its launches can share it. The specific kinds have
 * this as their first member. */
struct work {
    int references;
    cudaError_t (*run)(const struct work *work); /* cudaSuccess, or the error that loses the context */
    void (*destroy)(struct work *work);          /* gives back what it owns beyond itself; NULL: nothing */
    enum cudaGraphNodeType type;
    char name[96];
};

struct work *work_new(size_t bytes, enum cudaGraphNodeType type, cudaError_t (*run)(const struct work *work));
void work_release(struct work *work);

/* A position in a stream: what an event remembers and a wait waits for. */
struct position {
    struct CUstream_st *stream;
    uint64_t sequence;
};

/* A set of nodes of the graph being captured. */
struct frontier {
    int count;
    int *nodes;
};

enum { HANDLE_ALIVE = 0x45115e, HANDLE_DEAD = 0xdead };

struct CUstream_st {
    int state;
    int id, device, priority;
    unsigned flags;
    bool standard, legacy;      /* not of cudaStreamCreate; the legacy default stream */
    struct entry *first, *last; /* not yet executed */
    int pending;
    uint64_t added, done; /* sequence numbers of the last entry queued, of the last one executed */
    struct capture *capture;
    struct frontier frontier; /* what the next captured node depends on */
    struct CUstream_st *next;
};

struct CUevent_st {
    int state;
    int id, device;
    unsigned flags;
    bool recorded;
    struct position position;
    uint64_t record;         /* counts the records, so that only the last one sets the time */
    double time;             /* milliseconds */
    struct capture *capture; /* recorded in a capture: where */
    uint64_t capture_id;
    struct frontier frontier;
    struct CUevent_st *next;
};

/* The stream of a handle: NULL and cudaStreamLegacy, cudaStreamPerThread, or one of cudaStreamCreate. */
cudaError_t queue_stream(cudaStream_t handle, struct CUstream_st **stream);
/* Queues the work, or captures it. Takes over the caller's reference, whatever it returns. */
cudaError_t queue_add(struct CUstream_st *stream, struct work *work);
/* As queue_add, and executes up to it: for the calls that block. */
cudaError_t queue_add_and_wait(struct CUstream_st *stream, struct work *work);
/* Everything on the device; order between streams is drawn. */
cudaError_t queue_drain(int device);
/* Every stream and event of the device dies. What is queued is dropped. */
void queue_reset(void);
void queue_leaks(void);
extern struct CUstream_st *queue_streams;

/* --------------------------------------------------------------------------------------------------------------- capture.c */

/* cudaErrorStreamCaptureUnsupported, with the captures that this hits made invalid, where a call is not allowed for an
 * ongoing capture: cudaMalloc, a synchronising call. */
cudaError_t capture_forbids_unsafe_call(void);
/* The same for a call that waits for `stream`, or, with NULL, for the device. */
cudaError_t capture_forbids_wait(const struct CUstream_st *stream);
cudaError_t capture_add(struct CUstream_st *stream, struct work *work);
/* A call on the legacy stream would wait for a capturing blocking stream. */
cudaError_t capture_forbids_legacy(const struct CUstream_st *stream);
void capture_record(const struct CUstream_st *stream, struct CUevent_st *event);
cudaError_t capture_wait(struct CUstream_st *stream, const struct CUevent_st *event, bool *captured);
void capture_stream_destroyed(const struct CUstream_st *stream);
void capture_reset(void);
void capture_leaks(void);

/* ------------------------------------------------------------------------------------------------ transfer.c and launch.c */
void transfer_reset(void);
void transfer_leaks(void);
void launch_reset(void);
void launch_leaks(void);

#endif
