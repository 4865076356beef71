/* hash.h: XXH3, 64 bits (xxhash.com): finds damage, does not resist forgery. `seed` chains pieces: hash(b, hash(a)) stands for a
 * followed by b, cut there. Compiled into hash.c from the header alone, so that nothing is linked for it. */
#ifndef PLORA_HASH_H
#define PLORA_HASH_H

#include <stddef.h>
#include <stdint.h>

uint64_t plora__hash(const void *data, size_t bytes, uint64_t seed);
/* Chained over rows of `bytes` that start every `stride` bytes. */
uint64_t plora__hash_rows(const void *data, int64_t rows, size_t bytes, size_t stride, uint64_t seed);

#endif
