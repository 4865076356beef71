/* job.h: one sequence on its way through the server: a prompt, how to go on from it, and what has come of it.
 *
 *     a connection's thread makes it -> scheduler_submit() -> queue -> slot of the cache -> token by token -> finish != JOB_RUNNING
 *
 * What is asked for does not change after it is submitted. `text`, `generated` and `finish` change under the lock of its owner, whom the
 * scheduler wakes at each change; once `finish` is set the scheduler knows the job no more. */
#ifndef SERVE_JOB_H
#define SERVE_JOB_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "adapters.h"
#include "sampler.h"
#include "text.h"
#include "tokenizer.h"

enum finish { JOB_RUNNING, JOB_STOP, JOB_LENGTH, JOB_CANCELLED, JOB_FAILED };

struct owner { /* of the jobs of one request */
    pthread_mutex_t lock;
    pthread_cond_t changed;
};

struct job {
    struct tokens prompt;
    int64_t most; /* new tokens */
    struct sampling sampling;
    int ignore_eos;
    plora_snapshot *adapter; /* held by the owner; NULL = the model alone */
    struct owner *owner;

    atomic_int cancelled; /* set by the owner; the scheduler sees it soon */

    struct text text;
    int64_t generated;
    enum finish finish;
    char failure[256]; /* JOB_FAILED: why */

    struct job *next; /* from here on the scheduler's own */
    int64_t slot, past;
    int32_t last; /* the newest token, which is not in the cache yet */
    double submitted, first;
};

#endif
