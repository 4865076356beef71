/* test_registry_threads.c: requests on 8 threads while 2 others swap, replace, publish, unload, evict and pin: every answer has the bits of
 * the version that its request held. PLORA_TEST_SECONDS says for how long (60 under the sanitizers, by hand; else 4). */
#include <stdatomic.h>
#include <unistd.h>

#include "file_fixture.h"
#include "registry_fixture.h"

enum { NAMES = 10, READERS = 8, CHANGERS = 2, HOLD = 3 };

struct traffic {
    const struct registry_fixture *fixture;
    plora_registry *registry;
    atomic_int stop;
    atomic_llong requests, wrong, failures, changes, busy, misses;
    char text[READERS + CHANGERS][512]; /* the first failure of each thread */
};

struct worker {
    struct traffic *traffic;
    int number;
    plora_adapters *trained[REGISTRY_CONTENTS];
};

static void name_of(char name[16])
{
    snprintf(name, 16, "name%d", (int)check_integer(0, NAMES - 1));
}

static void note(struct worker *worker, atomic_llong *counter, const char *what, int value)
{
    struct traffic *traffic = worker->traffic;
    if (traffic->text[worker->number][0] == '\0')
        snprintf(traffic->text[worker->number], sizeof traffic->text[0], "%s %d: %s", what, value, plora_last_error());
    atomic_fetch_add(counter, 1);
}

/* One request: up to HOLD snapshots, mixed over the tokens, for a few steps. */
static void request(struct worker *worker, struct registry_client *client)
{
    struct traffic *traffic = worker->traffic;
    plora_snapshot *snapshots[HOLD];
    int contents[HOLD], count = 0;
    int32_t slots[REGISTRY_TOKENS];
    const int wanted = (int)check_integer(1, HOLD);
    for (int i = 0; i < wanted; ++i) {
        char name[16];
        plora_snapshot_info info = PLORA_SNAPSHOT_INFO_INIT;
        name_of(name);
        const plora_status status = plora_registry_acquire(traffic->registry, name, &snapshots[count]);
        if (status == PLORA_ERROR_NOT_FOUND ||
            status == PLORA_ERROR_OUT_OF_MEMORY) { /* none, or all the others are held */
            atomic_fetch_add(&traffic->misses, 1);
            continue;
        }
        if (status != PLORA_OK || plora_snapshot_describe(snapshots[count], &info) != PLORA_OK) {
            note(worker, &traffic->failures, "acquire", status);
            continue;
        }
        contents[count++] = info.rank - 1;
    }
    const int steps = (int)check_integer(1, 4);
    for (int step = 0; step < steps; ++step) {
        for (int t = 0; t < REGISTRY_TOKENS; ++t)
            slots[t] = (int32_t)check_integer(-1, count - 1);
        plora_status status = plora_batch_begin(client->batch, REGISTRY_TOKENS, slots, snapshots, count, NULL);
        if (status == PLORA_OK) status = registry_forward(client, PLORA_LINEAR_DELTA_ONLY);
        if (status != PLORA_OK) note(worker, &traffic->failures, "forward", status);
        for (int t = 0; t < REGISTRY_TOKENS && status == PLORA_OK; ++t)
            if (!registry_is_answer(client, t, slots[t] < 0 ? NULL : traffic->fixture->answers[contents[slots[t]]]))
                note(worker, &traffic->wrong, "wrong answer, content", slots[t] < 0 ? -1 : contents[slots[t]]);
    }
    for (int i = 0; i < count; ++i)
        plora_snapshot_release(snapshots[i]); /* the batch holds them until its next step */
    atomic_fetch_add(&traffic->requests, 1);
}

static void *serve(void *data)
{
    struct worker *worker = data;
    struct registry_client *client = calloc(1, sizeof *client);
    check_reseed(1000 + (uint64_t)worker->number);
    if (client == NULL || registry_client_open(worker->traffic->fixture, client) != PLORA_OK) abort();
    while (!atomic_load(&worker->traffic->stop))
        request(worker, client);
    registry_client_close(client);
    free(client);
    return NULL;
}

static plora_status change(struct worker *worker, const char *name)
{
    struct traffic *traffic = worker->traffic;
    const int content = (int)check_integer(0, REGISTRY_CONTENTS - 1), what = (int)check_integer(0, 9);
    if (what < 4) return registry_add(traffic->fixture, traffic->registry, name, content, NULL);
    if (what < 5) return plora_registry_publish(traffic->registry, name, worker->trained[content], NULL, NULL);
    if (what < 7) return plora_registry_evict(traffic->registry, name);
    if (what < 8) return plora_registry_unload(traffic->registry, name, 0);
    if (what < 9) return plora_registry_unload(traffic->registry, name, PLORA_REGISTRY_DEFER);
    const plora_status status = plora_registry_pin(traffic->registry, name, 1);
    return status == PLORA_OK ? plora_registry_pin(traffic->registry, name, 0) : status;
}

