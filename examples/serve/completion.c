/* completion.c: the life of a request for text. It waits for its jobs on its connection's thread and looks now and then whether the
 * client is still there and the time is not up; if so its jobs are cancelled. It is freed only when all of them have ended. */
#include "completion.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "util.h"

enum { LOOK_MILLISECONDS = 100 };

void completion_free(struct completion *c)
{
    if (!c) return;
    for (int64_t i = 0; i < c->count; i++) {
        free(c->jobs[i].prompt.ids);
        text_free(&c->jobs[i].text);
    }
    plora_snapshot_release(c->adapter);
    pthread_mutex_destroy(&c->owner.lock);
    pthread_cond_destroy(&c->owner.changed);
    atomic_fetch_sub(&c->server->active, 1);
    free(c->jobs);
    free(c->progress);
    free(c->events.data);
    free(c->model);
    free(c);
}

static void cancel(struct completion *c)
{
    for (int64_t i = 0; i < c->count; i++)
        atomic_store(&c->jobs[i].cancelled, 1);
    scheduler_wake(c->server->scheduler);
}

/* Waits for a change, under the owner's lock, and cancels what nobody waits for any more. */
static void wait(struct completion *c)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += LOOK_MILLISECONDS * 1000000L;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    pthread_cond_timedwait(&c->owner.changed, &c->owner.lock, &until);
    if (c->late || c->gone) return;
    c->gone = exchange_gone(c->socket) || atomic_load(&c->server->draining) == 2;
    c->late = !c->gone && now() > c->until;
    if (!c->late && !c->gone) return;
    metrics_add(c->server->metrics, COUNT_CANCELLED, 1);
    cancel(c);
}

static int all_ended(const struct completion *c)
{
    for (int64_t i = 0; i < c->count; i++)
        if (c->jobs[i].finish == JOB_RUNNING) return 0;
    return 1;
}

static void wait_for_all(struct completion *c)
{
    pthread_mutex_lock(&c->owner.lock);
    while (!all_ended(c))
        wait(c);
    pthread_mutex_unlock(&c->owner.lock);
}

/* The first job that did not end as it should, NULL when all did. */
static const struct job *bad_end(const struct completion *c)
{
    for (int64_t i = 0; i < c->count; i++)
        if (c->jobs[i].finish >= JOB_CANCELLED) return &c->jobs[i];
    return NULL;
}

static enum MHD_Result answer_at_once(struct exchange *e, struct completion *c)
{
    wait_for_all(c);
    const struct job *bad = bad_end(c);
    struct buffer body = {0};
    enum MHD_Result result;
    if (!bad) {
        completion_write(c, &body);
        result = exchange_reply(e, 200, "application/json", &body);
    } else if (bad->finish == JOB_FAILED)
        result = exchange_refuse(e, 500, NULL, "%s", bad->failure);
    else if (c->late)
        result = exchange_refuse(e, 504, NULL, "the answer was not ready in %lld seconds",
                                 (long long)c->server->options.max_seconds);
    else
        result = exchange_refuse(e, 503, NULL, "the server is ending");
    completion_free(c);
    return result;
}

/* The next events of a stream; waits until there are some. */
static ssize_t next_events(void *user, uint64_t at, char *out, size_t size)
{
    struct completion *c = user;
    (void)at;
    if (c->events_sent == c->events.size) {
        c->events.size = c->events_sent = 0;
        pthread_mutex_lock(&c->owner.lock);
        while (!c->done && !(c->done = completion_write_events(c, &c->events)) && c->events.size == 0 &&
               !c->events.failed)
            wait(c);
        pthread_mutex_unlock(&c->owner.lock);
    }
    if (c->events.failed) return MHD_CONTENT_READER_END_WITH_ERROR;
    if (c->events.size == 0) return MHD_CONTENT_READER_END_OF_STREAM;
    const size_t left = c->events.size - c->events_sent, count = left < size ? left : size;
    memcpy(out, c->events.data + c->events_sent, count);
    c->events_sent += count;
    return (ssize_t)count;
}

/* The stream has ended, or its client has gone. */
static void end_events(void *user)
{
    struct completion *c = user;
    pthread_mutex_lock(&c->owner.lock);
    const int ended = all_ended(c);
    pthread_mutex_unlock(&c->owner.lock);
    if (!ended) {
        metrics_add(c->server->metrics, COUNT_CANCELLED, !c->gone && !c->late);
        c->gone = 1;
        cancel(c);
    }
    wait_for_all(c);
    completion_free(c);
}

enum MHD_Result completion_answer(struct exchange *e, struct completion *c)
{
    struct job *jobs[MOST_PROMPTS];
    for (int64_t i = 0; i < c->count; i++)
        jobs[i] = &c->jobs[i];
    c->socket = exchange_socket(e);
    c->until = now() + (double)c->server->options.max_seconds;
    if (scheduler_submit(c->server->scheduler, jobs, c->count) != 0) {
        completion_free(c);
        return exchange_refuse(e, 503, NULL, "%s: try again later", failure());
    }
    return c->stream ? exchange_stream(e, next_events, end_events, c) : answer_at_once(e, c);
}
