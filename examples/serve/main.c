/* main.c: serve, a complete host application of libplora: an HTTP server for one model and many adapters of it.
 *
 *     connections (http.c, a thread each) -> jobs -> scheduler (one thread, model.c) -> text -> connections
 *
 * Exit codes: 0 ended by a signal, 1 failed, 2 wrong usage, 130 ended by a second signal. Only plora.h is used of the library. */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "api.h"
#include "chat.h"
#include "util.h"

static int threads_of(const struct options *options)
{
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    return options->threads > 0 ? (int)options->threads : cores > 0 ? (int)cores : 1;
}

/* The name of the model: as given, or the last part of its path. */
static int name_model(struct server *s)
{
    char *path = realpath(s->options.model, NULL);
    if (!path) return fault("there is no directory %s", s->options.model);
    const char *last = strrchr(path, '/');
    s->name = strdup(s->options.name ? s->options.name : last && last[1] ? last + 1 : path);
    free(path);
    return s->name ? 0 : fault("out of memory: a name");
}

static int open_model(struct server *s)
{
    const int threads = threads_of(&s->options);
    plora_context_options options = PLORA_CONTEXT_OPTIONS_INIT;
    options.threads = threads;
    LIBRARY(plora_context_create(&options, &s->context));
    const struct model_options wanted = {.directory = s->options.model,
                                         .dtype = strcmp(s->options.dtype, "bf16") == 0 ? PLORA_BF16 : PLORA_F32,
                                         .threads = threads,
                                         .slots = s->options.slots,
                                         .context = s->options.context,
                                         .batch_tokens = s->options.batch_tokens};
    TRY(model_open(s->context, &wanted, &s->model));
    TRY(tokenizer_open(s->options.model, model_configuration(s->model)->vocabulary, &s->tokenizer));
    TRY(chat_open(s->options.model, s));
    const struct adapters_options adapters = {.root = s->options.adapters,
                                              .memory = s->options.adapter_memory << 20,
                                              .spill = s->options.spill,
                                              .rows = model_rows(s->model),
                                              .slots = s->options.slots};
    TRY(adapters_create(model_layers(s->model), &adapters, &s->adapters));
    model_use_adapters(s->model, s->adapters);
    return adapters_load_all(s->adapters);
}

static int start(struct server *s)
{
    TRY(name_model(s));
    TRY(open_model(s));
    s->created = (int64_t)time(NULL);
    TRY(metrics_create(&s->metrics));
    metrics_set(s->metrics, GAUGE_SLOTS, s->options.slots);
    const struct scheduler_options options = {.model = s->model,
                                              .tokenizer = s->tokenizer,
                                              .metrics = s->metrics,
                                              .slots = s->options.slots,
                                              .batch_tokens = s->options.batch_tokens,
                                              .queue = s->options.queue};
    return scheduler_start(&options, &s->scheduler);
}

static void stop(struct server *s)
{
    scheduler_stop(s->scheduler);
    adapters_destroy(s->adapters);
    tokenizer_close(s->tokenizer);
    model_close(s->model);
    plora_context_destroy(s->context);
    metrics_destroy(s->metrics);
    free(s->system);
    free(s->name);
}

/* Waits until no request has jobs, at most so long; a second signal ends the program. */
static void wait_for_requests(struct server *s, const sigset_t *signals, double seconds)
{
    const struct timespec moment = {0, 20 * 1000 * 1000};
    for (const double until = now() + seconds; atomic_load(&s->active) > 0 && now() < until;)
        if (sigtimedwait(signals, NULL, &moment) > 0) _exit(130);
}

static int serve(struct server *s, const sigset_t *signals)
{
    struct http *http;
    int number;
    TRY(http_start(s, API, &http));
    printf("serve: '%s' and %lld adapters at http://%s:%d\n", s->name,
           (long long)adapters_statistics(s->adapters).names, s->options.host, http_port(http));
    fflush(stdout);
    sigwait(signals, &number);
    fprintf(stderr, "serve: finishing %d requests\n", atomic_load(&s->active));
    atomic_store(&s->draining, 1);
    http_quiesce(http);
    wait_for_requests(s, signals, (double)s->options.drain_seconds);
    atomic_store(&s->draining, 2);
    wait_for_requests(s, signals, 5);
    http_stop(http);
    return 0;
}

int main(int count, char **arguments)
{
    static struct server server;
    sigset_t signals;
    if (options_parse(count, arguments, &server.options) != 0) {
        fprintf(stderr, "serve: %s\n", failure());
        return 2;
    }
    if (server.options.help) {
        options_usage(stdout);
        return 0;
    }
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, NULL); /* before any thread is made: they all leave them to sigwait() */
    signal(SIGPIPE, SIG_IGN);
    const int result = start(&server) == 0 ? serve(&server, &signals) : -1;
    if (result != 0) fprintf(stderr, "serve: %s\n", failure());
    stop(&server);
    return result == 0 ? 0 : 1;
}
