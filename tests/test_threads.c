/* test_threads.c: handles used from several threads, as the header allows: adapters on one context and on one model, forwards on one
 * handle, creation beside destruction, messages by thread. The results must be those of one thread; run it under a race
 * detector (make tsan) for the rest. Threads report by a count of failures: cmocka's assertions belong to the main thread. */
#include "check.h"

enum { THREADS = 4, LAYERS = 3, FEATURES = 24, TOKENS = 9, RANK = 3 };

static int rounds(void)
{
    return check_quick() ? 5 : 40;
}

struct worker {
    pthread_t thread;
    int index;
    plora_context *context;
    plora_model *model;
    plora_adapters *adapters;
    const plora_matrix *x; /* this, y, dx: memory of the backend */
    float *y, *dx, *dy;    /* [TOKENS * FEATURES] */
    const float *want;     /* [LAYERS][TOKENS * FEATURES] */
    int failures;
    char message[256];
};

static void note(struct worker *worker, int holds, const char *what)
{
    if (holds) return;
    if (worker->failures++ == 0)
        snprintf(worker->message, sizeof worker->message, "%s; last error '%.150s'", what, plora_last_error());
}

static void run(struct worker *workers, void *(*body)(void *))
{
    for (int i = 0; i < THREADS; ++i) {
        workers[i].index = i;
        CHECK(pthread_create(&workers[i].thread, NULL, body, &workers[i]) == 0, "cannot start thread %d", i);
    }
    for (int i = 0; i < THREADS; ++i)
        pthread_join(workers[i].thread, NULL);
    for (int i = 0; i < THREADS; ++i)
        CHECK(workers[i].failures == 0, "thread %d: %d failures, the first: %s", i, workers[i].failures,
              workers[i].message);
}

static struct check_matrix weights[LAYERS];

static plora_status make_model(plora_context *context, plora_model **model)
{
    plora_status status = plora_model_create(context, model);
    for (int i = 0; i < LAYERS && status == PLORA_OK; ++i) {
        char name[32];
        snprintf(name, sizeof name, "layer.%d", i);
        status = check_add_linear(*model, name, &weights[i].m, NULL, 0, 0, NULL);
    }
    return status;
}

static plora_status make_adapters(plora_model *model, uint64_t seed, plora_adapters **adapters)
{
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = RANK;
    options.init = PLORA_INIT_GAUSSIAN;
    options.seed = seed;
    options.workspace_tokens = 4; /* several passes a call */
    return plora_adapters_create(model, &options, adapters);
}

/* B other than zero, the same for the same seed. */
static void fill(plora_adapters *adapters, uint64_t seed)
{
    float b[FEATURES * RANK];
    for (int i = 0; i < FEATURES * RANK; ++i)
        b[i] = (float)((seed + (uint64_t)i * 7) % 11) / 11.0f;
    for (int32_t layer = 0; layer < LAYERS; ++layer) {
        plora_adapter adapter = PLORA_ADAPTER_INIT;
        if (plora_adapters_layer(adapters, layer, &adapter) != PLORA_OK) return;
        device_transfer(adapter.b.data, b, sizeof b);
    }
}

static const float zeros[TOKENS * FEATURES];

/* Memory of the backend for a thread's y. */
static float *values_new(void)
{
    float *values = device_is_cuda() ? device_malloc(sizeof zeros) : malloc(sizeof zeros);
    CHECK(values != NULL, "the test itself is out of memory");
    device_transfer(values, zeros, sizeof zeros);
    return values;
}

static void values_free(float *values)
{
    if (device_is_cuda())
        device_free(values);
    else
        free(values);
}

static void poison_y(const struct worker *worker)
{
    unsigned char poison[sizeof zeros];
    memset(poison, CHECK_POISON, sizeof poison);
    device_transfer(worker->y, poison, sizeof poison);
}

static int y_is_wanted(const struct worker *worker, int32_t layer)
{
    float y[TOKENS * FEATURES];
    device_transfer(y, worker->y, sizeof y);
    return memcmp(y, worker->want + layer * TOKENS * FEATURES, sizeof y) == 0;
}

