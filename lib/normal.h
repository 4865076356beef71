/* normal.h: a standard normal number from one random 32-bit word, the same bits on every machine.
 *
 * The inverse of the normal distribution function at p = (word + 1/2) / 2^32, by Wichura's AS241 (PPND7, Applied Statistics 37,
 * 1988; about 7 digits), in double with a logarithm of our own, so that only + - * / and sqrt are used, each correctly rounded
 * by IEEE 754: compile with -ffp-contract=off. */
#ifndef PLORA_NORMAL_H
#define PLORA_NORMAL_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "host_device.h"

/* log(x) for a normal x > 0, to about 1e-13: x = 2^e f with f in [1/sqrt 2, sqrt 2), log f = 2 artanh((f - 1) / (f + 1)). */
PLORA__HOST_DEVICE static inline double plora__log(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int exponent = (int)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
    double fraction;
    memcpy(&fraction, &bits, sizeof fraction);
    if (fraction > 1.4142135623730951) {
        fraction = fraction * 0.5;
        exponent = exponent + 1;
    }
    const double z = (fraction - 1.0) / (fraction + 1.0);
    const double zz = z * z;
    double series = 0.0;
    for (int power = 17; power >= 1; power -= 2)
        series = series * zz + 1.0 / (double)power;
    return (double)exponent * 0.6931471805599453 + 2.0 * z * series;
}

PLORA__HOST_DEVICE static inline float plora__normal(uint32_t word)
{
    const double p = ((double)word + 0.5) * 0x1p-32;
    const double q = p - 0.5;
    if (q >= -0.425 && q <= 0.425) {
        const double r = 0.180625 - q * q;
        const double numerator = ((59.109374720 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179;
        const double denominator = ((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1.0;
        return (float)(q * numerator / denominator);
    }
    const double tail = q < 0.0 ? p : 1.0 - p;
    double r = sqrt(-plora__log(tail));
    double value;
    if (r <= 5.0) {
        r = r - 1.6;
        value = (((0.17023821103 * r + 1.3067284816) * r + 2.7568153900) * r + 1.4234372777) /
                ((0.12021132975 * r + 0.73700164250) * r + 1.0);
    } else {
        r = r - 5.0;
        value = (((0.017337203997 * r + 0.42868294337) * r + 3.0812263860) * r + 6.6579051150) /
                ((0.012258202635 * r + 0.24197894225) * r + 1.0);
    }
    return (float)(q < 0.0 ? -value : value);
}

#endif
