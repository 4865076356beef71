/* capture.c: stream capture and graphs.
 *
 *     cudaStreamBeginCapture(s)          s has an empty frontier
 *     copy on s                          node 0 depends on nothing; the frontier of s becomes {0}
 *     cudaEventRecord(e, s)              e remembers {0}
 *     cudaStreamWaitEvent(t, e)          t joins the capture; frontier of t {0}
 *     cudaStreamEndCapture(s, &graph)    an error when some node does not lead to the frontier of s
 *
 * A launch of an instantiated graph is one operation on its stream; its nodes run in an order drawn among those that the
 * dependencies allow. Calls that a capture forbids make it invalid, with the errors of the CUDA documentation ("Stream
 * capture"). Graphs built node by node, conditional nodes and updates are not here. */
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct CUgraphNode_st {
    struct work *work;
    struct frontier before;
};

/* A graph, and what a cudaGraphExec_t holds: a copy of it. */
struct CUgraph_st {
    int state, references;
    int count;
    struct CUgraphNode_st **nodes;
    struct CUgraph_st *next;
};

struct CUgraphExec_st {
    int state;
    struct CUgraph_st *graph;
    struct CUgraphExec_st *next;
};

struct capture {
    uint64_t id;
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    struct CUstream_st *origin;
    bool invalid;
    struct CUgraph_st *graph;
    struct capture *next;
};

static struct capture *captures; /* those that are going on */
static struct CUgraph_st *graphs;
static struct CUgraphExec_st *executables;
static uint64_t capture_count;
static struct emu_random orders;
static _Thread_local enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (memory == NULL) abort(); /* the test machine is out of memory */
    return memory;
}

/* ---------------------------------------------------------------------------------------------------------- sets of nodes */

static void frontier_clear(struct frontier *set)
{
    free(set->nodes);
    *set = (struct frontier){0, NULL};
}

static void frontier_add(struct frontier *set, const struct frontier *more)
{
    int *nodes = allocate((size_t)(set->count + more->count) + 1, sizeof *nodes);
    int count = set->count;
    if (count > 0) memcpy(nodes, set->nodes, (size_t)count * sizeof *nodes);
    for (int i = 0; i < more->count; ++i) {
        bool present = false;
        for (int j = 0; j < set->count; ++j)
            present |= set->nodes[j] == more->nodes[i];
        if (!present) nodes[count++] = more->nodes[i];
    }
    free(set->nodes);
    set->nodes = nodes;
    set->count = count;
}

static void frontier_set(struct frontier *set, const struct frontier *value)
{
    struct frontier fresh = {0, NULL};
    frontier_add(&fresh, value);
    frontier_clear(set);
    *set = fresh;
}

/* ----------------------------------------------------------------------------------------------------------------- graphs */

static struct CUgraph_st *graph_new(void)
{
    struct CUgraph_st *graph = allocate(1, sizeof *graph);
    graph->references = 1;
    return graph;
}

static void graph_add(struct CUgraph_st *graph, struct work *work, const struct frontier *before)
{
    struct CUgraphNode_st *node = allocate(1, sizeof *node);
    node->work = work;
    frontier_set(&node->before, before);
    struct CUgraphNode_st **nodes = realloc(graph->nodes, sizeof(void *) * (size_t)(graph->count + 1));
    if (nodes == NULL) abort();
    nodes[graph->count++] = node;
    graph->nodes = nodes;
}

static void graph_clear(struct CUgraph_st *graph)
{
    for (int i = 0; i < graph->count; ++i) {
        work_release(graph->nodes[i]->work);
        frontier_clear(&graph->nodes[i]->before);
        free(graph->nodes[i]);
    }
    free(graph->nodes);
    graph->nodes = NULL;
    graph->count = 0;
}

/* For the graphs that are no handles: of a capture, of an executable graph and its launches. */
static void graph_release(struct CUgraph_st *graph)
{
    if (--graph->references > 0) return;
    graph_clear(graph);
    free(graph);
}

static cudaError_t graph_alive(const struct CUgraph_st *graph)
{
    const struct CUgraph_st *each = graphs;
    while (each != NULL && each != graph)
        each = each->next;
    return each != NULL && each->state == HANDLE_ALIVE ? cudaSuccess : runtime_bad_handle("a graph", graph);
}

static cudaError_t executable_alive(const struct CUgraphExec_st *executable)
{
    const struct CUgraphExec_st *each = executables;
    while (each != NULL && each != executable)
        each = each->next;
    const bool alive = each != NULL && each->state == HANDLE_ALIVE;
    return alive ? cudaSuccess : runtime_bad_handle("an executable graph", executable);
}