/* NOLINTNEXTLINE(readability-non-const-parameter): y is written through the matrix */
static plora_status forward(plora_adapters *adapters, int32_t layer, const plora_matrix *x, float *y)
{
    const plora_matrix out = {y, TOKENS, FEATURES, FEATURES, PLORA_F32, 0};
    return plora_linear_forward(adapters, layer, x, &out, 0, NULL);
}

static plora_status backward(plora_adapters *adapters, int32_t layer, const struct worker *worker)
{
    const plora_matrix in = {worker->dy, TOKENS, FEATURES, FEATURES, PLORA_F32, 0};
    const plora_matrix out = {worker->dx, TOKENS, FEATURES, FEATURES, PLORA_F32, 0};
    return plora_linear_backward(adapters, layer, worker->x, &in, &out, 0, NULL);
}

/* Training beside training: each thread has its own adapters on its own model over the shared context and weights. */
static void *own_adapters(void *user)
{
    struct worker *worker = user;
    plora_model *model = NULL;
    plora_adapters *adapters = NULL;
    plora_optimizer *optimizer = NULL;
    note(worker, make_model(worker->context, &model) == PLORA_OK, "model");
    note(worker, make_adapters(model, 5, &adapters) == PLORA_OK, "adapters");
    note(worker, plora_optimizer_create(adapters, NULL, &optimizer) == PLORA_OK, "optimizer");
    if (worker->failures > 0) return NULL;
    fill(adapters, 5);
    for (int i = 0; i < rounds(); ++i) {
        const int32_t layer = (worker->index + i) % LAYERS;
        note(worker, forward(adapters, layer, worker->x, worker->y) == PLORA_OK, "forward");
        note(worker, y_is_wanted(worker, layer), "y differs from one thread's");
        note(worker, backward(adapters, layer, worker) == PLORA_OK, "backward");
    }
    note(worker, plora_optimizer_step(optimizer, 1.0, NULL, NULL) == PLORA_OK, "step");
    plora_context_destroy(NULL);
    plora_model_destroy(model);
    plora_adapters_destroy(adapters);
    plora_optimizer_destroy(optimizer);
    return NULL;
}

/* Forwards on one handle from all threads at once: the library makes them take turns. */
static void *shared_adapters(void *user)
{
    struct worker *worker = user;
    for (int i = 0; i < rounds(); ++i) {
        const int32_t layer = (worker->index + i) % LAYERS;
        poison_y(worker);
        note(worker, forward(worker->adapters, layer, worker->x, worker->y) == PLORA_OK, "forward");
        note(worker, y_is_wanted(worker, layer), "y differs from one thread's");
    }
    return NULL;
}

/* Adapter sets of one model come and go while another set computes. */
static void *come_and_go(void *user)
{
    struct worker *worker = user;
    for (int i = 0; i < rounds(); ++i) {
        plora_model *model = NULL;
        plora_adapters *adapters = NULL;
        if (worker->index == 0) {
            note(worker, forward(worker->adapters, i % LAYERS, worker->x, worker->y) == PLORA_OK, "forward");
            note(worker, y_is_wanted(worker, i % LAYERS), "y differs");
            continue;
        }
        note(worker, make_model(worker->context, &model) == PLORA_OK, "model");
        note(worker, make_adapters(model, (uint64_t)i, &adapters) == PLORA_OK, "adapters");
        plora_model_destroy(model);
        if (adapters != NULL)
            note(worker, forward(adapters, 0, worker->x, worker->y) == PLORA_OK, "forward on a new set");
        plora_adapters_destroy(adapters);
    }
    return NULL;
}

/* A message belongs to the thread whose call failed. */
static void *own_messages(void *user)
{
    struct worker *worker = user;
    char name[32];
    snprintf(name, sizeof name, "no.such.layer.%d", worker->index);
    note(worker, plora_last_error()[0] == '\0', "a new thread has a message");
    for (int i = 0; i < rounds() * 20; ++i) {
        int32_t layer;
        note(worker, plora_model_find_layer(worker->model, name, &layer) == PLORA_ERROR_NOT_FOUND, "find");
        note(worker, strstr(plora_last_error(), name) != NULL, "another thread's message");
        plora_memory_statistics statistics = PLORA_MEMORY_STATISTICS_INIT;
        note(worker, plora_memory_stats(worker->context, &statistics) == PLORA_OK && statistics.current_bytes > 0,
             "statistics");
    }
    return NULL;
}

