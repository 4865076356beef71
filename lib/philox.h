/* philox.h: the library's only source of random numbers, counter based (Philox4x32-10, Salmon et al., SC 2011).
 *
 * A draw is a pure function of (seed, purpose, stage or step, layer, element), so every rank, backend, thread count and
 * sharding draws the same bits, and a dropout mask need not be stored. One call gives four 32-bit words, for the elements
 * 4i .. 4i+3:
 *
 *     counter = { low and high word of i, stage or step, layer | purpose << 24 }      key = { low, high word of seed }
 *
 * Only integer operations and single, correctly rounded fp operations are used: compile with -ffp-contract=off. */
#ifndef PLORA_PHILOX_H
#define PLORA_PHILOX_H

#include <stdint.h>

#include "host_device.h"

enum plora__purpose { PLORA__PURPOSE_INIT = 1, PLORA__PURPOSE_DROPOUT = 2, PLORA__PURPOSE_ROUNDING = 3 };

struct plora__words {
    uint32_t word[4];
};

#define PLORA__PHILOX_M0 0xD2511F53u
#define PLORA__PHILOX_M1 0xCD9E8D57u
#define PLORA__PHILOX_W0 0x9E3779B9u
#define PLORA__PHILOX_W1 0xBB67AE85u

PLORA__HOST_DEVICE static inline struct plora__words plora__philox(struct plora__words counter, uint32_t key0,
                                                                   uint32_t key1)
{
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = (uint64_t)PLORA__PHILOX_M0 * counter.word[0];
        const uint64_t product1 = (uint64_t)PLORA__PHILOX_M1 * counter.word[2];
        counter = (struct plora__words){{(uint32_t)(product1 >> 32) ^ counter.word[1] ^ key0, (uint32_t)product1,
                                         (uint32_t)(product0 >> 32) ^ counter.word[3] ^ key1, (uint32_t)product0}};
        key0 += PLORA__PHILOX_W0;
        key1 += PLORA__PHILOX_W1;
    }
    return counter;
}

PLORA__HOST_DEVICE static inline struct plora__words plora__counter(enum plora__purpose purpose, uint64_t step,
                                                                    int32_t layer, uint64_t block)
{
    return (struct plora__words){{(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)step,
                                  ((uint32_t)layer & 0xffffffu) | (uint32_t)purpose << 24}};
}

/* The four words of elements 4 * block .. 4 * block + 3. */
PLORA__HOST_DEVICE static inline struct plora__words plora__draw(uint64_t seed, enum plora__purpose purpose,
                                                                 uint64_t step, int32_t layer, uint64_t block)
{
    return plora__philox(plora__counter(purpose, step, layer, block), (uint32_t)seed, (uint32_t)(seed >> 32));
}

/* Uniform in [-1, 1): a multiple of 2^-23, exact. */
PLORA__HOST_DEVICE static inline float plora__symmetric(uint32_t word)
{
    return (float)(int32_t)(word >> 8) * 0x1p-23f - 1.0f;
}

/* Dropout keeps an element when its word is at least this: P(drop) = probability to within 2^-32. */
PLORA__HOST_DEVICE static inline uint32_t plora__dropout_threshold(double probability)
{
    return (uint32_t)(probability * 4294967296.0);
}

#endif
