/* bpe.h: the merges of byte-pair encoding. A word begins as one symbol a byte; again and again the neighbours that stand earliest in
 * the list of merges become one symbol, the leftmost first, until no neighbours are in it. */
#ifndef SERVE_BPE_H
#define SERVE_BPE_H

#include <stdint.h>

struct merges;

int merges_create(int64_t count, struct merges **merges);
void merges_destroy(struct merges *merges);
/* Merge number `rank`, counted from 0: left, right -> made. Of a pair that comes twice the later counts. */
void merges_add(struct merges *merges, int32_t rank, int32_t left, int32_t right, int32_t made);

/* Merges ids[0 .. count) in place and returns how many are left, or -1. n symbols cost n log n. */
int64_t merges_apply(const struct merges *merges, int32_t *ids, int64_t count);

#endif
