/* bench_unload.c: the unload and the optimizer step, through the public calls, beside what memory allows.
 *
 *     bench_unload unload REPEATS ROWS COLUMNS RANK fp32|bf16 [nearest|stochastic|residual]
 *     bench_unload optimizer REPEATS COUNT
 *
 * unload      scale    W *= c in place, once, and likewise its residual: both are read and written, as an unload must
 *             unload   plora_unload() of one adapter, no report: checks, W + s B A, fresh A, B = 0, gradients = 0
 *             report   the same with its report
 * optimizer   scale    in place, over as many bytes as parameters, gradients and both moments take together
 *             step     plora_optimizer_step(), AdamW: reads those four, writes three, reads gradients twice (the norm)
 *
 * The forms take turns. Prints one JSON object with the seconds of every repeat. */
#include "measure.h"
#include "plora.h"

enum { MAX_REPEATS = 1000, WARM_UP = 2, OPTIMIZER_SIDE = 4096 };

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != PLORA_OK) measure_die(plora_last_error());                                                       \
    } while (0)

struct setup {
    plora_context *context;
    plora_model *model;
    plora_adapters *adapters;
    plora_adapter views;
    plora_matrix weight;
    int64_t weight_floats; /* its bytes / 4 */
    int32_t rounding;
    float *residual; /* as many bytes, to be scaled beside W; NULL = none */
};

static struct setup make_setup(int64_t rows, int64_t columns, int64_t rank, int32_t dtype, int32_t rounding)
{
    struct setup setup = {.views = PLORA_ADAPTER_INIT, .rounding = rounding};
    const size_t bytes = (size_t)(rows * columns) * (dtype == PLORA_F32 ? 4 : 2);
    setup.weight = (plora_matrix){measure_allocate(bytes), rows, columns, columns, dtype, 0};
    setup.weight_floats = (int64_t)(bytes / sizeof(float));
    if (dtype == PLORA_F32)
        measure_fill_fp32(setup.weight.data, rows * columns, 0.05f);
    else
        measure_fill_bf16(setup.weight.data, rows * columns, 0.05f);

    plora_linear linear = PLORA_LINEAR_INIT;
    linear.name = "layer";
    linear.weight = setup.weight;
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = (int32_t)rank;
    options.alpha = (double)(2 * rank);
    options.workspace_tokens = 1;
    options.residual = rounding == PLORA_ROUND_RESIDUAL ? PLORA_RESIDUAL_DEVICE : PLORA_RESIDUAL_NONE;
    if (rounding == PLORA_ROUND_RESIDUAL) setup.residual = measure_allocate(bytes);
    TRY(plora_context_create(NULL, &setup.context));
    TRY(plora_model_create(setup.context, &setup.model));
    TRY(plora_model_add_linear(setup.model, &linear, NULL));
    TRY(plora_adapters_create(setup.model, &options, &setup.adapters));
    TRY(plora_adapters_layer(setup.adapters, 0, &setup.views));
    return setup;
}

static void end_setup(struct setup *setup)
{
    plora_adapters_destroy(setup->adapters);
    plora_model_destroy(setup->model);
    plora_context_destroy(setup->context);
    free(setup->weight.data);
    free(setup->residual);
}

/* A trained adapter, with an update so small that the values stay what they are over many repeats. */
static double unload(struct setup *setup, plora_unload_report *report)
{
    measure_fill_fp32(setup->views.b.data, setup->views.b.rows * setup->views.b.columns, 1e-4f);
    plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
    options.rounding = setup->rounding;
    const double begin = measure_now();
    TRY(plora_unload(setup->adapters, NULL, &options, report, NULL));
    return measure_now() - begin;
}