static void *swap(void *data)
{
    struct worker *worker = data;
    struct traffic *traffic = worker->traffic;
    check_reseed(2000 + (uint64_t)worker->number);
    while (!atomic_load(&traffic->stop)) {
        char name[16];
        name_of(name);
        const plora_status status = change(worker, name);
        if (status == PLORA_ERROR_BUSY || status == PLORA_ERROR_OUT_OF_MEMORY)
            atomic_fetch_add(&traffic->busy, 1);
        else if (status != PLORA_OK && status != PLORA_ERROR_NOT_FOUND)
            note(worker, &traffic->failures, "change", status);
        else
            atomic_fetch_add(&traffic->changes, 1);
    }
    return NULL;
}

static double seconds(void)
{
    const char *given = getenv("PLORA_TEST_SECONDS");
    return given != NULL && *given != '\0' ? strtod(given, NULL) : 4;
}

/* Room for about half of the names. */
static plora_registry *registry_new(const struct registry_fixture *f)
{
    plora_registry_options options = PLORA_REGISTRY_OPTIONS_INIT;
    plora_registry_statistics statistics = PLORA_REGISTRY_STATISTICS_INIT;
    plora_registry *registry;
    CHECK_OK(plora_registry_create(f->model, NULL, &registry));
    CHECK_OK(registry_add(f, registry, "largest", REGISTRY_CONTENTS - 1, NULL));
    CHECK_OK(plora_registry_stats(registry, &statistics));
    plora_registry_destroy(registry);
    options.memory_budget = (size_t)statistics.resident_bytes * NAMES / 2;
    options.spill_directory = device_is_cuda() ? NULL : file_directory;
    CHECK_OK(plora_registry_create(f->model, &options, &registry));
    return registry;
}

static void test_registry_traffic(void **state)
{
    (void)state;
    check_reseed(1);
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    struct registry_fixture *f = registry_fixture_new(device_is_cuda() ? NULL : &allocator);
    struct traffic *traffic = calloc(1, sizeof *traffic);
    struct worker workers[READERS + CHANGERS];
    pthread_t threads[READERS + CHANGERS];
    CHECK(traffic != NULL, "the test itself is out of memory");
    traffic->fixture = f;
    traffic->registry = registry_new(f);
    for (int i = 0; i < READERS + CHANGERS; ++i) {
        workers[i] = (struct worker){.traffic = traffic, .number = i};
        for (int c = 0; i >= READERS && c < REGISTRY_CONTENTS; ++c)
            workers[i].trained[c] = registry_trained(f, c);
    }
    for (int i = 0; i < READERS + CHANGERS; ++i)
        CHECK(pthread_create(&threads[i], NULL, i < READERS ? serve : swap, &workers[i]) == 0, "no thread");
    const double wait = device_is_cuda() && seconds() > 4 ? 4 : seconds();
    usleep((useconds_t)(1e6 * wait));
    atomic_store(&traffic->stop, 1);
    for (int i = 0; i < READERS + CHANGERS; ++i)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < READERS + CHANGERS; ++i) {
        CHECK(traffic->text[i][0] == '\0', "thread %d: %s", i, traffic->text[i]);
        for (int c = 0; i >= READERS && c < REGISTRY_CONTENTS; ++c)
            plora_adapters_destroy(workers[i].trained[c]);
    }
    CHECK(traffic->wrong == 0 && traffic->failures == 0, "%lld wrong answers, %lld failures", (long long)traffic->wrong,
          (long long)traffic->failures);
    plora_registry_statistics statistics = PLORA_REGISTRY_STATISTICS_INIT;
    CHECK_OK(plora_registry_collect(traffic->registry));
    CHECK_OK(plora_registry_stats(traffic->registry, &statistics));
    print_message("%lld requests, %lld changes, %lld refused; %lld replaced, %lld evicted, %lld restored\n",
                  (long long)traffic->requests, (long long)traffic->changes, (long long)traffic->busy,
                  (long long)statistics.replaced, (long long)statistics.evicted, (long long)statistics.restored);
    CHECK(statistics.retired == 0, "%lld snapshots without name or holder are left", (long long)statistics.retired);
    CHECK(traffic->requests > 0 && statistics.replaced > 0 && statistics.evicted > 0 && statistics.restored > 0,
          "too little has happened");
    plora_registry_destroy(traffic->registry);
    registry_fixture_free(f);
    free(traffic);
    if (!device_is_cuda()) check_allocator_empty(&allocator, "registry");
}

int main(void)
{
    check_begin("test_registry_threads");
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_registry_traffic)};
    return cmocka_run_group_tests(tests, file_setup, file_teardown);
}
