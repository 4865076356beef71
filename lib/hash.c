/* hash.c: see hash.h. */
#include "hash.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

uint64_t plora__hash(const void *data, size_t bytes, uint64_t seed)
{
    return XXH3_64bits_withSeed(data, bytes, seed);
}

uint64_t plora__hash_rows(const void *data, int64_t rows, size_t bytes, size_t stride, uint64_t seed)
{
    const char *row = data;
    for (int64_t i = 0; i < rows; ++i, row += stride)
        seed = plora__hash(row, bytes, seed);
    return seed;
}
