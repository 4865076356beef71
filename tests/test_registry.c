/* test_registry.c: names, versions and memory of served adapters, one call after the other: what each answers, to the bit, and what is
 * refused. The same under traffic is in test_registry_threads.c. */
#include "file_fixture.h"
#include "quantised_fixture.h"
#include "registry_fixture.h"

static struct registry_client client;

static void check_answers(plora_registry *registry, const char *name, const float *answer, const char *what)
{
    CHECK_OK(registry_ask(registry, &client, name));
    for (int t = 0; t < REGISTRY_TOKENS; ++t)
        CHECK(registry_is_answer(&client, t, answer), "'%s' token %d: %s", name, t, what);
}

static plora_registry_statistics stats_of(plora_registry *registry)
{
    plora_registry_statistics statistics = PLORA_REGISTRY_STATISTICS_INIT;
    CHECK_OK(plora_registry_stats(registry, &statistics));
    return statistics;
}

struct setup {
    struct check_allocator allocator;
    struct registry_fixture *f;
    plora_registry *registry;
};

static struct setup *setup_new(uint64_t salt, size_t budget_of_largest, const char *spill)
{
    static const struct check_allocator fresh = CHECK_ALLOCATOR_INIT;
    struct setup *s = calloc(1, sizeof *s);
    plora_registry_options options = PLORA_REGISTRY_OPTIONS_INIT;
    CHECK(s != NULL, "the test itself is out of memory");
    check_reseed(salt);
    s->allocator = fresh;
    s->f = registry_fixture_new(&s->allocator);
    CHECK_OK(registry_client_open(s->f, &client));
    CHECK_OK(plora_registry_create(s->f->model, NULL, &s->registry));
    if (budget_of_largest > 0) {
        CHECK_OK(registry_add(s->f, s->registry, "largest", REGISTRY_CONTENTS - 1, NULL));
        options.memory_budget = (size_t)stats_of(s->registry).resident_bytes * budget_of_largest;
        options.spill_directory = spill;
        plora_registry_destroy(s->registry);
        CHECK_OK(plora_registry_create(s->f->model, &options, &s->registry));
    }
    return s;
}

static void setup_free(struct setup *s)
{
    plora_registry_destroy(s->registry);
    registry_client_close(&client);
    registry_fixture_free(s->f);
    check_allocator_empty(&s->allocator, "registry");
    free(s);
}

/* ------------------------------------------------------------------------------------------------------------ versions */

static void test_registry_versions(void **state)
{
    (void)state;
    struct setup *s = setup_new(1, 0, NULL);
    int64_t first = 0, second = 0, third = 0;
    plora_snapshot *old = NULL;
    plora_snapshot_info info = PLORA_SNAPSHOT_INFO_INIT;
    CHECK_OK(registry_add(s->f, s->registry, "a", 0, &first));
    CHECK_OK(plora_registry_acquire(s->registry, "a", &old));
    CHECK_OK(registry_add(s->f, s->registry, "a", 3, &second));
    CHECK(second > first, "versions %lld, %lld", (long long)first, (long long)second);
    check_answers(s->registry, "a", s->f->answers[3], "new version");
    CHECK_OK(registry_ask_snapshot(&client, old));
    CHECK(registry_is_answer(&client, 5, s->f->answers[0]), "the old version answers something else");
    CHECK_OK(plora_snapshot_describe(old, &info));
    CHECK(info.version == first && info.rank == 1 && info.weights == 2 && info.holders == 1 &&
              strcmp(info.name, "a") == 0,
          "version %lld rank %d weights %d holders %lld", (long long)info.version, info.rank, info.weights,
          (long long)info.holders);
    CHECK(stats_of(s->registry).retired == 1, "%lld retired", (long long)stats_of(s->registry).retired);
    const int64_t bytes = stats_of(s->registry).resident_bytes;
    plora_snapshot_release(old);
    CHECK_OK(plora_registry_collect(s->registry));
    CHECK(stats_of(s->registry).retired == 0 && stats_of(s->registry).resident_bytes < bytes, "nothing was collected");
    CHECK_OK(plora_registry_unload(s->registry, "a", 0));
    CHECK_FAILS(registry_ask(s->registry, &client, "a"), PLORA_ERROR_NOT_FOUND, "'a'");
    CHECK_FAILS(plora_registry_unload(s->registry, "a", 0), PLORA_ERROR_NOT_FOUND, "'a'");
    CHECK_OK(registry_add(s->f, s->registry, "a", 0, &third));
    CHECK(third > second, "version %lld came again", (long long)third);
    const plora_registry_statistics statistics = stats_of(s->registry);
    CHECK(statistics.names == 1 && statistics.added == 2 && statistics.replaced == 1 && statistics.unloaded == 1 &&
              statistics.missed == 1,
          "names %lld added %lld replaced %lld unloaded %lld missed %lld", (long long)statistics.names,
          (long long)statistics.added, (long long)statistics.replaced, (long long)statistics.unloaded,
          (long long)statistics.missed);
    setup_free(s);
}

