/* options.c: a table of options drives parsing, --help, and what a resumed run must have in common with its beginning. */
#include "options.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "plora.h"
#include "util.h"

enum kind { TEXT, INTEGER, NUMBER, FLAG, CHOICE };

struct option {
    const char *name;
    enum kind kind;
    size_t offset;
    double least, most;  /* of numbers */
    const char *choices; /* "a|b|c" */
    int fixed;           /* must not change on --resume */
    const char *help;
};

#define AT(field) offsetof(struct options, field)
#define HUGE_COUNT 1e15

static const struct option OPTIONS[] = {
    {"model", TEXT, AT(model), 0, 0, NULL, 0, "DIR: config.json and model.safetensors of a LLaMA-family model"},
    {"train", TEXT, AT(train), 0, 0, NULL, 0, "FILE: JSONL of {\"prompt\":[ids],\"completion\":[ids]}"},
    {"heldout", TEXT, AT(heldout), 0, 0, NULL, 0, "FILE: the same, for the held-out loss and samples (optional)"},
    {"output", TEXT, AT(output), 0, 0, NULL, 0, "DIR: log, result, checkpoint, merged model"},
    {"method", CHOICE, AT(method), 0, 0, "lora|plora", 1, "one adapter, or one unloaded every --period steps"},
    {"rank", INTEGER, AT(rank), 1, 1e6, NULL, 1, "rank of the adapters"},
    {"alpha", NUMBER, AT(alpha), -1e6, 1e6, NULL, 1, "scale = alpha / rank"},
    {"lr", NUMBER, AT(lr), 0, 1e3, NULL, 1, "learning rate"},
    {"schedule", CHOICE, AT(schedule), 0, 0, "constant|linear|cosine|relora", 1, "of the learning rate"},
    {"warmup", INTEGER, AT(warmup), 0, HUGE_COUNT, NULL, 1, "steps of warm-up"},
    {"rewarmup", INTEGER, AT(rewarmup), 0, HUGE_COUNT, NULL, 1, "relora: steps of warm-up after an unload"},
    {"final-ratio", NUMBER, AT(final_ratio), 0, 1, NULL, 1,
     "linear, cosine, relora: last learning rate over the first"},
    {"steps", INTEGER, AT(steps), 1, HUGE_COUNT, NULL, 0, "optimizer steps"},
    {"batch", INTEGER, AT(batch), 1, 1e6, NULL, 1, "examples per optimizer step"},
    {"accumulate", INTEGER, AT(accumulate), 1, 1e6, NULL, 1, "micro-batches that a batch is cut into"},
    {"period", INTEGER, AT(period), 1, HUGE_COUNT, NULL, 1, "plora: unload every N optimizer steps"},
    {"momentum", NUMBER, AT(momentum), 1e-6, 1, NULL, 1, "plora: share that an unload moves; 1 = all, with a restart"},
    {"dropout", NUMBER, AT(dropout), 0, 0.999999, NULL, 1, "of the adapters' input"},
    {"weight-decay", NUMBER, AT(weight_decay), 0, 1e3, NULL, 1, "decoupled"},
    {"clip", NUMBER, AT(clip), 0, 1e9, NULL, 1, "clip the global gradient norm to this; 0 = off"},
    {"lora-plus", NUMBER, AT(lora_plus), 1e-6, 1e6, NULL, 1, "learning rate of B over that of A"},
    {"rslora", FLAG, AT(rslora), 0, 0, NULL, 1, "scale = alpha / sqrt(rank)"},
    {"targets", TEXT, AT(targets), 0, 0, NULL, 1, "PATTERNS of the layers that get an adapter"},
    {"seed", INTEGER, AT(seed), 0, 9007199254740991.0, NULL, 1, "of adapters, dropout and the order of examples"},
    {"dtype", CHOICE, AT(dtype), 0, 0, "fp32|bf16", 1, "of backbone and activations; adapters are fp32"},
    {"threads", INTEGER, AT(threads), 0, 4096, NULL, 0, "0 = as OpenMP chooses"},
    {"deterministic", FLAG, AT(deterministic), 0, 0, NULL, 1, "the same bits for any number of threads"},
    {"eval-every", INTEGER, AT(eval_every), 0, HUGE_COUNT, NULL, 0,
     "held-out loss every N steps; 0 = before and after"},
    {"heldout-examples", INTEGER, AT(heldout_examples), 0, HUGE_COUNT, NULL, 1, "use the first N only; 0 = all"},
    {"checkpoint-every", INTEGER, AT(checkpoint_every), 0, HUGE_COUNT, NULL, 0, "0 = at the end and on a signal"},
    {"stop-after", INTEGER, AT(stop_after), 0, HUGE_COUNT, NULL, 0,
     "end with a checkpoint after N steps of this call, as a signal does; 0 = off"},
    {"ledger", TEXT, AT(ledger), 0, 0, NULL, 0,
     "FILE: plora: keep every unload; checkpoints then need no weights, and any stage comes back"},
    {"resume", FLAG, AT(resume), 0, 0, NULL, 0, "go on from the checkpoint in --output"},
    {"sample", INTEGER, AT(sample), 0, 1e6, NULL, 0,
     "greedy answers to the first N held-out prompts, before and after"},
    {"max-new-tokens", INTEGER, AT(max_new_tokens), 1, 1e6, NULL, 0, "of an answer"},
    {"eos", INTEGER, AT(eos), -1, 2147483647, NULL, 0, "ID of the token that ends an answer; -1 = config.json's"},
    {"save-adapter", FLAG, AT(save_adapter), 0, 0, NULL, 0,
     "write all that was learnt as a PEFT directory, OUTPUT/adapter, for the model as it was; plora: needs --ledger"},
    {"no-save-model", FLAG, AT(no_save_model), 0, 0, NULL, 0, "do not write the merged model"},
    {"bench", INTEGER, AT(bench), 1, 1e6, NULL, 0, "STEPS: time training steps on random tokens, print JSON"},
    {"bench-tokens", INTEGER, AT(bench_tokens), 1, 1e6, NULL, 0, "length of the benchmark's sequences"},
    {"frozen", FLAG, AT(frozen), 0, 0, NULL, 0, "benchmark without adapters: forward and the gradient of the input"},
    {"profile", FLAG, AT(profile), 0, 0, NULL, 0, "say on stderr where the time went"},
    {"help", FLAG, AT(help), 0, 0, NULL, 0, "this text"},
};
enum { OPTION_COUNT = sizeof OPTIONS / sizeof *OPTIONS };

