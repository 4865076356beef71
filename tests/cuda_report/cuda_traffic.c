/* cuda_traffic.c: what each kernel asks of global memory, counted by the emulator, beside the least that its operands need.
 *
 * Each case runs an operation on a shape that is large and even. `least` counts each operand once: W read and written, x read ...; the
 * factors, which are small and stay in the L2 cache, are left out of it and are in what was moved. Beside them stand the operations
 * of an element, in fp32 or on the tensor cores. Writes one JSON object, by kernel, which cuda_report.py reads. usage: cuda_traffic, on
 * the emulated device */
#include <stdio.h>
#include <stdlib.h>

#include "device.h"
#include "dtype.h"
#include "emulator/emulator.h"
#include "handles.h"

enum { SIDE = 1024, KERNELS = 128, FIGURES = 128, RANK_PAD = 16 };

static plora_context *context;

struct figure {
    char kernel[96], text[64];
    double moved, least; /* bytes per element */
    double fma,
        tensor; /* operations per element: fp32, and of tensor cores as if in tf32 (bf16 does two in the time of one) */
};

static struct figure figures[FIGURES];
static int figure_count;
static size_t shared[KERNELS];
static struct emu_traffic seen[KERNELS];
static int seen_count;

static void check(plora_status status, const char *what)
{
    if (status == PLORA_OK) return;
    fprintf(stderr, "cuda_traffic: %s: %s\n", what, plora_last_error());
    exit(1);
}

#define CHECKED(call) check(call, #call)

/* ------------------------------------------------------------------------------------------------------------ counting */

static void start(void)
{
    void (*function)(void);
    void *symbol = device_function("emu_traffic_start");
    memcpy(&function, &symbol, sizeof symbol);
    function();
}

static struct emu_traffic run[KERNELS];
static int run_count;

static int index_of(const char *kernel, const struct emu_traffic *list, int count)
{
    int i = 0;
    while (i < count && strcmp(list[i].kernel, kernel) != 0)
        ++i;
    return i;
}

/* Ends the counting of a case. */
static void stop(void)
{
    device_wait();
    int (*function)(struct emu_traffic *, int);
    void *symbol = device_function("emu_traffic_stop");
    memcpy(&function, &symbol, sizeof symbol);
    run_count = function(run, KERNELS);
    for (int i = 0; i < run_count && i < KERNELS; ++i) {
        const int at = index_of(run[i].kernel, seen, seen_count);
        if (at == seen_count) seen[seen_count++] = run[i];
        if (run[i].dynamic_shared > shared[at]) shared[at] = run[i].dynamic_shared;
    }
}

/* A figure of the case that was just counted: `least` bytes and so many operations for each of `elements`. */
static void figure(const char *kernel, const char *text, double elements, double least, double fma, double tensor)
{
    const int at = index_of(kernel, run, run_count);
    if (at == run_count) {
        fprintf(stderr, "cuda_traffic: %s: %s did not run\n", text, kernel);
        exit(1);
    }
    if (figure_count == FIGURES) exit(1);
    struct figure *f = &figures[figure_count++];
    *f = (struct figure){.least = least, .fma = fma, .tensor = tensor};
    f->moved = (double)(run[at].bytes_read + run[at].bytes_written) / elements;
    snprintf(f->kernel, sizeof f->kernel, "%s", kernel);
    snprintf(f->text, sizeof f->text, "%s", text);
}

/* --------------------------------------------------------------------------------------------------------------- cases */

/* Device memory of zeros: what is counted does not depend on values. */
static void *zeros(size_t bytes)
{
    void *memory = device_malloc(bytes);
    DEVICE_CALL(cudaMemset, (void *, int, size_t), memory, 0, bytes);
    return memory;
}

static const char *dtype_name(int32_t dtype)
{
    return dtype == PLORA_F32 ? "f32" : dtype == PLORA_BF16 ? "bf16" : "f16";
}

