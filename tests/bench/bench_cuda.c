/* bench_cuda.c: how near the CUDA backend comes to what a GPU allows. One JSON object a line.
 *
 *     merge      against a device copy that moves as many bytes: reads and writes W once
 *     optimizer  against a device copy of its 28 bytes an element
 *     linear     forward and backward of one layer with an adapter, against cuBLAS's product alone (the same layer without one)
 *     unload     a whole plora_unload() of 28 layers, host's time, against the copy
 *     batch      tokens of many adapters in one call, against one call for each adapter
 *     layers     what a training step of SmolLM2-135M does in its linear layers, host's time: cuda_peers.py has PEFT's
 *
 * Both sides of a ratio alternate; a figure is the median. On the emulator the times mean nothing, but everything runs.
 * usage: bench_cuda [repeats [quick | layers]]         layers: that one alone */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "device.h"
#include "dtype.h"
#include "handles.h"

enum { REPEATS_MAX = 201, LAYERS = 28 };

static int repeats = 21, quick;
static void *stream, *begin, *end;
static plora_context *context;

static void check(plora_status status, const char *what)
{
    if (status == PLORA_OK) return;
    fprintf(stderr, "bench_cuda: %s: %s: %s\n", what, plora_status_string(status), plora_last_error());
    exit(1);
}

#define CHECKED(call) check(call, #call)

/* ---------------------------------------------------------------------------------------------------------------- time */

static int ascending(const void *a, const void *b)
{
    const double difference = *(const double *)a - *(const double *)b;
    return (difference > 0) - (difference < 0);
}

static double median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, ascending);
    return values[count / 2];
}

/* Work on `stream`; `data` is the case's. */
typedef void (*work)(void *data);

static double device_seconds(work run, void *data)
{
    float milliseconds = 0;
    DEVICE_CALL(cudaEventRecord, (void *, void *), begin, stream);
    run(data);
    DEVICE_CALL(cudaEventRecord, (void *, void *), end, stream);
    DEVICE_CALL(cudaEventSynchronize, (void *), end);
    DEVICE_CALL(cudaEventElapsedTime, (float *, void *, void *), &milliseconds, begin, end);
    return 1e-3 * (double)milliseconds;
}

struct pair {
    double ours, other;
};

static struct pair measure(work ours, work other, void *data)
{
    static double times[2][REPEATS_MAX];
    for (int i = 0; i < 3; ++i) { /* warm */
        device_seconds(ours, data);
        device_seconds(other, data);
    }
    for (int i = 0; i < repeats; ++i) {
        times[0][i] = device_seconds(ours, data);
        times[1][i] = device_seconds(other, data);
    }
    return (struct pair){median(times[0], repeats), median(times[1], repeats)};
}

/* ------------------------------------------------------------------------------------------------------------- buffers */

/* Device memory with fp32 values in [-range, range], or bf16 ones. */
static void *values(int64_t count, int32_t dtype, float range)
{
    const size_t bytes = (size_t)count * plora__dtype_size(dtype);
    char *host = malloc(bytes);
    uint64_t state = 88172645463325252u;
    if (host == NULL) exit(1);
    for (int64_t i = 0; i < count; ++i) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        plora__store(host, i, dtype, range * ((float)(int32_t)(state >> 32) * 0x1p-31f));
    }
    void *device = device_malloc(bytes);
    device_copy(device, host, bytes);
    free(host);
    return device;
}

struct copy {
    void *from, *to;
    size_t bytes; /* read, and as many written */
};

static struct copy copy_new(size_t bytes)
{
    struct copy copy = {device_malloc(bytes), device_malloc(bytes), bytes};
    DEVICE_CALL(cudaMemset, (void *, int, size_t), copy.from, 0, bytes);
    return copy;
}

static void copy_free(struct copy *copy)
{
    device_free(copy->from);
    device_free(copy->to);
}

static void copy_run(const struct copy *copy)
{
    enum { DEVICE_TO_DEVICE = 3 };
    DEVICE_CALL(cudaMemcpyAsync, (void *, const void *, size_t, int, void *), copy->to, copy->from, copy->bytes,
                DEVICE_TO_DEVICE, stream);
}