static void test_registry_busy(void **state)
{
    (void)state;
    struct setup *s = setup_new(2, 0, NULL);
    const int32_t slots[REGISTRY_TOKENS] = {0};
    plora_snapshot *snapshot;
    CHECK_OK(registry_add(s->f, s->registry, "a", 2, NULL));
    CHECK_OK(plora_registry_acquire(s->registry, "a", &snapshot));
    plora_snapshot_retain(snapshot);
    CHECK_FAILS(plora_registry_unload(s->registry, "a", 0), PLORA_ERROR_BUSY, "'a'", "version 1 ", "2 times");
    plora_snapshot_release(snapshot);
    CHECK_OK(plora_batch_begin(client.batch, REGISTRY_TOKENS, slots, &snapshot, 1, NULL));
    plora_snapshot_release(snapshot);
    CHECK_FAILS(plora_registry_unload(s->registry, "a", 0), PLORA_ERROR_BUSY, "1 times"); /* the batch */
    CHECK_OK(plora_registry_unload(s->registry, "a", PLORA_REGISTRY_DEFER));
    CHECK_FAILS(plora_registry_acquire(s->registry, "a", &snapshot), PLORA_ERROR_NOT_FOUND, "'a'");
    CHECK_OK(registry_forward(&client, PLORA_LINEAR_DELTA_ONLY));
    CHECK(registry_is_answer(&client, 0, s->f->answers[2]), "unloaded, but still held");
    CHECK_FAILS(plora_registry_unload(s->registry, "a", 2), PLORA_ERROR_INVALID_ARGUMENT, "0x2");
    /* The registry goes while the batch holds one of its snapshots. */
    plora_registry_destroy(s->registry);
    s->registry = NULL;
    CHECK_OK(registry_forward(&client, PLORA_LINEAR_DELTA_ONLY));
    CHECK(registry_is_answer(&client, 11, s->f->answers[2]), "the registry has gone, the snapshot is held");
    setup_free(s);
}

