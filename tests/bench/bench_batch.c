/* bench_batch.c: what many adapters cost in one batch, and what a replacement costs those who read.
 *
 *     bench_batch [REPEATS [N K T R [ADAPTERS...]]]     default 21 repeats of 576 x 576, 1024 tokens, R = 16, of 1 8 64 adapters
 *     bench_batch stall [SECONDS [N K R]]               default 3 s of 4096 x 4096, R = 16
 *
 *     base        y = x W^T
 *     delta_A     y += s x A^T B^T, the tokens dealt among A adapters in runs of equal length (T / A each), by DELTA_ONLY
 *     dealt_A     the same, neighbours never of the same adapter
 *     grouped_A   three such layers with the same x in one call, per layer
 *
 * All are measured in turn; prints one JSON object with the seconds of every repeat, for fp32 and bf16. With `stall`, one thread acquires,
 * begins a batch and releases all the time while another replaces the adapter. The longest of its rounds is printed without those during
 * which the system gave its core to another thread (preempted_us is the longest of them), and beside the longest while nobody replaces,
 * which is the machine's own. */
#include <pthread.h>
#include <stdatomic.h>
#include <sys/resource.h>

#include "measure.h"
#include "plora.h"

enum { MAX_REPEATS = 1000, MAX_COUNTS = 8, MAX_ADAPTERS = 256, LAYERS = 3 };

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != PLORA_OK) measure_die(plora_last_error());                                                       \
    } while (0)

struct served {
    plora_model *model;
    plora_registry *registry;
    plora_batch *batch;
    plora_snapshot *snapshots[MAX_ADAPTERS];
    void *weights[LAYERS];
};

static void *values(int64_t count, int32_t dtype, float scale)
{
    void *data = measure_allocate((size_t)count * (dtype == PLORA_F32 ? 4 : 2));
    if (dtype == PLORA_F32)
        measure_fill_fp32(data, count, scale);
    else
        measure_fill_bf16(data, count, scale);
    return data;
}

static void add(struct served *s, const char *name, int64_t n, int64_t k, int64_t rank)
{
    plora_registry_layer layers[LAYERS];
    float *a = values(rank * k, PLORA_F32, 0.05f), *b = values(n * rank, PLORA_F32, 0.01f);
    memset(layers, 0, sizeof layers);
    for (int32_t i = 0; i < LAYERS; ++i)
        layers[i] = (plora_registry_layer){
            .a = {a, rank, k, k, PLORA_F32, 0}, .b = {b, n, rank, rank, PLORA_F32, 0}, .scale = 2.0, .layer = i};
    TRY(plora_registry_add(s->registry, name, layers, LAYERS, NULL));
    free(a);
    free(b);
}

static void serve(struct served *s, plora_context *context, int32_t dtype, int64_t n, int64_t k, int64_t tokens,
                  int64_t rank, int adapters)
{
    plora_batch_options options = PLORA_BATCH_OPTIONS_INIT;
    memset(s, 0, sizeof *s);
    TRY(plora_model_create(context, &s->model));
    for (int i = 0; i < LAYERS; ++i) {
        static const char *const names[LAYERS] = {"q", "k", "v"};
        plora_linear linear = PLORA_LINEAR_INIT;
        linear.name = names[i];
        s->weights[i] = values(n * k, dtype, 0.05f);
        linear.weight = (plora_matrix){s->weights[i], n, k, k, dtype, 0};
        TRY(plora_model_add_linear(s->model, &linear, NULL));
    }
    TRY(plora_registry_create(s->model, NULL, &s->registry));
    for (int i = 0; i < adapters; ++i) {
        char name[16];
        snprintf(name, sizeof name, "a%d", i);
        add(s, name, n, k, rank);
        TRY(plora_registry_acquire(s->registry, name, &s->snapshots[i]));
    }
    options.max_tokens = tokens;
    options.max_adapters = MAX_ADAPTERS;
    options.max_rank = (int32_t)rank;
    TRY(plora_batch_create(s->model, &options, &s->batch));
}

static void end(struct served *s, int adapters)
{
    plora_batch_destroy(s->batch);
    for (int i = 0; i < adapters; ++i)
        plora_snapshot_release(s->snapshots[i]);
    plora_registry_destroy(s->registry);
    plora_model_destroy(s->model);
    for (int i = 0; i < LAYERS; ++i)
        free(s->weights[i]);
}