/* --------------------------------------------------------------------------------------------------------------- merge */

struct merge_case {
    struct plora__merge_args args;
    struct copy copy;
};

static void merge_run(void *data)
{
    const struct merge_case *c = data;
    CHECKED(context->backend->merge(context->device, &c->args, stream));
}

static void merge_copy(void *data)
{
    const struct merge_case *c = data;
    copy_run(&c->copy);
}

static void bench_merge(int64_t rows, int64_t columns, int64_t rank, int32_t dtype, int report)
{
    struct merge_case c = {0};
    float *left = values(rows * rank, PLORA_F32, 0.1f), *right = values(rank * columns, PLORA_F32, 0.1f);
    const size_t bytes = (size_t)(rows * columns) * plora__dtype_size(dtype);
    c.args = (struct plora__merge_args){
        .weight = {values(rows * columns, dtype, 1.0f), rows, columns, columns, dtype, 0},
        .rank = rank,
        .factor = 1e-4f,
        .left = left,
        .left_row_stride = rank,
        .left_rank_stride = 1,
        .right = right,
        .right_rank_stride = columns,
        .right_column_stride = 1,
    };
    if (report) c.args.sums = device_malloc(sizeof *c.args.sums);
    c.args.workspace = device_malloc(context->backend->merge_workspace(context->device, &c.args));
    c.copy = copy_new(bytes);
    const struct pair times = measure(merge_run, merge_copy, &c);
    printf(
        "{\"bench\": \"merge\", \"dtype\": \"%s\", \"rows\": %lld, \"columns\": %lld, \"rank\": %lld, \"report\": %d, "
        "\"us\": %.2f, \"copy_us\": %.2f, \"GBps\": %.1f, \"share_of_copy\": %.3f}\n",
        plora__dtype_name(dtype), (long long)rows, (long long)columns, (long long)rank, report, 1e6 * times.ours,
        1e6 * times.other, 2e-9 * (double)bytes / times.ours, times.other / times.ours);
    fflush(stdout);
    copy_free(&c.copy);
    device_free(c.args.weight.data);
    device_free(c.args.workspace);
    if (report) device_free(c.args.sums);
    device_free(left);
    device_free(right);
}

/* -------------------------------------------------------------------------------------------------------------- layers */

struct layers {
    plora_model *model;
    plora_adapters *adapters;
    plora_optimizer *optimizer;
    void *weight[LAYERS];
    int count;
    plora_matrix x, y, dx;
    int32_t layer; /* the one that the calls go to */
    struct copy copy;
};

/* `count` layers [N,K], the last one without an adapter when `plain`. */
static void layers_open(struct layers *l, int count, int plain, int64_t n, int64_t k, int32_t rank, int32_t dtype,
                        int64_t tokens)
{
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    *l = (struct layers){.count = count};
    CHECKED(plora_model_create(context, &l->model));
    for (int i = 0; i < count; ++i) {
        char name[32];
        plora_linear linear = PLORA_LINEAR_INIT;
        snprintf(name, sizeof name, "%s%d", plain && i == count - 1 ? "plain" : "layer", i);
        l->weight[i] = values(n * k, dtype, 0.1f);
        linear.name = name;
        linear.weight = (plora_matrix){l->weight[i], n, k, k, dtype, 0};
        CHECKED(plora_model_add_linear(l->model, &linear, NULL));
    }
    options.rank = rank;
    options.targets = "layer*";
    options.workspace_tokens = tokens > 0 ? tokens : 16;
    CHECKED(plora_adapters_create(l->model, &options, &l->adapters));
    CHECKED(plora_optimizer_create(l->adapters, NULL, &l->optimizer));
    if (tokens == 0) return;
    const int32_t activations = dtype == PLORA_F32 ? PLORA_F32 : PLORA_BF16;
    l->x = (plora_matrix){values(tokens * k, activations, 1.0f), tokens, k, k, activations, 0};
    l->y = (plora_matrix){values(tokens * n, activations, 1.0f), tokens, n, n, activations, 0};
    l->dx = (plora_matrix){values(tokens * k, activations, 1.0f), tokens, k, k, activations, 0};
}