/* Contexts of their own share nothing. */
static void *own_context(void *user)
{
    struct worker *worker = user;
    for (int i = 0; i < 3; ++i) {
        plora_context *context = NULL;
        plora_model *model = NULL;
        plora_adapters *adapters = NULL;
        note(worker, check_context_create(NULL, NULL, 1, 1, &context) == PLORA_OK, "context");
        note(worker, make_model(context, &model) == PLORA_OK && make_adapters(model, 5, &adapters) == PLORA_OK,
             "handles");
        if (worker->failures > 0) return NULL;
        fill(adapters, 5);
        for (int32_t layer = 0; layer < LAYERS; ++layer) {
            note(worker, forward(adapters, layer, worker->x, worker->y) == PLORA_OK, "forward");
            note(worker, y_is_wanted(worker, layer), "y differs");
        }
        plora_context_destroy(context);
        plora_model_destroy(model);
        plora_adapters_destroy(adapters);
    }
    return NULL;
}

/* Runs all bodies, on contexts with 1 and with 2 threads of their own. */
static void concurrent_use(void **state)
{
    (void)state;
    static void *(*const bodies[])(void *) = {own_adapters, shared_adapters, come_and_go, own_messages, own_context};
    check_reseed(1);
    for (int i = 0; i < LAYERS; ++i) {
        weights[i] = check_matrix_new(FEATURES, FEATURES, FEATURES, PLORA_F32);
        check_matrix_random(&weights[i], 1.0);
        check_matrix_snapshot(&weights[i]);
    }
    struct check_matrix x = check_matrix_new(TOKENS, FEATURES, FEATURES + 3, PLORA_F32);
    check_matrix_random(&x, 1.0);
    device_upload();
    const plora_matrix device_x = device_matrix(x.m);
    struct worker buffers[THREADS] = {0};
    for (int i = 0; i < THREADS; ++i) {
        buffers[i].y = values_new();
        buffers[i].dx = values_new();
        buffers[i].dy = values_new();
    }
    for (int threads = 1; threads <= 2; ++threads) {
        struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
        plora_context *context = check_context(&allocator, threads, 1);
        plora_model *model = NULL;
        plora_adapters *adapters = NULL;
        CHECK_OK(make_model(context, &model));
        CHECK_OK(make_adapters(model, 5, &adapters));
        fill(adapters, 5);
        static float want[LAYERS * TOKENS * FEATURES];
        for (int32_t layer = 0; layer < LAYERS; ++layer) {
            CHECK_OK(forward(adapters, layer, &device_x, buffers[0].y));
            device_transfer(want + layer * TOKENS * FEATURES, buffers[0].y, sizeof zeros);
        }
        for (int body = 0; body < CHECK_COUNT(bodies); ++body) {
            struct worker workers[THREADS] = {0};
            for (int i = 0; i < THREADS; ++i)
                workers[i] = (struct worker){.context = context,
                                             .model = model,
                                             .adapters = adapters,
                                             .x = &device_x,
                                             .y = buffers[i].y,
                                             .dx = buffers[i].dx,
                                             .dy = buffers[i].dy,
                                             .want = want};
            run(workers, bodies[body]);
        }
        plora_adapters_destroy(adapters);
        plora_model_destroy(model);
        plora_context_destroy(context);
        check_allocator_empty(&allocator, "after all threads");
    }
    for (int i = 0; i < THREADS; ++i) {
        values_free(buffers[i].y);
        values_free(buffers[i].dx);
        values_free(buffers[i].dy);
    }
    for (int i = 0; i < LAYERS; ++i) {
        check_matrix_unchanged(&weights[i], "a weight");
        check_matrix_free(&weights[i]);
    }
    check_matrix_free(&x);
}

int main(void)
{
    check_begin("test_threads");
    const struct CMUnitTest tests[] = {cmocka_unit_test(concurrent_use)};
    return cmocka_run_group_tests_name("threads", tests, NULL, NULL);
}
