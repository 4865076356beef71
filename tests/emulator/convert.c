/* convert.c: cvt. Every conversion by one general function, lane by lane; the frequent ones by loops of their own. */
#include "lanes.h"

#include <fenv.h>
#include <math.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

static const uint8_t BITS[] = {8, 8, 16, 16, 32, 32, 64, 64, 16, 16, 32, 64, 32};

/* ------------------------------------------------------------------------------------------------------- 16-bit floats */
uint32_t bf16_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

float f16_value(uint32_t h)
{
    const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
    uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
    float x;
    if (exponent == 0) {
        x = (float)fraction * 0x1p-24f;
        return sign ? -x : x;
    }
    if (exponent == 31) bits = sign | 0x7f800000u | fraction << 13;
    memcpy(&x, &bits, sizeof x);
    return x;
}

void f16_values(const uint16_t *from, float *to, int count)
{
    int i = 0;
#ifdef __F16C__
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(from + i))));
#endif
    for (; i < count; ++i)
        to[i] = f16_value(from[i]);
}

/* From double, so that float and integers are rounded once; in the current rounding mode. */
uint32_t f16_of(double x)
{
    if (x != x) return 0x7fff;
    const uint32_t sign = signbit(x) ? 0x8000u : 0;
    int exponent = 0;
    frexp(x, &exponent);
    if (isinf(x) || fabs(x) >= 65536.0) {
        const bool largest =
            !isinf(x) && (fegetround() == FE_TOWARDZERO || fegetround() == (sign ? FE_UPWARD : FE_DOWNWARD));
        return sign | (largest ? 0x7bffu : 0x7c00u);
    }
    const int unit = exponent < -13 ? -24 : exponent - 11; /* the value of the last bit: 2^unit */
    const double scaled = fabs(rint(ldexp(x, -unit)));     /* at most 2048 */
    const double rounded = ldexp(scaled, unit);
    if (rounded >= 65536.0) return sign | 0x7c00u;
    if (rounded < 0x1p-14) return sign | (uint32_t)(rounded * 0x1p24);
    frexp(rounded, &exponent);
    return sign | (uint32_t)(exponent + 14) << 10 | ((uint32_t)ldexp(rounded, 11 - exponent) & 0x3ff);
}

/* ---------------------------------------------------------------------------------------------------- the general case */
static double float_of(uint64_t bits, enum number type)
{
    float x;
    double y;
    const uint32_t low = (uint32_t)bits, high = low << 16;
    switch (type) {
    case F16: return (double)f16_value(low & 0xffff);
    case BF16: memcpy(&x, &high, sizeof x); return (double)x;
    case NUMBER_F64: memcpy(&y, &bits, sizeof y); return y;
    default: memcpy(&x, &low, sizeof x); return (double)x;
    }
}

static uint64_t extend(uint64_t value, enum number type)
{
    switch (type) {
    case U8: return (uint8_t)value;
    case S8: return (uint64_t)(int8_t)value;
    case U16: return (uint16_t)value;
    case S16: return (uint64_t)(int16_t)value;
    case U32: return (uint32_t)value;
    case S32: return (uint64_t)(int32_t)value;
    default: return value;
    }
}

static bool is_signed(enum number type)
{
    return type == S8 || type == S16 || type == S32 || type == S64;
}

/* Clamped to the range of `to`: what conversions from floats always do, and .sat between integers. */
static uint64_t clamp_float(double x, enum number to)
{
    const int bits = BITS[to];
    if (x != x) return 0;
    if (is_signed(to)) {
        const double limit = ldexp(1.0, bits - 1);
        if (x >= limit) return (UINT64_C(1) << (bits - 1)) - 1;
        if (x < -limit) return 0 - (UINT64_C(1) << (bits - 1));
        return (uint64_t)(int64_t)x;
    }
    if (x <= 0) return 0;
    if (x >= ldexp(1.0, bits)) return bits == 64 ? UINT64_MAX : (UINT64_C(1) << bits) - 1;
    return (uint64_t)x;
}
static uint64_t clamp_integer(uint64_t x, bool from_signed, enum number to)
{
    const int bits = BITS[to];
    const bool negative = from_signed && (int64_t)x < 0;
    if (is_signed(to)) {
        const int64_t most = (int64_t)((UINT64_C(1) << (bits - 1)) - 1), least = -most - 1;
        if (negative) return (int64_t)x < least ? (uint64_t)least : x;
        return x > (uint64_t)most ? (uint64_t)most : x;
    }
    const uint64_t most = bits == 64 ? UINT64_MAX : (UINT64_C(1) << bits) - 1;
    return negative ? 0 : x > most ? most : x;
}

