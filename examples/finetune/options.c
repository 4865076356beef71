/* options.c: the table of options, which drives parsing, --help, and what a resumed run must have in common with its beginning. */
#include "options.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

#include "arguments.h"
#include "util.h"

#define AT(field) offsetof(struct options, field)
#define HUGE_COUNT 1e15

static const struct argument LIST[] = {
    {"model", TEXT, AT(model), .help = "DIR: config.json and model.safetensors of a LLaMA-family model"},
    {"train", TEXT, AT(train), .help = "FILE: JSONL of {\"prompt\":[ids],\"completion\":[ids]}"},
    {"heldout", TEXT, AT(heldout), .help = "FILE: the same, for the held-out loss and samples (optional)"},
    {"output", TEXT, AT(output), .help = "DIR: log, result, checkpoint, merged model"},
    {"method", CHOICE, AT(method), .choices = "lora|plora", .fixed = 1,
     .help = "one adapter, or one unloaded every --period steps"},
    {"rank", INTEGER, AT(rank), 1, 1e6, .fixed = 1, .help = "rank of the adapters"},
    {"alpha", NUMBER, AT(alpha), -1e6, 1e6, .fixed = 1, .help = "scale = alpha / rank"},
    {"lr", NUMBER, AT(lr), 0, 1e3, .fixed = 1, .help = "learning rate"},
    {"schedule", CHOICE, AT(schedule), .choices = "constant|linear|cosine|relora", .fixed = 1,
     .help = "of the learning rate"},
    {"warmup", INTEGER, AT(warmup), 0, HUGE_COUNT, .fixed = 1, .help = "steps of warm-up"},
    {"rewarmup", INTEGER, AT(rewarmup), 0, HUGE_COUNT, .fixed = 1, .help = "relora: steps of warm-up after an unload"},
    {"final-ratio", NUMBER, AT(final_ratio), 0, 1, .fixed = 1,
     .help = "linear, cosine, relora: last learning rate over the first"},
    {"steps", INTEGER, AT(steps), 1, HUGE_COUNT, .help = "optimizer steps"},
    {"batch", INTEGER, AT(batch), 1, 1e6, .fixed = 1, .help = "examples per optimizer step"},
    {"accumulate", INTEGER, AT(accumulate), 1, 1e6, .fixed = 1, .help = "micro-batches that a batch is cut into"},
    {"period", INTEGER, AT(period), 1, HUGE_COUNT, .fixed = 1, .help = "plora: unload every N optimizer steps"},
    {"momentum", NUMBER, AT(momentum), 1e-6, 1, .fixed = 1,
     .help = "plora: share that an unload moves; 1 = all, with a restart"},
    {"dropout", NUMBER, AT(dropout), 0, 0.999999, .fixed = 1, .help = "of the adapters' input"},
    {"weight-decay", NUMBER, AT(weight_decay), 0, 1e3, .fixed = 1, .help = "decoupled"},
    {"clip", NUMBER, AT(clip), 0, 1e9, .fixed = 1, .help = "clip the global gradient norm to this; 0 = off"},
    {"lora-plus", NUMBER, AT(lora_plus), 1e-6, 1e6, .fixed = 1, .help = "learning rate of B over that of A"},
    {"rslora", FLAG, AT(rslora), .fixed = 1, .help = "scale = alpha / sqrt(rank)"},
    {"targets", TEXT, AT(targets), .fixed = 1, .help = "PATTERNS of the layers that get an adapter"},
    {"seed", INTEGER, AT(seed), 0, 9007199254740991.0, .fixed = 1,
     .help = "of adapters, dropout and the order of examples"},
    {"dtype", CHOICE, AT(dtype), .choices = "fp32|bf16", .fixed = 1,
     .help = "of backbone and activations; adapters are fp32"},
    {"threads", INTEGER, AT(threads), 0, 4096, .help = "0 = as OpenMP chooses"},
    {"deterministic", FLAG, AT(deterministic), .fixed = 1, .help = "the same bits for any number of threads"},
    {"eval-every", INTEGER, AT(eval_every), 0, HUGE_COUNT, .help = "held-out loss every N steps; 0 = before and after"},
    {"heldout-examples", INTEGER, AT(heldout_examples), 0, HUGE_COUNT, .fixed = 1,
     .help = "use the first N only; 0 = all"},
    {"checkpoint-every", INTEGER, AT(checkpoint_every), 0, HUGE_COUNT, .help = "0 = at the end and on a signal"},
    {"stop-after", INTEGER, AT(stop_after), 0, HUGE_COUNT,
     .help = "end with a checkpoint after N steps of this call, as a signal does; 0 = off"},
    {"ledger", TEXT, AT(ledger),
     .help = "FILE: plora: keep every unload; checkpoints then need no weights, and any stage comes back"},
    {"resume", FLAG, AT(resume), .help = "go on from the checkpoint in --output"},
    {"sample", INTEGER, AT(sample), 0, 1e6, .help = "greedy answers to the first N held-out prompts, before and after"},
    {"max-new-tokens", INTEGER, AT(max_new_tokens), 1, 1e6, .help = "of an answer"},
    {"eos", INTEGER, AT(eos), -1, 2147483647, .help = "ID of the token that ends an answer; -1 = config.json's"},
    {"save-adapter", FLAG, AT(save_adapter),
     .help = "write all that was learnt as a PEFT directory, OUTPUT/adapter, for the model as it was; plora: needs "
             "--ledger"},
    {"no-save-model", FLAG, AT(no_save_model), .help = "do not write the merged model"},
    {"bench", INTEGER, AT(bench), 1, 1e6, .help = "STEPS: time training steps on random tokens, print JSON"},
    {"bench-tokens", INTEGER, AT(bench_tokens), 1, 1e6, .help = "length of the benchmark's sequences"},
    {"frozen", FLAG, AT(frozen), .help = "benchmark without adapters: forward and the gradient of the input"},
    {"profile", FLAG, AT(profile), .help = "say on stderr where the time went"},
    {"help", FLAG, AT(help), .help = "this text"},
};
enum { COUNT = sizeof LIST / sizeof *LIST };

