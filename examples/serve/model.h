/* model.h: a LLaMA-family model that takes pieces of many sequences at once, each through its own adapter.
 *
 *     rows of the batch   | sequence 0: its newest token | sequence 1: the same | sequence 2: a piece of its prompt | ...
 *     products            one pass over each weight for all rows; of each adapter only its own rows
 *     attention           each piece against the keys and values of its sequence, kept in a slot of the cache
 *
 * The cache has a fixed number of slots, each with room for one sequence of any length up to the context:
 *     keys, values [layer][slot][position][kv_heads D]
 * Pages of it cost memory only from their first use. The layers themselves are the trainer's (../finetune). */
#ifndef SERVE_MODEL_H
#define SERVE_MODEL_H

#include <stdint.h>

#include "adapters.h"
#include "config.h"
#include "plora.h"

struct model;

struct model_options {
    const char *directory;
    int32_t dtype; /* PLORA_F32 or PLORA_BF16 */
    int threads;
    int64_t slots, context; /* sequences at a time, and tokens of each */
    int64_t batch_tokens;   /* of one step, at most */
};

struct piece {
    int64_t slot, past, rows; /* rows new tokens after the `past` that are in the cache */
    const int32_t *ids;       /* [rows] */
    plora_snapshot *adapter;  /* NULL = the model alone */
    int wants_logits;         /* of its last token */
};

int model_open(plora_context *context, const struct model_options *options, struct model **model);
void model_close(struct model *model);
const struct llama_config *model_configuration(const struct model *model);
plora_model *model_layers(struct model *model);
/* The rows of a step, at most: some more than its tokens. */
int64_t model_rows(const struct model *model);
/* Whose products the layers are: of model_layers(). */
void model_use_adapters(struct model *model, struct adapters *adapters);

/* Takes the pieces through the model. *logits: one row of the vocabulary in fp32 for each piece that wants them, in their order; valid
 * until the next step. */
int model_step(struct model *model, int64_t count, const struct piece *pieces, const float **logits);

#endif
