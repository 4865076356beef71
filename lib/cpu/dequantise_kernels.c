/* dequantise_kernels.c: codes times a scale, compiled once per instruction level (isa.h). One product each, rounded to
 * fp32, then to bf16 where that is asked for: the same bits at every level.
 *
 * NF4: two elements a byte, the first in the upper half. A register of indices picks from the 16 values, which fill one
 * register (AVX-512) or two (AVX2). */
#include "dequantise_kernels.h"

#include "dtype.h"
#include "nf4.h"
#include "vector.h"

static const float nf4_values[16] = {PLORA__NF4_VALUES};

static void store(void *out, int32_t dtype, int64_t index, float value)
{
    if (dtype == PLORA_F32)
        ((float *)out)[index] = value;
    else
        ((uint16_t *)out)[index] = plora__float_to_bf16(value);
}

static void int8(void *restrict out, int32_t dtype, const int8_t *restrict codes, float scale, int64_t count)
{
    if (dtype == PLORA_F32)
        for (int64_t i = 0; i < count; ++i)
            ((float *)out)[i] = (float)codes[i] * scale;
    else
        for (int64_t i = 0; i < count; ++i)
            ((uint16_t *)out)[i] = plora__float_to_bf16((float)codes[i] * scale);
}

static float nf4_value(const uint8_t *codes, int64_t element)
{
    return nf4_values[codes[element / 2] >> (element % 2 ? 0 : 4) & 15];
}

#if CPU_ISA > CPU_ISA_PORTABLE
typedef uint16_t nf4_rounded __attribute__((vector_size(2 * CPU_LANES)));

/* CPU_LANES elements, the first of them in the upper half of codes[0]: each lane shifts a word of eight to its own. */
CPU_INLINE cpu_vf nf4_lanes(const uint8_t *codes)
{
    uint32_t words[CPU_LANES / 8];
    memcpy(words, codes, sizeof words);
#if CPU_ISA >= CPU_ISA_AVX512
    const cpu_vu shift = {4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24};
    const cpu_vu second = {0, 0, 0, 0, 0, 0, 0, 0, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};
    const cpu_vu word = (words[0] & ~second) | (words[1] & second);
#else
    const cpu_vu shift = {4, 0, 12, 8, 20, 16, 28, 24};
    const cpu_vu word = (cpu_vu){0} + words[0];
#endif
    const cpu_vu index = word >> shift & 15;
#if CPU_ISA >= CPU_ISA_AVX512
    return _mm512_permutexvar_ps((__m512i)index, cpu_load(nf4_values));
#else
    const __m256 low = _mm256_permutevar8x32_ps(cpu_load(nf4_values), (__m256i)index);
    const __m256 high = _mm256_permutevar8x32_ps(cpu_load(nf4_values + CPU_LANES), (__m256i)index);
    return _mm256_blendv_ps(low, high, (__m256)(index << 28)); /* by the sign: bit 3 of the index */
#endif
}

/* plora__float_to_bf16() of finite numbers and infinities, lane by lane. */
CPU_INLINE nf4_rounded round_bf16(cpu_vf value)
{
    const cpu_vu bits = (cpu_vu)value;
    return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nf4_rounded);
}
#endif

static void nf4(void *restrict out, int32_t dtype, const uint8_t *restrict codes, int64_t first, float scale,
                int64_t count)
{
    int64_t i = 0;
#if CPU_ISA > CPU_ISA_PORTABLE
    if (scale - scale == 0.0f) { /* NaN is for the loop below */
        if (first % 2 != 0 && count > 0) {
            store(out, dtype, 0, nf4_value(codes, first) * scale);
            i = 1;
        }
        for (; i + CPU_LANES <= count; i += CPU_LANES) {
            const cpu_vf values = nf4_lanes(codes + (first + i) / 2) * cpu_broadcast(scale);
            if (dtype == PLORA_F32) {
                cpu_store((float *)out + i, values);
            } else {
                const nf4_rounded rounded = round_bf16(values);
                memcpy((uint16_t *)out + i, &rounded, sizeof rounded);
            }
        }
    }
#endif
    for (; i < count; ++i)
        store(out, dtype, i, nf4_value(codes, first + i) * scale);
}

const struct cpu_dequantise_kernels CPU_ISA_NAME(cpu_dequantise_kernels) = {.int8 = int8, .nf4 = nf4};
