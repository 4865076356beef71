/* cuda_traffic.c: what each kernel asks of global memory, counted by the emulator, beside the least that its operands need.
 *
 * Each case runs an operation on a shape that is large and even. `least` counts each operand once: W read and written, x read ...; the
 * factors, which are small and stay in the L2 cache, are left out of it and are in what was moved. Writes one JSON object, by
 * kernel, which cuda_report.py reads. usage: cuda_traffic, on the emulated device */
#include <stdio.h>
#include <stdlib.h>

#include "device.h"
#include "dtype.h"
#include "emulator/emulator.h"
#include "handles.h"

enum { SIDE = 1024, KERNELS = 128, FIGURES = 64 };

static plora_context *context;

struct figure {
    const char *kernel;
    char text[64];
    double moved, least; /* bytes per element */
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

/* A figure of the case that was just counted: `least` bytes for each of `elements`. */
static void figure(const char *kernel, const char *text, double elements, double least)
{
    const int at = index_of(kernel, run, run_count);
    if (at == run_count) {
        fprintf(stderr, "cuda_traffic: %s: %s did not run\n", text, kernel);
        exit(1);
    }
    struct figure *f = &figures[figure_count++];
    *f = (struct figure){kernel, "", (double)(run[at].bytes_read + run[at].bytes_written) / elements, least};
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

static void merge_case(int32_t dtype, int64_t rank, int report, const char *kernel)
{
    const size_t bytes = (size_t)SIDE * SIDE * plora__dtype_size(dtype);
    char text[64];
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
    };
    if (report) args.sums = zeros(sizeof *args.sums);
    args.workspace = zeros(context->backend->merge_workspace(context->device, &args));
    start();
    CHECKED(context->backend->merge(context->device, &args, NULL));
    stop();
    snprintf(text, sizeof text, "R = %lld%s", (long long)rank, report ? ", report" : "");
    figure(kernel, text, (double)SIDE * SIDE, 2.0 * (double)plora__dtype_size(dtype));
    device_free(args.weight.data);
    device_free(args.workspace);
    if (report) device_free(args.sums);
    void *factors[2];
    memcpy(&factors[0], &args.left, sizeof args.left);
    memcpy(&factors[1], &args.right, sizeof args.right);
    device_free(factors[0]);
    device_free(factors[1]);
}

static void layer_case(int32_t dtype, int32_t rank, const char *shrink, const char *expand, const char *gradient)
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
    figure("init_uniform_kernel", text, (double)rank * SIDE, 4.0);
    start();
    CHECKED(plora_linear_forward(adapters, 0, &x, &y, 0, NULL));
    stop();
    figure(shrink, text, elements, size);
    figure(expand, text, elements, 2.0 * size);
    start();
    CHECKED(plora_linear_backward(adapters, 0, &x, &y, &dx, 0, NULL));
    stop();
    figure(gradient, text, 2.0 * elements, size);
    CHECKED(plora_optimizer_create(adapters, NULL, &optimizer));
    start();
    CHECKED(plora_optimizer_step(optimizer, 1.0, NULL, NULL));
    stop();
    figure("gradient_norm_kernel", text, 2.0 * (double)rank * SIDE, 4.0);
    figure("adamw_kernel", text, 2.0 * (double)rank * SIDE, 28.0);
    start();
    CHECKED(plora_unload(adapters, optimizer, NULL, NULL, NULL));
    stop();
    figure("magnitudes_kernel", text, 2.0 * (double)rank * SIDE, 4.0);
    plora_optimizer_destroy(optimizer);
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    device_free(w.data);
    device_free(x.data);
    device_free(y.data);
    device_free(dx.data);
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
            printf("%s{\"case\": \"%s\", \"moved\": %.4f, \"least\": %.4f}", separator, f->text, f->moved, f->least);
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
    for (int i = 0; i < 3; ++i) {
        merge_case(PLORA_BF16, ranks[i], 0, "merge_bf16_kernel");
        merge_case(PLORA_F32, ranks[i], 0, "merge_f32_kernel");
    }
    merge_case(PLORA_BF16, 16, 1, "merge_report_bf16_kernel");
    merge_case(PLORA_F32, 16, 1, "merge_report_f32_kernel");
    for (int i = 1; i < 3; ++i) {
        layer_case(PLORA_BF16, ranks[i], "shrink_bf16_kernel", "expand_bf16_kernel", "gradient_bf16_kernel");
        layer_case(PLORA_F32, ranks[i], "shrink_f32_kernel", "expand_f32_kernel", "gradient_f32_kernel");
    }
    plora_context_destroy(context);
    print();
    return 0;
}