static const struct options DEFAULTS = {.method = METHOD_LORA,
                                        .rank = 8,
                                        .alpha = 16,
                                        .lr = 1e-3,
                                        .steps = 100,
                                        .batch = 4,
                                        .accumulate = 1,
                                        .momentum = 1,
                                        .clip = 1,
                                        .lora_plus = 1,
                                        .rewarmup = 5,
                                        .max_new_tokens = 200,
                                        .eos = -1,
                                        .bench_tokens = 256,
                                        .targets = "all-linear"};

static void *field(struct options *options, const struct option *option)
{
    return (char *)options + option->offset;
}

/* The n-th of "a|b|c" as a fresh string, NULL when there are fewer. */
static char *nth_choice(const char *choices, int64_t n)
{
    for (; n > 0 && choices; n--) {
        choices = strchr(choices, '|');
        if (choices) choices++;
    }
    return choices ? strndup(choices, strcspn(choices, "|")) : NULL;
}

static int64_t find_choice(const char *choices, const char *value)
{
    char *choice;
    for (int64_t i = 0; (choice = nth_choice(choices, i)); i++) {
        const int same = strcmp(choice, value) == 0;
        free(choice);
        if (same) return i;
    }
    return -1;
}

static int set_value(struct options *options, const struct option *option, const char *value)
{
    void *target = field(options, option);
    char *end;
    errno = 0;
    if (option->kind == TEXT) {
        *(const char **)target = value;
        return *value ? 0 : fault("--%s needs a value", option->name);
    }
    if (option->kind == CHOICE) {
        const int64_t found = find_choice(option->choices, value);
        if (found < 0) return fault("--%s '%s': must be one of %s", option->name, value, option->choices);
        *(int64_t *)target = found;
        return 0;
    }
    if (option->kind == INTEGER) {
        const long long number = strtoll(value, &end, 10);
        if (*value == '\0' || *end != '\0' || errno ||
            !((double)number >= option->least && (double)number <= option->most))
            return fault("--%s '%s': must be an integer in [%.0f, %.0f]", option->name, value, option->least,
                         option->most);
        *(int64_t *)target = number;
        return 0;
    }
    const double number = strtod(value, &end);
    if (*value == '\0' || *end != '\0' || !(number >= option->least && number <= option->most))
        return fault("--%s '%s': must be a number in [%g, %g]", option->name, value, option->least, option->most);
    *(double *)target = number;
    return 0;
}

