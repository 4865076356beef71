/* main.c: finetune, a complete host application of libplora: LoRA and PeriodicLoRA fine-tuning of LLaMA-family models on the CPU.
 *
 *     options -> llama (config.json, safetensors) + data (JSONL of token ids) -> train -> log.jsonl, result.json,
 *     checkpoint.safetensors, samples.jsonl, model/
 *
 * Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by a signal with a checkpoint written. Only plora.h is used of the
 * library. */
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#include "train.h"
#include "util.h"

static volatile sig_atomic_t stop;

/* The first signal asks for an orderly end, the second ends at once. */
static void on_signal(int number)
{
    (void)number;
    if (stop) _exit(130);
    stop = 1;
}

int main(int count, char **arguments)
{
    struct options options;
    if (options_parse(count, arguments, &options) != 0) {
        fprintf(stderr, "finetune: %s\n", failure());
        return 2;
    }
    if (options.help) {
        options_usage(stdout);
        return 0;
    }
    struct sigaction action = {.sa_handler = on_signal};
    sigemptyset(&action.sa_mask);
    if (!options.bench) {
        sigaction(SIGINT, &action, NULL);
        sigaction(SIGTERM, &action, NULL);
    }
    const int result = options.bench ? bench_run(&options) : train_run(&options, &stop);
    if (result == TRAIN_FAILED) fprintf(stderr, "finetune: %s\n", failure());
    return result == TRAIN_FAILED ? 1 : result;
}
