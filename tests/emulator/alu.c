/* alu.c: arithmetic, logic, comparison and selection. Each instruction is an expression over x, y, z (lanes.h); the table at
 * the end names them. 16-bit values lie in 32-bit registers whose upper half means nothing: every reader casts. */
#include "lanes.h"

#include <fenv.h>
#include <math.h>
#include <string.h>

__extension__ typedef unsigned __int128 u128;
__extension__ typedef __int128 s128;

/* ------------------------------------------------------------------------------------------------------------ integers */
BINARY(add_w, u32, uint32_t, x + y)
BINARY(add_d, u64, uint64_t, x + y)
BINARY(sub_w, u32, uint32_t, x - y)
BINARY(sub_d, u64, uint64_t, x - y)
BINARY(mul_lo_w, u32, uint32_t, x *y)
BINARY(mul_lo_d, u64, uint64_t, x *y)
BINARY(mul_hi_u16, u32, uint16_t, (uint32_t)x *y >> 16)
BINARY(mul_hi_s16, u32, int16_t, (uint16_t)((int32_t)x *y >> 16))
BINARY(mul_hi_u32, u32, uint32_t, (uint64_t)x *y >> 32)
BINARY(mul_hi_s32, u32, int32_t, (uint64_t)((int64_t)x *y) >> 32)
BINARY(mul_hi_u64, u64, uint64_t, (u128)x *y >> 64)
BINARY(mul_hi_s64, u64, int64_t, (u128)((s128)x *y) >> 64)
TERNARY(mad_lo_w, u32, uint32_t, x *y + z)
TERNARY(mad_lo_d, u64, uint64_t, x *y + z)
TERNARY(mad_hi_u32, u32, uint32_t, ((uint64_t)x * y >> 32) + z)
TERNARY(mad_hi_s32, u32, int32_t, (uint32_t)((uint64_t)((int64_t)x *y) >> 32) + (uint32_t)z)
BINARY(mul_wide_u16, u32, uint16_t, (uint32_t)x *y)
BINARY(mul_wide_s16, u32, int16_t, (int32_t)x *y)
TERNARY(mad_wide_u16, u32, uint32_t, (uint16_t)x *(uint32_t)(uint16_t)y + z)
TERNARY(mad_wide_s16, u32, uint32_t, (uint32_t)((int16_t)x *(int16_t)y) + z)

