/* options.h: the command line. */
#ifndef SERVE_OPTIONS_H
#define SERVE_OPTIONS_H

#include <stdint.h>
#include <stdio.h>

struct options {
    const char *model, *name, *adapters, *spill, *host;
    int64_t port, dtype, threads;
    int64_t adapter_memory, slots, context, batch_tokens, queue;
    int64_t connections, max_body, request_seconds, max_seconds, drain_seconds;
    int64_t help;
};

int options_parse(int count, char **arguments, struct options *options);
void options_usage(FILE *stream);

#endif