static int check(const struct options *options)
{
    if (options->help) return 0;
    if (!options->model) return fault("--model is missing (see --help)");
    if (options->bench) return 0;
    if (options->frozen) return fault("--frozen belongs to --bench");
    if (!options->train) return fault("--train is missing (see --help)");
    if (!options->output) return fault("--output is missing (see --help)");
    if (options->method == METHOD_PLORA && options->period == 0) return fault("--method plora needs --period");
    if (options->method == METHOD_LORA && options->period > 0) return fault("--period belongs to --method plora");
    if (options->method == METHOD_LORA && options->ledger) return fault("--ledger belongs to --method plora");
    if (options->method == METHOD_LORA && options->momentum != 1) return fault("--momentum belongs to --method plora");
    if (options->batch % options->accumulate != 0)
        return fault("--batch %lld is no multiple of --accumulate %lld", (long long)options->batch,
                     (long long)options->accumulate);
    if (options->save_adapter && options->method == METHOD_PLORA && !options->ledger)
        return fault("--save-adapter of --method plora needs --ledger");
    if (options->sample > 0 && !options->heldout) return fault("--sample needs --heldout");
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
    fprintf(stream, "finetune: LoRA and PeriodicLoRA fine-tuning of a LLaMA-family model\n\n"
                    "  finetune --model DIR --train FILE --output DIR [options]\n"
                    "  finetune --model DIR --bench STEPS [options]\n\n");
    for (int i = 0; i < OPTION_COUNT; i++) {
        const struct option *option = &OPTIONS[i];
        const void *value = field(&defaults, option);
        fprintf(stream, "  --%-17s %s", option->name, option->help);
        if (option->choices) {
            char *choice = nth_choice(option->choices, *(const int64_t *)value);
            fprintf(stream, ": %s [%s]", option->choices, choice ? choice : "");
            free(choice);
        } else if (option->kind == INTEGER)
            fprintf(stream, " [%lld]", (long long)*(const int64_t *)value);
        else if (option->kind == NUMBER)
            fprintf(stream, " [%g]", *(const double *)value);
        fputc('\n', stream);
    }
}

const char *options_method(const struct options *options)
{
    return options->method == METHOD_PLORA ? "plora" : "lora";
}

const char *options_schedule(const struct options *options)
{
    static const char *const names[] = {"constant", "linear", "cosine", "relora"};
    return names[options->schedule];
}

const char *options_dtype(const struct options *options)
{
    return options->dtype == 0 ? "fp32" : "bf16";
}

char *options_to_json(const struct options *options, uint64_t data_hash)
{
    cJSON *root = cJSON_CreateObject();
    struct options copy = *options;
    for (int i = 0; root && i < OPTION_COUNT; i++) {
        const struct option *option = &OPTIONS[i];
        const void *value = field(&copy, option);
        if (strcmp(option->name, "help") == 0 || strcmp(option->name, "resume") == 0) continue;
        if (strncmp(option->name, "bench", 5) == 0 || strcmp(option->name, "frozen") == 0) continue;
        if (option->kind == TEXT && *(const char *const *)value)
            cJSON_AddStringToObject(root, option->name, *(const char *const *)value);
        else if (option->kind == CHOICE) {
            char *choice = nth_choice(option->choices, *(const int64_t *)value);
            cJSON_AddStringToObject(root, option->name, choice ? choice : "");
            free(choice);
        } else if (option->kind == NUMBER)
            cJSON_AddNumberToObject(root, option->name, *(const double *)value);
        else if (option->kind == FLAG)
            cJSON_AddBoolToObject(root, option->name, *(const int64_t *)value != 0);
        else if (option->kind == INTEGER)
            cJSON_AddNumberToObject(root, option->name, (double)*(const int64_t *)value);
    }
    char hash[24];
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)data_hash);
    cJSON_AddStringToObject(root, "data_hash", hash);
    char *text = cJSON_Print(root);
    cJSON_Delete(root);
    return text;
}

int options_same_run(const char *then, const char *now)
{
    cJSON *a = cJSON_Parse(then), *b = cJSON_Parse(now);
    int result = a && b ? 0 : fault("the options of the interrupted run cannot be read");
    for (int i = 0; result == 0 && i <= OPTION_COUNT; i++) {
        const char *name = i < OPTION_COUNT ? OPTIONS[i].name : "data_hash";
        if (i < OPTION_COUNT && !OPTIONS[i].fixed) continue;
        cJSON *x = cJSON_GetObjectItemCaseSensitive(a, name), *y = cJSON_GetObjectItemCaseSensitive(b, name);
        if ((!x && !y) || cJSON_Compare(x, y, 1)) continue;
        char *was = x ? cJSON_PrintUnformatted(x) : NULL, *is = y ? cJSON_PrintUnformatted(y) : NULL;
        result = i < OPTION_COUNT
                     ? fault("--resume: --%s was %s and is now %s", name, was ? was : "absent", is ? is : "absent")
                     : fault("--resume: the data is not what the run began with");
        free(was);
        free(is);
    }
    cJSON_Delete(a);
    cJSON_Delete(b);
    return result;
}
