/* rounding.h: the two roundings of a merge that keep small updates: at random, and with a residual. W is bf16 or f16,
 * the merged value fp32; every backend gets the same bits from the same value.
 *
 *     stochastic   one of the two neighbours of the value, the farther one seldom: the mean is the value
 *     residual     weight = the nearer neighbour (halfway: away from 0), and beside it a low half of 16 bits: how far the
 *                  value is from the neighbour towards 0, in 65536ths of the gap; 0x8000 and above: the weight is the other
 *
 * With bf16 weight and low half are the upper and lower half of the fp32 value, the upper rounded (as in Split-SGD,
 * which cuts it): the pair is exact. With f16 it is exact above 2^-14 and to 2^-41 below. A low half of 0 says that the
 * weight is the value. A weight of 0 has a low half below 0x8000.
 *
 * Where the neighbour away from 0 is infinite, a value is rounded to nearest at random, and cut to the last pair that is
 * not: so a small update never makes a finite weight infinite. */
#ifndef PLORA_ROUNDING_H
#define PLORA_ROUNDING_H

#include "dtype.h"

/* The random number of an element is a half of a word of Philox (philox.h): element e takes half e % 2, the lower first, of
 * word e / 2 % 4 of block e / 8. */
enum { PLORA__ROUNDING_BLOCK = 8 };

/* `random` is uniform: the chance to go up is exact to 2^-16 (f16 above 2^-14: to 2^-13, as are its values). */
PLORA__HOST_DEVICE static inline uint16_t plora__round_stochastic(float value, uint16_t random, int32_t dtype)
{
    const uint32_t bits = plora__float_bits(value), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
    if (magnitude >= (dtype == PLORA_BF16 ? 0x7f7f0000u : 0x477fe000u)) /* the largest number, or above */
        return dtype == PLORA_BF16 ? plora__float_to_bf16(value) : plora__float_to_f16(value);
    if (dtype == PLORA_BF16) return (uint16_t)((bits >> 16) + (random < (bits & 0xffffu)));
    if (magnitude >= 0x38800000u)
        return (uint16_t)(sign |
                          (((magnitude - 0x38000000u) >> 13) + ((uint32_t)(random >> 3) < (magnitude & 0x1fffu))));
    const float steps = plora__float_from_bits(magnitude) * 0x1p24f; /* exact, as are the two below */
    const uint32_t whole = (uint32_t)steps;
    return (uint16_t)(sign | (whole + ((float)random < (steps - (float)whole) * 0x1p16f)));
}

PLORA__HOST_DEVICE static inline void plora__split_residual(float value, int32_t dtype, uint16_t *weight, uint16_t *low)
{
    const uint32_t bits = plora__float_bits(value), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
    const uint32_t largest = dtype == PLORA_BF16 ? 0x7f7f7fffu : 0x7bff7fffu;
    uint32_t pair; /* without its sign: the neighbour towards 0, and the low half */
    if (magnitude >= (dtype == PLORA_BF16 ? 0x7f800000u : 0x47800000u)) {
        *weight = dtype == PLORA_BF16 ? plora__float_to_bf16(value) : plora__float_to_f16(value);
        *low = 0;
        return;
    }
    if (dtype == PLORA_BF16) {
        pair = magnitude;
    } else if (magnitude >= 0x38800000u) {
        pair = (magnitude - 0x38000000u) << 3;
    } else {
        const float steps = plora__float_from_bits(magnitude) * 0x1p40f;
        pair = (uint32_t)(steps < 0x1p23f ? steps + 0.5f : steps); /* from 2^23 on all floats are whole */
    }
    if (pair > largest) pair = largest;
    *weight = (uint16_t)(sign | (pair + 0x8000u) >> 16);
    *low = (uint16_t)pair;
}

PLORA__HOST_DEVICE static inline float plora__join_residual(uint16_t weight, uint16_t low, int32_t dtype)
{
    const uint32_t sign = (uint32_t)(weight & 0x8000u) << 16;
    const uint32_t pair = ((uint32_t)(weight & 0x7fffu) << 16 | low) - ((uint32_t)(low >> 15) << 16);
    if (dtype == PLORA_BF16) return plora__float_from_bits(sign | pair);
    if ((weight & 0x7fffu) >= 0x7c00u) return plora__f16_to_float(weight);
    if (pair >= 0x4000000u) return plora__float_from_bits(sign | ((pair >> 3) + 0x38000000u));
    return plora__float_from_bits(sign | plora__float_bits((float)pair * 0x1p-40f));
}

#endif
