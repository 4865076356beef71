/* SPDX-License-Identifier: Apache-2.0
 *
 * quickstart.c: a 64 x 64 weight W is to become W + D, where D has rank 16 and equal singular values, with adapters of rank 2.
 *
 * One adapter (LoRA) can take 2 of the 16 singular values: 14/16 of |D|^2 is its floor (Eckart-Young). PeriodicLoRA unloads
 * it into W after each stage and goes on with a fresh one: 8 stages of rank 2 reach all of D.
 *
 *     cc quickstart.c $(pkg-config --cflags --libs plora) -o quickstart && ./quickstart
 */
#include <plora.h>
#include <stdio.h>
#include <stdlib.h>

enum { N = 64, T = 128, RANK = 2, TARGET_RANK = 16, STAGES = 8, STEPS = 200 /* of one stage */ };
enum { STUDENT, TEACHER }; /* the two layers, by index */

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        if ((call) != PLORA_OK) {                                                                                      \
            fprintf(stderr, "quickstart: %s\n", plora_last_error());                                                   \
            exit(EXIT_FAILURE);                                                                                        \
        }                                                                                                              \
    } while (0)

#define MATRIX(data, rows) ((plora_matrix){(data), (rows), N, N, PLORA_F32, 0})

/* error = y - goal, where y = x (W + s B A)^T and goal = x (W + D)^T: a layer without an adapter is a plain linear. */
static void forward(plora_adapters *adapters, float x[][N], float error[][N], int rows)
{
    static float goal[T][N];
    CHECK(plora_linear_forward(adapters, STUDENT, &MATRIX(x, rows), &MATRIX(error, rows), 0, NULL));
    CHECK(plora_linear_forward(adapters, TEACHER, &MATRIX(x, rows), &MATRIX(goal, rows), 0, NULL));
    for (int i = 0; i < rows * N; i++)
        error[i / N][i % N] -= goal[i / N][i % N];
}

/* Trains for all stages; left[i] = |W + s B A - (W + D)|^2 / |D|^2 after stage i. LoRA is one adapter all the way. */
static void train(plora_context *context, int periodic, double left[STAGES])
{
    static float weight[2][N][N], x[T][N], error[T][N], unit[N][N];
    for (int n = 0; n < N; n++)
        for (int k = 0; k < N; k++) { /* D: 16 products of two rows of the orthonormal Hadamard matrix */
            unit[n][k] = n == k;
            weight[STUDENT][n][k] = weight[TEACHER][n][k] = (float)((n * 37 + k * 11) % 101 - 50) / 400.0f;
            for (int r = 0; r < TARGET_RANK; r++)
                weight[TEACHER][n][k] += __builtin_parity((r & n) ^ (~r & 63 & k)) ? -1.0f / N : 1.0f / N;
        }

    plora_model *model;
    plora_adapters *adapters;
    plora_optimizer *optimizer;
    plora_linear student = {sizeof student, "student", MATRIX(weight[STUDENT], N), NULL, 0, 0};
    plora_linear teacher = {sizeof teacher, "teacher", MATRIX(weight[TEACHER], N), NULL, 0, 0};
    plora_adapters_options adapter = PLORA_ADAPTERS_OPTIONS_INIT;
    plora_optimizer_options rule = PLORA_OPTIMIZER_OPTIONS_INIT;
    adapter.targets = "student";
    adapter.alpha = adapter.rank = RANK;
    rule.schedule = PLORA_SCHEDULE_COSINE;
    rule.period_steps = periodic ? STEPS : STAGES * STEPS;
    rule.learning_rate = 0.03;
    CHECK(plora_model_create(context, &model));
    CHECK(plora_model_add_linear(model, &student, NULL));
    CHECK(plora_model_add_linear(model, &teacher, NULL));
    CHECK(plora_adapters_create(model, &adapter, &adapters));
    CHECK(plora_optimizer_create(adapters, &rule, &optimizer));

    uint32_t random = 1;
    for (int step = 1; step <= STAGES * STEPS; step++) {
        for (int i = 0; i < T * N; i++, random = random * 1664525u + 1013904223u)
            x[i / N][i % N] = random >> 31 ? 1.0f : -1.0f;
        forward(adapters, x, error, T);
        CHECK(plora_optimizer_zero_gradients(optimizer, NULL));
        CHECK(plora_linear_backward(adapters, STUDENT, &MATRIX(x, T), &MATRIX(error, T), NULL, 0, NULL));
        CHECK(plora_optimizer_step(optimizer, 1.0 / T, NULL, NULL));
        if (step % STEPS == 0) {
            forward(adapters, unit, error, N);
            for (int i = 0; i < N * N; i++)
                left[step / STEPS - 1] += error[i / N][i % N] * error[i / N][i % N] / TARGET_RANK;
            if (periodic) /* W += s B A, then a fresh A, B = 0; moments, step counter and schedule restart */
                CHECK(plora_unload(adapters, optimizer, NULL, NULL, NULL));
        }
    }
    plora_optimizer_destroy(optimizer), plora_adapters_destroy(adapters), plora_model_destroy(model);
}

int main(void)
{
    plora_context *context;
    double lora[STAGES] = {0}, plora[STAGES] = {0};
    CHECK(plora_context_create(NULL, &context));
    train(context, 0, lora), train(context, 1, plora);
    plora_context_destroy(context);
    printf("Share of the update still to be learnt, rank %d\n\nstage     LoRA    PLoRA   best of rank 2 x stage\n",
           RANK);
    for (int i = 0; i < STAGES; i++)
        printf("%5d %8.4f %8.4f %8.4f\n", i + 1, lora[i], plora[i], 1.0 - (double)RANK * (i + 1) / TARGET_RANK);
    printf("\nLoRA's floor is %.4f, whatever the number of steps.\n", 1.0 - (double)RANK / TARGET_RANK);
}