static uint64_t pack_float(double x, enum number to)
{
    float single = (float)x;
    uint32_t bits;
    uint64_t wide;
    switch (to) {
    case F16: return f16_of(x);
    case BF16:
        if (fegetround() == FE_TONEAREST) return bf16_of(single);
        memcpy(&bits, &single, sizeof bits);
        return bits >> 16;
    case TF32: /* .rna: to nearest, ties away from 0 */
        memcpy(&bits, &single, sizeof bits);
        return single != single ? 0x7fffffff : (bits + 0x1000) & ~0x1fffu;
    case NUMBER_F64: memcpy(&wide, &x, sizeof wide); return wide;
    default: memcpy(&bits, &single, sizeof bits); return bits;
    }
}

static uint64_t from_integer(uint64_t x, bool negative_possible, enum number to)
{
    float single = negative_possible ? (float)(int64_t)x : (float)x;
    uint32_t bits;
    if (to != NUMBER_F32) return pack_float(negative_possible ? (double)(int64_t)x : (double)x, to);
    memcpy(&bits, &single, sizeof bits);
    return bits;
}

static uint64_t convert_one(uint64_t raw, const struct op *op)
{
    const enum number from = op->kind, to = op->flags;
    if (from < F16) {
        const uint64_t x = extend(raw, from);
        if (to >= F16) return from_integer(x, is_signed(from), to);
        return extend(op->width ? clamp_integer(x, is_signed(from), to) : x, to);
    }
    double x = float_of(raw, from);
    if (to < F16) return extend(clamp_float(rint(x), to), to);
    /* .rni .. of a float into the same type gives whole numbers; .rn .. into a narrower one rounds in pack_float. */
    if (from == to && (op->count != NEAREST || strstr(op->text, "rni") != NULL) && strstr(op->text, ".r") != NULL)
        x = rint(x);
    if (op->width) x = x > 1 ? 1 : x > 0 ? x : 0;
    return pack_float(x, to);
}

EXEC(general)
{
    static const int MODE[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD, FE_TONEAREST};
    const bool wide_d = op->wide & 1, wide_a = op->wide & 2;
    fesetround(MODE[op->count]);
    for (int i = 0; i < LANES; ++i) {
        if (!(mask >> i & 1)) continue;
        const uint64_t value = convert_one(wide_a ? REG(1, u64)[i] : REG(1, u32)[i], op);
        if (wide_d)
            REG(0, u64)[i] = value;
        else
            REG(0, u32)[i] = (uint32_t)value;
    }
    fesetround(FE_TONEAREST);
}

/* -------------------------------------------------------------------------------------------------- the frequent cases */
#define QUICK(name, D, A, expression)                                                                                  \
    EXEC(name)                                                                                                         \
    {                                                                                                                  \
        D *d = REG(0, D);                                                                                              \
        const A *a = REG(1, A);                                                                                        \
        EACH(const A x = a[i]; d[i] = (D)(expression));                                                                \
    }