/* ------------------------------------------------------------------------------------------------ what a capture forbids */

/* A relaxed capture forbids nothing, a thread-local one its own thread, a global one every thread that is in global mode. */
static bool forbids(const struct capture *capture)
{
    if (capture->mode == cudaStreamCaptureModeRelaxed || thread_mode == cudaStreamCaptureModeRelaxed) return false;
    if (pthread_equal(capture->thread, pthread_self())) return true;
    return capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
}

cudaError_t capture_forbids_unsafe_call(void)
{
    cudaError_t error = cudaSuccess;
    for (struct capture *capture = captures; capture != NULL; capture = capture->next) {
        if (!forbids(capture)) continue;
        capture->invalid = true;
        error = cudaErrorStreamCaptureUnsupported;
    }
    return error;
}

cudaError_t capture_forbids_wait(const struct CUstream_st *stream)
{
    cudaError_t error = cudaSuccess;
    for (struct capture *capture = captures; capture != NULL; capture = capture->next) {
        if (stream != NULL && stream->capture != capture) continue;
        capture->invalid = true;
        error = cudaErrorStreamCaptureUnsupported;
    }
    return error;
}

cudaError_t capture_forbids_legacy(const struct CUstream_st *stream)
{
    if (!stream->legacy) return cudaSuccess;
    cudaError_t error = cudaSuccess;
    for (struct capture *capture = captures; capture != NULL; capture = capture->next) {
        if (capture->origin->flags & cudaStreamNonBlocking || capture->origin->device != stream->device) continue;
        capture->invalid = true;
        error = cudaErrorStreamCaptureImplicit;
    }
    return error;
}

/* ---------------------------------------------------------------------------------------------------------------- capture */

cudaError_t capture_add(struct CUstream_st *stream, struct work *work)
{
    struct capture *capture = stream->capture;
    if (capture->invalid) {
        work_release(work);
        return cudaErrorStreamCaptureInvalidated;
    }
    graph_add(capture->graph, work, &stream->frontier);
    int node = capture->graph->count - 1;
    frontier_set(&stream->frontier, &(struct frontier){1, &node});
    return cudaSuccess;
}

void capture_record(const struct CUstream_st *stream, struct CUevent_st *event)
{
    event->capture = stream->capture;
    event->capture_id = stream->capture->id;
    frontier_set(&event->frontier, &stream->frontier);
}

static struct capture *capture_of(const struct CUevent_st *event)
{
    struct capture *capture = captures;
    while (capture != NULL && (capture != event->capture || capture->id != event->capture_id))
        capture = capture->next;
    return capture;
}

cudaError_t capture_wait(struct CUstream_st *stream, const struct CUevent_st *event, bool *captured)
{
    if (event->capture == NULL) {
        if (stream->capture == NULL || !event->recorded) return cudaSuccess;
        stream->capture->invalid = true;
        return cudaErrorStreamCaptureIsolation;
    }
    struct capture *capture = capture_of(event);
    if (capture == NULL) return cudaErrorCapturedEvent; /* that capture is over */
    *captured = true;
    if (stream->legacy) {
        capture->invalid = true;
        return cudaErrorStreamCaptureImplicit;
    }
    if (stream->capture != NULL && stream->capture != capture) {
        capture->invalid = stream->capture->invalid = true;
        return cudaErrorStreamCaptureMerge;
    }
    if (capture->invalid) return cudaErrorStreamCaptureInvalidated;
    stream->capture = capture;
    frontier_add(&stream->frontier, &event->frontier);
    return cudaSuccess;
}

void capture_stream_destroyed(const struct CUstream_st *stream)
{
    if (stream->capture != NULL) stream->capture->invalid = true;
}

/* Everything leads to the frontier of the stream where the capture began. Nodes only depend on earlier ones. */
static bool joined(const struct capture *capture)
{
    const struct CUgraph_st *graph = capture->graph;
    const struct frontier *last = &capture->origin->frontier;
    bool *reached = allocate((size_t)graph->count + 1, sizeof *reached), all = true;
    for (int i = 0; i < last->count; ++i)
        reached[last->nodes[i]] = true;
    for (int i = graph->count - 1; i >= 0; --i) {
        const struct frontier *before = &graph->nodes[i]->before;
        all &= reached[i];
        for (int j = 0; j < before->count && reached[i]; ++j)
            reached[before->nodes[j]] = true;
    }
    free(reached);
    return all;
}

