/* precision_quantised.c: what int8 and NF4 weights hold after many unloads, with a master and without: the table of docs/precision.md.
 *
 * With S the sum of the updates of precision.h in fp64, and Q what the codes hold:
 *     captured   <Q - Q_0, S> / |S|^2           error   |Q - W_0 - S| / |S|
 * "once" quantises W_0 + S from fp64 a single time, at the end: what a master can reach.
 *
 * usage: precision_quantised [UNLOADS]      all through plora_unload(); prints a table in Markdown. */
#include "precision.h"

enum { IN_PLACE, MASTER, ONCE, METHODS };

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
    TRY(plora_model_create(context, &subject->model));
    TRY(plora_model_add_quantised(subject->model, &linear, NULL));
    subject->adapters = make_adapters(subject->model, PLORA_RESIDUAL_NONE, &subject->view);
}

static void free_subject(struct subject *subject)
{
    plora_adapters_destroy(subject->adapters);
    plora_model_destroy(subject->model);
    free(subject->weight.codes);
    free(subject->weight.scales);
    free(subject->weight.nested_codes);
}

static void held(plora_context *context, const struct subject *subject, float *values)
{
    plora_matrix out = {NULL, ROWS, COLUMNS, COLUMNS, PLORA_F32, 0};
    out.data = values;
    TRY(plora_dequantise(context, &subject->weight, &out, NULL));
}

static void row(plora_context *context, int kind, double eps, int fresh, int unloads)
{
    static const char *const names[] = {"NF4", "NF4, doubly", "int8, by rows"};
    static float a[RANK * COLUMNS], b[ROWS * RANK];
    const int32_t format = kind < 2 ? PLORA_QUANTISED_NF4 : PLORA_QUANTISED_INT8;
    float *start = allocate(ELEMENTS * sizeof *start), *before = allocate(ELEMENTS * sizeof *before);
    float *after = allocate(ELEMENTS * sizeof *after);
    double *sum = allocate(ELEMENTS * sizeof *sum);
    struct subject subjects[METHODS];
    double captured[METHODS], error[METHODS];
    draw(start, ELEMENTS, weight_rms, 0);
    for (int method = 0; method < METHODS; ++method)
        make_subject(context, format, kind == 1, method, start, &subjects[method]);
    held(context, &subjects[ONCE], before);
    for (int t = 0; t < unloads; ++t) {
        draw_update(eps, fresh, t, a, b, sum);
        for (int method = 0; method < ONCE; ++method) {
            plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
            options.without_master = 1;
            unload(subjects[method].adapters, &subjects[method].view, &options, a, b);
        }
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
    printf("| %s, %.0e, %s |", names[kind], eps, fresh ? "fresh" : "same");
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
    return table(argc, argv,
                 "without a master | with a master | once, from fp64 | captured: master / once | error: master / once",
                 3, row);
}
