/* registry_fixture.h: a small model, adapters whose contents can be told from their rank, and what they answer.
 *
 * Content c has rank c + 1 and random factors of its own, so that a holder of a snapshot knows from its rank which answer is the right
 * one. An answer is what two layers add to y for one x, in device memory, read back as bytes. */
#ifndef PLORA_TESTS_REGISTRY_FIXTURE_H
#define PLORA_TESTS_REGISTRY_FIXTURE_H

#include "check.h"

enum { REGISTRY_CONTENTS = 6, REGISTRY_K = 36, REGISTRY_N0 = 40, REGISTRY_N1 = 52, REGISTRY_TOKENS = 12 };
enum { REGISTRY_ANSWER = REGISTRY_N0 + REGISTRY_N1 };

struct registry_fixture {
    plora_context *context;
    plora_model *model;
    struct check_matrix weights[2], a[REGISTRY_CONTENTS][2], b[REGISTRY_CONTENTS][2];
    double scales[REGISTRY_CONTENTS];
    float x[REGISTRY_K];                               /* the same for every token */
    float answers[REGISTRY_CONTENTS][REGISTRY_ANSWER]; /* of a token */
};

/* Device memory; on the CPU the host's. */
static CHECK_UNUSED void *registry_memory(size_t bytes)
{
    void *memory = device_is_cuda() ? device_malloc(bytes) : malloc(bytes);
    if (memory == NULL) abort();
    return memory;
}

static CHECK_UNUSED void registry_forget(void *memory)
{
    if (device_is_cuda())
        device_free(memory);
    else
        free(memory);
}

/* x, y and the batch of one thread. */
struct registry_client {
    plora_batch *batch;
    float *x, *y[2];
    float rows[2][REGISTRY_TOKENS * REGISTRY_N1]; /* y, read back */
};

static CHECK_UNUSED plora_status registry_client_open(const struct registry_fixture *f, struct registry_client *client)
{
    const int32_t widths[2] = {REGISTRY_N0, REGISTRY_N1};
    plora_batch_options options = PLORA_BATCH_OPTIONS_INIT;
    options.max_tokens = REGISTRY_TOKENS;
    options.max_adapters = REGISTRY_TOKENS;
    options.max_rank = REGISTRY_CONTENTS;
    memset(client, 0, sizeof *client);
    client->x = registry_memory((size_t)REGISTRY_TOKENS * REGISTRY_K * sizeof(float));
    for (int i = 0; i < REGISTRY_TOKENS; ++i)
        device_transfer(client->x + (size_t)i * REGISTRY_K, f->x, sizeof f->x);
    for (int i = 0; i < 2; ++i)
        client->y[i] = registry_memory((size_t)(REGISTRY_TOKENS * widths[i]) * sizeof(float));
    return plora_batch_create(f->model, &options, &client->batch);
}

static CHECK_UNUSED void registry_client_close(struct registry_client *client)
{
    plora_batch_destroy(client->batch);
    registry_forget(client->x);
    registry_forget(client->y[0]);
    registry_forget(client->y[1]);
}

/* y starts at 0. The rows of token t are in client->rows[i] from t * N_i on. */
static CHECK_UNUSED plora_status registry_forward(struct registry_client *client, uint32_t flags)
{
    static const int32_t layers[2] = {0, 1};
    const int32_t widths[2] = {REGISTRY_N0, REGISTRY_N1};
    const plora_matrix x = {client->x, REGISTRY_TOKENS, REGISTRY_K, REGISTRY_K, PLORA_F32, 0};
    plora_matrix y[2];
    for (int i = 0; i < 2; ++i) {
        const size_t bytes = (size_t)(REGISTRY_TOKENS * widths[i]) * sizeof(float);
        memset(client->rows[i], 0, bytes);
        device_transfer(client->y[i], client->rows[i], bytes);
        y[i] = (plora_matrix){client->y[i], REGISTRY_TOKENS, widths[i], widths[i], PLORA_F32, 0};
    }
    const plora_status status = plora_batch_forward(client->batch, layers, 2, &x, y, flags, NULL);
    device_wait();
    for (int i = 0; i < 2; ++i)
        device_transfer(client->rows[i], client->y[i], (size_t)(REGISTRY_TOKENS * widths[i]) * sizeof(float));
    return status;
}

/* Whether token t has this answer; NULL = zeros. */
static CHECK_UNUSED int registry_is_answer(const struct registry_client *client, int t, const float *answer)
{
    static const float zeros[REGISTRY_ANSWER];
    const float *want = answer != NULL ? answer : zeros;
    return memcmp(client->rows[0] + (size_t)t * REGISTRY_N0, want, REGISTRY_N0 * sizeof(float)) == 0 &&
           memcmp(client->rows[1] + (size_t)t * REGISTRY_N1, want + REGISTRY_N0, REGISTRY_N1 * sizeof(float)) == 0;
}

static CHECK_UNUSED plora_status registry_add(const struct registry_fixture *f, plora_registry *registry,
                                              const char *name, int content, int64_t *version)
{
    plora_registry_layer layers[2];
    memset(layers, 0, sizeof layers);
    for (int i = 0; i < 2; ++i) {
        layers[i].a = f->a[content][i].m;
        layers[i].b = f->b[content][i].m;
        layers[i].scale = f->scales[content];
        layers[i].layer = i;
    }
    return plora_registry_add(registry, name, layers, 2, version);
}