static void capture_end(struct capture *capture)
{
    for (struct CUstream_st *stream = queue_streams; stream != NULL; stream = stream->next) {
        if (stream->capture != capture) continue;
        stream->capture = NULL;
        frontier_clear(&stream->frontier);
    }
    struct capture **link = &captures;
    while (*link != capture)
        link = &(*link)->next;
    *link = capture->next;
    free(capture);
}

static cudaError_t begin(struct CUstream_st *stream, enum cudaStreamCaptureMode mode)
{
    if ((int)mode < cudaStreamCaptureModeGlobal || mode > cudaStreamCaptureModeRelaxed) return cudaErrorInvalidValue;
    if (stream->legacy) return cudaErrorStreamCaptureUnsupported;
    if (stream->capture != NULL) return cudaErrorIllegalState;
    if (capture_count == 0) orders = emu_random_new(0x9a);
    struct capture *capture = allocate(1, sizeof *capture);
    capture->id = ++capture_count;
    capture->mode = mode;
    capture->thread = pthread_self();
    capture->origin = stream;
    capture->graph = graph_new();
    capture->next = captures;
    captures = capture;
    stream->capture = capture;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = queue_stream(handle, &stream);
    if (error == cudaSuccess) error = begin(stream, mode);
    return runtime_leave(error);
}

static cudaError_t end(const struct CUstream_st *stream, cudaGraph_t *out)
{
    struct capture *capture = stream->capture;
    *out = NULL;
    if (capture == NULL) return cudaErrorIllegalState;
    if (capture->origin != stream) {
        capture->invalid = true;
        return cudaErrorStreamCaptureUnmatched;
    }
    if (capture->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(capture->thread, pthread_self()))
        return cudaErrorStreamCaptureWrongThread;
    cudaError_t error = cudaSuccess;
    if (capture->invalid)
        error = cudaErrorStreamCaptureInvalidated;
    else if (!joined(capture))
        error = cudaErrorStreamCaptureUnjoined;
    if (error == cudaSuccess) {
        *out = capture->graph;
        (*out)->state = HANDLE_ALIVE;
        (*out)->next = graphs;
        graphs = *out;
    } else {
        graph_release(capture->graph);
    }
    capture_end(capture);
    return error;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *out)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = out == NULL ? cudaErrorInvalidValue : queue_stream(handle, &stream);
    if (error == cudaSuccess) error = end(stream, out);
    return runtime_leave(error);
}

static enum cudaStreamCaptureStatus status_of(const struct CUstream_st *stream)
{
    if (stream->capture == NULL) return cudaStreamCaptureStatusNone;
    return stream->capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

/* Asking about the legacy stream while a blocking stream is captured is an error, but does the capture no harm. */
static cudaError_t legacy_unknown(const struct CUstream_st *stream)
{
    for (const struct capture *capture = captures; capture != NULL && stream->legacy; capture = capture->next)
        if (!(capture->origin->flags & cudaStreamNonBlocking)) return cudaErrorStreamCaptureImplicit;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = status == NULL ? cudaErrorInvalidValue : queue_stream(handle, &stream);
    if (error == cudaSuccess) error = legacy_unknown(stream);
    if (error == cudaSuccess) *status = status_of(stream);
    return runtime_leave(error);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = status == NULL ? cudaErrorInvalidValue : queue_stream(handle, &stream);
    if (error == cudaSuccess && (graph != NULL || dependencies != NULL || edges != NULL || count != NULL))
        error = cudaErrorNotSupported;
    if (error == cudaSuccess) error = legacy_unknown(stream);
    if (error == cudaSuccess) *status = status_of(stream);
    if (error == cudaSuccess && id != NULL) *id = stream->capture != NULL ? stream->capture->id : 0;
    return runtime_leave(error);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && mode == NULL) error = cudaErrorInvalidValue;
    if (error == cudaSuccess) {
        const enum cudaStreamCaptureMode before = thread_mode;
        thread_mode = *mode;
        *mode = before;
    }
    return runtime_leave(error);
}

/* ------------------------------------------------------------------------------------------------------ executable graphs */

struct graph_work {
    struct work base;
    struct CUgraph_st *graph;
};

static bool ready(const struct CUgraphNode_st *node, const bool *done)
{
    for (int i = 0; i < node->before.count; ++i)
        if (!done[node->before.nodes[i]]) return false;
    return true;
}