static void layers_close(struct layers *l)
{
    plora_optimizer_destroy(l->optimizer);
    plora_adapters_destroy(l->adapters);
    plora_model_destroy(l->model);
    for (int i = 0; i < l->count; ++i)
        device_free(l->weight[i]);
    if (l->x.data != NULL) {
        device_free(l->x.data);
        device_free(l->y.data);
        device_free(l->dx.data);
    }
}

static void forward_adapted(void *data)
{
    struct layers *l = data;
    CHECKED(plora_linear_forward(l->adapters, 0, &l->x, &l->y, 0, stream));
}

static void forward_plain(void *data)
{
    struct layers *l = data;
    CHECKED(plora_linear_forward(l->adapters, 1, &l->x, &l->y, 0, stream));
}

static void backward_adapted(void *data)
{
    struct layers *l = data;
    CHECKED(plora_linear_backward(l->adapters, 0, &l->x, &l->y, &l->dx, 0, stream));
}

static void backward_plain(void *data)
{
    struct layers *l = data;
    CHECKED(plora_linear_backward(l->adapters, 1, &l->x, &l->y, &l->dx, 0, stream));
}

static void bench_linear(int64_t tokens, int64_t n, int64_t k, int32_t rank, int32_t dtype)
{
    struct layers l;
    layers_open(&l, 2, 1, n, k, rank, dtype, tokens);
    const struct pair forward = measure(forward_adapted, forward_plain, &l);
    const struct pair backward = measure(backward_adapted, backward_plain, &l);
    printf("{\"bench\": \"linear\", \"dtype\": \"%s\", \"tokens\": %lld, \"out\": %lld, \"in\": %lld, \"rank\": %d, "
           "\"forward_us\": %.2f, \"cublas_forward_us\": %.2f, \"backward_us\": %.2f, \"cublas_backward_us\": %.2f, "
           "\"overhead\": %.3f}\n",
           plora__dtype_name(dtype), (long long)tokens, (long long)n, (long long)k, rank, 1e6 * forward.ours,
           1e6 * forward.other, 1e6 * backward.ours, 1e6 * backward.other,
           (forward.ours + backward.ours) / (forward.other + backward.other) - 1.0);
    fflush(stdout);
    layers_close(&l);
}

/* --------------------------------------------------------------------------------------------------- optimizer, unload */

static void step_run(void *data)
{
    struct layers *l = data;
    CHECKED(plora_optimizer_step(l->optimizer, 1.0, NULL, stream));
}

static void layers_copy(void *data)
{
    struct layers *l = data;
    copy_run(&l->copy);
}