/* ----------------------------------------------------------------------------------------------------------------- cost */

enum form { BASE, DELTA, DEALT, GROUPED };

struct job {
    enum form form;
    int adapters;
    int32_t *slots;
    double seconds[MAX_REPEATS];
};

static double run(struct served *s, const struct job *job, const plora_matrix *x, const plora_matrix *y, int64_t tokens)
{
    static const int32_t layers[LAYERS] = {0, 1, 2};
    const int count = job->form == GROUPED ? LAYERS : 1;
    TRY(plora_batch_begin(s->batch, tokens, job->slots, s->snapshots, job->adapters, NULL));
    const double begin = measure_now();
    TRY(plora_batch_forward(s->batch, layers, count, x, y, job->form == BASE ? 0 : PLORA_LINEAR_DELTA_ONLY, NULL));
    return (measure_now() - begin) / count;
}

static int32_t *deal(enum form form, int64_t tokens, int adapters)
{
    int32_t *slots = malloc((size_t)tokens * sizeof *slots);
    if (slots == NULL) measure_die("out of memory");
    for (int64_t t = 0; t < tokens; ++t)
        slots[t] = form == BASE ? -1 : (int32_t)(form == DEALT ? t % adapters : t * adapters / tokens);
    return slots;
}

static void measure(plora_context *context, int32_t dtype, const int64_t *shape, const int *counts, int count,
                    int repeats)
{
    static struct job jobs[1 + 3 * MAX_COUNTS];
    static struct served s;
    const int64_t n = shape[0], k = shape[1], tokens = shape[2];
    plora_matrix y[LAYERS], x = {values(tokens * k, dtype, 1.0f), tokens, k, k, dtype, 0};
    int most = 1, job_count = 0;
    for (int i = 0; i < LAYERS; ++i)
        y[i] = (plora_matrix){values(tokens * n, dtype, 1.0f), tokens, n, n, dtype, 0};
    for (int i = 0; i < count; ++i)
        most = counts[i] > most ? counts[i] : most;
    serve(&s, context, dtype, n, k, tokens, shape[3], most);
    jobs[job_count++] = (struct job){.form = BASE, .adapters = 0};
    for (int i = 0; i < count; ++i)
        for (enum form form = DELTA; form <= GROUPED; ++form)
            jobs[job_count++] = (struct job){.form = form, .adapters = counts[i]};
    for (int j = 0; j < job_count; ++j)
        jobs[j].slots = deal(jobs[j].form, tokens, jobs[j].adapters);
    for (int i = -2; i < repeats; ++i)
        for (int j = 0; j < job_count; ++j) {
            const double time = run(&s, &jobs[j], &x, y, tokens);
            if (i >= 0) jobs[j].seconds[i] = time;
        }
    for (int j = 0; j < job_count; ++j) {
        static const char *const names[] = {"base", "delta", "dealt", "grouped"};
        char name[32];
        snprintf(name, sizeof name, jobs[j].form == BASE ? "%s" : "%s_%d", names[jobs[j].form], jobs[j].adapters);
        measure_print(name, jobs[j].seconds, repeats);
        printf("%s", j + 1 < job_count ? ",\n  " : "}");
        free(jobs[j].slots);
    }
    end(&s, most);
    free(x.data);
    for (int i = 0; i < LAYERS; ++i)
        free(y[i].data);
}

/* ---------------------------------------------------------------------------------------------------------------- stall */

struct reader {
    struct served *s;
    atomic_int stop;
    double longest, preempted, total; /* preempted: the longest round during which the thread lost its core */
    int64_t rounds;
};

/* How often the system has taken the core from this thread; waiting for a lock does not count. */
static long preemptions(void)
{
    struct rusage usage;
    if (getrusage(RUSAGE_THREAD, &usage) != 0) measure_die("getrusage");
    return usage.ru_nivcsw;
}

