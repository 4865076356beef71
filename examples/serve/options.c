/* options.c: a table of options drives parsing and --help. */
#include "options.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

enum kind { TEXT, INTEGER, DTYPE, FLAG };

struct option {
    const char *name;
    enum kind kind;
    size_t offset;
    int64_t least, most;
    const char *help;
};

#define AT(field) offsetof(struct options, field)

static const struct option OPTIONS[] = {
    {"model", TEXT, AT(model), 0, 0, "DIR: config.json, tokenizer.json, model.safetensors of a LLaMA-family model"},
    {"name", TEXT, AT(name), 0, 0, "what the model is called; else as its directory"},
    {"adapters", TEXT, AT(adapters), 0, 0,
     "DIR: each PEFT directory in it is served under its name; none outside it ever is"},
    {"adapter-memory", INTEGER, AT(adapter_memory), 0, 1 << 30, "MB that adapters may take; 0 = no bound"},
    {"spill", TEXT, AT(spill), 0, 0,
     "DIR for adapters that have no room, those asked for longest ago; else more are refused"},
    {"host", TEXT, AT(host), 0, 0, "address to listen on; only this machine reaches 127.0.0.1"},
    {"port", INTEGER, AT(port), 0, 65535, "0 = any that is free"},
    {"dtype", DTYPE, AT(dtype), 0, 0, "fp32 or bf16, of weights, activations and cache"},
    {"threads", INTEGER, AT(threads), 0, 4096, "of a step of the model; 0 = one a core"},
    {"slots", INTEGER, AT(slots), 1, 4096, "sequences that run at a time"},
    {"context", INTEGER, AT(context), 16, 1 << 24, "tokens of a sequence, prompt and answer"},
    {"batch-tokens", INTEGER, AT(batch_tokens), 1, 1 << 16, "of a step: how much of new prompts goes in at a time"},
    {"queue", INTEGER, AT(queue), 1, 1 << 20, "sequences that may wait; more are refused with 503"},
    {"connections", INTEGER, AT(connections), 1, 1 << 16, "at a time; each has a thread"},
    {"max-body", INTEGER, AT(max_body), 1 << 10, 1 << 30, "bytes of a request"},
    {"request-seconds", INTEGER, AT(request_seconds), 1, 3600,
     "a request must arrive in, and a client take its answer"},
    {"max-seconds", INTEGER, AT(max_seconds), 1, 1 << 20, "an answer may take; more is 504"},
    {"drain-seconds", INTEGER, AT(drain_seconds), 0, 1 << 20, "requests under way may take after SIGINT or SIGTERM"},
    {"help", FLAG, AT(help), 0, 0, "this text"},
};
enum { OPTION_COUNT = sizeof OPTIONS / sizeof *OPTIONS };

static const struct options DEFAULTS = {.host = "127.0.0.1",
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

static void *field(struct options *options, const struct option *option)
{
    return (char *)options + option->offset;
}

static int set_value(struct options *options, const struct option *option, const char *value)
{
    void *target = field(options, option);
    char *end;
    if (option->kind == TEXT) {
        *(const char **)target = value;
        return *value ? 0 : fault("--%s needs a value", option->name);
    }
    if (option->kind == DTYPE) {
        *(int64_t *)target = strcmp(value, "bf16") == 0;
        return strcmp(value, "fp32") == 0 || strcmp(value, "bf16") == 0
                   ? 0
                   : fault("--dtype '%s': must be fp32 or bf16", value);
    }
    errno = 0;
    const long long number = strtoll(value, &end, 10);
    if (*value == '\0' || *end != '\0' || errno || number < option->least || number > option->most)
        return fault("--%s '%s': must be an integer in [%lld, %lld]", option->name, value, (long long)option->least,
                     (long long)option->most);
    *(int64_t *)target = number;
    return 0;
}

static int check(const struct options *options)
{
    if (options->help) return 0;
    if (!options->model) return fault("--model is missing (see --help)");
    if (options->batch_tokens < options->slots)
        return fault("--batch-tokens %lld is less than --slots %lld: every running sequence has a token in a step",
                     (long long)options->batch_tokens, (long long)options->slots);
    return 0;
}

int options_parse(int count, char **arguments, struct options *options)
{
    *options = DEFAULTS;
    for (int i = 1; i < count; i++) {
        const char *argument = arguments[i], *value = strchr(argument, '=');
        const size_t length = value ? (size_t)(value - argument) : strlen(argument);
        const struct option *option = NULL;
        for (int j = 0; j < OPTION_COUNT && length > 2 && strncmp(argument, "--", 2) == 0; j++)
            if (strlen(OPTIONS[j].name) == length - 2 && memcmp(OPTIONS[j].name, argument + 2, length - 2) == 0)
                option = &OPTIONS[j];
        if (!option) return fault("unknown argument '%s' (see --help)", argument);
        if (option->kind == FLAG) {
            if (value) return fault("--%s takes no value", option->name);
            *(int64_t *)field(options, option) = 1;
            continue;
        }
        if (value)
            value++;
        else if (++i < count)
            value = arguments[i];
        else
            return fault("--%s needs a value", option->name);
        TRY(set_value(options, option, value));
    }
    return check(options);
}

void options_usage(FILE *stream)
{
    struct options defaults = DEFAULTS;
    fprintf(stream, "serve: an HTTP server for a LLaMA-family model and many adapters of it\n\n"
                    "  serve --model DIR [--adapters DIR] [options]\n\n");
    for (int i = 0; i < OPTION_COUNT; i++) {
        const struct option *option = &OPTIONS[i];
        const void *value = field(&defaults, option);
        fprintf(stream, "  --%-16s %s", option->name, option->help);
        if (option->kind == INTEGER) fprintf(stream, " [%lld]", (long long)*(const int64_t *)value);
        if (option->kind == TEXT && *(const char *const *)value) fprintf(stream, " [%s]", *(const char *const *)value);
        fputc('\n', stream);
    }
}