QUICK(w_u8, u32, u32, (uint8_t)x)
QUICK(w_s8, u32, u32, (int8_t)x)
QUICK(w_u16, u32, u32, (uint16_t)x)
QUICK(w_s16, u32, u32, (int16_t)x)
QUICK(w_w, u32, u32, x)
QUICK(w_d, u32, u64, x)
QUICK(h_d, u32, u64, (uint16_t)x)
QUICK(d_u16, u64, u32, (uint16_t)x)
QUICK(d_s16, u64, u32, (int64_t)(int16_t)x)
QUICK(d_u8, u64, u32, (uint8_t)x)
QUICK(d_u32, u64, u32, x)
QUICK(d_s32, u64, s32, (int64_t)x)
QUICK(d_d, u64, u64, x)
QUICK(f32_u32, f32, u32, x)
QUICK(f32_s32, f32, s32, x)
QUICK(f32_u16, f32, u32, (uint16_t)x)
QUICK(f32_u8, f32, u32, (uint8_t)x)
QUICK(f32_s64, f32, s64, x)
QUICK(f32_u64, f32, u64, x)
QUICK(f64_u32, f64, u32, x)
QUICK(f64_s32, f64, s32, x)
QUICK(f64_u64, f64, u64, x)
QUICK(f64_s64, f64, s64, x)
QUICK(f64_f32, f64, f32, x)
QUICK(f32_f64, f32, f64, x)
QUICK(f32_f16, f32, u32, f16_value(x & 0xffff))
QUICK(f16_f32, u32, f32, f16_of((double)x))
QUICK(bf16_f32, u32, f32, bf16_of(x))

exec_fn convert_exec(enum number to, enum number from, enum rounding rounding, bool saturate)
{
    static const struct {
        enum number to, from;
        exec_fn exec;
    } QUICK_FORMS[] = {{U32, U8, w_u8},
                       {S32, S8, w_s8},
                       {U32, U16, w_u16},
                       {S32, U16, w_u16},
                       {S32, S16, w_s16},
                       {U16, U8, w_u8},
                       {S16, S8, w_s8},
                       {U16, U32, w_u16},
                       {U16, S32, w_u16},
                       {S16, U32, w_s16},
                       {U16, U64, h_d},
                       {U16, U16, w_u16},
                       {S32, S32, w_w},
                       {U32, U32, w_w},
                       {S32, U32, w_w},
                       {U32, S32, w_w},
                       {U32, U64, w_d},
                       {S32, S64, w_d},
                       {S32, U64, w_d},
                       {U32, S64, w_d},
                       {U64, U16, d_u16},
                       {S64, S16, d_s16},
                       {U64, U8, d_u8},
                       {U64, U32, d_u32},
                       {S64, U32, d_u32},
                       {S64, S32, d_s32},
                       {U64, S32, d_s32},
                       {U64, U64, d_d},
                       {S64, S64, d_d},
                       {NUMBER_F32, U32, f32_u32},
                       {NUMBER_F32, S32, f32_s32},
                       {NUMBER_F32, U16, f32_u16},
                       {NUMBER_F32, U8, f32_u8},
                       {NUMBER_F32, S64, f32_s64},
                       {NUMBER_F32, U64, f32_u64},
                       {NUMBER_F64, U32, f64_u32},
                       {NUMBER_F64, S32, f64_s32},
                       {NUMBER_F64, U64, f64_u64},
                       {NUMBER_F64, S64, f64_s64},
                       {NUMBER_F64, NUMBER_F32, f64_f32},
                       {NUMBER_F32, NUMBER_F64, f32_f64},
                       {NUMBER_F32, F16, f32_f16},
                       {F16, NUMBER_F32, f16_f32},
                       {BF16, NUMBER_F32, bf16_f32}};
    /* Integers and widenings have no rounding; the others are quick when it is to nearest. */
    const bool exact =
        (to < F16 && from < F16) || (from >= F16 && BITS[to] > BITS[from]) || (to == NUMBER_F64 && from < U64);
    if (saturate || !(exact || rounding == NEAREST)) return general;
    for (size_t i = 0; i < sizeof QUICK_FORMS / sizeof QUICK_FORMS[0]; ++i)
        if (QUICK_FORMS[i].to == to && QUICK_FORMS[i].from == from) return QUICK_FORMS[i].exec;
    return general;
}

void convert_pair(struct warp *warp, const struct op *op, uint32_t mask)
{
    u32 *d = REG(0, u32);
    const f32 *high = REG(1, f32), *low = REG(2, f32);
    if (op->kind)
        EACH(d[i] = bf16_of(high[i]) << 16 | bf16_of(low[i]));
    else
        EACH(d[i] = f16_of((double)high[i]) << 16 | f16_of((double)low[i]));
}