static cudaError_t run_graph(const struct work *work)
{
    const struct CUgraph_st *graph = ((const struct graph_work *)work)->graph;
    bool *done = allocate((size_t)graph->count + 1, sizeof *done);
    cudaError_t error = cudaSuccess;
    for (int left = graph->count; left > 0 && error == cudaSuccess; --left) {
        uint32_t choices = 0;
        for (int i = 0; i < graph->count; ++i)
            choices += !done[i] && ready(graph->nodes[i], done);
        uint32_t chosen = emu_random_below(&orders, choices);
        int node = 0;
        while (done[node] || !ready(graph->nodes[node], done) || chosen-- > 0)
            node++;
        const struct work *next = graph->nodes[node]->work;
        if (runtime_tracing()) fprintf(stderr, "emulator: node %d: %s\n", node, next->name);
        error = next->run(next);
        done[node] = true;
    }
    free(done);
    return error;
}

static void destroy_graph_work(struct work *work)
{
    graph_release(((struct graph_work *)work)->graph);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = out == NULL ? cudaErrorInvalidValue : graph_alive(graph);
    if (error == cudaSuccess && flags != 0) error = cudaErrorNotSupported;
    if (error == cudaSuccess) {
        struct CUgraphExec_st *executable = allocate(1, sizeof *executable);
        executable->state = HANDLE_ALIVE;
        executable->graph = graph_new();
        for (int i = 0; i < graph->count; ++i) {
            graph->nodes[i]->work->references++;
            graph_add(executable->graph, graph->nodes[i]->work, &graph->nodes[i]->before);
        }
        executable->next = executables;
        executables = *out = executable;
    }
    return runtime_leave(error);
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags)
{
    return cudaGraphInstantiate(out, graph, flags);
}

cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t handle)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = executable_alive(executable);
    if (error == cudaSuccess) error = queue_stream(handle, &stream);
    return runtime_leave(error);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle)
{
    struct CUstream_st *stream;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = executable_alive(executable);
    if (error == cudaSuccess) error = queue_stream(handle, &stream);
    if (error == cudaSuccess) {
        struct graph_work *work = (struct graph_work *)work_new(sizeof *work, cudaGraphNodeTypeGraph, run_graph);
        work->base.destroy = destroy_graph_work;
        work->graph = executable->graph;
        work->graph->references++;
        snprintf(work->base.name, sizeof work->base.name, "graph of %d nodes", work->graph->count);
        error = queue_add(stream, &work->base);
    }
    return runtime_leave(error);
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = executable_alive(executable);
    if (error == cudaSuccess) {
        executable->state = HANDLE_DEAD;
        graph_release(executable->graph); /* launches that are queued hold it too */
    }
    return runtime_leave(error);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = graph_alive(graph);
    if (error == cudaSuccess) {
        graph->state = HANDLE_DEAD;
        graph_clear(graph);
    }
    return runtime_leave(error);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = count == NULL ? cudaErrorInvalidValue : graph_alive(graph);
    if (error == cudaSuccess) {
        const size_t room = nodes != NULL ? *count : 0, have = (size_t)graph->count;
        for (size_t i = 0; i < room; ++i)
            nodes[i] = i < have ? graph->nodes[i] : NULL;
        if (nodes == NULL || room > have) *count = have;
    }
    return runtime_leave(error);
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, enum cudaGraphNodeType *type)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && (node == NULL || type == NULL)) error = cudaErrorInvalidValue;
    if (error == cudaSuccess) *type = node->work->type;
    return runtime_leave(error);
}

/* ----------------------------------------------------------------------------------------------------------- start and end */

void capture_reset(void)
{
    while (captures != NULL) {
        graph_release(captures->graph);
        capture_end(captures);
    }
    for (struct CUgraph_st *graph = graphs; graph != NULL; graph = graph->next)
        graph->state = HANDLE_DEAD;
    for (struct CUgraphExec_st *each = executables; each != NULL; each = each->next)
        each->state = HANDLE_DEAD;
}

void capture_leaks(void)
{
    int graph_count = 0, executable_count = 0;
    for (const struct CUgraph_st *graph = graphs; graph != NULL; graph = graph->next)
        graph_count += graph->state == HANDLE_ALIVE;
    for (const struct CUgraphExec_st *each = executables; each != NULL; each = each->next)
        executable_count += each->state == HANDLE_ALIVE;
    if (captures != NULL) emu_find(NULL, "leak: the capture of stream %d was not ended", captures->origin->id);
    if (graph_count > 0) emu_find(NULL, "leak: %d graphs were not destroyed", graph_count);
    if (executable_count > 0) emu_find(NULL, "leak: %d executable graphs were not destroyed", executable_count);
}
