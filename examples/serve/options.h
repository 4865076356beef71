/* options.h: the command line. */
#ifndef SERVE_OPTIONS_H
#define SERVE_OPTIONS_H

#include <stdint.h>
#include <stdio.h>

struct options {
    const char *model, *name, *adapters, *spill, *host;
    const char *dtype; /* "fp32" or "bf16" */
    int64_t port, threads;
    int64_t adapter_memory, slots, context, batch_tokens, queue;
    int64_t connections, max_body, request_seconds, max_seconds, drain_seconds;
    int64_t help;
};

int options_parse(int count, char **words, struct options *options);
void options_usage(FILE *stream);

#endif