static void bench_step(int64_t n, int64_t k, int32_t rank)
{
    struct layers l;
    int64_t count = 0;
    float *parameters;
    layers_open(&l, LAYERS, 0, n, k, rank, PLORA_BF16, 0);
    CHECKED(plora_adapters_parameters(l.adapters, &parameters, &count));
    l.copy =
        copy_new(16 * (size_t)count); /* 32 bytes an element are moved: 4 more for the norm's reading are the step's */
    const struct pair times = measure(step_run, layers_copy, &l);
    printf("{\"bench\": \"optimizer\", \"parameters\": %lld, \"us\": %.2f, \"copy_us\": %.2f, \"GBps\": %.1f, "
           "\"share_of_copy\": %.3f}\n",
           (long long)count, 1e6 * times.ours, 1e6 * times.other, 32e-9 * (double)count / times.ours,
           times.other / times.ours);
    fflush(stdout);
    copy_free(&l.copy);
    layers_close(&l);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void bench_unload(int64_t n, int64_t k, int32_t rank, int32_t dtype)
{
    static double times[2][REPEATS_MAX];
    struct layers l;
    layers_open(&l, LAYERS, 0, n, k, rank, dtype, 0);
    l.copy = copy_new((size_t)(n * k) * plora__dtype_size(dtype) * LAYERS);
    for (int i = -2; i < repeats; ++i) {
        const double start = now();
        CHECKED(plora_unload(l.adapters, l.optimizer, NULL, NULL, stream));
        CHECKED(plora_synchronize(context, stream));
        if (i >= 0) times[0][i] = now() - start;
        const double copied = device_seconds(layers_copy, &l);
        if (i >= 0) times[1][i] = copied;
    }
    const double ours = median(times[0], repeats), copy = median(times[1], repeats);
    printf("{\"bench\": \"unload\", \"dtype\": \"%s\", \"layers\": %d, \"out\": %lld, \"in\": %lld, \"rank\": %d, "
           "\"ms\": %.3f, \"copy_ms\": %.3f, \"share_of_copy\": %.3f}\n",
           plora__dtype_name(dtype), LAYERS, (long long)n, (long long)k, rank, 1e3 * ours, 1e3 * copy, copy / ours);
    fflush(stdout);
    copy_free(&l.copy);
    layers_close(&l);
}

/* --------------------------------------------------------------------------------------------------------------- batch */

enum { ADAPTERS_MAX = 64 };

struct batch_case {
    struct plora__batch_args all, each[ADAPTERS_MAX];
    struct plora__batch_target target;
    int count;
};

static void batch_all(void *data)
{
    const struct batch_case *c = data;
    CHECKED(context->backend->batch_forward(context->device, &c->all, stream));
}

static void batch_each(void *data)
{
    const struct batch_case *c = data;
    for (int i = 0; i < c->count; ++i)
        CHECKED(context->backend->batch_forward(context->device, &c->each[i], stream));
}

/* `count` adapters with `tokens` tokens each. */
static void bench_batch(int count, int32_t tokens, int64_t side, int32_t rank, int32_t dtype)
{
    static struct batch_case c;
    struct plora__batch_slot slots[ADAPTERS_MAX];
    const struct plora__batch_slot *adapters[ADAPTERS_MAX];
    struct plora__batch_segment segments[2][ADAPTERS_MAX]; /* of the one call, of the many */
    const int64_t all = (int64_t)count * tokens;
    c.count = count;
    for (int i = 0; i < count; ++i) {
        slots[i] = (struct plora__batch_slot){values(rank * side, PLORA_F32, 0.1f),
                                              values(side * rank, PLORA_F32, 0.1f), rank, 0.5f, NULL};
        segments[0][i] = segments[1][i] = (struct plora__batch_segment){i, i * tokens, tokens, 0};
        plora__batch_cut(&segments[1][i], 1);
    }
    c.target =
        (struct plora__batch_target){0, rank, side, {values(all * side, dtype, 1.0f), all, side, side, dtype, 0}};
    c.all = (struct plora__batch_args){.tokens = all,
                                       .in_features = side,
                                       .segment_count = count,
                                       .tiles = plora__batch_cut(segments[0], count),
                                       .target_count = 1,
                                       .targets = &c.target,
                                       .x = {values(all * side, dtype, 1.0f), all, side, side, dtype, 0}};
    struct plora__batch_segment *device_segments = device_malloc(sizeof segments);
    struct plora__batch_slot *device_slots = device_malloc(sizeof slots);
    void *device_adapters = device_malloc(sizeof adapters);
    for (int i = 0; i < count; ++i)
        adapters[i] = device_slots + i;
    device_copy(device_segments, segments, sizeof segments);
    device_copy(device_slots, slots, (size_t)count * sizeof *slots);
    device_copy(device_adapters, adapters, (size_t)count * sizeof(void *));
    c.all.segments = device_segments;
    c.all.adapters = device_adapters;
    c.all.workspace = device_malloc(context->backend->batch_workspace(context->device, &c.all));
    for (int i = 0; i < count; ++i) { /* the list is that of the one call, of which each takes its own tokens */
        c.each[i] = c.all;
        c.each[i].segments = device_segments + ADAPTERS_MAX + i;
        c.each[i].segment_count = 1;
        c.each[i].tiles = (tokens + PLORA__BATCH_TILE - 1) / PLORA__BATCH_TILE;
    }
    const struct pair times = measure(batch_all, batch_each, &c);
    printf("{\"bench\": \"batch\", \"dtype\": \"%s\", \"adapters\": %d, \"tokens_each\": %d, \"side\": %lld, \"rank\": "
           "%d, "
           "\"us\": %.2f, \"one_by_one_us\": %.2f, \"times_as_fast\": %.2f}\n",
           plora__dtype_name(dtype), count, tokens, (long long)side, rank, 1e6 * times.ours, 1e6 * times.other,
           times.other / times.ours);
    fflush(stdout);
    for (int i = 0; i < count; ++i) {
        device_free((void *)(uintptr_t)slots[i].a);
        device_free((void *)(uintptr_t)slots[i].b);
    }
    void *const blocks[] = {c.all.x.data,    c.target.y.data, c.all.workspace,
                            device_segments, device_slots,    device_adapters};
    for (int i = 0; i < 6; ++i)
        device_free(blocks[i]);
}

/* -------------------------------------------------------------------------------------------- linear layers of a step */

enum { SHAPES = 7 };

/* SmolLM2-135M: out and in of q, k, v, o, gate, up, down in each of 30 blocks. */
static const int64_t smollm2[SHAPES][2] = {{576, 576},  {192, 576},  {192, 576}, {576, 576},
                                           {1536, 576}, {1536, 576}, {576, 1536}};

/* Forward and backward of every layer, from activations that lie there, then the optimizer's step. */
static void bench_layers(int blocks, int64_t tokens, int32_t rank, int32_t dtype)
{
    static double times[REPEATS_MAX];
    const int64_t widest = 1536;
    plora_model *model;
    plora_adapters *adapters;
    plora_optimizer *optimizer;
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    void *weights[SHAPES], *x = values(tokens * widest, dtype, 1.0f), *y = values(tokens * widest, dtype, 1.0f),
                           *dx = values(tokens * widest, dtype, 1.0f);
    CHECKED(plora_model_create(context, &model));
    for (int shape = 0; shape < SHAPES; ++shape) /* blocks share them: only adapters are trained */
        weights[shape] = values(smollm2[shape][0] * smollm2[shape][1], dtype, 0.1f);
    for (int i = 0; i < blocks * SHAPES; ++i) {
        char name[32];
        plora_linear linear = PLORA_LINEAR_INIT;
        const int64_t *shape = smollm2[i % SHAPES];
        snprintf(name, sizeof name, "block%d.%d", i / SHAPES, i % SHAPES);
        linear.name = name;
        linear.weight = (plora_matrix){weights[i % SHAPES], shape[0], shape[1], shape[1], dtype, 0};
        CHECKED(plora_model_add_linear(model, &linear, NULL));
    }
    options.rank = rank;
    options.workspace_tokens = tokens;
    CHECKED(plora_adapters_create(model, &options, &adapters));
    CHECKED(plora_optimizer_create(adapters, NULL, &optimizer));
    for (int i = -2; i < repeats; ++i) {
        CHECKED(plora_synchronize(context, stream));
        const double start = now();
        for (int backward = 0; backward < 2; ++backward)
            for (int32_t layer = 0; layer < blocks * SHAPES; ++layer) {
                const int64_t n = smollm2[layer % SHAPES][0], k = smollm2[layer % SHAPES][1];
                const plora_matrix in = {x, tokens, k, k, dtype, 0}, out = {y, tokens, n, n, dtype, 0},
                                   gradient = {dx, tokens, k, k, dtype, 0};
                CHECKED(backward ? plora_linear_backward(adapters, layer, &in, &out, &gradient, 0, stream)
                                 : plora_linear_forward(adapters, layer, &in, &out, 0, stream));
            }
        CHECKED(plora_optimizer_step(optimizer, 1.0, NULL, stream));
        CHECKED(plora_optimizer_zero_gradients(optimizer, stream));
        CHECKED(plora_synchronize(context, stream));
        if (i >= 0) times[i] = now() - start;
    }
    printf("{\"bench\": \"layers\", \"dtype\": \"%s\", \"blocks\": %d, \"tokens\": %lld, \"rank\": %d, \"ms\": %.3f}\n",
           plora__dtype_name(dtype), blocks, (long long)tokens, rank, 1e3 * median(times, repeats));
    fflush(stdout);
    plora_optimizer_destroy(optimizer);
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    for (int shape = 0; shape < SHAPES; ++shape)
        device_free(weights[shape]);
    device_free(x);
    device_free(y);
    device_free(dx);
}

/* ---------------------------------------------------------------------------------------------------------------- main */

static void print_device(void)
{
    char properties[8192] = {0}; /* cudaDeviceProp begins with the name */
    DEVICE_CALL(cudaGetDeviceProperties, (void *, int), properties, 0);
    printf("{\"bench\": \"device\", \"name\": \"%.255s\"}\n", properties);
}

static void open_context(void)
{
    enum { NON_BLOCKING = 1 };
    plora_context_options options = PLORA_CONTEXT_OPTIONS_INIT;
    options.backend = PLORA_BACKEND_CUDA;
    CHECKED(plora_context_create(&options, &context));
    DEVICE_CALL(cudaStreamCreateWithFlags, (void **, unsigned), &stream, NON_BLOCKING);
    DEVICE_CALL(cudaEventCreate, (void **), &begin);
    DEVICE_CALL(cudaEventCreate, (void **), &end);
}

static void close_context(void)
{
    DEVICE_CALL(cudaEventDestroy, (void *), begin);
    DEVICE_CALL(cudaEventDestroy, (void *), end);
    DEVICE_CALL(cudaStreamDestroy, (void *), stream);
    plora_context_destroy(context);
}

int main(int count, char **arguments)
{
    if (count > 1) repeats = atoi(arguments[1]);
    quick = count > 2 && strcmp(arguments[2], "quick") == 0;
    const int layers_alone = count > 2 && strcmp(arguments[2], "layers") == 0;
    if (repeats < 1 || repeats > REPEATS_MAX) {
        fprintf(stderr, "bench_cuda: repeats '%s': must be in [1, %d]\n", arguments[1], REPEATS_MAX);
        return 2;
    }
    open_context();
    print_device();
    for (int d = 0; d < 2; ++d)
        bench_layers(quick ? 1 : 30, quick ? 16 : 1024, quick ? 4 : 16, d == 0 ? PLORA_F32 : PLORA_BF16);
    if (layers_alone) {
        close_context();
        return 0;
    }
    static const int32_t dtypes[] = {PLORA_F32, PLORA_BF16, PLORA_F16}, ranks[] = {8, 16, 64};
    const int64_t side = quick ? 96 : 4096, wide = quick ? 200 : 11008, tokens = quick ? 33 : 4096;
    for (int d = 0; d < 3; ++d)
        for (int r = 0; r < 3; ++r) {
            bench_merge(side, side, ranks[r], dtypes[d], 0);
            bench_merge(wide, side, ranks[r], dtypes[d], 0);
        }
    for (int d = 0; d < 2; ++d)
        bench_merge(side, side, 16, dtypes[d], 1);
    for (int d = 0; d < 2; ++d)
        for (int r = 0; r < 3; ++r) {
            bench_linear(tokens, side, side, ranks[r], dtypes[d]);
            bench_linear(tokens, wide, side, ranks[r], dtypes[d]);
        }
    bench_step(side, side, 16);
    for (int d = 0; d < 2; ++d)
        bench_unload(side, side, 16, dtypes[d]);
    for (int d = 0; d < 2; ++d)
        for (int32_t each = 1; each <= (quick ? 2 : 64); each *= quick ? 2 : 8)
            bench_batch(quick ? 3 : ADAPTERS_MAX, each, side, 16, dtypes[d]);
    close_context();
    return 0;
}