static void merge_case(int32_t dtype, int64_t rank, int32_t rounding, int report)
{
    const size_t size = plora__dtype_size(dtype), bytes = (size_t)SIDE * SIDE * size;
    const int by_fma = rank <= (dtype == PLORA_F32 ? 32 : 16), residual = rounding == PLORA_ROUND_RESIDUAL;
    char text[64], kernel[64];
    struct plora__merge_args args = {
        .weight = {zeros(bytes), SIDE, SIDE, SIDE, dtype, 0},
        .rank = rank,
        .factor = 1.0f,
        .left = zeros((size_t)(SIDE * rank) * sizeof(float)),
        .left_row_stride = rank,
        .left_rank_stride = 1,
        .right = zeros((size_t)(SIDE * rank) * sizeof(float)),
        .right_rank_stride = SIDE,
        .right_column_stride = 1,
        .rounding = rounding,
        .draw = {.row_elements = SIDE},
        .residual = residual ? zeros((size_t)SIDE * SIDE * sizeof(uint16_t)) : NULL,
        .residual_stride = residual ? SIDE : 0,
    };
    if (report) args.sums = zeros(sizeof *args.sums);
    args.workspace = zeros(context->backend->merge_workspace(context->device, &args));
    start();
    CHECKED(context->backend->merge(context->device, &args, NULL));
    stop();
    snprintf(kernel, sizeof kernel, "merge_%s%s%s_kernel", rounding == PLORA_ROUND_NEAREST ? "" : "rounded_",
             report ? "report_" : "", dtype_name(dtype));
    snprintf(text, sizeof text, "R = %lld%s", (long long)rank,
             residual                             ? ", residual"
             : rounding == PLORA_ROUND_STOCHASTIC ? ", at random"
                                                  : "");
    figure(kernel, text, (double)SIDE * SIDE, 2.0 * (double)size + (residual ? 4.0 : 0.0),
           by_fma ? 2.0 * (double)rank : 0.0, by_fma ? 0.0 : 6.0 * (double)rank);
    device_free(args.weight.data);
    device_free(args.workspace);
    if (report) device_free(args.sums);
    if (residual) device_free(args.residual);
    void *factors[2];
    memcpy(&factors[0], &args.left, sizeof args.left);
    memcpy(&factors[1], &args.right, sizeof args.right);
    device_free(factors[0]);
    device_free(factors[1]);
}

static void layer_figure(const char *operation, int32_t dtype, int32_t rank, double elements, double least)
{
    char kernel[64], text[64];
    const int32_t padded = (rank + RANK_PAD - 1) / RANK_PAD * RANK_PAD;
    const double operations = 2.0 * padded;
    snprintf(kernel, sizeof kernel, "%s_%s_kernel", operation, dtype_name(dtype));
    snprintf(text, sizeof text, "R = %d", rank);
    figure(kernel, text, elements, least, dtype == PLORA_F32 ? operations : 0.0,
           dtype == PLORA_F32 ? 0.0 : operations / 2.0);
}

