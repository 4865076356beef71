/* quantise_kernels.c: numbers to codes, compiled once per instruction level (isa.h). Nothing can be contracted, so every level gives the
 * same bits: a product or quotient, then comparisons or one rounding. The loops are such that the compiler makes vectors of them. */
#include "quantise_kernels.h"

#include "isa.h"
#include "nf4.h"
#include "vector.h"

static void int8(int8_t *restrict codes, const float *restrict values, float scale, int64_t count)
{
    const float whole = 0x1.8p23f; /* sums with it are whole numbers: the addition rounds, ties to even */
    for (int64_t i = 0; i < count; ++i) {
        float quotient = values[i] / scale; /* beyond 127 where the scale is a subnormal number */
        quotient = quotient < 127.0f ? quotient : 127.0f;
        quotient = quotient > -127.0f ? quotient : -127.0f;
        codes[i] = (int8_t)(int32_t)((quotient + whole) - whole);
    }
}

static void nf4(uint8_t *restrict codes, const float *restrict values, float inverse, int64_t count)
{
    static const float middles[15] = {PLORA__NF4_MIDDLES};
    int32_t numbers[PLORA__NF4_BLOCK] = {0};
    for (int m = 0; m < 15; ++m)
        for (int i = 0; i < PLORA__NF4_BLOCK; ++i)
            numbers[i] += values[i] * inverse > middles[m]; /* not of a NaN */
    for (int64_t i = count; i < PLORA__NF4_BLOCK; ++i)
        numbers[i] = 0;
    for (int64_t i = 0; i < (count + 1) / 2; ++i)
        codes[i] = (uint8_t)(numbers[2 * i] << 4 | numbers[2 * i + 1]);
}

const struct cpu_quantise_kernels CPU_ISA_NAME(cpu_quantise_kernels) = {.int8 = int8, .nf4 = nf4};
