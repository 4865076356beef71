/* programs.h: programs of one thread, the same source for the device (programs.cu) and the host (test_programs.c): control flow,
 * local arrays, narrow integers, fp64, random numbers. PROGRAM(name): uint64_t name(uint64_t x). */
#ifndef EMULATOR_PROGRAMS_H
#define EMULATOR_PROGRAMS_H

#include <stdint.h>

#include "normal.h"
#include "philox.h"

#ifdef __CUDACC__
#define PROGRAM static __device__ __forceinline__
#else
#define PROGRAM static inline
#endif

/* Loops of another length in every lane. */
PROGRAM uint64_t collatz(uint64_t x)
{
    uint64_t n = (x & 0xffff) + 1, steps = 0;
    while (n != 1) {
        n = n & 1 ? 3 * n + 1 : n / 2;
        ++steps;
    }
    return steps;
}

PROGRAM uint64_t divisor(uint64_t x)
{
    uint64_t a = x & 0xffffffff, b = (x >> 32) | 1;
    while (b) {
        const uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* break, continue and return inside nested loops. */
PROGRAM uint64_t search(uint64_t x)
{
    uint64_t found = 0;
    for (uint32_t i = 0; i < 12; ++i) {
        if ((x >> i & 1) == 0) continue;
        for (uint32_t j = i; j < 40; ++j) {
            if ((x * (j + 3) >> 7 & 15) == i) break;
            if ((x >> j & 63) == 42) return 1000 + 64 * i + j;
            found += j ^ i;
        }
    }
    return found;
}

/* A table of cases. */
PROGRAM uint64_t machine(uint64_t x)
{
    uint64_t a = x, b = 1;
    for (int step = 0; step < 20; ++step) {
        switch (a >> 3 & 15) {
        case 0: a += 7; break;
        case 1:
            b ^= a;
            a = a * 3 + 1;
            break;
        case 2: a -= b;
        /* fall through */
        case 3:
            b += 5;
            a ^= b << 1;
            break;
        case 4: a = a << 3 | a >> 61; break;
        case 5:
            if (b & 1) return a;
            b >>= 1;
            a += 11;
            break;
        case 6: a = ~a; break;
        case 7: a += b * b; break;
        case 8:
            b = a % 1001;
            a += 3;
            break;
        case 9:
            for (uint64_t i = 0; i < (b & 7); ++i)
                a += i * a;
            break;
        case 11: a ^= UINT64_C(0x123456789abcdef); break;
        case 12: a += 1 + (b > a); break;
        default: a = a * 5 + 3; break;
        }
    }
    return a ^ b;
}

/* An array in local memory: insertion sort. */
PROGRAM uint64_t sorted(uint64_t x)
{
    int16_t array[24];
    const int count = (int)(x & 15) + 8;
    for (int i = 0; i < count; ++i)
        array[i] = (int16_t)((x + 1) * (uint64_t)(i + 1) * UINT64_C(0x9e3779b97f4a7c15) >> 48);
    for (int i = 1; i < count; ++i) {
        const int16_t value = array[i];
        int j = i;
        for (; j > 0 && array[j - 1] > value; --j)
            array[j] = array[j - 1];
        array[j] = value;
    }
    uint64_t hash = 0;
    for (int i = 0; i < count; ++i)
        hash = hash * 31 + (uint16_t)array[i];
    return hash;
}

PROGRAM uint64_t narrow(uint64_t x)
{
    uint8_t u8 = (uint8_t)x;
    int8_t s8 = (int8_t)(x >> 8);
    uint16_t u16 = (uint16_t)(x >> 16);
    int16_t s16 = (int16_t)(x >> 32);
    for (int i = 0; i < 9; ++i) {
        u8 = (uint8_t)(u8 * 7 + s8);
        s8 = (int8_t)(s8 ^ (int8_t)(u16 >> 5));
        u16 = (uint16_t)(u16 / (u8 | 1) + s16);
        s16 = (int16_t)(s16 % (s8 | 1) - u8);
        if (s16 < s8) u16 = (uint16_t)(u16 << 3);
    }
    return (uint64_t)u8 | (uint64_t)(uint8_t)s8 << 8 | (uint64_t)u16 << 16 | (uint64_t)(uint16_t)s16 << 32;
}

PROGRAM uint64_t random_words(uint64_t x)
{
    const struct plora__words w = plora__draw(x, PLORA__PURPOSE_DROPOUT, x >> 7, (int32_t)(x & 0xffff), x >> 3);
    return ((uint64_t)w.word[0] << 32 | w.word[1]) ^ ((uint64_t)w.word[3] << 32 | w.word[2]);
}

/* fp64 with division and square root. */
PROGRAM uint64_t normal_bits(uint64_t x)
{
    union {
        float value[2];
        uint64_t bits;
    } pair = {{plora__normal((uint32_t)x), plora__symmetric((uint32_t)(x >> 32))}};
    return pair.bits;
}

#define PROGRAMS(X) X(collatz) X(divisor) X(search) X(machine) X(sorted) X(narrow) X(random_words) X(normal_bits)

#endif