#define WIDE(name, T, W)                                                                                               \
    EXEC(mul_##name)                                                                                                   \
    {                                                                                                                  \
        u64 *d = REG(0, u64);                                                                                          \
        const u32 *a = REG(1, u32), *b = REG(2, u32);                                                                  \
        EACH(d[i] = (uint64_t)((W)(T)a[i] * (W)(T)b[i]));                                                              \
    }                                                                                                                  \
    EXEC(mad_##name)                                                                                                   \
    {                                                                                                                  \
        u64 *d = REG(0, u64);                                                                                          \
        const u32 *a = REG(1, u32), *b = REG(2, u32);                                                                  \
        const u64 *c = REG(3, u64);                                                                                    \
        EACH(d[i] = (uint64_t)((W)(T)a[i] * (W)(T)b[i]) + c[i]);                                                       \
    }
WIDE(wide_u32, uint32_t, uint64_t)
WIDE(wide_s32, int32_t, int64_t)

/* Division by zero is unspecified: all ones, as on hardware. The one quotient that overflows wraps. */
BINARY(div_u16, u32, uint16_t, y ? x / y : 0xffff)
BINARY(div_s16, u32, int16_t, y ? x / y : -1)
BINARY(div_u32, u32, uint32_t, y ? x / y : FULL)
BINARY(div_s32, u32, int32_t, y == -1 ? (int32_t)(0 - (uint32_t)x) : y ? x / y : -1)
BINARY(div_u64, u64, uint64_t, y ? x / y : UINT64_MAX)
BINARY(div_s64, u64, int64_t, y == -1 ? (int64_t)(0 - (uint64_t)x) : y ? x / y : -1)
BINARY(rem_u16, u32, uint16_t, y ? x % y : x)
BINARY(rem_s16, u32, int16_t, y ? x % y : x)
BINARY(rem_u32, u32, uint32_t, y ? x % y : x)
BINARY(rem_s32, u32, int32_t, y == -1 ? 0 : y ? x % y : x)
BINARY(rem_u64, u64, uint64_t, y ? x % y : x)
BINARY(rem_s64, u64, int64_t, y == -1 ? 0 : y ? x % y : x)

#define MINMAX(suffix, R, T)                                                                                           \
    BINARY(min_##suffix, R, T, x < y ? x : y)                                                                          \
    BINARY(max_##suffix, R, T, x > y ? x : y)
MINMAX(u16, u32, uint16_t)
MINMAX(s16, u32, int16_t)
MINMAX(u32, u32, uint32_t)
MINMAX(s32, u32, int32_t)
MINMAX(u64, u64, uint64_t)
MINMAX(s64, u64, int64_t)

UNARY(neg_w, u32, uint32_t, 0 - x)
UNARY(neg_d, u64, uint64_t, 0 - x)
UNARY(abs_s16, u32, int16_t, x < 0 ? -x : x)
UNARY(abs_s32, u32, int32_t, x < 0 ? 0 - (uint32_t)x : (uint32_t)x)
UNARY(abs_s64, u64, int64_t, x < 0 ? 0 - (uint64_t)x : (uint64_t)x)
UNARY(not_w, u32, uint32_t, ~x)
UNARY(not_d, u64, uint64_t, ~x)
UNARY(cnot_w, u32, uint32_t, x == 0)
UNARY(popc_w, u32, uint32_t, __builtin_popcount(x))
UNARY(clz_w, u32, uint32_t, x ? __builtin_clz(x) : 32)
BINARY(and_w, u32, uint32_t, x &y)
BINARY(and_d, u64, uint64_t, x &y)
BINARY(or_w, u32, uint32_t, x | y)
BINARY(or_d, u64, uint64_t, x | y)
BINARY(xor_w, u32, uint32_t, x ^ y)
BINARY(xor_d, u64, uint64_t, x ^ y)
UNARY(mov_w, u32, uint32_t, x)
UNARY(mov_d, u64, uint64_t, x)

/* A 64-bit source with a 32-bit result, and the reverse. */
#define FROM_D(name, expression)                                                                                       \
    EXEC(name)                                                                                                         \
    {                                                                                                                  \
        u32 *d = REG(0, u32);                                                                                          \
        const u64 *a = REG(1, u64);                                                                                    \
        EACH(const uint64_t x = a[i]; d[i] = (uint32_t)(expression));                                                  \
    }
FROM_D(popc_d, __builtin_popcountll(x))
FROM_D(clz_d, x ? __builtin_clzll(x) : 64)

static uint32_t reverse(uint32_t x)
{
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}
UNARY(brev_w, u32, uint32_t, reverse(x))
UNARY(brev_d, u64, uint64_t, (uint64_t)reverse((uint32_t)x) << 32 | reverse((uint32_t)(x >> 32)))

/* bfind: the highest set bit (of a negative number: the highest clear one); .shiftamt counts from the top. */
static uint32_t find_bit(uint64_t x, int bits, bool shift_amount)
{
    if (x == 0) return FULL;
    const int top = 63 - __builtin_clzll(x);
    return (uint32_t)(shift_amount ? bits - 1 - top : top);
}
UNARY(bfind_u32, u32, uint32_t, find_bit(x, 32, false))
UNARY(bfind_s32, u32, int32_t, find_bit((uint32_t)(x < 0 ? ~x : x), 32, false))
UNARY(bfind_shift_u32, u32, uint32_t, find_bit(x, 32, true))
UNARY(bfind_shift_s32, u32, int32_t, find_bit((uint32_t)(x < 0 ? ~x : x), 32, true))
FROM_D(bfind_u64, find_bit(x, 64, false))
FROM_D(bfind_s64, find_bit((int64_t)x < 0 ? ~x : x, 64, false))
FROM_D(bfind_shift_u64, find_bit(x, 64, true))

/* Shifts by the width or more give 0, or the sign. */
#define SHIFTS(suffix, R, T, expression)                                                                               \
    EXEC(suffix)                                                                                                       \
    {                                                                                                                  \
        R *d = REG(0, R);                                                                                              \
        const R *a = REG(1, R);                                                                                        \
        const u32 *b = REG(2, u32);                                                                                    \
        EACH(const T x = (T)a[i]; const uint32_t y = b[i]; d[i] = (R)(expression));                                    \
    }
SHIFTS(shl_16, u32, uint16_t, y > 15 ? 0 : (uint16_t)(x << y))
SHIFTS(shl_32, u32, uint32_t, y > 31 ? 0 : x << y)
SHIFTS(shl_64, u64, uint64_t, y > 63 ? 0 : x << y)
SHIFTS(shr_u16, u32, uint16_t, y > 15 ? 0 : x >> y)
SHIFTS(shr_u32, u32, uint32_t, y > 31 ? 0 : x >> y)
SHIFTS(shr_u64, u64, uint64_t, y > 63 ? 0 : x >> y)
SHIFTS(shr_s16, u32, int16_t, x >> (y > 15 ? 15 : y))
SHIFTS(shr_s32, u32, int32_t, x >> (y > 31 ? 31 : y))
SHIFTS(shr_s64, u64, int64_t, x >> (y > 63 ? 63 : y))

/* shf: y:x is one 64-bit number, z the amount; the upper word of it shifted left, the lower of it shifted right. */
TERNARY(shf_l_wrap, u32, uint32_t, ((uint64_t)y << 32 | x) << (z & 31) >> 32)
TERNARY(shf_r_wrap, u32, uint32_t, ((uint64_t)y << 32 | x) >> (z & 31))
TERNARY(shf_l_clamp, u32, uint32_t, ((uint64_t)y << 32 | x) << (z > 32 ? 32 : z) >> 32)
TERNARY(shf_r_clamp, u32, uint32_t, ((uint64_t)y << 32 | x) >> (z > 32 ? 32 : z))

static uint64_t field(uint64_t x, uint32_t at, uint32_t length, int bits, bool with_sign)
{
    at &= 255;
    length &= 255;
    if (length == 0) return 0;
    const uint32_t last = at + length - 1 < (uint32_t)bits ? at + length - 1 : (uint32_t)bits - 1;
    const uint64_t sign = with_sign && (x >> last & 1) ? ~UINT64_C(0) : 0;
    const uint64_t value = at < (uint32_t)bits ? x >> at : 0;
    /* Bits past the end of x are sign too. */
    const uint64_t have = at >= (uint32_t)bits ? 0 : (uint32_t)bits - at < length ? (uint32_t)bits - at : length;
    const uint64_t keep = have > 63 ? ~UINT64_C(0) : (UINT64_C(1) << have) - 1;
    return (value & keep) | (sign & ~keep);
}
static uint64_t insert(uint64_t x, uint64_t into, uint32_t at, uint32_t length, int bits)
{
    at &= 255;
    length &= 255;
    if (at >= (uint32_t)bits || length == 0) return into;
    const uint64_t ones = length > 63 ? ~UINT64_C(0) : (UINT64_C(1) << length) - 1;
    return (into & ~(ones << at)) | (x & ones) << at;
}
TERNARY(bfe_u32, u32, uint32_t, field(x, y, z, 32, false))
TERNARY(bfe_s32, u32, uint32_t, field(x, y, z, 32, true))
#define BFE64(name, with_sign)                                                                                         \
    EXEC(name)                                                                                                         \
    {                                                                                                                  \
        u64 *d = REG(0, u64);                                                                                          \
        const u64 *a = REG(1, u64);                                                                                    \
        const u32 *b = REG(2, u32), *c = REG(3, u32);                                                                  \
        EACH(d[i] = field(a[i], b[i], c[i], 64, with_sign));                                                           \
    }
BFE64(bfe_u64, false)
BFE64(bfe_s64, true)
EXEC(bfi_b32)
{
    u32 *d = REG(0, u32);
    const u32 *a = REG(1, u32), *b = REG(2, u32), *at = REG(3, u32), *length = REG(4, u32);
    EACH(d[i] = (uint32_t)insert(a[i], b[i], at[i], length[i], 32));
}
EXEC(bfi_b64)
{
    u64 *d = REG(0, u64);
    const u64 *a = REG(1, u64), *b = REG(2, u64);
    const u32 *at = REG(3, u32), *length = REG(4, u32);
    EACH(d[i] = insert(a[i], b[i], at[i], length[i], 64));
}

/* prmt: each result byte is byte (selector & 7) of y:x; bit 3 of the selector takes its sign instead. */
static uint32_t permute(uint32_t x, uint32_t y, uint32_t selector)
{
    const uint64_t bytes = (uint64_t)y << 32 | x;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t s = selector >> 4 * i & 15;
        const uint32_t byte = (uint32_t)(bytes >> 8 * (s & 7)) & 255;
        result |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return result;
}
TERNARY(prmt_b32, u32, uint32_t, permute(x, y, z))

/* lop3: bit k of the immediate is the result for (x, y, z) = the bits of k. */
EXEC(lop3_b32)
{
    u32 *d = REG(0, u32);
    const u32 *a = REG(1, u32), *b = REG(2, u32), *c = REG(3, u32);
    const uint32_t table = REG(4, u32)[0];
    uint32_t when[8];
    for (int k = 0; k < 8; ++k)
        when[k] = table >> k & 1 ? FULL : 0;
    EACH(const uint32_t x = a[i]; const uint32_t y = b[i]; const uint32_t z = c[i];
         d[i] = (~x & ~y & ~z & when[0]) | (~x & ~y & z & when[1]) | (~x & y & ~z & when[2]) | (~x & y & z & when[3]) |
                (x & ~y & ~z & when[4]) | (x & ~y & z & when[5]) | (x & y & ~z & when[6]) | (x & y & z & when[7]));
}

/* -------------------------------------------------------------------------------------------------------------- floats */
static uint32_t bits32(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static float float32(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static uint64_t bits64(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static double float64(uint64_t bits)
{
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

BINARY(add_f32, f32, float, x + y)
BINARY(add_f64, f64, double, x + y)
BINARY(sub_f32, f32, float, x - y)
BINARY(sub_f64, f64, double, x - y)
BINARY(mul_f32, f32, float, x *y)
BINARY(mul_f64, f64, double, x *y)
BINARY(div_f32, f32, float, x / y)
BINARY(div_f64, f64, double, x / y)
TERNARY(fma_f32, f32, float, __builtin_fmaf(x, y, z))
TERNARY(fma_f64, f64, double, __builtin_fma(x, y, z))
UNARY(neg_f32, u32, uint32_t, x ^ 0x80000000u)
UNARY(neg_f64, u64, uint64_t, x ^ UINT64_C(1) << 63)
UNARY(abs_f32, u32, uint32_t, x & 0x7fffffffu)
UNARY(abs_f64, u64, uint64_t, x & ~(UINT64_C(1) << 63))
UNARY(sqrt_f32, f32, float, __builtin_sqrtf(x))
UNARY(sqrt_f64, f64, double, __builtin_sqrt(x))
UNARY(rcp_f32, f32, float, 1.0f / x)
UNARY(rcp_f64, f64, double, 1.0 / x)
UNARY(rsqrt_f32, f32, float, 1.0f / __builtin_sqrtf(x))
UNARY(rsqrt_f64, f64, double, 1.0 / __builtin_sqrt(x))
UNARY(ex2_f32, f32, float, exp2f(x))
UNARY(lg2_f32, f32, float, log2f(x))
UNARY(sin_f32, f32, float, sinf(x))
UNARY(cos_f32, f32, float, cosf(x))
UNARY(tanh_f32, f32, float, tanhf(x))
BINARY(copysign_f32, u32, uint32_t, (x & 0x80000000u) | (y & 0x7fffffffu))
BINARY(copysign_f64, u64, uint64_t, (x & UINT64_C(1) << 63) | (y & ~(UINT64_C(1) << 63)))

/* The number where one is NaN; -0 is less than +0. */
BINARY(min_f32, f32, float, x < y || y != y ? x : y < x || x != x ? y : float32(bits32(x) | bits32(y)))
BINARY(max_f32, f32, float, x > y || y != y ? x : y > x || x != x ? y : float32(bits32(x) & bits32(y)))
BINARY(min_f64, f64, double, x < y || y != y ? x : y < x || x != x ? y : float64(bits64(x) | bits64(y)))
BINARY(max_f64, f64, double, x > y || y != y ? x : y > x || x != x ? y : float64(bits64(x) & bits64(y)))
BINARY(min_nan_f32, f32, float,
       x != x || y != y ? float32(0x7fffffffu)
       : x < y          ? x
       : y < x          ? y
                        : float32(bits32(x) | bits32(y)))
BINARY(max_nan_f32, f32, float,
       x != x || y != y ? float32(0x7fffffffu)
       : x > y          ? x
       : y > x          ? y
                        : float32(bits32(x) & bits32(y)))

/* The other rounding modes: the same loops, under the mode that decode.c put into op->kind, exec in op->immediate. */
void alu_rounded(struct warp *warp, const struct op *op, uint32_t mask)
{
    static const int MODE[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    fesetround(MODE[op->kind]);
    ((exec_fn)(intptr_t)op->immediate)(warp, op, mask);
    fesetround(FE_TONEAREST);
}

/* ---------------------------------------------------------------------------------------------- comparison, selection */
/* setp.cmp[.bool] p|q, a, b, c: op->kind is the bool (0: none), op->flags whether c is negated. */
static void set_both(struct warp *warp, const struct op *op, uint32_t mask, uint32_t result)
{
    uint32_t not_result = ~result;
    if (op->kind) {
        uint32_t c = predicate(warp, op->r[4]);
        if (op->flags) c = ~c;
        result = op->kind == 1 ? result & c : op->kind == 2 ? result | c : result ^ c;
        not_result = op->kind == 1 ? not_result & c : op->kind == 2 ? not_result | c : not_result ^ c;
    }
    set_predicate(warp, op->r[0], mask, result);
    if (op->r[1] != NONE) set_predicate(warp, op->r[1], mask, not_result);
}
#define SETP(name, R, T, expression)                                                                                   \
    EXEC(name)                                                                                                         \
    {                                                                                                                  \
        const R *a = REG(2, R), *b = REG(3, R);                                                                        \
        uint32_t result = 0;                                                                                           \
        for (int i = 0; i < LANES; ++i) {                                                                              \
            const T x = (T)a[i], y = (T)b[i];                                                                          \
            result |= (uint32_t)(expression) << i;                                                                     \
        }                                                                                                              \
        set_both(warp, op, mask, result);                                                                              \
    }
#define ORDERED(suffix, R, T)                                                                                          \
    SETP(lt_##suffix, R, T, x < y)                                                                                     \
    SETP(le_##suffix, R, T, x <= y)                                                                                    \
    SETP(gt_##suffix, R, T, x > y)                                                                                     \
    SETP(ge_##suffix, R, T, x >= y)
#define EQUALITY(suffix, R, T)                                                                                         \
    SETP(eq_##suffix, R, T, x == y)                                                                                    \
    SETP(ne_##suffix, R, T, x != y)
#define FLOATS(suffix, R, T)                                                                                           \
    ORDERED(suffix, R, T)                                                                                              \
    SETP(eq_##suffix, R, T, x == y)                                                                                    \
    SETP(ne_##suffix, R, T, x<y || x> y)                                                                               \
    SETP(equ_##suffix, R, T, !(x < y || x > y))                                                                        \
    SETP(neu_##suffix, R, T, x != y)                                                                                   \
    SETP(ltu_##suffix, R, T, !(x >= y))                                                                                \
    SETP(leu_##suffix, R, T, !(x > y))                                                                                 \
    SETP(gtu_##suffix, R, T, !(x <= y))                                                                                \
    SETP(geu_##suffix, R, T, !(x < y))                                                                                 \
    SETP(num_##suffix, R, T, x == x && y == y)                                                                         \
    SETP(nan_##suffix, R, T, x != x || y != y)
ORDERED(u16, u32, uint16_t)
ORDERED(s16, u32, int16_t)
ORDERED(u32, u32, uint32_t)
ORDERED(s32, u32, int32_t)
ORDERED(u64, u64, uint64_t)
ORDERED(s64, u64, int64_t)
EQUALITY(16, u32, uint16_t)
EQUALITY(32, u32, uint32_t)
EQUALITY(64, u64, uint64_t)
FLOATS(f32, f32, float)
FLOATS(f64, f64, double)

#define SELP(name, R)                                                                                                  \
    EXEC(name)                                                                                                         \
    {                                                                                                                  \
        R *d = REG(0, R);                                                                                              \
        const R *a = REG(1, R), *b = REG(2, R);                                                                        \
        const uint32_t p = predicate(warp, op->r[3]) ^ (op->flags ? FULL : 0);                                         \
        EACH(d[i] = p >> i & 1 ? a[i] : b[i]);                                                                         \
    }
SELP(selp_w, u32)
SELP(selp_d, u64)

#define LOGIC(name, expression)                                                                                        \
    EXEC(name)                                                                                                         \
    {                                                                                                                  \
        const uint32_t x = predicate(warp, op->r[1]), y = op->r[2] == NONE ? 0 : predicate(warp, op->r[2]);            \
        (void)y;                                                                                                       \
        set_predicate(warp, op->r[0], mask, expression);                                                               \
    }
LOGIC(and_p, x &y)
LOGIC(or_p, x | y)
LOGIC(xor_p, x ^ y)
LOGIC(not_p, ~x)
LOGIC(mov_p, x)

/* ---------------------------------------------------------------------------------------------------------- the table */
#define SAME(name, fn)                                                                                                 \
    {name ".u32", "www", fn##_w}, {name ".s32", "www", fn##_w}, {name ".u16", "www", fn##_w},                          \
        {name ".s16", "www", fn##_w}, {name ".u64", "ddd", fn##_d},                                                    \
    {                                                                                                                  \
        name ".s64", "ddd", fn##_d                                                                                     \
    }
#define BITS(name, w, d, fn)                                                                                           \
    {name ".b32", w, fn##_w}, {name ".b16", w, fn##_w},                                                                \
    {                                                                                                                  \
        name ".b64", d, fn##_d                                                                                         \
    }
#define SIX(name, fn)                                                                                                  \
    {name ".u16", "www", fn##_u16}, {name ".s16", "www", fn##_s16}, {name ".u32", "www", fn##_u32},                    \
        {name ".s32", "www", fn##_s32}, {name ".u64", "ddd", fn##_u64},                                                \
    {                                                                                                                  \
        name ".s64", "ddd", fn##_s64                                                                                   \
    }
#define COMPARE(cmp)                                                                                                   \
    {"setp." #cmp ".u16", "pQwwP", cmp##_u16}, {"setp." #cmp ".s16", "pQwwP", cmp##_s16},                              \
        {"setp." #cmp ".u32", "pQwwP", cmp##_u32}, {"setp." #cmp ".s32", "pQwwP", cmp##_s32},                          \
        {"setp." #cmp ".u64", "pQddP", cmp##_u64}, {"setp." #cmp ".s64", "pQddP", cmp##_s64}, COMPARE_FLOAT(cmp)
#define COMPARE_FLOAT(cmp)                                                                                             \
    {"setp." #cmp ".f32", "pQwwP", cmp##_f32},                                                                         \
    {                                                                                                                  \
        "setp." #cmp ".f64", "pQddP", cmp##_f64                                                                        \
    }
#define COMPARE_UNSIGNED(name, cmp)                                                                                    \
    {"setp." name ".u16", "pQwwP", cmp##_u16}, {"setp." name ".u32", "pQwwP", cmp##_u32},                              \
    {                                                                                                                  \
        "setp." name ".u64", "pQddP", cmp##_u64                                                                        \
    }
#define COMPARE_EQUAL(cmp)                                                                                             \
    {"setp." #cmp ".u16", "pQwwP", cmp##_16}, {"setp." #cmp ".s16", "pQwwP", cmp##_16},                                \
        {"setp." #cmp ".b16", "pQwwP", cmp##_16}, {"setp." #cmp ".u32", "pQwwP", cmp##_32},                            \
        {"setp." #cmp ".s32", "pQwwP", cmp##_32}, {"setp." #cmp ".b32", "pQwwP", cmp##_32},                            \
        {"setp." #cmp ".u64", "pQddP", cmp##_64}, {"setp." #cmp ".s64", "pQddP", cmp##_64},                            \
        {"setp." #cmp ".b64", "pQddP", cmp##_64}, COMPARE_FLOAT(cmp)
#define W2(name, fn)                                                                                                   \
    {                                                                                                                  \
        name, "ww", fn                                                                                                 \
    }
#define W3(name, fn)                                                                                                   \
    {                                                                                                                  \
        name, "www", fn                                                                                                \
    }
#define W4(name, fn)                                                                                                   \
    {                                                                                                                  \
        name, "wwww", fn                                                                                               \
    }
#define FLOAT3(name, fn)                                                                                               \
    {name ".f32", "www", fn##_f32},                                                                                    \
    {                                                                                                                  \
        name ".f64", "ddd", fn##_f64                                                                                   \
    }
#define FLOAT2(name, fn)                                                                                               \
    {name ".f32", "ww", fn##_f32},                                                                                     \
    {                                                                                                                  \
        name ".f64", "dd", fn##_f64                                                                                    \
    }

static const struct form FORMS[] = {
    SAME("add", add),
    SAME("sub", sub),
    SAME("mul.lo", mul_lo),
    SIX("mul.hi", mul_hi),
    SIX("div", div),
    SIX("rem", rem),
    SIX("min", min),
    SIX("max", max),
    {"mad.lo.u16", "wwww", mad_lo_w},
    {"mad.lo.s16", "wwww", mad_lo_w},
    {"mad.lo.u32", "wwww", mad_lo_w},
    {"mad.lo.s32", "wwww", mad_lo_w},
    {"mad.lo.u64", "dddd", mad_lo_d},
    {"mad.lo.s64", "dddd", mad_lo_d},
    W4("mad.hi.u32", mad_hi_u32),
    W4("mad.hi.s32", mad_hi_s32),
    {"mul.wide.u32", "dww", mul_wide_u32},
    {"mul.wide.s32", "dww", mul_wide_s32},
    {"mad.wide.u32", "dwwd", mad_wide_u32},
    {"mad.wide.s32", "dwwd", mad_wide_s32},
    W3("mul.wide.u16", mul_wide_u16),
    W3("mul.wide.s16", mul_wide_s16),
    W4("mad.wide.u16", mad_wide_u16),
    W4("mad.wide.s16", mad_wide_s16),
    W2("neg.s16", neg_w),
    W2("neg.s32", neg_w),
    {"neg.s64", "dd", neg_d},
    W2("abs.s16", abs_s16),
    W2("abs.s32", abs_s32),
    {"abs.s64", "dd", abs_s64},
    BITS("and", "www", "ddd", and),
    BITS("or", "www", "ddd", or),
    BITS("xor", "www", "ddd", xor),
    BITS("not", "ww", "dd", not ),
    W2("cnot.b32", cnot_w),
    W2("cnot.b16", cnot_w),
    W2("popc.b32", popc_w),
    {"popc.b64", "wd", popc_d},
    W2("clz.b32", clz_w),
    {"clz.b64", "wd", clz_d},
    W2("brev.b32", brev_w),
    {"brev.b64", "dd", brev_d},
    W2("bfind.u32", bfind_u32),
    W2("bfind.s32", bfind_s32),
    {"bfind.u64", "wd", bfind_u64},
    {"bfind.s64", "wd", bfind_s64},
    W2("bfind.shiftamt.u32", bfind_shift_u32),
    W2("bfind.shiftamt.s32", bfind_shift_s32),
    {"bfind.shiftamt.u64", "wd", bfind_shift_u64},
    W3("shl.b16", shl_16),
    W3("shl.b32", shl_32),
    {"shl.b64", "ddw", shl_64},
    W3("shr.u16", shr_u16),
    W3("shr.b16", shr_u16),
    W3("shr.s16", shr_s16),
    W3("shr.u32", shr_u32),
    W3("shr.b32", shr_u32),
    W3("shr.s32", shr_s32),
    {"shr.u64", "ddw", shr_u64},
    {"shr.b64", "ddw", shr_u64},
    {"shr.s64", "ddw", shr_s64},
    W4("shf.l.wrap.b32", shf_l_wrap),
    W4("shf.r.wrap.b32", shf_r_wrap),
    W4("shf.l.clamp.b32", shf_l_clamp),
    W4("shf.r.clamp.b32", shf_r_clamp),
    W4("bfe.u32", bfe_u32),
    W4("bfe.s32", bfe_s32),
    {"bfe.u64", "ddww", bfe_u64},
    {"bfe.s64", "ddww", bfe_s64},
    {"bfi.b32", "wwwww", bfi_b32},
    {"bfi.b64", "dddww", bfi_b64},
    W4("prmt.b32", prmt_b32),
    {"lop3.b32", "wwwww", lop3_b32},

    FLOAT3("add", add),
    FLOAT3("sub", sub),
    FLOAT3("mul", mul),
    FLOAT3("div", div),
    W3("div.approx.f32", div_f32),
    W3("div.full.f32", div_f32),
    {"fma.f32", "wwww", fma_f32},
    {"fma.f64", "dddd", fma_f64},
    {"mad.f32", "wwww", fma_f32},
    {"mad.f64", "dddd", fma_f64},
    FLOAT3("min", min),
    FLOAT3("max", max),
    W3("min.NaN.f32", min_nan_f32),
    W3("max.NaN.f32", max_nan_f32),
    FLOAT2("neg", neg),
    FLOAT2("abs", abs),
    FLOAT2("sqrt", sqrt),
    FLOAT2("rcp", rcp),
    FLOAT3("copysign", copysign),
    W2("sqrt.approx.f32", sqrt_f32),
    W2("rcp.approx.f32", rcp_f32),
    W2("rsqrt.approx.f32", rsqrt_f32),
    {"rsqrt.approx.f64", "dd", rsqrt_f64},
    {"rcp.approx.f64", "dd", rcp_f64},
    W2("ex2.approx.f32", ex2_f32),
    W2("lg2.approx.f32", lg2_f32),
    W2("sin.approx.f32", sin_f32),
    W2("cos.approx.f32", cos_f32),
    W2("tanh.approx.f32", tanh_f32),

    COMPARE_EQUAL(eq),
    COMPARE_EQUAL(ne),
    COMPARE(lt),
    COMPARE(le),
    COMPARE(gt),
    COMPARE(ge),
    COMPARE_UNSIGNED("lo", lt),
    COMPARE_UNSIGNED("ls", le),
    COMPARE_UNSIGNED("hi", gt),
    COMPARE_UNSIGNED("hs", ge),
    COMPARE_FLOAT(equ),
    COMPARE_FLOAT(neu),
    COMPARE_FLOAT(ltu),
    COMPARE_FLOAT(leu),
    COMPARE_FLOAT(gtu),
    COMPARE_FLOAT(geu),
    COMPARE_FLOAT(num),
    COMPARE_FLOAT(nan),

    {"selp.b16", "wwwP", selp_w},
    {"selp.u16", "wwwP", selp_w},
    {"selp.s16", "wwwP", selp_w},
    {"selp.b32", "wwwP", selp_w},
    {"selp.u32", "wwwP", selp_w},
    {"selp.s32", "wwwP", selp_w},
    {"selp.f32", "wwwP", selp_w},
    {"selp.b64", "dddP", selp_d},
    {"selp.u64", "dddP", selp_d},
    {"selp.s64", "dddP", selp_d},
    {"selp.f64", "dddP", selp_d},
    {"mov.b16", "ww", mov_w},
    {"mov.u16", "ww", mov_w},
    {"mov.s16", "ww", mov_w},
    {"mov.b32", "ww", mov_w},
    {"mov.u32", "ww", mov_w},
    {"mov.s32", "ww", mov_w},
    {"mov.f32", "ww", mov_w},
    {"mov.b64", "dd", mov_d},
    {"mov.u64", "dd", mov_d},
    {"mov.s64", "dd", mov_d},
    {"mov.f64", "dd", mov_d},
    {"and.pred", "ppp", and_p},
    {"or.pred", "ppp", or_p},
    {"xor.pred", "ppp", xor_p},
    {"not.pred", "pp", not_p},
    {"mov.pred", "pp", mov_p},
};

const struct form *alu_form(const char *name)
{
    for (size_t i = 0; i < sizeof FORMS / sizeof FORMS[0]; ++i)
        if (strcmp(FORMS[i].name, name) == 0) return &FORMS[i];
    return NULL;
}
