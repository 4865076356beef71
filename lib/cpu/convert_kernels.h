/* convert_kernels.h: conversions, dropout and random numbers, one table per instruction level (isa.h). */
#ifndef PLORA_CPU_CONVERT_KERNELS_H
#define PLORA_CPU_CONVERT_KERNELS_H

#include "backend.h"
#include "philox.h"

enum { CPU_DRAWS = 16 }; /* Philox blocks of one draw() */

struct cpu_convert_kernels {
    /* words[4 * j + i] = word i of block first + j (philox.h), for j < CPU_DRAWS. */
    void (*draw)(uint32_t *words, uint64_t seed, enum plora__purpose purpose, uint64_t step, int32_t layer,
                 uint64_t first);
    /* out[i] = plora__symmetric(words[i]) * scale. */
    void (*symmetric)(float *out, const uint32_t *words, float scale, int64_t count);
    /* out[i] = in[i], widened to fp32. */
    void (*widen)(float *out, const void *in, int32_t dtype, int64_t count);
    /* out[i] = in[i] rounded to bf16. */
    void (*narrow)(uint16_t *out, const float *in, int64_t count);
    /* values[i] *= factor, and where rounded is not NULL, rounded[i] = that in bf16. */
    void (*scale)(float *values, uint16_t *rounded, float factor, int64_t count);
    /* out[i] = kept(first + i) ? in[i] * keep_scale : 0, in the dtype of both (F32 or BF16). */
    void (*dropout)(void *out, const void *in, int32_t dtype, const struct plora__dropout *dropout, uint64_t first,
                    int64_t count);
    /* out[i] += kept(first + i) ? delta[i] * keep_scale : 0, out F32 or BF16. */
    void (*dropout_add)(void *out, int32_t dtype, const float *delta, const struct plora__dropout *dropout,
                        uint64_t first, int64_t count);
    /* out[i] += in[i]. */
    void (*add)(float *out, const float *in, int64_t count);
    /* out[j * rows + i] += in[i * columns + j] for j in [begin, end). */
    void (*transpose_add)(float *out, const float *in, int64_t rows, int64_t columns, int64_t begin, int64_t end);
};

extern const struct cpu_convert_kernels cpu_convert_kernels_portable;
extern const struct cpu_convert_kernels cpu_convert_kernels_avx2;
extern const struct cpu_convert_kernels cpu_convert_kernels_avx512;
extern const struct cpu_convert_kernels cpu_convert_kernels_amx;

/* The table of a level. */
const struct cpu_convert_kernels *cpu_convert_kernels(int isa);

#endif
