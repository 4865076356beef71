/* dtype.h: sizes, names and scalar conversions of the element types. Conversions from fp32 round to nearest, ties to even;
 * NaN stays NaN, overflow becomes infinity. No dependency but the public header, so that every layer may use it. */
#ifndef PLORA_DTYPE_H
#define PLORA_DTYPE_H

#include <string.h>

#include "host_device.h"
#include "plora.h"

static inline int plora__dtype_known(int32_t dtype)
{
    return dtype == PLORA_F32 || dtype == PLORA_BF16 || dtype == PLORA_F16;
}

static inline size_t plora__dtype_size(int32_t dtype)
{
    return dtype == PLORA_F32 ? 4 : 2;
}

static inline const char *plora__dtype_name(int32_t dtype)
{
    return dtype == PLORA_F32 ? "F32" : dtype == PLORA_BF16 ? "BF16" : dtype == PLORA_F16 ? "F16" : "unknown dtype";
}

PLORA__HOST_DEVICE static inline uint32_t plora__float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

PLORA__HOST_DEVICE static inline float plora__float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

PLORA__HOST_DEVICE static inline float plora__bf16_to_float(uint16_t value)
{
    return plora__float_from_bits((uint32_t)value << 16);
}

PLORA__HOST_DEVICE static inline uint16_t plora__float_to_bf16(float value)
{
    const uint32_t bits = plora__float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

PLORA__HOST_DEVICE static inline float plora__f16_to_float(uint16_t value)
{
    const uint32_t sign = (uint32_t)(value & 0x8000u) << 16;
    const uint32_t magnitude = value & 0x7fffu;
    if (magnitude >= 0x7c00u) return plora__float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x0400u) return plora__float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
    const float subnormal = (float)magnitude * 0x1p-24f;
    return plora__float_from_bits(sign | plora__float_bits(subnormal));
}

PLORA__HOST_DEVICE static inline uint16_t plora__float_to_f16(float value)
{
    const uint32_t bits = plora__float_bits(value);
    const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
    if (magnitude < 0x38800000u) {                                   /* below 2^-14: a multiple of 2^-24 */
        const float shifted =
            plora__float_from_bits(magnitude) + 0.5f; /* the ulp of 0.5 is 2^-24: this addition rounds */
        return (uint16_t)(sign | (plora__float_bits(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

static inline float plora__load(const void *data, int64_t index, int32_t dtype)
{
    if (dtype == PLORA_F32) return ((const float *)data)[index];
    const uint16_t half = ((const uint16_t *)data)[index];
    return dtype == PLORA_BF16 ? plora__bf16_to_float(half) : plora__f16_to_float(half);
}

static inline void plora__store(void *data, int64_t index, int32_t dtype, float value)
{
    if (dtype == PLORA_F32)
        ((float *)data)[index] = value;
    else
        ((uint16_t *)data)[index] = dtype == PLORA_BF16 ? plora__float_to_bf16(value) : plora__float_to_f16(value);
}

#endif
