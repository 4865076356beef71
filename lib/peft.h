/* peft.h: PEFT directories: written of live adapters (peft.c) or of exported ones (export.c), and read. */
#ifndef PLORA_PEFT_H
#define PLORA_PEFT_H

#include "safetensors.h"

/* An adapter as it goes into the directory. Entry i of a list is of adapters->adapters[i], whose shapes and layer it has. */
struct plora__peft_adapter {
    const char *name; /* the layer in the file */
    int64_t rank;
    double alpha;
    void *a, *b; /* A[rank,K] and B[N,rank]: device memory, or what the writers below go by */
    plora_status (*write_a)(const struct plora__tensor *tensor, struct plora__writer *writer); /* NULL: from memory */
    plora_status (*write_b)(const struct plora__tensor *tensor, struct plora__writer *writer);
};

/* The layer that an adapter is saved under: the first of its weight that PEFT sees as a linear one. UNSUPPORTED if none is. */
plora_status plora__peft_name(const plora_adapters *adapters, int32_t index, const char **name);

/* Writes both files, each atomically; the directory is made if it is missing. Of options, rank and alpha are those of layers that
 * the patterns do not name; rslora and dropout are told to PEFT. */
plora_status plora__peft_save(const plora_adapters *adapters, const struct plora__peft_adapter *list,
                              const plora_adapters_options *options, const char *directory);

/* plora_adapters_load() of a directory. Rank, alpha and rslora of `options` become the file's. */
plora_status plora__peft_load(plora_model *model, const char *directory, plora_adapters_options *options,
                              plora_adapters **adapters);

#endif
