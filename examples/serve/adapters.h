/* adapters.h: the adapters that can be asked for by name, and the products of a step that go through several of them at once.
 *
 *     name -> plora_registry -> plora_snapshot, held by a request to its end -> plora_batch of a step -> every layer
 *
 * They come, go and are replaced while requests run: a snapshot stays as it was for as long as somebody holds it. */
#ifndef SERVE_ADAPTERS_H
#define SERVE_ADAPTERS_H

#include <stdint.h>

#include "buffer.h"
#include "plora.h"

struct adapters;

struct adapters_options {
    const char *root;    /* the directory of adapters, NULL = none */
    int64_t memory;      /* bytes that all may take, 0 = no bound */
    const char *spill;   /* directory for those that have no room; NULL: more than there is room for are refused */
    int64_t rows, slots; /* tokens and sequences of a step, at most */
};

int adapters_create(plora_model *model, const struct adapters_options *options, struct adapters **out);
void adapters_destroy(struct adapters *adapters);

/* Whether it may be the name of an adapter: 1 to 64 of the characters A-Z a-z 0-9 . _ -, not beginning with '.'. */
int adapters_name_valid(const char *name);

/* These return 0, or the HTTP status that says whose fault it is; failure() says what. */

/* Loads a PEFT directory, `path` within the root, under the name; what had the name before is replaced. */
unsigned adapters_load(struct adapters *adapters, const char *name, const char *path, int64_t *version);
/* Requests that hold it go on. */
unsigned adapters_unload(struct adapters *adapters, const char *name);
/* The adapter of this name, held until plora_snapshot_release(). */
unsigned adapters_acquire(struct adapters *adapters, const char *name, plora_snapshot **snapshot);

/* Loads every PEFT directory in the root under its own name; tells of those that cannot be. */
int adapters_load_all(struct adapters *adapters);

plora_registry_statistics adapters_statistics(struct adapters *adapters);
/* {"id": ...} of each, with a comma before each, for a list of models. */
void adapters_list(struct adapters *adapters, const char *base, struct buffer *out);

/* The two batches of a step: all its rows, and the last rows of its pieces, whose logits are wanted. */
enum step_part { STEP_LAYERS, STEP_HEAD, STEP_PARTS };

/* Whose adapter each row goes through, NULL = none. One thread at a time, as adapters_forward(). */
int adapters_begin(struct adapters *adapters, enum step_part part, int64_t rows, plora_snapshot *const *of_row);
/* y[i] = x W^T + the low-rank product of each row's own adapter, for `count` layers with the same x. */
int adapters_forward(struct adapters *adapters, enum step_part part, const int32_t *layers, int32_t count,
                     const plora_matrix *x, const plora_matrix *y);

#endif
