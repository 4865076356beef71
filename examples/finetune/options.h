/* options.h: the command line. */
#ifndef FINETUNE_OPTIONS_H
#define FINETUNE_OPTIONS_H

#include <stdint.h>
#include <stdio.h>

enum { METHOD_LORA, METHOD_PLORA };

struct options {
    const char *model, *train, *heldout, *output, *targets, *ledger;
    int64_t method, schedule, dtype;
    int64_t rank, warmup, rewarmup, steps, batch, accumulate, period, seed, threads;
    int64_t eval_every, heldout_examples, checkpoint_every, stop_after, sample, max_new_tokens, eos;
    int64_t bench, bench_tokens;
    double alpha, lr, final_ratio, momentum, dropout, weight_decay, clip, lora_plus;
    int64_t rslora, deterministic, resume, no_save_model, save_adapter, frozen, profile, help;
};

/* 0, or -1 with the reason in failure(). */
int options_parse(int count, char **words, struct options *options);
void options_usage(FILE *stream);
const char *options_method(const struct options *options);
const char *options_schedule(const struct options *options);
const char *options_dtype(const struct options *options);

/* The options as one JSON object: everything that decides the course of a run. Free with free(). */
char *options_to_json(const struct options *options, uint64_t data_hash);
/* Fails and names the first value that differs between the two, but for those that may change on --resume. */
int options_same_run(const char *then, const char *now);

#endif
