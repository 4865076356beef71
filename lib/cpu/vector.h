/* vector.h: one register of fp32 numbers at the instruction level of the file being compiled (isa.h), by the compiler's vector
 * extension, and the few operations that need an instruction of their own.
 *
 * cpu_vf holds CPU_LANES floats, cpu_vi as many int32, cpu_vd half as many doubles. Fused multiply-add is written out: -ffp-contract
 * is off, and the portable level, which has no such instruction, rounds twice. */
#ifndef PLORA_CPU_VECTOR_H
#define PLORA_CPU_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "isa.h"

#if CPU_ISA > CPU_ISA_PORTABLE || defined(__SSE2__)
#include <immintrin.h>
#endif

#if CPU_ISA >= CPU_ISA_AVX512
#define CPU_LANES 16
#if CPU_ISA == CPU_ISA_AMX
#define CPU_ISA_NAME(name) name##_amx
#else
#define CPU_ISA_NAME(name) name##_avx512
#endif
#elif CPU_ISA == CPU_ISA_AVX2
#define CPU_LANES 8
#define CPU_ISA_NAME(name) name##_avx2
#else
#define CPU_LANES 4
#define CPU_ISA_NAME(name) name##_portable
#endif

typedef float cpu_vf __attribute__((vector_size(4 * CPU_LANES)));
typedef int32_t cpu_vi __attribute__((vector_size(4 * CPU_LANES)));
typedef uint32_t cpu_vu __attribute__((vector_size(4 * CPU_LANES)));
typedef int16_t cpu_vi16 __attribute__((vector_size(4 * CPU_LANES)));
typedef uint16_t cpu_vu16 __attribute__((vector_size(4 * CPU_LANES)));
typedef double cpu_vd __attribute__((vector_size(4 * CPU_LANES)));
typedef int64_t cpu_vl __attribute__((vector_size(4 * CPU_LANES)));
typedef uint64_t cpu_vul __attribute__((vector_size(4 * CPU_LANES)));
typedef float cpu_vh __attribute__((vector_size(2 * CPU_LANES)));

#define CPU_INLINE static inline __attribute__((always_inline))

CPU_INLINE cpu_vf cpu_load(const void *from)
{
    cpu_vf value;
    memcpy(&value, from, sizeof value);
    return value;
}

CPU_INLINE void cpu_store(void *to, cpu_vf value)
{
    memcpy(to, &value, sizeof value);
}

CPU_INLINE cpu_vf cpu_broadcast(float value)
{
    return value - (cpu_vf){0}; /* of a scalar and a vector: -0 and NaN come through */
}

/* a b + c */
CPU_INLINE cpu_vf cpu_fma(cpu_vf a, cpu_vf b, cpu_vf c)
{
#if CPU_ISA >= CPU_ISA_AVX512
    return _mm512_fmadd_ps(a, b, c);
#elif CPU_ISA == CPU_ISA_AVX2
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

CPU_INLINE cpu_vd cpu_fma_double(cpu_vd a, cpu_vd b, cpu_vd c)
{
#if CPU_ISA >= CPU_ISA_AVX512
    return _mm512_fmadd_pd(a, b, c);
#elif CPU_ISA == CPU_ISA_AVX2
    return _mm256_fmadd_pd(a, b, c);
#else
    return a * b + c;
#endif
}

CPU_INLINE cpu_vf cpu_sqrt(cpu_vf value)
{
#if CPU_ISA >= CPU_ISA_AVX512
    return _mm512_sqrt_ps(value);
#elif CPU_ISA == CPU_ISA_AVX2
    return _mm256_sqrt_ps(value);
#elif defined(__SSE2__)
    return _mm_sqrt_ps(value);
#else
    for (int i = 0; i < CPU_LANES; ++i)
        value[i] = sqrtf(value[i]);
    return value;
#endif
}

/* The doubles of the lower (half 0) and upper (half 1) lanes. */
CPU_INLINE cpu_vd cpu_widen(cpu_vf value, int half)
{
#if CPU_ISA >= CPU_ISA_AVX512
    return _mm512_cvtps_pd(half ? _mm512_extractf32x8_ps(value, 1) : _mm512_castps512_ps256(value));
#else
    cpu_vh halves[2];
    memcpy(halves, &value, sizeof halves);
    return __builtin_convertvector(halves[half], cpu_vd);
#endif
}

/* The doubles of CPU_LANES / 2 floats in memory. */
CPU_INLINE cpu_vd cpu_load_double(const float *from)
{
    cpu_vh value;
    memcpy(&value, from, sizeof value);
    return __builtin_convertvector(value, cpu_vd);
}

/* max(maximum, |value|) */
CPU_INLINE cpu_vd cpu_max_magnitude_double(cpu_vd maximum, cpu_vd value)
{
    const cpu_vd magnitude = (cpu_vd)((cpu_vl)value & INT64_MAX);
#if CPU_ISA >= CPU_ISA_AVX512
    return _mm512_max_pd(magnitude, maximum);
#else
    const cpu_vl greater = magnitude > maximum;
    return (cpu_vd)(((cpu_vl)magnitude & greater) | ((cpu_vl)maximum & ~greater));
#endif
}

/* The larger of unsigned numbers of 16 bits, one by one. */
CPU_INLINE cpu_vu cpu_max_halves(cpu_vu a, cpu_vu b)
{
#if CPU_ISA >= CPU_ISA_AVX512
    return (cpu_vu)_mm512_max_epu16((__m512i)a, (__m512i)b);
#elif CPU_ISA == CPU_ISA_AVX2
    return (cpu_vu)_mm256_max_epu16((__m256i)a, (__m256i)b);
#else
    const cpu_vu greater = (cpu_vu)((cpu_vu16)a > (cpu_vu16)b);
    return (a & greater) | (b & ~greater);
#endif
}

/* Whether any of them is above the limit. */
CPU_INLINE int cpu_any_half_above(cpu_vu halves, uint16_t limit)
{
#if CPU_ISA >= CPU_ISA_AVX512
    return _mm512_cmpgt_epu16_mask((__m512i)halves, _mm512_set1_epi16((int16_t)limit)) != 0;
#elif CPU_ISA == CPU_ISA_AVX2
    const __m256i above = _mm256_subs_epu16((__m256i)halves, _mm256_set1_epi16((int16_t)limit));
    return !_mm256_testz_si256(above, above);
#else
    const cpu_vl above = (cpu_vl)((cpu_vu16)halves > limit);
    int64_t any = 0;
    for (int i = 0; i < CPU_LANES / 2; ++i)
        any |= above[i];
    return any != 0;
#endif
}

/* Lane by lane, the 64-bit product of the lower 32 bits of a and of b. */
CPU_INLINE cpu_vul cpu_multiply_low(cpu_vul a, cpu_vul b)
{
#if CPU_ISA >= CPU_ISA_AVX512
    return (cpu_vul)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif CPU_ISA == CPU_ISA_AVX2
    return (cpu_vul)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (cpu_vul)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & UINT32_MAX) * (b & UINT32_MAX);
#endif
}

/* The sum of the lanes, in order. */
CPU_INLINE double cpu_sum_double(cpu_vd value)
{
    double sum = 0;
    for (int i = 0; i < CPU_LANES / 2; ++i)
        sum += value[i];
    return sum;
}

#endif
