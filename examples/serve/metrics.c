/* metrics.c: see metrics.h. Seconds are summed in whole microseconds, so that one atomic addition does. */
#include "metrics.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "util.h"

static const double BOUNDS[] = {0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60};
enum { BUCKETS = sizeof BOUNDS / sizeof *BOUNDS };

static const unsigned STATUSES[] = {200, 400, 404, 405, 408, 409, 413, 415, 429, 500, 503, 504};
enum { STATUS_COUNT = sizeof STATUSES / sizeof *STATUSES };

struct histogram {
    _Atomic int64_t buckets[BUCKETS + 1], microseconds;
};

struct metrics {
    _Atomic int64_t counters[COUNTERS], gauges[GAUGES], replies[STATUS_COUNT + 1];
    _Atomic int64_t steps, step_rows, step_microseconds;
    struct histogram first_token, finished;
};

int metrics_create(struct metrics **metrics)
{
    return memory_allocate(1, sizeof **metrics, "metrics", metrics);
}

void metrics_destroy(struct metrics *m)
{
    free(m);
}

static void add(_Atomic int64_t *value, int64_t amount)
{
    atomic_fetch_add_explicit(value, amount, memory_order_relaxed);
}

static int64_t get(const _Atomic int64_t *value)
{
    return atomic_load_explicit(value, memory_order_relaxed);
}

void metrics_add(struct metrics *m, enum counter counter, int64_t amount)
{
    add(&m->counters[counter], amount);
}

void metrics_set(struct metrics *m, enum gauge gauge, int64_t value)
{
    atomic_store_explicit(&m->gauges[gauge], value, memory_order_relaxed);
}

void metrics_reply(struct metrics *m, unsigned status)
{
    int i = 0;
    while (i < STATUS_COUNT && STATUSES[i] != status)
        i++;
    add(&m->replies[i], 1);
}

static void observe(struct histogram *h, double seconds)
{
    int i = 0;
    while (i < BUCKETS && seconds > BOUNDS[i])
        i++;
    add(&h->buckets[i], 1);
    add(&h->microseconds, (int64_t)(seconds * 1e6));
}

void metrics_first_token(struct metrics *m, double seconds)
{
    observe(&m->first_token, seconds);
}

void metrics_finished(struct metrics *m, double seconds)
{
    observe(&m->finished, seconds);
}

void metrics_step(struct metrics *m, int64_t rows, double seconds)
{
    add(&m->steps, 1);
    add(&m->step_rows, rows);
    add(&m->step_microseconds, (int64_t)(seconds * 1e6));
}

/* --------------------------------------------------------------------------------------------------------------- report */

static void head(struct buffer *out, const char *name, const char *type, const char *help)
{
    buffer_print(out, "# HELP plora_%s %s\n# TYPE plora_%s %s\n", name, help, name, type);
}

static void number(struct buffer *out, const char *name, const char *type, int64_t value, const char *help)
{
    head(out, name, type, help);
    buffer_print(out, "plora_%s %lld\n", name, (long long)value);
}

static void histogram(struct buffer *out, const char *name, const struct histogram *h, const char *help)
{
    int64_t sum = 0;
    head(out, name, "histogram", help);
    for (int i = 0; i < BUCKETS; i++) {
        sum += get(&h->buckets[i]);
        buffer_print(out, "plora_%s_bucket{le=\"%g\"} %lld\n", name, BOUNDS[i], (long long)sum);
    }
    sum += get(&h->buckets[BUCKETS]);
    buffer_print(out, "plora_%s_bucket{le=\"+Inf\"} %lld\n", name, (long long)sum);
    buffer_print(out, "plora_%s_sum %.6f\nplora_%s_count %lld\n", name, 1e-6 * (double)get(&h->microseconds), name,
                 (long long)sum);
}

void metrics_report(const struct metrics *m, struct buffer *out)
{
    head(out, "http_requests_total", "counter", "HTTP requests answered, by status.");
    for (int i = 0; i < STATUS_COUNT; i++)
        if (get(&m->replies[i]) > 0)
            buffer_print(out, "plora_http_requests_total{code=\"%u\"} %lld\n", STATUSES[i],
                         (long long)get(&m->replies[i]));
    buffer_print(out, "plora_http_requests_total{code=\"other\"} %lld\n", (long long)get(&m->replies[STATUS_COUNT]));
    number(out, "prompt_tokens_total", "counter", get(&m->counters[COUNT_PROMPT_TOKENS]), "Prompt tokens processed.");
    number(out, "generated_tokens_total", "counter", get(&m->counters[COUNT_GENERATED_TOKENS]), "Tokens generated.");
    number(out, "requests_cancelled_total", "counter", get(&m->counters[COUNT_CANCELLED]),
           "Requests ended early: the client left, the time was up, or the server stopped.");
    number(out, "adapter_loads_total", "counter", get(&m->counters[COUNT_LOADS]), "Adapters loaded or replaced.");
    number(out, "adapter_unloads_total", "counter", get(&m->counters[COUNT_UNLOADS]), "Adapters unloaded.");
    number(out, "adapters", "gauge", get(&m->gauges[GAUGE_ADAPTERS]), "Adapters that can be asked for.");
    number(out, "adapter_bytes", "gauge", get(&m->gauges[GAUGE_ADAPTER_BYTES]),
           "Memory of those that are not evicted.");
    number(out, "adapter_evictions_total", "counter", get(&m->gauges[GAUGE_EVICTED]), "Adapters put out of memory.");
    number(out, "adapter_restores_total", "counter", get(&m->gauges[GAUGE_RESTORED]), "Adapters brought back.");
    number(out, "sequences_waiting", "gauge", get(&m->gauges[GAUGE_WAITING]), "Sequences in the queue.");
    number(out, "sequences_running", "gauge", get(&m->gauges[GAUGE_RUNNING]), "Sequences in a slot.");
    number(out, "sequence_slots", "gauge", get(&m->gauges[GAUGE_SLOTS]), "Slots of the cache.");
    number(out, "steps_total", "counter", get(&m->steps), "Steps of the model.");
    number(out, "step_tokens_total", "counter", get(&m->step_rows), "Tokens that steps took in.");
    head(out, "step_seconds_total", "counter", "Time in steps.");
    buffer_print(out, "plora_step_seconds_total %.6f\n", 1e-6 * (double)get(&m->step_microseconds));
    histogram(out, "time_to_first_token_seconds", &m->first_token, "From submission to a sequence's first token.");
    histogram(out, "sequence_seconds", &m->finished, "From submission to a sequence's end.");
}
