/* gguf_adapter.h: adapters from a GGUF file. */
#ifndef PLORA_GGUF_ADAPTER_H
#define PLORA_GGUF_ADAPTER_H

#include "handles.h"

/* plora_adapters_load() of a file. Rank, alpha and rslora of `options` become the file's. */
plora_status plora__gguf_load(plora_model *model, const char *path, plora_adapters_options *options,
                              plora_adapters **adapters);

#endif
