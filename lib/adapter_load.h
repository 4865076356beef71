/* adapter_load.h: adapters from the tensors of a file, of whatever format: PEFT (peft.c) or GGUF (gguf_adapter.c). */
#ifndef PLORA_ADAPTER_LOAD_H
#define PLORA_ADAPTER_LOAD_H

#include "safetensors.h"

/* What a format knows about the tensors of a file. Errors of its functions name tensor or layer. */
struct plora__adapter_source {
    const struct plora__tensor *tensors;
    int32_t tensor_count;
    /* Which layer a tensor belongs to, by the model's names, and whether it is its B. `layer` has PLORA__LAYER_NAME_ROOM bytes more
     * than the tensor's name. */
    plora_status (*name_layer)(const struct plora__adapter_source *source, const struct plora__tensor *tensor,
                               char *layer, int *is_b);
    /* Alpha and scale of a layer whose tensors have that rank, or why it cannot have it. */
    plora_status (*choose)(const struct plora__adapter_source *source, const struct plora__layer *layer, int64_t rank,
                           double *alpha, double *scale);
    /* The row of the arena's B that is row `row` of the tensor; NULL where the two are the same. */
    int64_t (*row)(const struct plora__adapter_source *source, const struct plora__layer *layer, int64_t row);
};

enum { PLORA__LAYER_NAME_ROOM = 64 };

/* Creates adapters with the tensors' values, each layer's checked against the model, and every value that it is finite. A is
 * [R,K], B is [N,R]. Errors: FORMAT, UNSUPPORTED, SHAPE, NOT_FOUND (no such layer), OUT_OF_MEMORY. */
plora_status plora__adapters_from(plora_model *model, const struct plora__adapter_source *source,
                                  const plora_adapters_options *options, plora_adapters **adapters);

#endif
