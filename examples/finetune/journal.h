/* journal.h: what a run writes for people and programs: log.jsonl, the progress line, samples.jsonl. */
#ifndef FINETUNE_JOURNAL_H
#define FINETUNE_JOURNAL_H

#include <stdint.h>
#include <stdio.h>

#include "plora.h"

struct journal {
    FILE *file;
    double *losses; /* [steps]: of each step so far */
    int64_t steps;
    double heldout_before, heldout_after; /* NaN = not measured */
    int64_t unloads;
    int64_t tokens; /* of all training steps so far, and the seconds they took */
    double seconds;
    double begin, last_line; /* times of the progress line */
    int64_t first_step;      /* of this process */
    int terminal, line_open;
};

struct journal_step {
    int64_t step, stage, tokens;
    double loss, lr, gradient_norm, seconds;
};

/* Opens DIR/log.jsonl: empty, or with resume_step >= 0 cut back to what happened up to that step. */
int journal_open(const char *directory, int64_t steps, int64_t resume_step, struct journal *journal);
void journal_close(struct journal *journal);
int journal_step(struct journal *journal, const struct journal_step *step);
int journal_heldout(struct journal *journal, int64_t step, double loss);
/* final: the merge for export after the last step. */
int journal_unload(struct journal *journal, int64_t step, const plora_unload_report *report, int final);
void journal_progress(struct journal *journal, const struct journal_step *step, double tokens_per_second);
void journal_end_line(struct journal *journal); /* before other output on stderr */

#endif
