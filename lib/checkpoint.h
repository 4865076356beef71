/* checkpoint.h: what a test needs to make files that get as far as a checkpoint's own checks. */
#ifndef PLORA_CHECKPOINT_H
#define PLORA_CHECKPOINT_H

#include "safetensors.h"

/* What the metadata "checksum" must say, as 16 hexadecimal digits: a hash of all other metadata, and of the tensors. */
uint64_t plora__checkpoint_checksum(const struct plora__safetensors *file);

#endif
