/* server.h: what the parts of the server share. */
#ifndef SERVE_SERVER_H
#define SERVE_SERVER_H

#include <stdatomic.h>
#include <stdint.h>

#include "adapters.h"
#include "metrics.h"
#include "model.h"
#include "options.h"
#include "scheduler.h"
#include "tokenizer.h"

struct server {
    struct options options;
    char *name; /* of the model without adapter */
    int64_t created;
    plora_context *context;
    struct model *model;
    struct tokenizer *tokenizer;
    char *system;                 /* what a chat begins with unless its messages do, NULL = nothing */
    int32_t turn_begin, turn_end; /* control tokens of a chat, -1 = this model has no chat */
    struct adapters *adapters;
    struct metrics *metrics;
    struct scheduler *scheduler;
    atomic_int draining; /* no new work; 2: what is left is cancelled */
    atomic_int active;   /* requests with jobs */
};

#endif
