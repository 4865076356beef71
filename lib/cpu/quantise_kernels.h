/* quantise_kernels.h: runs of numbers that share a scale become codes, one table per instruction level (isa.h). */
#ifndef PLORA_CPU_QUANTISE_KERNELS_H
#define PLORA_CPU_QUANTISE_KERNELS_H

#include "backend.h"

struct cpu_quantise_kernels {
    /* codes[i] = values[i] / scale rounded to nearest, ties to even, at most 127 in size. scale > 0. */
    void (*int8)(int8_t *codes, const float *values, float scale, int64_t count);
    /* The nearest NF4 values of values[i] * inverse, two a byte, the first in the upper half. A block of 64; of a shorter one the rest of
     * `values` is ignored, and `codes` has (count + 1) / 2 bytes. */
    void (*nf4)(uint8_t *codes, const float values[PLORA__NF4_BLOCK], float inverse, int64_t count);
};

extern const struct cpu_quantise_kernels cpu_quantise_kernels_portable;
extern const struct cpu_quantise_kernels cpu_quantise_kernels_avx2;
extern const struct cpu_quantise_kernels cpu_quantise_kernels_avx512;
extern const struct cpu_quantise_kernels cpu_quantise_kernels_amx;

/* The table of a level, and the launcher below cpu_quantise() for it. */
const struct cpu_quantise_kernels *cpu_quantise_kernels(int isa);
void cpu_quantise_with(int isa, int threads, const struct plora__quantise_args *args);

#endif
