/* targets.h: which layers a comma-separated pattern list names (the `targets` of plora_adapters_options). */
#ifndef PLORA_TARGETS_H
#define PLORA_TARGETS_H

#include "handles.h"

/* Whether one pattern of `length` bytes matches a layer: "all-linear", a glob over the whole name, or the last components. */
int plora__pattern_matches(const char *pattern, size_t length, const struct plora__layer *layer);

/* chosen[i] = 1 for the layers that a list names and 0 for the others; NOT_FOUND for a pattern that names none. */
plora_status plora__match_targets(const plora_model *model, const char *list, const char *what, unsigned char *chosen);

#endif
