/* philox_lanes.h: the ten rounds of philox.h on several counters side by side, one in each 64-bit lane: its lower half counts, the
 * upper one holds what the products leave there, which the next product does not look at. */
#ifndef PLORA_CPU_PHILOX_LANES_H
#define PLORA_CPU_PHILOX_LANES_H

#include "philox.h"
#include "vector.h"

enum { CPU_PHILOX_LANES = CPU_LANES / 2, CPU_PHILOX_ROUNDS = 10 };

/* The keys of all rounds. */
struct cpu_philox_keys {
    uint64_t key[CPU_PHILOX_ROUNDS][2];
};

CPU_INLINE struct cpu_philox_keys cpu_philox_keys(uint64_t seed)
{
    struct cpu_philox_keys keys;
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < CPU_PHILOX_ROUNDS; ++round, key0 += PLORA__PHILOX_W0, key1 += PLORA__PHILOX_W1) {
        keys.key[round][0] = key0;
        keys.key[round][1] = key1;
    }
    return keys;
}

/* a ^ b ^ c */
CPU_INLINE cpu_vul cpu_xor(cpu_vul a, cpu_vul b, cpu_vul c)
{
#if CPU_ISA >= CPU_ISA_AVX512
    return (cpu_vul)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
    return a ^ (b ^ c);
#endif
}

/* `count` registers of counters at once: one chain of rounds alone waits for itself. */
CPU_INLINE void cpu_philox(cpu_vul (*c)[4], int count, const struct cpu_philox_keys *keys)
{
    const cpu_vul m0 = (cpu_vul){0} + PLORA__PHILOX_M0, m1 = (cpu_vul){0} + PLORA__PHILOX_M1;
#pragma GCC unroll 10
    for (int round = 0; round < CPU_PHILOX_ROUNDS; ++round) {
        const cpu_vul key0 = (cpu_vul){0} + keys->key[round][0], key1 = (cpu_vul){0} + keys->key[round][1];
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i) {
            const cpu_vul product0 = cpu_multiply_low(c[i][0], m0), product1 = cpu_multiply_low(c[i][2], m1);
            c[i][0] = cpu_xor(product1 >> 32, c[i][1], key0);
            c[i][1] = product1;
            c[i][2] = cpu_xor(product0 >> 32, c[i][3], key1);
            c[i][3] = product0;
        }
    }
}

#endif