static void test_registry_names(void **state)
{
    (void)state;
    struct setup *s = setup_new(3, 0, NULL);
    char name[300], seen[300];
    plora_snapshot_info info = PLORA_SNAPSHOT_INFO_INIT;
    for (int i = 0; i < 40; ++i) { /* in no order */
        snprintf(name, sizeof name, "n%02d", (i * 17) % 40);
        CHECK_OK(registry_add(s->f, s->registry, name, i % REGISTRY_CONTENTS, NULL));
    }
    for (int i = 0; i < 40; ++i) {
        snprintf(name, sizeof name, "n%02d", i);
        CHECK_OK(plora_registry_entry(s->registry, i, seen, sizeof seen, &info));
        CHECK(strcmp(seen, name) == 0 && info.name == NULL && info.holders == 0 && info.bytes > 0, "entry %d is '%s'",
              i, seen);
    }
    CHECK_FAILS(plora_registry_entry(s->registry, 40, seen, sizeof seen, &info), PLORA_ERROR_NOT_FOUND, "40");
    CHECK_FAILS(plora_registry_entry(s->registry, -1, seen, sizeof seen, &info), PLORA_ERROR_NOT_FOUND, "-1");
    CHECK_FAILS(plora_registry_entry(s->registry, 0, seen, 3, &info), PLORA_ERROR_INVALID_ARGUMENT, "3", "4");
    memset(name, 'x', sizeof name);
    name[256] = '\0';
    CHECK_FAILS(registry_add(s->f, s->registry, name, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "256", "255");
    CHECK_FAILS(registry_add(s->f, s->registry, "", 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "0 bytes");
    name[255] = '\0';
    CHECK_OK(registry_add(s->f, s->registry, name, 1, NULL));
    check_answers(s->registry, name, s->f->answers[1], "a long name");
    for (int i = 0; i < 40; i += 2) {
        snprintf(name, sizeof name, "n%02d", i);
        CHECK_OK(plora_registry_unload(s->registry, name, 0));
    }
    CHECK(stats_of(s->registry).names == 21, "%lld names", (long long)stats_of(s->registry).names);
    check_answers(s->registry, "n17", s->f->answers[1], "after others have gone");
    setup_free(s);
}

/* ------------------------------------------------------------------------------------------------------------- sources */

static void test_registry_load(void **state)
{
    (void)state;
    struct setup *s = setup_new(4, 0, NULL);
    plora_adapters *adapters = registry_trained(s->f, 4);
    CHECK_OK(plora_adapters_save(adapters, file_path("peft")));
    CHECK_OK(plora_registry_load(s->registry, "file", file_path("peft"), NULL, NULL));
    check_answers(s->registry, "file", s->f->answers[4], "from a PEFT directory");
    CHECK_FAILS(plora_registry_load(s->registry, "file", file_path("none"), NULL, NULL), PLORA_ERROR_IO, "none");
    size_t count;
    unsigned char *bytes = file_read(file_path("peft/adapter_model.safetensors"), &count);
    file_write(file_path("peft/adapter_model.safetensors"), bytes, count - 5);
    CHECK_FAILS(plora_registry_load(s->registry, "file", file_path("peft"), NULL, NULL), PLORA_ERROR_FORMAT,
                "safetensors");
    const float nan = NAN;
    memcpy(bytes + count - sizeof nan, &nan, sizeof nan);
    file_write(file_path("peft/adapter_model.safetensors"), bytes, count);
    CHECK_FAILS(plora_registry_load(s->registry, "file", file_path("peft"), NULL, NULL), PLORA_ERROR_FORMAT, "nan");
    file_write_text(file_path("peft/adapter_config.json"), "{\"peft_type\": \"LORA\", \"use_dora\": true}");
    CHECK_FAILS(plora_registry_load(s->registry, "file", file_path("peft"), NULL, NULL), PLORA_ERROR_UNSUPPORTED,
                "use_dora");
    check_answers(s->registry, "file", s->f->answers[4], "as before the loads that failed");
    CHECK(stats_of(s->registry).replaced == 0, "%lld replaced", (long long)stats_of(s->registry).replaced);
    free(bytes);
    plora_adapters_destroy(adapters);
    setup_free(s);
}

/* What training does after publish is not seen. */
static void test_registry_publish(void **state)
{
    (void)state;
    struct setup *s = setup_new(5, 0, NULL);
    plora_adapters *adapters = registry_trained(s->f, 2);
    float *parameters;
    int64_t count;
    CHECK_OK(plora_registry_publish(s->registry, "live", adapters, NULL, NULL));
    CHECK_OK(plora_adapters_parameters(adapters, &parameters, &count));
    float *values = malloc((size_t)count * sizeof *values);
    CHECK(values != NULL, "the test itself is out of memory");
    for (int64_t i = 0; i < count; ++i)
        values[i] = (float)check_uniform();
    device_transfer(parameters, values, (size_t)count * sizeof *values);
    check_answers(s->registry, "live", s->f->answers[2], "after training went on");
    values[count / 2] = INFINITY;
    device_transfer(parameters, values, (size_t)count * sizeof *values);
    CHECK_FAILS(plora_registry_publish(s->registry, "live", adapters, NULL, NULL), PLORA_ERROR_NON_FINITE, "m.");
    free(values);
    plora_adapters_destroy(adapters);
    check_answers(s->registry, "live", s->f->answers[2], "after the adapters' end");
    struct registry_fixture *other = registry_fixture_new(NULL);
    adapters = registry_trained(other, 0);
    CHECK_FAILS(plora_registry_publish(s->registry, "live", adapters, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "another model");
    plora_adapters_destroy(adapters);
    registry_fixture_free(other);
    setup_free(s);
}

static void test_registry_add_errors(void **state)
{
    (void)state;
    struct setup *s = setup_new(6, 0, NULL);
    plora_registry_layer good[2], bad[2];
    memset(good, 0, sizeof good);
    for (int i = 0; i < 2; ++i)
        good[i] = (plora_registry_layer){.a = s->f->a[1][i].m, .b = s->f->b[1][i].m, .scale = 1.0, .layer = i};
#define REFUSED(change, status, ...)                                                                                   \
    do {                                                                                                               \
        memcpy(bad, good, sizeof bad);                                                                                 \
        change;                                                                                                        \
        CHECK_FAILS(plora_registry_add(s->registry, "bad", bad, 2, NULL), status, __VA_ARGS__);                        \
    } while (0)
    REFUSED(bad[1].layer = 2, PLORA_ERROR_INVALID_ARGUMENT, "layers[1]", "layer 2");
    REFUSED(bad[0].layer = 1, PLORA_ERROR_SHAPE, "m.up_proj", "[40,2]", "[52,2]");
    REFUSED(bad[1] = bad[0], PLORA_ERROR_INVALID_ARGUMENT, "same weight", "layers[0]");
    REFUSED(bad[0].a.columns--, PLORA_ERROR_SHAPE, "m.q_proj", "a is [2,35]");
    REFUSED(bad[0].a.rows = 0, PLORA_ERROR_INVALID_ARGUMENT, "rank 0");
    REFUSED(bad[0].a.rows = 37, PLORA_ERROR_INVALID_ARGUMENT, "rank 37", "K=36");
    REFUSED(bad[0].b.dtype = 7, PLORA_ERROR_UNSUPPORTED, "b", "7");
    REFUSED(bad[0].b.data = NULL, PLORA_ERROR_INVALID_ARGUMENT, "b");
    REFUSED(bad[0].b.stride = 1, PLORA_ERROR_SHAPE, "stride 1");
    REFUSED(bad[0].scale = NAN, PLORA_ERROR_INVALID_ARGUMENT, "nan");
    REFUSED(bad[0].reserved = 1, PLORA_ERROR_INVALID_ARGUMENT, "reserved");
    float *value = (float *)s->f->b[1][1].m.data + 5;
    const float kept = *value;
    *value = -INFINITY;
    REFUSED((void)0, PLORA_ERROR_NON_FINITE, "m.up_proj", "b(2,1)", "-inf");
    *value = kept;
    CHECK_FAILS(plora_registry_add(s->registry, "bad", good, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "0");
    CHECK_FAILS(plora_registry_add(s->registry, "bad", good, 3, NULL), PLORA_ERROR_INVALID_ARGUMENT, "3", "2 weights");
    CHECK_FAILS(plora_registry_add(s->registry, NULL, good, 2, NULL), PLORA_ERROR_INVALID_ARGUMENT, "name");
    CHECK_FAILS(plora_registry_add(NULL, "x", good, 2, NULL), PLORA_ERROR_INVALID_ARGUMENT, "registry");
    CHECK(stats_of(s->registry).names == 0, "a name was added");
    setup_free(s);
}

/* -------------------------------------------------------------------------------------------------------------- memory */

static int is_resident(plora_registry *registry, const char *name)
{
    plora_snapshot_info info = PLORA_SNAPSHOT_INFO_INIT;
    char text[300];
    for (int64_t i = 0; plora_registry_entry(registry, i, text, sizeof text, &info) == PLORA_OK; ++i)
        if (strcmp(text, name) == 0) return info.bytes > 0;
    return -1;
}

static void evictions(const char *spill)
{
    struct setup *s = setup_new(7, 2, spill);
    plora_snapshot *held;
    CHECK_OK(registry_add(s->f, s->registry, "a", 5, NULL));
    CHECK_OK(registry_add(s->f, s->registry, "b", 5, NULL));
    check_answers(s->registry, "a", s->f->answers[5], "first");
    CHECK_OK(registry_add(s->f, s->registry, "c", 5, NULL)); /* b is the one not used for longest */
    CHECK(is_resident(s->registry, "a") == 1 && is_resident(s->registry, "b") == 0 &&
              is_resident(s->registry, "c") == 1,
          "resident: a %d b %d c %d", is_resident(s->registry, "a"), is_resident(s->registry, "b"),
          is_resident(s->registry, "c"));
    check_answers(s->registry, "b", s->f->answers[5], "brought back"); /* for a */
    CHECK(is_resident(s->registry, "a") == 0, "a is still there");
    const plora_registry_statistics statistics = stats_of(s->registry);
    CHECK(statistics.resident_bytes <= statistics.budget_bytes && statistics.evicted == 2 && statistics.restored == 1,
          "%lld of %lld bytes, evicted %lld, restored %lld", (long long)statistics.resident_bytes,
          (long long)statistics.budget_bytes, (long long)statistics.evicted, (long long)statistics.restored);
    CHECK_OK(plora_registry_pin(s->registry, "b", 1));
    CHECK_OK(plora_registry_acquire(s->registry, "c", &held));
    CHECK_FAILS(plora_registry_acquire(s->registry, "a", &(plora_snapshot *){NULL}), PLORA_ERROR_OUT_OF_MEMORY, "'a'",
                "budget", "pinned");
    CHECK_FAILS(registry_add(s->f, s->registry, "d", 5, NULL), PLORA_ERROR_OUT_OF_MEMORY, "'d'", "budget");
    CHECK_FAILS(plora_registry_evict(s->registry, "b"), PLORA_ERROR_BUSY, "'b'", "pinned");
    CHECK_FAILS(plora_registry_evict(s->registry, "c"), PLORA_ERROR_BUSY, "'c'", "1 times");
    CHECK_FAILS(plora_registry_evict(s->registry, "d"), PLORA_ERROR_NOT_FOUND, "'d'");
    plora_snapshot_release(held);
    CHECK_OK(plora_registry_evict(s->registry, "c"));
    CHECK_OK(plora_registry_evict(s->registry, "c")); /* it is */
    CHECK_OK(plora_registry_pin(s->registry, "a", 1));
    CHECK_OK(plora_registry_pin(s->registry, "b", 0));
    check_answers(s->registry, "c", s->f->answers[5], "instead of b");
    check_answers(s->registry, "a", s->f->answers[5], "pinned");
    CHECK(is_resident(s->registry, "b") == 0, "b is still there");
    CHECK_OK(plora_registry_unload(s->registry, "b", 0)); /* while it is evicted */
    CHECK(stats_of(s->registry).retired == 0, "not collected");
    setup_free(s);
}

static void test_registry_evict(void **state)
{
    (void)state;
    evictions(file_directory);
    if (device_is_cuda()) evictions(NULL);
    CHECK(file_count(file_directory) <= 1, "%d files are left", file_count(file_directory)); /* of test_registry_load */
    struct setup *s = setup_new(8, 1, NULL);
    CHECK_OK(registry_add(s->f, s->registry, "a", 5, NULL));
    if (!device_is_cuda()) {
        CHECK_FAILS(plora_registry_evict(s->registry, "a"), PLORA_ERROR_UNSUPPORTED, "spill_directory");
        CHECK_FAILS(registry_add(s->f, s->registry, "b", 0, NULL), PLORA_ERROR_OUT_OF_MEMORY, "'b'", "spill_directory");
    }
    plora_registry_options options = PLORA_REGISTRY_OPTIONS_INIT;
    plora_registry *none;
    options.spill_directory = "/nowhere/at/all";
    CHECK_FAILS(plora_registry_create(s->f->model, &options, &none), PLORA_ERROR_IO, "/nowhere/at/all");
    options = (plora_registry_options)PLORA_REGISTRY_OPTIONS_INIT;
    options.memory_budget = 100;
    CHECK_OK(plora_registry_create(s->f->model, &options, &none));
    CHECK_FAILS(registry_add(s->f, none, "a", 0, NULL), PLORA_ERROR_OUT_OF_MEMORY, "budget of 100");
    plora_registry_destroy(none);
    setup_free(s);
}

/* An arena that goes to its file and comes back in more than one piece. */
static void test_registry_evict_large(void **state)
{
    (void)state;
    check_reseed(12);
    enum { TOKENS = 2, K = 700, N = 600, RANK = 256 };
    plora_context *context = check_context(NULL, 0, 0);
    plora_model *model;
    plora_registry *registry;
    plora_batch *batch;
    struct check_matrix w = check_matrix_new(N, K, K, PLORA_F32), x = check_matrix_new(TOKENS, K, K, PLORA_F32);
    struct check_matrix a = check_matrix_new(RANK, K, K, PLORA_F32), b = check_matrix_new(N, RANK, RANK, PLORA_F32);
    struct check_matrix y[2] = {check_matrix_new(TOKENS, N, N, PLORA_F32), check_matrix_new(TOKENS, N, N, PLORA_F32)};
    check_matrix_random(&w, 1.0);
    check_matrix_random(&x, 1.0);
    check_matrix_random(&a, 1.0);
    check_matrix_random(&b, 1.0);
    CHECK_OK(plora_model_create(context, &model));
    CHECK_OK(check_add_linear(model, "m.q_proj", &w.m, NULL, PLORA_F32, 0, NULL));
    plora_registry_options options = PLORA_REGISTRY_OPTIONS_INIT;
    options.spill_directory = file_directory;
    CHECK_OK(plora_registry_create(model, &options, &registry));
    const plora_registry_layer layer = {.a = a.m, .b = b.m, .scale = 0.1, .layer = 0};
    CHECK_OK(plora_registry_add(registry, "large", &layer, 1, NULL));
    plora_batch_options limits = PLORA_BATCH_OPTIONS_INIT;
    limits.max_tokens = TOKENS;
    limits.max_adapters = 1;
    limits.max_rank = RANK;
    CHECK_OK(plora_batch_create(model, &limits, &batch));
    for (int i = 0; i < 2; ++i) {
        const int32_t slots[TOKENS] = {0}, layers[1] = {0};
        const plora_matrix device_x = device_matrix(x.m), device_y = device_matrix(y[i].m);
        plora_snapshot *snapshot;
        memset(y[i].m.data, 0, TOKENS * N * sizeof(float));
        if (i == 1) CHECK_OK(plora_registry_evict(registry, "large"));
        CHECK(is_resident(registry, "large") == (i == 0), "evicted: %d", i);
        CHECK_OK(plora_registry_acquire(registry, "large", &snapshot));
        CHECK_OK(plora_batch_begin(batch, TOKENS, slots, &snapshot, 1, NULL));
        plora_snapshot_release(snapshot);
        CHECK_OK(DEVICE(plora_batch_forward(batch, layers, 1, &device_x, &device_y, PLORA_LINEAR_DELTA_ONLY, NULL)));
        CHECK_OK(plora_batch_begin(batch, 0, NULL, NULL, 0, NULL));
    }
    CHECK(check_element(&y[0].m, 1, N - 1) != 0, "the adapter does nothing");
    CHECK(memcmp(y[0].m.data, y[1].m.data, TOKENS * N * sizeof(float)) == 0,
          "another answer after it was brought back");
    plora_batch_destroy(batch);
    plora_registry_destroy(registry);
    plora_model_destroy(model);
    plora_context_destroy(context);
    struct check_matrix *const matrices[] = {&w, &x, &a, &b, &y[0], &y[1]};
    for (int i = 0; i < CHECK_COUNT(matrices); ++i)
        check_matrix_free(matrices[i]);
}

/* -------------------------------------------------------------------------------------------------------------- merging */

static void read_weights(const struct registry_fixture *f, unsigned char *to)
{
    for (int i = 0; i < 2; ++i) {
        const struct check_matrix *w = &f->weights[i];
        device_transfer(to, device_of(w->memory), w->bytes);
        to += w->bytes;
    }
}

static void test_registry_merge(void **state)
{
    (void)state;
    struct setup *s = setup_new(9, 0, NULL);
    const size_t bytes = s->f->weights[0].bytes + s->f->weights[1].bytes;
    unsigned char *before = malloc(bytes), *after = malloc(bytes);
    const int32_t slots[REGISTRY_TOKENS] = {0};
    plora_snapshot *own, *other;
    CHECK(before != NULL && after != NULL, "the test itself is out of memory");
    read_weights(s->f, before);
    CHECK_OK(registry_add(s->f, s->registry, "own", 3, NULL));
    CHECK_OK(registry_add(s->f, s->registry, "other", 1, NULL));
    CHECK_OK(plora_registry_acquire(s->registry, "own", &own));
    CHECK_OK(plora_batch_begin(client.batch, REGISTRY_TOKENS, slots, &own, 1, NULL));
    CHECK_OK(registry_forward(&client, 0)); /* W x + s B A x */
    float apart[REGISTRY_N0];
    memcpy(apart, client.rows[0], sizeof apart);
    CHECK_OK(plora_registry_acquire(s->registry, "other", &other));
    CHECK_FAILS(plora_registry_merge(s->registry, "own"), PLORA_ERROR_BUSY, "'own'", "'other'");
    plora_snapshot_release(other);
    CHECK_OK(plora_registry_merge(s->registry, "own"));
    CHECK_FAILS(registry_forward(&client, 0), PLORA_ERROR_BUSY, "plora_batch_begin");
    CHECK_OK(plora_batch_begin(client.batch, REGISTRY_TOKENS, slots, &own, 1, NULL));
    CHECK_OK(registry_forward(&client, 0));
    for (int n = 0; n < REGISTRY_N0; ++n)
        CHECK_CLOSE(client.rows[0][n], apart[n], 1e-4, "merged, output %d", n);
    read_weights(s->f, after);
    CHECK(memcmp(before, after, bytes) != 0, "the merge has changed no weight");
    CHECK_FAILS(plora_registry_merge(s->registry, "own"), PLORA_ERROR_BUSY, "merged adapter already");
    CHECK_FAILS(registry_add(s->f, s->registry, "own", 0, NULL), PLORA_ERROR_BUSY, "'own'", "merged");
    CHECK_FAILS(plora_registry_unload(s->registry, "own", PLORA_REGISTRY_DEFER), PLORA_ERROR_BUSY, "'own'", "merged");
    CHECK_OK(plora_registry_acquire(s->registry, "other", &other));
    CHECK_FAILS(plora_batch_begin(client.batch, REGISTRY_TOKENS, slots, &other, 1, NULL), PLORA_ERROR_BUSY, "'other'",
                "merged");
    plora_snapshot_release(other);
    plora_adapters *trained = registry_trained(s->f, 1);
    CHECK_FAILS(plora_unload(trained, NULL, NULL, NULL, NULL), PLORA_ERROR_BUSY, "plora_registry_unmerge");
    plora_adapters_destroy(trained);
    CHECK_OK(plora_registry_unmerge(s->registry));
    CHECK_FAILS(plora_registry_unmerge(s->registry), PLORA_ERROR_INVALID_ARGUMENT, "no adapter");
    read_weights(s->f, after);
    CHECK(memcmp(before, after, bytes) == 0, "the weights are not what they were");
    plora_snapshot_release(own);
    CHECK_OK(plora_batch_begin(client.batch, 0, NULL, NULL, 0, NULL));
    check_answers(s->registry, "own", s->f->answers[3], "after the merge was undone");
    /* A factor that overflows: nothing is written. And a registry that ends while merged puts the weights back. */
    for (int i = 0; i < REGISTRY_N0; ++i)
        ((float *)s->f->b[0][0].m.data)[i] *= 1e6f;
    s->f->scales[0] = 3e38;
    CHECK_OK(registry_add(s->f, s->registry, "huge", 0, NULL));
    CHECK_FAILS(plora_registry_merge(s->registry, "huge"), PLORA_ERROR_NON_FINITE, "'huge'", "m.q_proj", "overflow");
    read_weights(s->f, after);
    CHECK(memcmp(before, after, bytes) == 0, "the weights are not what they were");
    CHECK_OK(plora_registry_merge(s->registry, "own"));
    plora_registry_destroy(s->registry);
    s->registry = NULL;
    read_weights(s->f, after);
    CHECK(memcmp(before, after, bytes) == 0, "the registry has ended, but not its merge");
    free(before);
    free(after);
    setup_free(s);
}

/* Refused whatever master the weight has; a weight before it is as it was, and adapters of the other layers are merged. */
static void check_merge_quantised(const struct kind *kind, int32_t master)
{
    enum { K = 70, N = 40, RANK = 3 };
    plora_context *context = check_context(NULL, 0, 0);
    plora_model *model;
    plora_registry *registry;
    struct arrays *codes = arrays_new(kind, N, K);
    float *values = random_values(N * K, 0.5);
    struct check_matrix w = check_matrix_new(N, K, K, PLORA_F32);
    struct check_matrix a = check_matrix_new(RANK, K, K, PLORA_F32), b = check_matrix_new(N, RANK, RANK, PLORA_F32);
    check_matrix_random(&w, 1.0);
    check_matrix_random(&a, 1.0);
    check_matrix_random(&b, 1.0);
    check_matrix_snapshot(&w);
    const plora_matrix matrix = dense(values, N, K, PLORA_F32);
    plora_quantised_linear linear = PLORA_QUANTISED_LINEAR_INIT;
    linear.name = "m.up_proj";
    linear.weight = on_device(codes);
    CHECK_OK(DEVICE(plora_quantise(context, &matrix, &linear.weight, 0, NULL)));
    linear.master = master;
    CHECK_OK(plora_model_create(context, &model));
    CHECK_OK(check_add_linear(model, "m.q_proj", &w.m, NULL, PLORA_F32, 0, NULL));
    CHECK_OK(plora_model_add_quantised(model, &linear, NULL));
    CHECK_OK(plora_registry_create(model, NULL, &registry));
    const plora_registry_layer layers[2] = {{.a = a.m, .b = b.m, .scale = 0.1, .layer = 0},
                                            {.a = a.m, .b = b.m, .scale = 0.1, .layer = 1}};
    CHECK_OK(plora_registry_add(registry, "both", layers, 2, NULL));
    CHECK_OK(plora_registry_add(registry, "plain", layers, 1, NULL));
    memset(codes->w.codes, CHECK_POISON, codes->codes_bytes);
    CHECK_FAILS(DEVICE(plora_registry_merge(registry, "both")), PLORA_ERROR_UNSUPPORTED, "'both'", "'m.up_proj'",
                "quantised weight", "nothing was merged");
    check_matrix_unchanged(&w, "refused");
    for (size_t i = 0; i < codes->codes_bytes; ++i)
        CHECK(((uint8_t *)codes->w.codes)[i] == CHECK_POISON, "a refused merge wrote code %zu", i);
    CHECK_FAILS(plora_registry_unmerge(registry), PLORA_ERROR_INVALID_ARGUMENT, "no adapter");
    CHECK_OK(plora_registry_unload(registry, "both", 0));
    CHECK_OK(DEVICE(plora_registry_merge(registry, "plain")));
    CHECK(memcmp(w.memory, w.snapshot, w.bytes) != 0, "the merge has changed no weight");
    CHECK_OK(DEVICE(plora_registry_unmerge(registry)));
    check_matrix_unchanged(&w, "unmerged");
    plora_registry_destroy(registry);
    plora_model_destroy(model);
    plora_context_destroy(context);
    check_matrix_free(&w);
    check_matrix_free(&a);
    check_matrix_free(&b);
    arrays_free(codes);
    free(values);
}

static void test_registry_merge_quantised(void **state)
{
    (void)state;
    check_reseed(13);
    for (int k = 0; k < CHECK_COUNT(kinds); ++k)
        check_merge_quantised(&kinds[k], k % 2 == 0 ? PLORA_MASTER_NONE : PLORA_MASTER_MEMORY);
}

/* -------------------------------------------------------------------------------------------------------- out of memory */

enum { OPERATIONS = 6 };

static plora_status operate(struct setup *s, int operation, plora_adapters *adapters)
{
    plora_registry *registry;
    struct registry_client another;
    plora_status status;
    switch (operation) {
    case 0: return registry_add(s->f, s->registry, "new", 2, NULL);
    case 1: return plora_registry_load(s->registry, "new", file_path("saved"), NULL, NULL);
    case 2: return plora_registry_publish(s->registry, "new", adapters, NULL, NULL);
    case 3: return plora_registry_merge(s->registry, "kept");
    case 4:
        status = registry_client_open(s->f, &another);
        registry_client_close(&another);
        return status;
    default:
        status = plora_registry_create(s->f->model, NULL, &registry);
        if (status == PLORA_OK) plora_registry_destroy(registry);
        return status;
    }
}

static void test_registry_out_of_memory(void **state)
{
    (void)state;
    struct setup *s = setup_new(10, 0, NULL);
    plora_adapters *adapters = registry_trained(s->f, 2);
    CHECK_OK(plora_adapters_save(adapters, file_path("saved")));
    CHECK_OK(registry_add(s->f, s->registry, "kept", 4, NULL));
    for (int operation = 0; operation < OPERATIONS; ++operation) {
        int failures = 0;
        for (int k = 1;; ++k) {
            const int64_t live = s->allocator.live;
            s->allocator.fail_at = s->allocator.calls + k;
            const plora_status status = operate(s, operation, adapters);
            const int failed = s->allocator.calls >= s->allocator.fail_at;
            s->allocator.fail_at = 0;
            if (!failed) {
                CHECK(status == PLORA_OK, "operation %d: status %d: %s", operation, status, plora_last_error());
                break;
            }
            CHECK(status == PLORA_ERROR_OUT_OF_MEMORY, "operation %d, allocation %d: status %d: %s", operation, k,
                  status, plora_last_error());
            CHECK(s->allocator.live == live, "operation %d, allocation %d: %lld allocations are left", operation, k,
                  (long long)(s->allocator.live - live));
            CHECK(stats_of(s->registry).names == 1, "operation %d, allocation %d: a name is there", operation, k);
            failures++;
        }
        CHECK(failures > 0, "operation %d has allocated nothing", operation);
        if (operation == 3) CHECK_OK(plora_registry_unmerge(s->registry));
        if (operation < 3) {
            check_answers(s->registry, "new", s->f->answers[2], "in the end");
            CHECK_OK(plora_registry_unload(s->registry, "new", 0));
        }
        check_answers(s->registry, "kept", s->f->answers[4], "kept");
    }
    plora_adapters_destroy(adapters);
    setup_free(s);
}

/* The hot calls allocate nothing. */
static void test_registry_no_allocation(void **state)
{
    (void)state;
    struct setup *s = setup_new(11, 0, NULL);
    CHECK_OK(registry_add(s->f, s->registry, "a", 4, NULL));
    CHECK_OK(registry_ask(s->registry, &client, "a"));
    const int64_t calls = s->allocator.calls;
    for (int i = 0; i < 3; ++i)
        check_answers(s->registry, "a", s->f->answers[4], "again");
    CHECK(s->allocator.calls == calls, "%lld allocations", (long long)(s->allocator.calls - calls));
    setup_free(s);
}

int main(void)
{
    check_begin("test_registry");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_registry_versions),      cmocka_unit_test(test_registry_busy),
        cmocka_unit_test(test_registry_names),         cmocka_unit_test(test_registry_load),
        cmocka_unit_test(test_registry_publish),       cmocka_unit_test(test_registry_add_errors),
        cmocka_unit_test(test_registry_evict),         cmocka_unit_test(test_registry_evict_large),
        cmocka_unit_test(test_registry_merge),         cmocka_unit_test(test_registry_merge_quantised),
        cmocka_unit_test(test_registry_out_of_memory), cmocka_unit_test(test_registry_no_allocation),
    };
    return cmocka_run_group_tests(tests, file_setup, file_teardown);
}