static void *read_all_the_time(void *data)
{
    struct reader *reader = data;
    const int32_t slots[4] = {0};
    long before = preemptions();
    while (!atomic_load_explicit(&reader->stop, memory_order_relaxed)) {
        plora_snapshot *snapshot;
        const double begin = measure_now();
        TRY(plora_registry_acquire(reader->s->registry, "a0", &snapshot));
        TRY(plora_batch_begin(reader->s->batch, 4, slots, &snapshot, 1, NULL));
        plora_snapshot_release(snapshot);
        const double time = measure_now() - begin;
        if (time > reader->longest) {
            const long now = preemptions();
            double *longest = now == before ? &reader->longest : &reader->preempted;
            if (time > *longest) *longest = time;
            before = now;
        }
        reader->total += time;
        reader->rounds++;
    }
    return NULL;
}

static struct reader read_for(struct served *s, double seconds, const int64_t *shape, int64_t *replaced)
{
    struct reader reader = {.s = s};
    pthread_t thread;
    *replaced = 0;
    if (pthread_create(&thread, NULL, read_all_the_time, &reader) != 0) measure_die("no thread");
    for (const double begin = measure_now(); measure_now() - begin < seconds;) {
        if (shape == NULL) {
            const struct timespec nap = {0, 10000000};
            nanosleep(&nap, NULL);
            continue;
        }
        add(s, "a0", shape[0], shape[1], shape[2]);
        ++*replaced;
    }
    atomic_store(&reader.stop, 1);
    pthread_join(thread, NULL);
    return reader;
}

static void stall(plora_context *context, double seconds, const int64_t *shape)
{
    static struct served s;
    int64_t replaced, none;
    serve(&s, context, PLORA_F32, shape[0], shape[1], 4, shape[2], 1);
    plora_snapshot_release(s.snapshots[0]);
    s.snapshots[0] = NULL;
    const struct reader quiet = read_for(&s, seconds, NULL, &none), busy = read_for(&s, seconds, shape, &replaced);
    printf(
        "{\"replaced\": %lld, \"rounds\": %lld, \"mean_us\": %.3f, \"longest_us\": %.1f, "
        "\"preempted_us\": %.1f, \"quiet_mean_us\": %.3f, \"quiet_longest_us\": %.1f, \"quiet_preempted_us\": %.1f}\n",
        (long long)replaced, (long long)busy.rounds, 1e6 * busy.total / (double)busy.rounds, 1e6 * busy.longest,
        1e6 * busy.preempted, 1e6 * quiet.total / (double)quiet.rounds, 1e6 * quiet.longest, 1e6 * quiet.preempted);
    end(&s, 0);
}

int main(int argc, char **argv)
{
    plora_context *context;
    TRY(plora_context_create(NULL, &context));
    if (argc > 1 && strcmp(argv[1], "stall") == 0) {
        int64_t shape[3] = {4096, 4096, 16};
        for (int i = 3; i < argc && i < 6; ++i)
            shape[i - 3] = atoll(argv[i]);
        stall(context, argc > 2 ? atof(argv[2]) : 3, shape);
        plora_context_destroy(context);
        return 0;
    }
    int64_t shape[4] = {576, 576, 1024, 16};
    int counts[MAX_COUNTS] = {1, 8, 64}, count = 3;
    const int repeats = argc > 1 ? atoi(argv[1]) : 21;
    if (repeats < 1 || repeats > MAX_REPEATS || (argc > 2 && argc < 6) || argc > 6 + MAX_COUNTS)
        measure_die("bench_batch [REPEATS [N K T R [ADAPTERS...]]], with 1 to 1000 repeats, or bench_batch stall ...");
    for (int i = 2; i < argc && i < 6; ++i)
        shape[i - 2] = atoll(argv[i]);
    for (int i = 6; i < argc; ++i)
        counts[i - 6] = atoi(argv[i]);
    if (argc > 6) count = argc - 6;
    for (int i = 0; i < count; ++i)
        if (counts[i] < 1 || counts[i] > MAX_ADAPTERS) measure_die("1 to 256 adapters");
    printf("{\"n\": %lld, \"k\": %lld, \"tokens\": %lld, \"rank\": %lld,\n\"fp32\": {", (long long)shape[0],
           (long long)shape[1], (long long)shape[2], (long long)shape[3]);
    measure(context, PLORA_F32, shape, counts, count, repeats);
    printf(",\n\"bf16\": {");
    measure(context, PLORA_BF16, shape, counts, count, repeats);
    printf("}\n");
    plora_context_destroy(context);
    return 0;
}