static void layer_case(int32_t dtype, int32_t rank)
{
    const double size = (double)plora__dtype_size(dtype), elements = (double)SIDE * SIDE;
    const plora_matrix w = {zeros((size_t)(size * elements)), SIDE, SIDE, SIDE, dtype, 0};
    plora_matrix x = w, y = w, dx = w;
    plora_model *model;
    plora_adapters *adapters;
    plora_optimizer *optimizer;
    plora_linear linear = PLORA_LINEAR_INIT;
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    char text[64];
    x.data = zeros((size_t)(size * elements));
    y.data = zeros((size_t)(size * elements));
    dx.data = zeros((size_t)(size * elements));
    linear.name = "layer";
    linear.weight = w;
    options.rank = rank;
    CHECKED(plora_model_create(context, &model));
    CHECKED(plora_model_add_linear(model, &linear, NULL));
    start();
    CHECKED(plora_adapters_create(model, &options, &adapters));
    stop();
    snprintf(text, sizeof text, "R = %d", rank);
    if (dtype == PLORA_F32) figure("init_uniform_kernel", text, (double)rank * SIDE, 4.0, 0.0, 0.0);
    start();
    CHECKED(plora_linear_forward(adapters, 0, &x, &y, 0, NULL));
    stop();
    layer_figure("shrink", dtype, rank, elements, size);
    layer_figure("expand", dtype, rank, elements, 2.0 * size);
    start();
    CHECKED(plora_linear_backward(adapters, 0, &x, &y, &dx, 0, NULL));
    stop();
    layer_figure("gradient", dtype, rank, 2.0 * elements, size);
    CHECKED(plora_optimizer_create(adapters, NULL, &optimizer));
    start();
    CHECKED(plora_optimizer_step(optimizer, 1.0, NULL, NULL));
    stop();
    if (dtype == PLORA_F32) {
        figure("gradient_norm_kernel", text, 2.0 * (double)rank * SIDE, 4.0, 0.0, 0.0);
        figure("adamw_kernel", text, 2.0 * (double)rank * SIDE, 28.0, 0.0, 0.0);
    }
    start();
    CHECKED(plora_unload(adapters, optimizer, NULL, NULL, NULL));
    stop();
    if (dtype == PLORA_F32) figure("magnitudes_kernel", text, 2.0 * (double)rank * SIDE, 4.0, 0.0, 0.0);
    plora_optimizer_destroy(optimizer);
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    device_free(w.data);
    device_free(x.data);
    device_free(y.data);
    device_free(dx.data);
}

/* SIDE tokens of `count` adapters, in turn. */
static void batch_case(int32_t dtype, int32_t rank, int32_t count)
{
    enum { SLOTS = 64 };
    const double size = (double)plora__dtype_size(dtype), elements = (double)SIDE * SIDE;
    struct plora__batch_slot slots[SLOTS];
    const struct plora__batch_slot *adapters[SLOTS];
    struct plora__batch_segment segments[SLOTS];
    void *a = zeros((size_t)(rank * SIDE) * sizeof(float)), *b = zeros((size_t)(rank * SIDE) * sizeof(float));
    char text[64], kernel[64];
    for (int32_t i = 0; i < count; ++i) {
        slots[i] = (struct plora__batch_slot){a, b, rank, 1.0f, NULL};
        segments[i] = (struct plora__batch_segment){i, i * (SIDE / count), SIDE / count, 0};
    }
    const struct plora__batch_target target = {
        0, rank, SIDE, {zeros((size_t)(size * elements)), SIDE, SIDE, SIDE, dtype, 0}};
    struct plora__batch_args args = {.tokens = SIDE,
                                     .in_features = SIDE,
                                     .segment_count = count,
                                     .tiles = plora__batch_cut(segments, count),
                                     .target_count = 1,
                                     .targets = &target,
                                     .x = {zeros((size_t)(size * elements)), SIDE, SIDE, SIDE, dtype, 0}};
    struct plora__batch_slot *device_slots = device_malloc(sizeof slots);
    void *device_segments = device_malloc(sizeof segments), *device_adapters = device_malloc(sizeof adapters);
    for (int32_t i = 0; i < count; ++i)
        adapters[i] = device_slots + i;
    device_copy(device_slots, slots, (size_t)count * sizeof *slots);
    device_copy(device_adapters, adapters, (size_t)count * sizeof(void *));
    device_copy(device_segments, segments, (size_t)count * sizeof *segments);
    args.adapters = device_adapters;
    args.segments = device_segments;
    args.workspace = device_malloc(context->backend->batch_workspace(context->device, &args));
    start();
    CHECKED(context->backend->batch_forward(context->device, &args, NULL));
    stop();
    for (int expand = 0; expand < 2; ++expand) {
        const double operations = 2.0 * rank;
        snprintf(kernel, sizeof kernel, "batch_%s_%s_kernel", expand ? "expand" : "shrink", dtype_name(dtype));
        snprintf(text, sizeof text, "R = %d, %d adapters", rank, count);
        /* One A or B is shared here, but is read once for each adapter, as if they were many. */
        figure(kernel, text, elements, (expand ? 2.0 : 1.0) * size + 4.0 * rank * count / SIDE,
               dtype == PLORA_F32 ? operations : 0.0, dtype == PLORA_F32 ? 0.0 : operations / 2.0);
    }
    void *const blocks[] = {
        a, b, args.x.data, target.y.data, device_slots, device_adapters, device_segments, args.workspace};
    for (int i = 0; i < 8; ++i)
        device_free(blocks[i]);
}

