/* precision.c: what 16-bit weights hold after many unloads, by rounding: the table of docs/precision.md.
 *
 *     W_0 in 16 bits, D_t as in precision.h;  truth  W_0 + sum D_t  in double
 *     captured = <W - W_0, sum D> / |sum D|^2          error = |W - truth| / |sum D|
 *
 * The master is an fp32 weight that is rounded to 16 bits once, after the last unload: no 16-bit W is nearer to fp32 training. With a
 * residual W is what products see, `W + residual` the fp32 value behind it.
 *
 * usage: precision [UNLOADS]      all through plora_unload(); prints a table in Markdown. */
#include "precision.h"

#include "dtype.h"
#include "handles.h"
#include "rounding.h"

enum { NEAREST, STOCHASTIC, RESIDUAL, MASTER, METHODS };

/* One weight with its adapter. */
struct subject {
    plora_model *model;
    plora_adapters *adapters;
    plora_adapter view;
    void *weight;
    int32_t dtype, rounding;
};

static struct subject make_subject(plora_context *context, int method, int32_t dtype, const uint16_t *start)
{
    static const int32_t roundings[METHODS] = {PLORA_ROUND_NEAREST, PLORA_ROUND_STOCHASTIC, PLORA_ROUND_RESIDUAL,
                                               PLORA_ROUND_NEAREST};
    struct subject subject = {.view = PLORA_ADAPTER_INIT,
                              .weight = allocate(ELEMENTS * sizeof(float)),
                              .dtype = method == MASTER ? PLORA_F32 : dtype,
                              .rounding = roundings[method]};
    for (int64_t i = 0; i < ELEMENTS; ++i)
        plora__store(subject.weight, i, subject.dtype, plora__load(start, i, dtype));
    plora_linear linear = PLORA_LINEAR_INIT;
    linear.name = "layer";
    linear.weight = (plora_matrix){subject.weight, ROWS, COLUMNS, COLUMNS, subject.dtype, 0};
    TRY(plora_model_create(context, &subject.model));
    TRY(plora_model_add_linear(subject.model, &linear, NULL));
    subject.adapters =
        make_adapters(subject.model, method == RESIDUAL ? PLORA_RESIDUAL_DEVICE : PLORA_RESIDUAL_NONE, &subject.view);
    return subject;
}

static void free_subject(struct subject *subject)
{
    plora_adapters_destroy(subject->adapters);
    plora_model_destroy(subject->model);
    free(subject->weight);
}

/* A weight as 16 bits hold it, or with its residual. */
static double value_of(const struct subject *subject, int32_t dtype, int64_t i, int with_residual)
{
    if (subject->dtype == PLORA_F32) {
        uint16_t rounded;
        plora__store(&rounded, 0, dtype, ((const float *)subject->weight)[i]);
        return plora__load(&rounded, 0, dtype);
    }
    if (!with_residual) return plora__load(subject->weight, i, dtype);
    const struct plora__weight *weight = &subject->model->weights[0];
    const uint16_t low = weight->residual[i / COLUMNS * weight->residual_stride + i % COLUMNS];
    return plora__join_residual(((const uint16_t *)subject->weight)[i], low, dtype);
}

struct result {
    double captured, error;
};

static struct result compare(const struct subject *subject, int32_t dtype, const uint16_t *start, const double *sum,
                             int with_residual)
{
    double dot = 0, square = 0, error = 0;
    for (int64_t i = 0; i < ELEMENTS; ++i) {
        const double done = value_of(subject, dtype, i, with_residual) - plora__load(start, i, dtype);
        dot += done * sum[i];
        square += sum[i] * sum[i];
        error += (done - sum[i]) * (done - sum[i]);
    }
    return (struct result){dot / square, sqrt(error / square)};
}

static void row(plora_context *context, int kind, double eps, int fresh, int unloads)
{
    static float a[RANK * COLUMNS], b[ROWS * RANK];
    const int32_t dtype = kind == 0 ? PLORA_BF16 : PLORA_F16;
    uint16_t *start = allocate(ELEMENTS * sizeof *start);
    float *values = allocate(ELEMENTS * sizeof *values);
    double *sum = allocate(ELEMENTS * sizeof *sum);
    struct subject subjects[METHODS];
    draw(values, ELEMENTS, weight_rms, 0);
    for (int64_t i = 0; i < ELEMENTS; ++i)
        plora__store(start, i, dtype, values[i]);
    for (int method = 0; method < METHODS; ++method)
        subjects[method] = make_subject(context, method, dtype, start);
    for (int t = 0; t < unloads; ++t) {
        draw_update(eps, fresh, t, a, b, sum);
        for (int method = 0; method < METHODS; ++method) {
            plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
            options.rounding = subjects[method].rounding;
            unload(subjects[method].adapters, &subjects[method].view, &options, a, b);
        }
    }
    printf("| %s, eps %.0e, %s |", dtype == PLORA_BF16 ? "bf16" : "f16", eps, fresh ? "fresh" : "same");
    struct result results[METHODS];
    for (int method = 0; method < METHODS; ++method) {
        results[method] = compare(&subjects[method], dtype, start, sum, 0);
        printf(" %.4f, %.3g |", results[method].captured, results[method].error);
        if (method == RESIDUAL) printf(" %.2g |", compare(&subjects[method], dtype, start, sum, 1).error);
    }
    printf(" %.4f |\n", results[RESIDUAL].error / results[MASTER].error);
    for (int method = 0; method < METHODS; ++method)
        free_subject(&subjects[method]);
    free(start);
    free(values);
    free(sum);
}

int main(int argc, char **argv)
{
    return table(argc, argv,
                 "nearest | stochastic | residual: W | W + residual | fp32 master, rounded once | residual / master", 2,
                 row);
}
