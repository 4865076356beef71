/* metrics.h: what the server counts, and its report in Prometheus' text format. Any thread may count; nobody waits. */
#ifndef SERVE_METRICS_H
#define SERVE_METRICS_H

#include <stdint.h>

#include "buffer.h"

struct metrics;

enum counter { COUNT_PROMPT_TOKENS, COUNT_GENERATED_TOKENS, COUNT_LOADS, COUNT_UNLOADS, COUNT_CANCELLED, COUNTERS };
enum gauge {
    GAUGE_WAITING,
    GAUGE_RUNNING,
    GAUGE_SLOTS,
    GAUGE_ADAPTERS,
    GAUGE_ADAPTER_BYTES,
    GAUGE_EVICTED,
    GAUGE_RESTORED,
    GAUGES
};

int metrics_create(struct metrics **metrics);
void metrics_destroy(struct metrics *metrics);

void metrics_add(struct metrics *metrics, enum counter counter, int64_t amount);
void metrics_set(struct metrics *metrics, enum gauge gauge, int64_t value);
/* An HTTP request was answered with this status. */
void metrics_reply(struct metrics *metrics, unsigned status);
/* A sequence has its first token, or all, so many seconds after it was submitted. */
void metrics_first_token(struct metrics *metrics, double seconds);
void metrics_finished(struct metrics *metrics, double seconds);
/* A step of the model over so many rows. */
void metrics_step(struct metrics *metrics, int64_t rows, double seconds);

void metrics_report(const struct metrics *metrics, struct buffer *out);

#endif
