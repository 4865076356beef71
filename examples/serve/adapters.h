/* adapters.h: the adapters that can be asked for by name. They come and go while requests run: who has pinned one keeps it, as it was, to
 * the end of his request. */
#ifndef SERVE_ADAPTERS_H
#define SERVE_ADAPTERS_H

#include <stdint.h>

#include "buffer.h"
#include "plora.h"

struct adapters;
struct adapter;

/* root: the directory of adapters, NULL = none. model: the layers they belong to. */
int adapters_create(plora_model *model, const char *root, struct adapters **adapters);
void adapters_destroy(struct adapters *adapters);

/* Whether it may be the name of an adapter: 1 to 64 of the characters A-Z a-z 0-9 . _ -, not beginning with '.'. */
int adapters_name_valid(const char *name);

/* Loads a PEFT directory, `path` within the root, under the name; what had the name before is replaced. Returns 0 or the HTTP status that
 * says whose fault it is; failure() says what. */
unsigned adapters_load(struct adapters *adapters, const char *name, const char *path, int64_t *version);
/* 0, or 404. Requests that have it pinned go on. */
unsigned adapters_unload(struct adapters *adapters, const char *name);
/* Loads every PEFT directory in the root under its own name; tells of those that cannot be. */
int adapters_load_all(struct adapters *adapters);

/* The adapter of this name, kept until adapters_unpin(); NULL when there is none. */
struct adapter *adapters_pin(struct adapters *adapters, const char *name);
void adapters_unpin(struct adapters *adapters, struct adapter *adapter);

int64_t adapters_count(struct adapters *adapters);
/* {"id": ...} of each, with a comma before each, for a list of models. */
void adapters_list(struct adapters *adapters, const char *base, struct buffer *out);

/* y = x W^T + the low-rank product of each row's own adapter, NULL = none. One thread at a time. */
int adapters_forward(struct adapters *adapters, int32_t layer, const plora_matrix *x, const plora_matrix *y,
                     struct adapter *const *of_row);

#endif
