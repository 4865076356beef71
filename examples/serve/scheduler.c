/* scheduler.c: see scheduler.h.
 *
 * The queue is under the scheduler's lock; running jobs belong to its thread. A job's owner is told of every change under the owner's
 * lock, and may free the job as soon as `finish` is set: that is the last thing done to it. */
#include "scheduler.h"

#include <stdio.h>
#include <stdlib.h>

#include "util.h"

struct scheduler {
    struct scheduler_options options;
    int64_t eos;
    struct sampler *sampler;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct job *queue, **queue_end;
    int64_t queued;
    int ending, woken;
    struct job **running; /* [slots], in the order of their coming */
    int64_t running_count;
    int64_t *free_slots, free_count;
    struct piece *pieces;  /* [slots] */
    struct job **piece_of; /* [slots] */
};

static void finish(struct scheduler *s, struct job *job, enum finish how, const char *why)
{
    struct owner *owner = job->owner;
    if (job->slot >= 0) s->free_slots[s->free_count++] = job->slot;
    metrics_finished(s->options.metrics, now() - job->submitted);
    pthread_mutex_lock(&owner->lock);
    text_end(&job->text);
    if (why) snprintf(job->failure, sizeof job->failure, "%s", why);
    job->finish = how;
    pthread_cond_broadcast(&owner->changed);
    pthread_mutex_unlock(&owner->lock);
}

/* ---------------------------------------------------------------------------------------------------------------- queue */

int scheduler_submit(struct scheduler *s, struct job *const *jobs, int64_t count)
{
    const double time = now();
    pthread_mutex_lock(&s->lock);
    const int full = s->queued + count > s->options.queue || s->ending;
    for (int64_t i = 0; i < count && !full; i++) {
        jobs[i]->submitted = time;
        jobs[i]->slot = -1;
        jobs[i]->next = NULL;
        *s->queue_end = jobs[i];
        s->queue_end = &jobs[i]->next;
        s->queued++;
    }
    metrics_set(s->options.metrics, GAUGE_WAITING, s->queued);
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
    return full ? fault("the queue is full: %lld sequences may wait", (long long)s->options.queue) : 0;
}

void scheduler_wake(struct scheduler *s)
{
    pthread_mutex_lock(&s->lock);
    s->woken = 1;
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
}

/* Takes the queue's jobs that were cancelled, or all, out of it, and returns them as a list. */
static struct job *drop(struct scheduler *s, int all)
{
    struct job **at = &s->queue, *dropped = NULL;
    while (*at) {
        struct job *job = *at;
        if (!all && !atomic_load(&job->cancelled)) {
            at = &job->next;
            continue;
        }
        *at = job->next;
        s->queued--;
        job->next = dropped;
        dropped = job;
    }
    s->queue_end = at;
    return dropped;
}

/* Waits for work and moves jobs from the queue into slots. 0 = the end. */
static int admit(struct scheduler *s)
{
    pthread_mutex_lock(&s->lock);
    while (!s->ending && !s->woken && !s->queue && s->running_count == 0)
        pthread_cond_wait(&s->work, &s->lock);
    s->woken = 0;
    struct job *dropped = drop(s, s->ending);
    while (s->queue && s->free_count > 0) {
        struct job *job = s->queue;
        s->queue = job->next;
        if (!s->queue) s->queue_end = &s->queue;
        s->queued--;
        job->slot = s->free_slots[--s->free_count];
        job->past = 0;
        s->running[s->running_count++] = job;
    }
    metrics_set(s->options.metrics, GAUGE_WAITING, s->queued);
    const int go_on = !s->ending;
    pthread_mutex_unlock(&s->lock);
    while (dropped) { /* not under the lock: owners wake the scheduler under theirs */
        struct job *next = dropped->next;
        finish(s, dropped, JOB_CANCELLED, NULL);
        dropped = next;
    }
    return go_on;
}

/* ----------------------------------------------------------------------------------------------------------------- step */

static void plan_piece(struct scheduler *s, struct job *job, int64_t rows, int64_t *count)
{
    const int prefill = job->past < job->prompt.count;
    s->piece_of[*count] = job;
    s->pieces[(*count)++] = (struct piece){.slot = job->slot,
                                           .past = job->past,
                                           .rows = rows,
                                           .ids = prefill ? job->prompt.ids + job->past : &job->last,
                                           .adapter = job->adapter,
                                           .wants_logits = job->past + rows >= job->prompt.count};
}

/* What goes into the next step: first those that are under way, one token each, then prompts, first come first served. */
static int64_t plan(struct scheduler *s)
{
    int64_t count = 0, room = s->options.batch_tokens;
    for (int64_t i = 0; i < s->running_count; i++)
        if (s->running[i]->past >= s->running[i]->prompt.count) {
            plan_piece(s, s->running[i], 1, &count);
            room--;
        }
    for (int64_t i = 0; i < s->running_count && room > 0; i++) {
        struct job *job = s->running[i];
        const int64_t left = job->prompt.count - job->past, rows = left < room ? left : room;
        if (left <= 0) continue;
        plan_piece(s, job, rows, &count);
        room -= rows;
    }
    return count;
}