static void bench_unload(int repeats, int64_t rows, int64_t columns, int64_t rank, int32_t dtype, int32_t rounding)
{
    struct setup setup = make_setup(rows, columns, rank, dtype, rounding);
    double scale[MAX_REPEATS], plain[MAX_REPEATS], reported[MAX_REPEATS];
    for (int i = -WARM_UP; i < repeats; ++i) {
        const int slot = i < 0 ? 0 : i;
        plora_unload_report report = PLORA_UNLOAD_REPORT_INIT;
        scale[slot] = measure_scale(setup.weight.data, setup.weight_floats, 1.0f);
        if (setup.residual != NULL) scale[slot] += measure_scale(setup.residual, setup.weight_floats, 1.0f);
        plain[slot] = unload(&setup, NULL);
        reported[slot] = unload(&setup, &report);
    }
    printf("{\"rows\": %lld, \"columns\": %lld, \"rank\": %lld, \"dtype\": \"%s\",\n", (long long)rows,
           (long long)columns, (long long)rank, dtype == PLORA_F32 ? "fp32" : "bf16");
    measure_print("scale", scale, repeats);
    printf(",\n");
    measure_print("unload", plain, repeats);
    printf(",\n");
    measure_print("report", reported, repeats);
    printf("}\n");
    end_setup(&setup);
}

static void bench_optimizer(int repeats, int64_t count)
{
    struct setup setup =
        make_setup(OPTIMIZER_SIDE, OPTIMIZER_SIDE, count / (2 * OPTIMIZER_SIDE), PLORA_BF16, PLORA_ROUND_NEAREST);
    const plora_optimizer_options options = PLORA_OPTIMIZER_OPTIONS_INIT;
    plora_optimizer *optimizer;
    float *gradients;
    TRY(plora_adapters_gradients(setup.adapters, &gradients, &count));
    measure_fill_fp32(gradients, count, 1e-3f);
    TRY(plora_optimizer_create(setup.adapters, &options, &optimizer));
    float *buffer = measure_allocate((size_t)count * 4 * sizeof(float));
    measure_fill_fp32(buffer, count * 4, 1.0f);
    double scale[MAX_REPEATS], step[MAX_REPEATS];
    for (int i = -WARM_UP; i < repeats; ++i) {
        const int slot = i < 0 ? 0 : i;
        scale[slot] = measure_scale(buffer, count * 4, 1.0f);
        const double begin = measure_now();
        TRY(plora_optimizer_step(optimizer, 1.0, NULL, NULL));
        step[slot] = measure_now() - begin;
    }
    printf("{\"count\": %lld, \"scaled_bytes\": %lld,\n", (long long)count, (long long)count * 16);
    measure_print("scale", scale, repeats);
    printf(",\n");
    measure_print("step", step, repeats);
    printf("}\n");
    free(buffer);
    plora_optimizer_destroy(optimizer);
    end_setup(&setup);
}

static int32_t rounding_of(const char *name)
{
    static const char *const names[] = {"nearest", "stochastic", "residual"};
    for (int32_t rounding = PLORA_ROUND_NEAREST; rounding <= PLORA_ROUND_RESIDUAL; ++rounding)
        if (strcmp(name, names[rounding]) == 0) return rounding;
    measure_die("rounding is nearest, stochastic or residual");
    return -1;
}

int main(int argc, char **argv)
{
    const int repeats = argc > 2 ? atoi(argv[2]) : 0;
    if (repeats < 1 || repeats > MAX_REPEATS) measure_die("REPEATS is 1 to 1000");
    if ((argc == 7 || argc == 8) && strcmp(argv[1], "unload") == 0)
        bench_unload(repeats, atoll(argv[3]), atoll(argv[4]), atoll(argv[5]),
                     strcmp(argv[6], "bf16") == 0 ? PLORA_BF16 : PLORA_F32,
                     argc == 8 ? rounding_of(argv[7]) : PLORA_ROUND_NEAREST);
    else if (argc == 4 && strcmp(argv[1], "optimizer") == 0)
        bench_optimizer(repeats, atoll(argv[3]));
    else
        measure_die("bench_unload unload REPEATS ROWS COLUMNS RANK fp32|bf16 [ROUNDING] | optimizer REPEATS COUNT");
    return 0;
}
