/* precision.c: what 16-bit weights hold after many unloads, by rounding: the table of docs/precision.md.
 *
 *     W_0 [N,K] normal, in 16 bits;  D_t = s B_t A_t, rms(D_t) = eps rms(W_0);  truth  W_0 + sum D_t  in double
 *     captured = <W - W_0, sum D> / |sum D|^2          error = |W - truth| / |sum D|
 *
 * `same`: every D_t is D_1, training that goes on in one direction. `fresh`: each is drawn anew. The master is an fp32 weight that is
 * rounded to 16 bits once, after the last unload: no 16-bit W is nearer to fp32 training. With a residual W is what products see,
 * `W + residual` the fp32 value behind it.
 *
 * usage: precision [UNLOADS]      all through plora_unload(); prints a table in Markdown. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "handles.h"
#include "philox.h"
#include "rounding.h"

enum { ROWS = 512, COLUMNS = 512, ELEMENTS = ROWS * COLUMNS, RANK = 8 };
enum { NEAREST, STOCHASTIC, RESIDUAL, MASTER, METHODS };

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != PLORA_OK) {                                                                                      \
            fprintf(stderr, "%s: %s\n", #call, plora_last_error());                                                    \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* One weight with its adapter. */
struct subject {
    plora_model *model;
    plora_adapters *adapters;
    plora_adapter view;
    void *weight;
    int32_t dtype, rounding;
};

static void *allocate(size_t bytes)
{
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory == NULL) exit(1);
    return memory;
}

/* `count` normal numbers, a function of (stream, number). */
static void draw(float *values, int64_t count, double size, uint64_t stream)
{
    for (int64_t i = 0; i < count; ++i) {
        const struct plora__words words = plora__draw(2024, PLORA__PURPOSE_INIT, stream, 0, (uint64_t)i);
        const double radius = sqrt(-2 * log((words.word[0] + 1.0) * 0x1p-32)); /* Box and Muller */
        values[i] = (float)(size * radius * cos(words.word[1] * (0x1p-31 * 3.14159265358979)));
    }
}

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
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = RANK;
    options.alpha = RANK;
    options.workspace_tokens = 1;
    options.residual = method == RESIDUAL ? PLORA_RESIDUAL_DEVICE : PLORA_RESIDUAL_NONE;
    TRY(plora_model_create(context, &subject.model));
    TRY(plora_model_add_linear(subject.model, &linear, NULL));
    TRY(plora_adapters_create(subject.model, &options, &subject.adapters));
    TRY(plora_adapters_layer(subject.adapters, 0, &subject.view));
    return subject;
}

static void free_subject(struct subject *subject)
{
    plora_adapters_destroy(subject->adapters);
    plora_model_destroy(subject->model);
    free(subject->weight);
}

static void unload(struct subject *subject, const float *a, const float *b)
{
    plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
    options.rounding = subject->rounding;
    memcpy(subject->view.a.data, a, RANK * COLUMNS * sizeof *a);
    memcpy(subject->view.b.data, b, ROWS * RANK * sizeof *b);
    TRY(plora_unload(subject->adapters, NULL, &options, NULL, NULL));
}

static void add_update(double *sum, const float *a, const float *b)
{
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < ROWS; ++i)
        for (int64_t r = 0; r < RANK; ++r)
            for (int64_t j = 0; j < COLUMNS; ++j)
                sum[i * COLUMNS + j] += (double)b[i * RANK + r] * a[r * COLUMNS + j];
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

static void study(plora_context *context, int32_t dtype, double eps, int fresh, int unloads)
{
    static float a[RANK * COLUMNS], b[ROWS * RANK];
    const double weight_rms = 0.02, factor_rms = sqrt(eps * weight_rms / sqrt(RANK));
    uint16_t *start = allocate(ELEMENTS * sizeof *start);
    float *values = allocate(ELEMENTS * sizeof *values);
    double *sum = allocate(ELEMENTS * sizeof *sum);
    struct subject subjects[METHODS];
    draw(values, ELEMENTS, weight_rms, 0);
    for (int64_t i = 0; i < ELEMENTS; ++i) {
        plora__store(start, i, dtype, values[i]);
        sum[i] = 0;
    }
    for (int method = 0; method < METHODS; ++method)
        subjects[method] = make_subject(context, method, dtype, start);
    for (int t = 0; t < unloads; ++t) {
        draw(a, RANK * COLUMNS, factor_rms, fresh ? 2 * (uint64_t)t + 1 : 1);
        draw(b, ROWS * RANK, factor_rms, fresh ? 2 * (uint64_t)t + 2 : 2);
        add_update(sum, a, b);
        for (int method = 0; method < METHODS; ++method)
            unload(&subjects[method], a, b);
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
    const int unloads = argc > 1 ? atoi(argv[1]) : 256;
    if (unloads < 1) return 2;
    plora_context *context;
    TRY(plora_context_create(NULL, &context));
    printf(
        "| %d unloads of R = %d, W [%d,%d] | nearest | stochastic | residual: W | W + residual | fp32 master, rounded "
        "once | residual / master |\n|---|---|---|---|---|---|---|\n",
        unloads, RANK, ROWS, COLUMNS);
    for (int32_t dtype = PLORA_BF16; dtype <= PLORA_F16; ++dtype)
        for (int fresh = 0; fresh < 2; ++fresh)
            for (int exponent = 2; exponent <= 4; ++exponent)
                study(context, dtype, pow(10, -exponent), fresh, unloads);
    plora_context_destroy(context);
    return 0;
}
