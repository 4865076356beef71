/* precision_quantised.c: what int8 and NF4 weights hold after many unloads, with a master and without (docs/precision.md).
 *
 *     precision_quantised [UNLOADS]
 *
 * W is normal; each unload adds B A of the size `eps` relative to W (rms), in one direction ("same") or in a new one ("fresh"). With S
 * their sum in fp64 and Q what the codes hold:
 *     captured   <Q - Q_0, S> / |S|^2           error   |Q - W_0 - S| / |S|
 * "once" quantises W_0 + S from fp64 a single time, at the end: what a master can reach. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plora.h"

enum { ROWS = 512, COLUMNS = 512, ELEMENTS = ROWS * COLUMNS, RANK = 8 };
enum { IN_PLACE, MASTER, ONCE, METHODS };

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != PLORA_OK) {                                                                                      \
            fprintf(stderr, "%s: %s\n", #call, plora_last_error());                                                    \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static void *allocate(size_t bytes)
{
    void *memory = calloc(1, bytes);
    if (memory == NULL) exit(1);
    return memory;
}

/* splitmix64 and Box-Muller */
static double uniform(uint64_t *state)
{
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return ((double)((z ^ (z >> 31)) >> 11) + 0.5) * 0x1p-53;
}

static void draw(float *values, int64_t count, double rms, uint64_t seed)
{
    uint64_t state = seed * 0xD1342543DE82EF95u;
    for (int64_t i = 0; i < count; ++i)
        values[i] = (float)(rms * sqrt(-2 * log(uniform(&state))) * cos(6.283185307179586 * uniform(&state)));
}

struct subject {
    plora_quantised weight;
    float map[256];
    plora_model *model;
    plora_adapters *adapters;
    plora_adapter view;
};

static void make_subject(plora_context *context, int32_t format, int nested, int method, const float *start,
                         struct subject *subject)
{
    *subject = (struct subject){.weight = PLORA_QUANTISED_INIT, .view = PLORA_ADAPTER_INIT};
    plora_quantised *weight = &subject->weight;
    size_t codes, scales, nested_codes;
    *weight = (plora_quantised){.rows = ROWS, .columns = COLUMNS, .format = format};
    TRY(plora_quantised_size(weight, nested, &codes, &scales, &nested_codes));
    weight->codes = allocate(codes);
    weight->scales = allocate(scales);
    TRY(plora_quantised_map(subject->map));
    if (nested) {
        weight->nested_codes = allocate(nested_codes);
        weight->map = subject->map;
    }
    const plora_matrix values = {(void *)(uintptr_t)start, ROWS, COLUMNS, COLUMNS, PLORA_F32, 0};
    TRY(plora_quantise(context, &values, weight, 0, NULL));
    if (method == ONCE) return;
    plora_quantised_linear linear = PLORA_QUANTISED_LINEAR_INIT;
    linear.name = "layer";
    linear.weight = *weight;
    linear.master = method == MASTER ? PLORA_MASTER_MEMORY : PLORA_MASTER_NONE;
    if (method == MASTER) linear.values = values;
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = RANK;
    options.alpha = RANK;
    options.workspace_tokens = 1;
    TRY(plora_model_create(context, &subject->model));
    TRY(plora_model_add_quantised(subject->model, &linear, NULL));
    TRY(plora_adapters_create(subject->model, &options, &subject->adapters));
    TRY(plora_adapters_layer(subject->adapters, 0, &subject->view));
}

static void free_subject(struct subject *subject)
{
    plora_adapters_destroy(subject->adapters);
    plora_model_destroy(subject->model);
    free(subject->weight.codes);
    free(subject->weight.scales);
    free(subject->weight.nested_codes);
}

static void unload(struct subject *subject, const float *a, const float *b)
{
    plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
    options.without_master = 1;
    memcpy(subject->view.a.data, a, RANK * COLUMNS * sizeof *a);
    memcpy(subject->view.b.data, b, ROWS * RANK * sizeof *b);
    TRY(plora_unload(subject->adapters, NULL, &options, NULL, NULL));
}