/* One more token of a job. Returns how it ends with it, JOB_RUNNING when it does not. */
static enum finish take(struct scheduler *s, struct job *job, int32_t token)
{
    size_t size;
    const char *bytes = tokenizer_bytes(s->options.tokenizer, token, &size);
    if (token == s->eos && !job->ignore_eos) return JOB_STOP;
    job->last = token;
    if (tokenizer_is_special(s->options.tokenizer, token)) size = 0;
    pthread_mutex_lock(&job->owner->lock);
    const int failed = text_append(&job->text, bytes, size) != 0;
    job->generated++;
    const enum finish how = failed                        ? JOB_FAILED
                            : job->text.stopped           ? JOB_STOP
                            : job->generated == job->most ? JOB_LENGTH
                                                          : JOB_RUNNING;
    if (how == JOB_RUNNING) pthread_cond_broadcast(&job->owner->changed);
    pthread_mutex_unlock(&job->owner->lock);
    return how;
}

/* The tokens that the step has made. Jobs that end with theirs are marked by slot = -1 in the list of running ones. */
static void deal(struct scheduler *s, int64_t count, const float *logits)
{
    const int64_t vocabulary = model_configuration(s->options.model)->vocabulary;
    for (int64_t i = 0; i < count; i++) {
        struct job *job = s->piece_of[i];
        const int64_t prompt = s->pieces[i].past < job->prompt.count ? s->pieces[i].rows : 0;
        job->past += s->pieces[i].rows;
        metrics_add(s->options.metrics, COUNT_PROMPT_TOKENS, prompt);
        if (!s->pieces[i].wants_logits) continue;
        const int32_t token = sampler_pick(s->sampler, logits, &job->sampling, job->past);
        logits += vocabulary;
        if (prompt > 0) metrics_first_token(s->options.metrics, now() - job->submitted);
        metrics_add(s->options.metrics, COUNT_GENERATED_TOKENS, 1);
        const enum finish how = take(s, job, token);
        if (how == JOB_RUNNING) continue;
        for (int64_t j = 0; j < s->running_count; j++)
            if (s->running[j] == job) s->running[j] = NULL;
        finish(s, job, how, how == JOB_FAILED ? failure() : NULL);
    }
}

/* Closes the gaps in the list of running jobs. */
static void compact(struct scheduler *s)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < s->running_count; i++)
        if (s->running[i]) s->running[kept++] = s->running[i];
    s->running_count = kept;
    metrics_set(s->options.metrics, GAUGE_RUNNING, kept);
}

/* Ends all running jobs (all = 1), or those that were cancelled. */
static void end_running(struct scheduler *s, int all, enum finish how, const char *why)
{
    for (int64_t i = 0; i < s->running_count; i++) {
        if (!all && !atomic_load(&s->running[i]->cancelled)) continue;
        struct job *job = s->running[i];
        s->running[i] = NULL;
        finish(s, job, how, why);
    }
    compact(s);
}

static void step(struct scheduler *s)
{
    const float *logits = NULL;
    const double begin = now();
    const int64_t count = plan(s);
    int64_t rows = 0;
    for (int64_t i = 0; i < count; i++)
        rows += s->pieces[i].rows;
    if (count == 0) return;
    if (model_step(s->options.model, count, s->pieces, &logits) != 0) {
        end_running(s, 1, JOB_FAILED, failure()); /* the cache of all of them is in doubt */
        return;
    }
    deal(s, count, logits);
    compact(s);
    metrics_step(s->options.metrics, rows, now() - begin);
}

static void *run(void *argument)
{
    struct scheduler *s = argument;
    while (admit(s)) {
        end_running(s, 0, JOB_CANCELLED, NULL);
        step(s);
    }
    end_running(s, 1, JOB_CANCELLED, NULL);
    return NULL;
}

/* ----------------------------------------------------------------------------------------------------------------- life */

static void release(struct scheduler *s)
{
    sampler_destroy(s->sampler);
    free(s->running);
    free(s->free_slots);
    free(s->pieces);
    free(s->piece_of);
    free(s);
}

static int make(struct scheduler *s)
{
    const size_t slots = (size_t)s->options.slots;
    TRY(sampler_create(model_configuration(s->options.model)->vocabulary, &s->sampler));
    TRY(memory_allocate(slots, sizeof(struct job *), "jobs", &s->running));
    TRY(memory_allocate(slots, sizeof *s->free_slots, "slots", &s->free_slots));
    TRY(memory_allocate(slots, sizeof *s->pieces, "pieces", &s->pieces));
    TRY(memory_allocate(slots, sizeof(struct job *), "pieces", &s->piece_of));
    for (int64_t i = 0; i < s->options.slots; i++)
        s->free_slots[s->free_count++] = s->options.slots - 1 - i;
    s->eos = model_configuration(s->options.model)->eos;
    s->queue_end = &s->queue;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->work, NULL);
    return pthread_create(&s->thread, NULL, run, s) == 0 ? 0 : fault("cannot create the scheduler's thread");
}

int scheduler_start(const struct scheduler_options *options, struct scheduler **scheduler)
{
    *scheduler = NULL;
    struct scheduler *s;
    TRY(memory_allocate(1, sizeof *s, "scheduler", &s));
    s->options = *options;
    if (make(s) != 0) {
        release(s);
        return -1;
    }
    *scheduler = s;
    return 0;
}

void scheduler_stop(struct scheduler *s)
{
    if (!s) return;
    pthread_mutex_lock(&s->lock);
    s->ending = 1;
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->work);
    release(s);
}
