/* data.h: examples as token ids, their order, and batches of them.
 *
 * File: one JSON object a line, {"prompt": [ids], "completion": [ids]}. The model reads prompt and completion but the last token,
 * and the loss is taken where it must predict a token of the completion. */
#ifndef FINETUNE_DATA_H
#define FINETUNE_DATA_H

#include <stddef.h>
#include <stdint.h>

#include "llama.h"

struct example {
    int32_t *ids; /* [length]: prompt, then completion */
    int64_t prompt, length;
};

struct dataset {
    struct example *examples;
    int64_t count, longest;
    uint64_t hash; /* of all ids: --resume compares it */
};

int dataset_read(const char *path, int64_t vocabulary, int64_t max_positions, struct dataset *dataset);
void dataset_free(struct dataset *dataset);

/* Random tokens, every position with a loss (benchmark): `count` sequences of `length`. */
int batch_random(int64_t count, int64_t length, int64_t vocabulary, uint64_t seed, struct batch *batch);
/* The examples indices[0 .. count) one after another; frees what the batch held before. */
int batch_fill(struct batch *batch, const struct dataset *dataset, const int64_t *indices, int64_t count);
void batch_free(struct batch *batch);

/* The order in which examples are drawn: a fresh permutation of all of them each epoch, a function of seed and place alone. */
struct order {
    uint64_t seed;
    int64_t count, epoch; /* epoch of `permutation`, -1 at first */
    int64_t *permutation;
};
int order_create(int64_t count, uint64_t seed, struct order *order);
int64_t order_at(struct order *order, int64_t place); /* the example at place 0, 1, 2, ... of the run */
void order_free(struct order *order);

#endif
