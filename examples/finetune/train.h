/* train.h: a fine-tuning run, and the benchmark. */
#ifndef FINETUNE_TRAIN_H
#define FINETUNE_TRAIN_H

#include <signal.h>

#include "options.h"

enum { TRAIN_DONE = 0, TRAIN_FAILED = -1, TRAIN_STOPPED = 130 };

/* Trains as the options say. *stop turns non-zero when the run must end after its present step: then a checkpoint is written. */
int train_run(const struct options *options, const volatile sig_atomic_t *stop);

/* Times training steps on random tokens and prints one JSON object on stdout. */
int bench_run(const struct options *options);

#endif
