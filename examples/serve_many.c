/* SPDX-License-Identifier: Apache-2.0
 *
 * serve_many.c: one layer, many tenants in every batch, and an adapter that is replaced while requests run.
 *
 * A server has 8 adapters over one weight. Each step mixes their tokens, and some of the backbone alone, in one batch; meanwhile
 * a trainer publishes new versions of one of them. Every answer must be that of one version or the other, never a mixture.
 *
 *     cc serve_many.c $(pkg-config --cflags --libs plora) -lpthread -lm -o serve_many && ./serve_many
 */
#include <math.h>
#include <plora.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { K = 256, N = 256, RANK = 8, TENANTS = 8, TOKENS = 64, STEPS = 2000 };

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != PLORA_OK) {                                                                                      \
            fprintf(stderr, "%s: %s\n", #call, plora_last_error());                                                    \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static float weight[N * K], x[TOKENS * K], y[TOKENS * N];
static atomic_int serving = 1;

/* Version v of a tenant adds v to every output when the inputs are 1: A is 1 / K, B is v / RANK. */
static void add_tenant(plora_registry *registry, int tenant, float version)
{
    static float a[RANK * K], b[N * RANK];
    char name[16];
    plora_registry_layer layer = {
        .a = {a, RANK, K, K, PLORA_F32, 0}, .b = {b, N, RANK, RANK, PLORA_F32, 0}, .scale = 1};
    for (int i = 0; i < RANK * K; ++i)
        a[i] = 1.0f / K;
    for (int i = 0; i < N * RANK; ++i)
        b[i] = version / RANK;
    snprintf(name, sizeof name, "tenant-%d", tenant);
    TRY(plora_registry_add(registry, name, &layer, 1, NULL));
}

/* Replaces tenant 0 for as long as there are requests: by 16, 32, 16 ... */
static void *replace(void *registry)
{
    for (int i = 1; atomic_load(&serving); ++i)
        add_tenant(registry, 0, i % 2 ? 32 : 16);
    return NULL;
}

/* One step: which token is whose, then every layer of the model (here one). */
static void serve(plora_registry *registry, plora_batch *batch, int64_t versions_seen[2])
{
    static const int32_t layers[1] = {0};
    const plora_matrix input = {x, TOKENS, K, K, PLORA_F32, 0}, output = {y, TOKENS, N, N, PLORA_F32, 0};
    plora_snapshot *snapshots[TENANTS];
    int32_t slots[TOKENS];
    for (int i = 0; i < TENANTS; ++i) { /* a server holds them for a whole request, over many steps */
        char name[16];
        snprintf(name, sizeof name, "tenant-%d", i);
        TRY(plora_registry_acquire(registry, name, &snapshots[i]));
    }
    for (int t = 0; t < TOKENS; ++t)
        slots[t] = t % (TENANTS + 1) - 1; /* -1: the backbone alone */
    TRY(plora_batch_begin(batch, TOKENS, slots, snapshots, TENANTS, NULL));
    TRY(plora_batch_forward(batch, layers, 1, &input, &output, 0, NULL));
    for (int t = 0; t < TOKENS; ++t) {
        const float first = y[t * N], want = slots[t] < 0 ? 0 : slots[t] > 0 ? (float)slots[t] : first;
        const int known = slots[t] != 0 || fabsf(first - 16) < 1e-3f || fabsf(first - 32) < 1e-3f;
        for (int n = 0; n < N; ++n)
            if (!known || fabsf(y[t * N + n] - want) > 1e-3f) {
                fprintf(stderr, "token %d of slot %d: %g\n", t, slots[t], (double)y[t * N + n]);
                exit(1);
            }
        if (slots[t] == 0) versions_seen[first > 24]++;
    }
    for (int i = 0; i < TENANTS; ++i)
        plora_snapshot_release(snapshots[i]);
}

int main(void)
{
    plora_context *context;
    plora_model *model;
    plora_registry *registry;
    plora_batch *batch;
    plora_linear linear = PLORA_LINEAR_INIT;
    plora_registry_statistics statistics = PLORA_REGISTRY_STATISTICS_INIT;
    int64_t seen[2] = {0, 0};
    pthread_t trainer;
    TRY(plora_context_create(NULL, &context));
    TRY(plora_model_create(context, &model));
    linear.name = "layer";
    linear.weight = (plora_matrix){weight, N, K, K, PLORA_F32, 0}; /* zeros: what is seen is the adapters' */
    TRY(plora_model_add_linear(model, &linear, NULL));
    TRY(plora_registry_create(model, NULL, &registry));
    TRY(plora_batch_create(model, NULL, &batch));
    for (int i = 0; i < TOKENS * K; ++i)
        x[i] = 1;
    for (int i = 0; i < TENANTS; ++i)
        add_tenant(registry, i, i == 0 ? 16 : (float)i);

    if (pthread_create(&trainer, NULL, replace, registry) != 0) return 1;
    for (int step = 0; step < STEPS; ++step)
        serve(registry, batch, seen);
    atomic_store(&serving, 0);
    pthread_join(trainer, NULL);

    TRY(plora_registry_stats(registry, &statistics));
    printf("%d steps of %d tokens for %d tenants and the backbone; %lld replacements meanwhile\n", STEPS, TOKENS,
           TENANTS, (long long)statistics.replaced);
    printf("tokens of tenant 0 answered by a version of 16: %lld, of 32: %lld\n", (long long)seen[0],
           (long long)seen[1]);
    plora_batch_destroy(batch);
    plora_registry_destroy(registry);
    plora_model_destroy(model);
    plora_context_destroy(context);
    return 0;
}