static void add_update(double *sum, const float *a, const float *b)
{
    for (int64_t i = 0; i < ROWS; ++i)
        for (int64_t r = 0; r < RANK; ++r)
            for (int64_t j = 0; j < COLUMNS; ++j)
                sum[i * COLUMNS + j] += (double)b[i * RANK + r] * a[r * COLUMNS + j];
}

static void held(plora_context *context, const struct subject *subject, float *values)
{
    plora_matrix out = {NULL, ROWS, COLUMNS, COLUMNS, PLORA_F32, 0};
    out.data = values;
    TRY(plora_dequantise(context, &subject->weight, &out, NULL));
}

static void study(plora_context *context, const char *name, int32_t format, int nested, double eps, int fresh,
                  int unloads)
{
    static float a[RANK * COLUMNS], b[ROWS * RANK];
    const double weight_rms = 0.02, factor_rms = sqrt(eps * weight_rms / sqrt(RANK));
    float *start = allocate(ELEMENTS * sizeof *start), *before = allocate(ELEMENTS * sizeof *before);
    float *after = allocate(ELEMENTS * sizeof *after);
    double *sum = allocate(ELEMENTS * sizeof *sum);
    struct subject subjects[METHODS];
    double captured[METHODS], error[METHODS];
    draw(start, ELEMENTS, weight_rms, 99);
    for (int method = 0; method < METHODS; ++method)
        make_subject(context, format, nested, method, start, &subjects[method]);
    held(context, &subjects[ONCE], before);
    for (int t = 0; t < unloads; ++t) {
        draw(a, RANK * COLUMNS, factor_rms, fresh ? 2 * (uint64_t)t + 1 : 1);
        draw(b, ROWS * RANK, factor_rms, fresh ? 2 * (uint64_t)t + 2 : 2);
        add_update(sum, a, b);
        unload(&subjects[IN_PLACE], a, b);
        unload(&subjects[MASTER], a, b);
    }
    for (int64_t i = 0; i < ELEMENTS; ++i)
        after[i] = (float)(start[i] + sum[i]);
    const plora_matrix values = {after, ROWS, COLUMNS, COLUMNS, PLORA_F32, 0};
    TRY(plora_quantise(context, &values, &subjects[ONCE].weight, 0, NULL)); /* with the best offset */
    for (int method = 0; method < METHODS; ++method) {
        double dot = 0, square = 0, lost = 0;
        held(context, &subjects[method], after);
        for (int64_t i = 0; i < ELEMENTS; ++i) {
            const double off = after[i] - (start[i] + sum[i]);
            dot += ((double)after[i] - before[i]) * sum[i];
            square += sum[i] * sum[i];
            lost += off * off;
        }
        captured[method] = dot / square;
        error[method] = sqrt(lost / square);
        free_subject(&subjects[method]);
    }
    printf("| %s, %.0e, %s |", name, eps, fresh ? "fresh" : "same");
    for (int method = 0; method < METHODS; ++method)
        printf(" %.4f, %.3g |", captured[method], error[method]);
    printf(" %.4f | %.4f |\n", captured[MASTER] / captured[ONCE], error[MASTER] / error[ONCE]);
    free(start);
    free(before);
    free(after);
    free(sum);
}

int main(int argc, char **argv)
{
    const int unloads = argc > 1 ? atoi(argv[1]) : 256;
    if (unloads < 1) return 2;
    plora_context *context;
    TRY(plora_context_create(NULL, &context));
    printf(
        "| %d unloads of R = %d, W [%d,%d] | without a master | with a master | once, from fp64 | captured: master / "
        "once | error: master / once |\n|---|---|---|---|---|---|\n",
        unloads, RANK, ROWS, COLUMNS);
    for (int kind = 0; kind < 3; ++kind)
        for (int fresh = 0; fresh < 2; ++fresh)
            for (int exponent = 2; exponent <= 4; ++exponent)
                study(context,
                      kind == 0   ? "NF4"
                      : kind == 1 ? "NF4, doubly"
                                  : "int8, by rows",
                      kind < 2 ? PLORA_QUANTISED_NF4 : PLORA_QUANTISED_INT8, kind == 1, pow(10, -exponent), fresh,
                      unloads);
    plora_context_destroy(context);
    return 0;
}