static void dequantise_case(int32_t format, int32_t dtype)
{
    const int int8 = format == PLORA__QUANTISED_INT8;
    const double size = (double)plora__dtype_size(dtype), elements = (double)SIDE * SIDE;
    void *codes = zeros((size_t)SIDE * SIDE), *scales = zeros((size_t)SIDE * SIDE / 16);
    void *out = zeros((size_t)(size * elements));
    const struct plora__dequantise_args args = {
        .weight = {.format = format, .rows = SIDE, .columns = SIDE, .group = 64, .codes = codes, .scales = scales},
        .out = {out, SIDE, SIDE, SIDE, dtype, 0}};
    start();
    CHECKED(context->backend->dequantise(context->device, &args, NULL));
    stop();
    figure(int8 ? "dequantise_int8_kernel" : "dequantise_nf4_kernel", dtype_name(dtype), elements,
           (int8 ? 1.0 : 0.5) + 4.0 / 64 + size, 0.0, 0.0);
    device_free(codes);
    device_free(scales);
    device_free(out);
}

/* -------------------------------------------------------------------------------------------------------------- output */

static void print(void)
{
    printf("{\n");
    for (int k = 0; k < seen_count; ++k) {
        printf("  \"%s\": {\"dynamic_shared\": %zu, \"cases\": [", seen[k].kernel, shared[k]);
        const char *separator = "";
        for (int i = 0; i < figure_count; ++i) {
            const struct figure *f = &figures[i];
            if (strcmp(f->kernel, seen[k].kernel) != 0) continue;
            printf("%s{\"case\": \"%s\", \"moved\": %.4f, \"least\": %.4f, \"fma\": %.1f, \"tensor\": %.1f}", separator,
                   f->text, f->moved, f->least, f->fma, f->tensor);
            separator = ", ";
        }
        printf("]}%s\n", k + 1 < seen_count ? "," : "");
    }
    printf("}\n");
}

int main(void)
{
    plora_context_options options = PLORA_CONTEXT_OPTIONS_INIT;
    options.backend = PLORA_BACKEND_CUDA;
    setenv("PLORA_TEST_BACKEND", "cuda", 1);
    CHECKED(plora_context_create(&options, &context));
    static const int ranks[] = {8, 16, 64};
    for (int32_t dtype = PLORA_F32; dtype <= PLORA_F16; ++dtype) {
        for (int i = 0; i < 3; ++i)
            merge_case(dtype, ranks[i], PLORA_ROUND_NEAREST, 0);
        merge_case(dtype, 16, PLORA_ROUND_NEAREST, 1);
        if (dtype == PLORA_F32) continue;
        merge_case(dtype, 16, PLORA_ROUND_STOCHASTIC, 0);
        merge_case(dtype, 16, PLORA_ROUND_RESIDUAL, 0);
    }
    for (int32_t dtype = PLORA_F32; dtype <= PLORA_BF16; ++dtype) {
        for (int i = 1; i < 3; ++i) {
            layer_case(dtype, ranks[i]);
            batch_case(dtype, ranks[i], 4);
        }
        dequantise_case(PLORA__QUANTISED_INT8, dtype);
        dequantise_case(PLORA__QUANTISED_NF4, dtype);
    }
    plora_context_destroy(context);
    print();
    return 0;
}
