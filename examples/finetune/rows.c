/* rows.c: versions of the element-wise kernels per instruction set and element type, and the choice among them. On x86-64 gcc
 * compiles rows_body.h for AVX-512, AVX2 with FMA, and the baseline; elsewhere only the baseline exists. A change of target per
 * function, rather than ifunc resolvers, keeps the sanitizers working. */
#include "rows.h"

#include <math.h>
#include <string.h>

#include "plora.h"

/* Macros rather than functions: a function compiled for one target is not always inlined into another. */
#define BF16_TO_FLOAT(h)                                                                                               \
    (((union {                                                                                                         \
         uint32_t u;                                                                                                   \
         float f;                                                                                                      \
     }){.u = (uint32_t)(h) << 16})                                                                                     \
         .f)
#define FLOAT_BITS(x)                                                                                                  \
    (((union {                                                                                                         \
         float f;                                                                                                      \
         uint32_t u;                                                                                                   \
     }){.f = (x)})                                                                                                     \
         .u)
#define BITS_TO_BF16(u)                                                                                                \
    ((uint16_t)(((u)&0x7fffffffu) > 0x7f800000u ? ((u) >> 16) | 0x40u : ((u) + 0x7fffu + (((u) >> 16) & 1u)) >> 16))

enum { ROWS_GROUP = 16 }; /* elements of the widest vector; divides the key blocks of attention */

#define F32_LOAD(p, i) ((p)[i])
#define F32_STORE(p, i, v) ((p)[i] = (v))
#define BF16_LOAD(p, i) BF16_TO_FLOAT((p)[i])
#define BF16_STORE(p, i, v)                                                                                            \
    do {                                                                                                               \
        const uint32_t bits_ = FLOAT_BITS(v);                                                                          \
        (p)[i] = BITS_TO_BF16(bits_);                                                                                  \
    } while (0)

#define ROWS_FMA(a, b, c) ((a) * (b) + (c))
#define ROWS_NAME(x) x##_f32_base
#define ROWS_ELEMENT float
#define ROWS_LOAD F32_LOAD
#define ROWS_STORE F32_STORE
#include "rows_body.h"
#define ROWS_NAME(x) x##_bf16_base
#define ROWS_ELEMENT uint16_t
#define ROWS_LOAD BF16_LOAD
#define ROWS_STORE BF16_STORE
#include "rows_body.h"
#undef ROWS_FMA

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ROWS_VERSIONS 1
#define ROWS_FMA(a, b, c) __builtin_fmaf(a, b, c)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define ROWS_NAME(x) x##_f32_avx2
#define ROWS_ELEMENT float
#define ROWS_LOAD F32_LOAD
#define ROWS_STORE F32_STORE
#include "rows_body.h"
#define ROWS_NAME(x) x##_bf16_avx2
#define ROWS_ELEMENT uint16_t
#define ROWS_LOAD BF16_LOAD
#define ROWS_STORE BF16_STORE
#include "rows_body.h"
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#define ROWS_NAME(x) x##_f32_avx512
#define ROWS_ELEMENT float
#define ROWS_LOAD F32_LOAD
#define ROWS_STORE F32_STORE
#include "rows_body.h"
#define ROWS_NAME(x) x##_bf16_avx512
#define ROWS_ELEMENT uint16_t
#define ROWS_LOAD BF16_LOAD
#define ROWS_STORE BF16_STORE
#include "rows_body.h"
#pragma GCC pop_options
#endif

const struct row_kernels *row_kernels_for(int32_t dtype)
{
    const int bf16 = dtype == PLORA_BF16;
#ifdef ROWS_VERSIONS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return bf16 ? &kernels_bf16_avx512 : &kernels_f32_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return bf16 ? &kernels_bf16_avx2 : &kernels_f32_avx2;
#endif
    return bf16 ? &kernels_bf16_base : &kernels_f32_base;
}

static float f16_to_float(uint16_t value)
{
    const uint32_t sign = (uint32_t)(value & 0x8000u) << 16, exponent = (value >> 10) & 31u, mantissa = value & 0x3ffu;
    const float magnitude =
        exponent == 0 ? (float)mantissa * 0x1p-24f : ldexpf((float)(1024u + mantissa), (int)exponent - 25);
    if (exponent == 31) return BF16_TO_FLOAT((sign >> 16) | 0x7f80u | (mantissa ? 0x40u : 0u));
    return sign ? -magnitude : magnitude;
}

static uint16_t float_to_f16(float value)
{
    const uint16_t sign = (uint16_t)((FLOAT_BITS(value) >> 16) & 0x8000u);
    const float magnitude = fabsf(value);
    if (isnan(value)) return sign | 0x7e00u;
    if (magnitude >= 65520.0f) return sign | 0x7c00u;
    if (magnitude < 0x1p-14f) return (uint16_t)(sign | (uint16_t)lrintf(magnitude * 0x1p24f));
    int exponent;
    const float fraction = frexpf(magnitude, &exponent); /* in [1/2, 1) */
    /* A mantissa that rounds up to 2048 carries into the exponent, as it must. */
    return (uint16_t)(sign | (uint16_t)(((uint32_t)(exponent + 13) << 10) + (uint32_t)lrintf(fraction * 2048.0f)));
}

void convert_elements(int64_t count, const void *in, int32_t in_dtype, void *out, int32_t out_dtype)
{
    if (in_dtype == out_dtype) {
        if (count > 0) memcpy(out, in, (size_t)count * element_size(in_dtype));
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        const float value = in_dtype == PLORA_F32    ? ((const float *)in)[i]
                            : in_dtype == PLORA_BF16 ? BF16_TO_FLOAT(((const uint16_t *)in)[i])
                                                     : f16_to_float(((const uint16_t *)in)[i]);
        if (out_dtype == PLORA_F32)
            ((float *)out)[i] = value;
        else if (out_dtype == PLORA_BF16)
            BF16_STORE((uint16_t *)out, i, value);
        else
            ((uint16_t *)out)[i] = float_to_f16(value);
    }
}
