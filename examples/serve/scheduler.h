/* scheduler.h: continuous batching. One thread goes through the model step by step; each step takes the newest token of every running
 * sequence and, in the room that is left, pieces of the prompts of new ones. A sequence that ends leaves its slot at once, and the next
 * in the queue takes it. Whose adapter a sequence goes through makes no difference to any of this. */
#ifndef SERVE_SCHEDULER_H
#define SERVE_SCHEDULER_H

#include <stdint.h>

#include "job.h"
#include "metrics.h"
#include "model.h"
#include "tokenizer.h"

struct scheduler;

struct scheduler_options {
    struct model *model;
    const struct tokenizer *tokenizer;
    struct metrics *metrics;
    int64_t slots, batch_tokens, queue; /* queue: jobs that may wait */
};

int scheduler_start(const struct scheduler_options *options, struct scheduler **scheduler);
/* Cancels what is left and ends the thread. */
void scheduler_stop(struct scheduler *scheduler);

/* Takes all of the jobs, or none when the queue has no room for them: then it returns -1. */
int scheduler_submit(struct scheduler *scheduler, struct job *const *jobs, int64_t count);
/* Makes the scheduler look at its jobs: some were cancelled. */
void scheduler_wake(struct scheduler *scheduler);

#endif
