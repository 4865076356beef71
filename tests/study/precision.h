/* precision.h: what precision.c and precision_quantised.c share: the weight, and the updates that are unloaded into it.
 *
 *     W_0 [N,K] normal, rms .02;  D_t = B_t A_t, rms(D_t) = eps rms(W_0)
 *
 * `same`: every D_t is D_1, training that goes on in one direction. `fresh`: each is drawn anew. */
#ifndef PLORA_TESTS_STUDY_PRECISION_H
#define PLORA_TESTS_STUDY_PRECISION_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "philox.h"
#include "plora.h"

enum { ROWS = 512, COLUMNS = 512, ELEMENTS = ROWS * COLUMNS, RANK = 8 };

static const double weight_rms = 0.02;

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != PLORA_OK) {                                                                                      \
            fprintf(stderr, "%s: %s\n", #call, plora_last_error());                                                    \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* Zeros. */
static void *allocate(size_t bytes)
{
    const size_t whole = (bytes + 63) / 64 * 64;
    void *memory = aligned_alloc(64, whole);
    if (memory == NULL) exit(1);
    return memset(memory, 0, whole);
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

/* One adapter of rank 8. */
static plora_adapters *make_adapters(plora_model *model, int32_t residual, plora_adapter *view)
{
    plora_adapters *adapters;
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = RANK;
    options.alpha = RANK;
    options.workspace_tokens = 1;
    options.residual = residual;
    TRY(plora_adapters_create(model, &options, &adapters));
    TRY(plora_adapters_layer(adapters, 0, view));
    return adapters;
}

/* The factors of update `t`, whose product is added to the sum. */
static void draw_update(double eps, int fresh, int t, float *a, float *b, double *sum)
{
    const double size = sqrt(eps * weight_rms / sqrt(RANK));
    draw(a, RANK * COLUMNS, size, fresh ? 2 * (uint64_t)t + 1 : 1);
    draw(b, ROWS * RANK, size, fresh ? 2 * (uint64_t)t + 2 : 2);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < ROWS; ++i)
        for (int64_t r = 0; r < RANK; ++r)
            for (int64_t j = 0; j < COLUMNS; ++j)
                sum[i * COLUMNS + j] += (double)b[i * RANK + r] * a[r * COLUMNS + j];
}

static void unload(plora_adapters *adapters, const plora_adapter *view, const plora_unload_options *options,
                   const float *a, const float *b)
{
    memcpy(view->a.data, a, RANK * COLUMNS * sizeof *a);
    memcpy(view->b.data, b, ROWS * RANK * sizeof *b);
    TRY(plora_unload(adapters, NULL, options, NULL, NULL));
}

/* A table in Markdown: a row for each kind, direction and size. usage: program [UNLOADS] */
static int table(int argc, char **argv, const char *columns, int kinds,
                 void (*row)(plora_context *context, int kind, double eps, int fresh, int unloads))
{
    const int unloads = argc > 1 ? atoi(argv[1]) : 256;
    if (unloads < 1) return 2;
    plora_context *context;
    TRY(plora_context_create(NULL, &context));
    printf("| %d unloads of R = %d, W [%d,%d] | %s |\n|---|", unloads, RANK, ROWS, COLUMNS, columns);
    for (const char *at = columns; at != NULL; at = strstr(at + 1, " | "))
        printf("---|");
    printf("\n");
    for (int kind = 0; kind < kinds; ++kind)
        for (int fresh = 0; fresh < 2; ++fresh)
            for (int exponent = 2; exponent <= 4; ++exponent)
                row(context, kind, pow(10, -exponent), fresh, unloads);
    plora_context_destroy(context);
    return 0;
}

#endif
