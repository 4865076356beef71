/* options.c: the table of options, and what they must have in common. */
#include "options.h"

#include <string.h>

#include "arguments.h"
#include "util.h"

#define AT(field) offsetof(struct options, field)
#define DEFAULT_HOST "127.0.0.1"

static const struct argument LIST[] = {
    {"model", TEXT, AT(model), .help = "DIR: config.json, tokenizer.json, model.safetensors of a LLaMA-family model"},
    {"name", TEXT, AT(name), .help = "what the model is called; else as its directory"},
    {"adapters", TEXT, AT(adapters),
     .help = "DIR: each PEFT directory in it is served under its name; none outside it ever is"},
    {"adapter-memory", INTEGER, AT(adapter_memory), 0, 1 << 30, .help = "MB that adapters may take; 0 = no bound"},
    {"spill", TEXT, AT(spill),
     .help = "DIR for adapters that have no room, those asked for longest ago; else more are refused"},
    {"host", TEXT, AT(host), .help = "address to listen on; only this machine reaches 127.0.0.1 [" DEFAULT_HOST "]"},
    {"port", INTEGER, AT(port), 0, 65535, .help = "0 = any that is free"},
    {"dtype", TEXT, AT(dtype), .help = "fp32 or bf16, of weights, activations and cache"},
    {"threads", INTEGER, AT(threads), 0, 4096, .help = "of a step of the model; 0 = one a core"},
    {"slots", INTEGER, AT(slots), 1, 4096, .help = "sequences that run at a time"},
    {"context", INTEGER, AT(context), 16, 1 << 24, .help = "tokens of a sequence, prompt and answer"},
    {"batch-tokens", INTEGER, AT(batch_tokens), 1, 1 << 16,
     .help = "of a step: how much of new prompts goes in at a time"},
    {"queue", INTEGER, AT(queue), 1, 1 << 20, .help = "sequences that may wait; more are refused with 503"},
    {"connections", INTEGER, AT(connections), 1, 1 << 16, .help = "at a time; each has a thread"},
    {"max-body", INTEGER, AT(max_body), 1 << 10, 1 << 30, .help = "bytes of a request"},
    {"request-seconds", INTEGER, AT(request_seconds), 1, 3600,
     .help = "a request must arrive in, and a client take its answer"},
    {"max-seconds", INTEGER, AT(max_seconds), 1, 1 << 20, .help = "an answer may take; more is 504"},
    {"drain-seconds", INTEGER, AT(drain_seconds), 0, 1 << 20,
     .help = "requests under way may take after SIGINT or SIGTERM"},
    {"help", FLAG, AT(help), .help = "this text"},
};

static const struct arguments ARGUMENTS = {
    .usage = "serve: an HTTP server for a LLaMA-family model and many adapters of it\n\n"
             "  serve --model DIR [--adapters DIR] [options]\n\n",
    .width = 16,
    .count = sizeof LIST / sizeof *LIST,
    .list = LIST,
};

static const struct options DEFAULTS = {.host = DEFAULT_HOST,
                                        .dtype = "fp32",
                                        .port = 8000,
                                        .slots = 16,
                                        .context = 2048,
                                        .batch_tokens = 256,
                                        .queue = 256,
                                        .connections = 256,
                                        .max_body = 1 << 20,
                                        .request_seconds = 30,
                                        .max_seconds = 600,
                                        .drain_seconds = 30};

static int check(const struct options *options)
{
    if (strcmp(options->dtype, "fp32") != 0 && strcmp(options->dtype, "bf16") != 0)
        return fault("--dtype '%s': must be fp32 or bf16", options->dtype);
    if (options->help) return 0;
    if (!options->model) return fault("--model is missing (see --help)");
    if (options->batch_tokens < options->slots)
        return fault("--batch-tokens %lld is less than --slots %lld: every running sequence has a token in a step",
                     (long long)options->batch_tokens, (long long)options->slots);
    return 0;
}

int options_parse(int count, char **words, struct options *options)
{
    *options = DEFAULTS;
    TRY(arguments_parse(&ARGUMENTS, count, words, options));
    return check(options);
}

void options_usage(FILE *stream)
{
    arguments_help(&ARGUMENTS, &DEFAULTS, stream);
}