/* What a name answers now, by all tokens alike. */
static CHECK_UNUSED plora_status registry_ask(plora_registry *registry, struct registry_client *client,
                                              const char *name)
{
    const int32_t slots[REGISTRY_TOKENS] = {0};
    plora_snapshot *snapshot;
    plora_status status = plora_registry_acquire(registry, name, &snapshot);
    if (status != PLORA_OK) return status;
    status = plora_batch_begin(client->batch, REGISTRY_TOKENS, slots, &snapshot, 1, NULL);
    plora_snapshot_release(snapshot); /* the batch holds it */
    if (status == PLORA_OK) status = registry_forward(client, PLORA_LINEAR_DELTA_ONLY);
    if (status == PLORA_OK) status = plora_batch_begin(client->batch, 0, NULL, NULL, 0, NULL);
    return status;
}

/* What a snapshot that is held answers. */
static CHECK_UNUSED plora_status registry_ask_snapshot(struct registry_client *client, plora_snapshot *snapshot)
{
    const int32_t slots[REGISTRY_TOKENS] = {0};
    plora_status status = plora_batch_begin(client->batch, REGISTRY_TOKENS, slots, &snapshot, 1, NULL);
    if (status == PLORA_OK) status = registry_forward(client, PLORA_LINEAR_DELTA_ONLY);
    if (status == PLORA_OK) status = plora_batch_begin(client->batch, 0, NULL, NULL, 0, NULL);
    return status;
}

static CHECK_UNUSED void registry_answers(struct registry_fixture *f)
{
    struct registry_client *client = calloc(1, sizeof *client);
    plora_registry *registry;
    CHECK(client != NULL, "the test itself is out of memory");
    CHECK_OK(registry_client_open(f, client));
    CHECK_OK(plora_registry_create(f->model, NULL, &registry));
    for (int c = 0; c < REGISTRY_CONTENTS; ++c) {
        CHECK_OK(registry_add(f, registry, "x", c, NULL));
        CHECK_OK(registry_ask(registry, client, "x"));
        memcpy(f->answers[c], client->rows[0], REGISTRY_N0 * sizeof(float));
        memcpy(f->answers[c] + REGISTRY_N0, client->rows[1], REGISTRY_N1 * sizeof(float));
        for (int other = 0; other < c; ++other)
            CHECK(memcmp(f->answers[c], f->answers[other], sizeof f->answers[c]) != 0,
                  "contents %d and %d answer alike", c, other);
    }
    plora_registry_destroy(registry);
    registry_client_close(client);
    free(client);
}

static CHECK_UNUSED struct registry_fixture *registry_fixture_new(struct check_allocator *allocator)
{
    struct registry_fixture *f = calloc(1, sizeof *f);
    CHECK(f != NULL, "the test itself is out of memory");
    f->context = check_context(allocator, 1, 0);
    CHECK_OK(plora_model_create(f->context, &f->model));
    for (int i = 0; i < 2; ++i) {
        const int64_t n = i == 0 ? REGISTRY_N0 : REGISTRY_N1;
        f->weights[i] = check_matrix_new(n, REGISTRY_K, REGISTRY_K + 2 * i, i == 0 ? PLORA_F32 : PLORA_BF16);
        check_matrix_random(&f->weights[i], 0.3);
        CHECK_OK(
            check_add_linear(f->model, i == 0 ? "m.q_proj" : "m.up_proj", &f->weights[i].m, NULL, PLORA_F32, 0, NULL));
        for (int c = 0; c < REGISTRY_CONTENTS; ++c) {
            f->a[c][i] = check_matrix_new(c + 1, REGISTRY_K, REGISTRY_K, PLORA_F32);
            f->b[c][i] = check_matrix_new(n, c + 1, c + 1, PLORA_F32);
            check_matrix_random(&f->a[c][i], 0.5);
            check_matrix_random(&f->b[c][i], 1.0);
            f->scales[c] = 0.5 + c;
        }
    }
    for (int k = 0; k < REGISTRY_K; ++k)
        f->x[k] = (float)check_uniform();
    registry_answers(f);
    return f;
}

static CHECK_UNUSED void registry_fixture_free(struct registry_fixture *f)
{
    plora_model_destroy(f->model);
    plora_context_destroy(f->context);
    for (int i = 0; i < 2; ++i) {
        check_matrix_free(&f->weights[i]);
        for (int c = 0; c < REGISTRY_CONTENTS; ++c) {
            check_matrix_free(&f->a[c][i]);
            check_matrix_free(&f->b[c][i]);
        }
    }
    free(f);
}

/* Adapters of content c as a training host has them; alpha = scale * rank. */
static CHECK_UNUSED plora_adapters *registry_trained(const struct registry_fixture *f, int content)
{
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    plora_adapters *adapters = NULL;
    options.rank = content + 1;
    options.alpha = f->scales[content] * (content + 1);
    CHECK_OK(plora_adapters_create(f->model, &options, &adapters));
    for (int i = 0; i < 2; ++i) {
        plora_adapter adapter = PLORA_ADAPTER_INIT;
        CHECK_OK(plora_adapters_layer(adapters, i, &adapter));
        device_transfer(adapter.a.data, f->a[content][i].m.data,
                        (size_t)(adapter.a.rows * adapter.a.columns) * sizeof(float));
        device_transfer(adapter.b.data, f->b[content][i].m.data,
                        (size_t)(adapter.b.rows * adapter.b.columns) * sizeof(float));
    }
    return adapters;
}

#endif
