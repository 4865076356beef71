/* completion.h: one request for text, from its JSON to its answer.
 *
 *     completion_read()    JSON -> jobs, every value checked    completion_read.c
 *     completion_answer()  jobs -> scheduler -> JSON or events  completion.c; the words of it: completion_write.c */
#ifndef SERVE_COMPLETION_H
#define SERVE_COMPLETION_H

#include "http.h"
#include "job.h"

enum { MOST_PROMPTS = 128 };

struct progress { /* of one job, as far as the client has been told */
    size_t sent;  /* bytes of its text */
    int ended;
};

struct completion {
    struct server *server;
    struct owner owner;
    plora_snapshot *adapter;
    char *model; /* as it was asked for */
    char id[48];
    int64_t created;
    int chat, stream, usage; /* usage: of a stream, in an event of its own */
    struct job *jobs;
    struct progress *progress;
    int64_t count;

    int socket; /* of the client */
    double until;
    int late, gone;       /* why it was cancelled */
    struct buffer events; /* of a stream: made, but not sent yet */
    size_t events_sent;
    int role_sent, done;
};

/* A request of /v1/completions, or with chat of /v1/chat/completions. *out is NULL when it has been refused; the result is then that of
 * the refusal. */
enum MHD_Result completion_read(struct exchange *exchange, int chat, struct completion **out);
void completion_free(struct completion *completion);

/* Runs it to its end, or starts its stream; takes it. */
enum MHD_Result completion_answer(struct exchange *exchange, struct completion *completion);

/* The whole answer. All jobs have ended. */
void completion_write(const struct completion *completion, struct buffer *out);
/* The events since the last call, under the owner's lock. Returns 1 after the last of all. */
int completion_write_events(struct completion *completion, struct buffer *out);

#endif
