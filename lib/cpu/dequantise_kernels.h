/* dequantise_kernels.h: runs of quantised weights that share a scale, one table per instruction level (isa.h). */
#ifndef PLORA_CPU_DEQUANTISE_KERNELS_H
#define PLORA_CPU_DEQUANTISE_KERNELS_H

#include "backend.h"

struct cpu_dequantise_kernels {
    /* out[i] = codes[i] * scale, in fp32 or rounded to bf16. */
    void (*int8)(void *out, int32_t dtype, const int8_t *codes, float scale, int64_t count);
    /* The same with the NF4 value of element first + i. */
    void (*nf4)(void *out, int32_t dtype, const uint8_t *codes, int64_t first, float scale, int64_t count);
};

extern const struct cpu_dequantise_kernels cpu_dequantise_kernels_portable;
extern const struct cpu_dequantise_kernels cpu_dequantise_kernels_avx2;
extern const struct cpu_dequantise_kernels cpu_dequantise_kernels_avx512;
extern const struct cpu_dequantise_kernels cpu_dequantise_kernels_amx;

/* The table of a level, and the launcher below cpu_dequantise() for it. */
const struct cpu_dequantise_kernels *cpu_dequantise_kernels(int isa);
void cpu_dequantise_with(const struct cpu_dequantise_kernels *kernels, int threads,
                         const struct plora__dequantise_args *args);

#endif