static const struct arguments ARGUMENTS = {
    .usage = "finetune: LoRA and PeriodicLoRA fine-tuning of a LLaMA-family model\n\n"
             "  finetune --model DIR --train FILE --output DIR [options]\n"
             "  finetune --model DIR --bench STEPS [options]\n\n",
    .width = 17,
    .count = COUNT,
    .list = LIST,
};

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
    for (int i = 0; root && i < COUNT; i++) {
        const struct argument *option = &LIST[i];
        const void *value = argument_value(option, options);
        if (strcmp(option->name, "help") == 0 || strcmp(option->name, "resume") == 0) continue;
        if (strncmp(option->name, "bench", 5) == 0 || strcmp(option->name, "frozen") == 0) continue;
        if (option->kind == TEXT && *(const char *const *)value)
            cJSON_AddStringToObject(root, option->name, *(const char *const *)value);
        else if (option->kind == CHOICE) {
            char *choice = argument_choice(option, options);
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
    for (int i = 0; result == 0 && i <= COUNT; i++) {
        const char *name = i < COUNT ? LIST[i].name : "data_hash";
        if (i < COUNT && !LIST[i].fixed) continue;
        cJSON *x = cJSON_GetObjectItemCaseSensitive(a, name), *y = cJSON_GetObjectItemCaseSensitive(b, name);
        if ((!x && !y) || cJSON_Compare(x, y, 1)) continue;
        char *was = x ? cJSON_PrintUnformatted(x) : NULL, *is = y ? cJSON_PrintUnformatted(y) : NULL;
        result = i < COUNT
                     ? fault("--resume: --%s was %s and is now %s", name, was ? was : "absent", is ? is : "absent")
                     : fault("--resume: the data is not what the run began with");
        free(was);
        free(is);
    }
    cJSON_Delete(a);
    cJSON_Delete(b);
    return result;
}
