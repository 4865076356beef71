/* forms.h: instructions one by one: FORM(name, result, first, second, third operand, PTX, the same in C).
 *
 * Operands: W 32 bits, D 64 bits, H 16 bits, F float, G double. forms.cu makes a kernel of each, with the PTX; test_ptx.c a function
 * with the C, over x, y, z. The C is written from the PTX ISA's words, not from the emulator: bit by bit where that is another way. */
#define PREDICATE(comparison) "{ .reg .pred p; " comparison "; selp.u32 %0, 1, 0, p; }"

#define FORMS(FORM)                                                                                                    \
    FORM(add_u32, W, W, W, W, "add.u32 %0, %1, %2;", x + y)                                                            \
    FORM(add_s64, D, D, D, D, "add.s64 %0, %1, %2;", x + y)                                                            \
    FORM(add_s16, H, H, H, H, "add.s16 %0, %1, %2;", x + y)                                                            \
    FORM(sub_s32, W, W, W, W, "sub.s32 %0, %1, %2;", x - y)                                                            \
    FORM(sub_u64, D, D, D, D, "sub.u64 %0, %1, %2;", x - y)                                                            \
    FORM(mul_lo_s32, W, W, W, W, "mul.lo.s32 %0, %1, %2;", x *y)                                                       \
    FORM(mul_lo_u64, D, D, D, D, "mul.lo.u64 %0, %1, %2;", x *y)                                                       \
    FORM(mul_lo_s16, H, H, H, H, "mul.lo.s16 %0, %1, %2;", (uint32_t)x *y)                                             \
    FORM(mul_hi_u32, W, W, W, W, "mul.hi.u32 %0, %1, %2;", high32(x, y))                                               \
    FORM(mul_hi_s32, W, W, W, W, "mul.hi.s32 %0, %1, %2;", high32(x, y) - (S(x) < 0 ? y : 0) - (S(y) < 0 ? x : 0))     \
    FORM(mul_hi_u64, D, D, D, D, "mul.hi.u64 %0, %1, %2;", high64(x, y))                                               \
    FORM(mul_hi_s64, D, D, D, D, "mul.hi.s64 %0, %1, %2;", high64(x, y) - (L(x) < 0 ? y : 0) - (L(y) < 0 ? x : 0))     \
    FORM(mul_wide_u32, D, W, W, W, "mul.wide.u32 %0, %1, %2;", (uint64_t)x *y)                                         \
    FORM(mul_wide_s32, D, W, W, W, "mul.wide.s32 %0, %1, %2;", (int64_t)S(x) * S(y))                                   \
    FORM(mul_wide_u16, W, H, H, H, "mul.wide.u16 %0, %1, %2;", (uint32_t)x *y)                                         \
    FORM(mul_wide_s16, W, H, H, H, "mul.wide.s16 %0, %1, %2;", (int16_t)x *(int16_t)y)                                 \
    FORM(mad_lo_s32, W, W, W, W, "mad.lo.s32 %0, %1, %2, %3;", x *y + z)                                               \
    FORM(mad_lo_s64, D, D, D, D, "mad.lo.s64 %0, %1, %2, %3;", x *y + z)                                               \
    FORM(mad_hi_u32, W, W, W, W, "mad.hi.u32 %0, %1, %2, %3;", high32(x, y) + z)                                       \
    FORM(mad_wide_u32, D, W, W, D, "mad.wide.u32 %0, %1, %2, %3;", (uint64_t)x *y + z)                                 \
    FORM(mad_wide_s32, D, W, W, D, "mad.wide.s32 %0, %1, %2, %3;", (uint64_t)((int64_t)S(x) * S(y)) + z)               \
    FORM(div_u32, W, W, W, W, "div.u32 %0, %1, %2;", y ? x / y : ~0u)                                                  \
    FORM(div_s32, W, W, W, W, "div.s32 %0, %1, %2;", y ? (int64_t)S(x) / S(y) : -1)                                    \
    FORM(div_u64, D, D, D, D, "div.u64 %0, %1, %2;", y ? x / y : ~UINT64_C(0))                                         \
    FORM(div_s64, D, D, D, D, "div.s64 %0, %1, %2;", y ? (~y ? (uint64_t)(L(x) / L(y)) : 0 - x) : ~UINT64_C(0))        \
    FORM(rem_u32, W, W, W, W, "rem.u32 %0, %1, %2;", y ? x - x / y *y : x)                                             \
    FORM(rem_s32, W, W, W, W, "rem.s32 %0, %1, %2;", y ? (int64_t)S(x) % S(y) : S(x))                                  \
    FORM(rem_u64, D, D, D, D, "rem.u64 %0, %1, %2;", y ? x - x / y *y : x)                                             \
    FORM(min_u32, W, W, W, W, "min.u32 %0, %1, %2;", x < y ? x : y)                                                    \
    FORM(min_s32, W, W, W, W, "min.s32 %0, %1, %2;", S(x) < S(y) ? x : y)                                              \
    FORM(max_s64, D, D, D, D, "max.s64 %0, %1, %2;", L(x) > L(y) ? x : y)                                              \
    FORM(max_u64, D, D, D, D, "max.u64 %0, %1, %2;", x > y ? x : y)                                                    \
    FORM(max_s16, H, H, H, H, "max.s16 %0, %1, %2;", (int16_t)x > (int16_t)y ? x : y)                                  \
    FORM(neg_s32, W, W, W, W, "neg.s32 %0, %1;", 0 - x)                                                                \
    FORM(abs_s32, W, W, W, W, "abs.s32 %0, %1;", S(x) < 0 ? 0 - x : x)                                                 \
    FORM(abs_s64, D, D, D, D, "abs.s64 %0, %1;", L(x) < 0 ? 0 - x : x)                                                 \
    FORM(and_b32, W, W, W, W, "and.b32 %0, %1, %2;", x &y)                                                             \
    FORM(or_b64, D, D, D, D, "or.b64 %0, %1, %2;", x | y)                                                              \
    FORM(xor_b16, H, H, H, H, "xor.b16 %0, %1, %2;", x ^ y)                                                            \
    FORM(not_b32, W, W, W, W, "not.b32 %0, %1;", ~x)                                                                   \
    FORM(shl_b32, W, W, W, W, "{ .reg .u32 n; and.b32 n, %2, 63; shl.b32 %0, %1, n; }",                                \
         (y & 63) > 31 ? 0 : x << (y & 63))                                                                            \
    FORM(shl_b64, D, D, W, W, "{ .reg .u32 n; and.b32 n, %2, 127; shl.b64 %0, %1, n; }",                               \
         (y & 127) > 63 ? 0 : x << (y & 127))                                                                          \
    FORM(shr_u32, W, W, W, W, "{ .reg .u32 n; and.b32 n, %2, 63; shr.u32 %0, %1, n; }",                                \
         (y & 63) > 31 ? 0 : x >> (y & 63))                                                                            \
    FORM(shr_s32, W, W, W, W, "{ .reg .u32 n; and.b32 n, %2, 63; shr.s32 %0, %1, n; }",                                \
         S(x) >> ((y & 63) > 31 ? 31 : y & 63))                                                                        \
    FORM(shr_s64, D, D, W, W, "shr.s64 %0, %1, %2;", L(x) >> (y > 63 ? 63 : y))                                        \
    FORM(shr_s16, H, H, W, W, "shr.s16 %0, %1, %2;", (int16_t)x >> (y > 15 ? 15 : y))                                  \
    FORM(shf_l_wrap, W, W, W, W, "shf.l.wrap.b32 %0, %1, %2, %3;", z & 31 ? y << (z & 31) | x >> (32 - (z & 31)) : y)  \
    FORM(shf_r_wrap, W, W, W, W, "shf.r.wrap.b32 %0, %1, %2, %3;", z & 31 ? x >> (z & 31) | y << (32 - (z & 31)) : x)  \
    FORM(shf_l_clamp, W, W, W, W, "shf.l.clamp.b32 %0, %1, %2, %3;", z == 0 ? y : z < 32 ? y << z | x >> (32 - z) : x) \
    FORM(shf_r_clamp, W, W, W, W, "shf.r.clamp.b32 %0, %1, %2, %3;", z == 0 ? x : z < 32 ? x >> z | y << (32 - z) : y) \
    FORM(popc_b32, W, W, W, W, "popc.b32 %0, %1;", ones(x))                                                            \
    FORM(popc_b64, W, D, D, D, "popc.b64 %0, %1;", ones(x))                                                            \
    FORM(clz_b32, W, W, W, W, "clz.b32 %0, %1;", 31 - highest(x))                                                      \
    FORM(clz_b64, W, D, D, D, "clz.b64 %0, %1;", 63 - highest(x))                                                      \
    FORM(brev_b32, W, W, W, W, "brev.b32 %0, %1;", reversed(x, 32))                                                    \
    FORM(brev_b64, D, D, D, D, "brev.b64 %0, %1;", reversed(x, 64))                                                    \
    FORM(bfind_u32, W, W, W, W, "bfind.u32 %0, %1;", highest(x))                                                       \
    FORM(bfind_s32, W, W, W, W, "bfind.s32 %0, %1;", highest(S(x) < 0 ? ~x : x))                                       \
    FORM(bfind_u64, W, D, D, D, "bfind.u64 %0, %1;", highest(x))                                                       \
    FORM(bfind_shift, W, W, W, W, "bfind.shiftamt.u32 %0, %1;", x ? 31 - highest(x) : -1)                              \
    FORM(bfe_u32, W, W, W, W, "bfe.u32 %0, %1, %2, %3;", extracted(x, y, z, 32, 0))                                    \
    FORM(bfe_s32, W, W, W, W, "bfe.s32 %0, %1, %2, %3;", extracted(x, y, z, 32, 1))                                    \
    FORM(bfe_u64, D, D, W, W, "bfe.u64 %0, %1, %2, %3;", extracted(x, y, z, 64, 0))                                    \
    FORM(bfi_b32, W, W, W, W, "bfi.b32 %0, %1, %2, %3, 7;", inserted(x, y, z, 7, 32))                                  \
    FORM(bfi_b64, D, D, D, W, "bfi.b64 %0, %1, %2, %3, 21;", inserted(x, y, z, 21, 64))                                \
    FORM(prmt_b32, W, W, W, W, "prmt.b32 %0, %1, %2, %3;", permuted(x, y, z))                                          \
    FORM(lop3_96, W, W, W, W, "lop3.b32 %0, %1, %2, %3, 0x96;", x ^ y ^ z)                                             \
    FORM(lop3_e8, W, W, W, W, "lop3.b32 %0, %1, %2, %3, 0xe8;", (x & y) | (y & z) | (x & z))                           \
    FORM(lop3_ca, W, W, W, W, "lop3.b32 %0, %1, %2, %3, 0xca;", (x & y) | (~x & z))                                    \
    FORM(lop3_2d, W, W, W, W, "lop3.b32 %0, %1, %2, %3, 0x2d;", looked_up(x, y, z, 0x2d))                              \
    FORM(mov_pack, W, H, H, H, "mov.b32 %0, {%1, %2};", x | (uint32_t)y << 16)                                         \
    FORM(mov_pack64, D, W, W, W, "mov.b64 %0, {%1, %2};", x | (uint64_t)y << 32)                                       \
    FORM(mov_unpack, W, D, D, D, "{ .reg .b32 low; mov.b64 {low, %0}, %1; }", x >> 32)                                 \
    FORM(mov_four, D, H, H, H, "mov.b64 %0, {%1, %2, %3, %1};",                                                        \
         x | (uint64_t)y << 16 | (uint64_t)z << 32 | (uint64_t)x << 48)                                                \
                                                                                                                       \
    FORM(lt_s32, W, W, W, W, PREDICATE("setp.lt.s32 p, %1, %2"), S(x) < S(y))                                          \
    FORM(lt_u32, W, W, W, W, PREDICATE("setp.lt.u32 p, %1, %2"), x < y)                                                \
    FORM(lo_u32, W, W, W, W, PREDICATE("setp.lo.u32 p, %1, %2"), x < y)                                                \
    FORM(hs_u64, W, D, D, D, PREDICATE("setp.hs.u64 p, %1, %2"), x >= y)                                               \
    FORM(ge_s64, W, D, D, D, PREDICATE("setp.ge.s64 p, %1, %2"), L(x) >= L(y))                                         \
    FORM(eq_b16, W, H, H, H, PREDICATE("setp.eq.b16 p, %1, %2"), x == y)                                               \
    FORM(ne_s32, W, W, W, W, PREDICATE("setp.ne.s32 p, %1, %2"), x != y)                                               \
    FORM(le_s16, W, H, H, H, PREDICATE("setp.le.s16 p, %1, %2"), (int16_t)x <= (int16_t)y)                             \
    FORM(and_pair, W, W, W, W,                                                                                         \
         "{ .reg .pred p, q, r; .reg .u32 m; setp.gt.s32 r, %3, 0; setp.lt.and.s32 p|q, %1, %2, !r; "                  \
         "selp.u32 %0, 1, 0, p; selp.u32 m, 2, 0, q; or.b32 %0, %0, m; }",                                             \
         S(z) > 0      ? 0                                                                                             \
         : S(x) < S(y) ? 1                                                                                             \
                       : 2)                                                                                            \
    FORM(guarded, W, W, W, W,                                                                                          \
         "{ .reg .pred p; setp.lt.u32 p, %1, %2; mov.u32 %0, 7; @p add.u32 %0, %1, %3; @!p xor.b32 %0, %0, %2; }",     \
         x < y ? x + z : 7 ^ y)                                                                                        \
    FORM(logic, W, W, W, W,                                                                                            \
         "{ .reg .pred p, q; setp.lt.u32 p, %1, %2; setp.lt.u32 q, %2, %3; xor.pred p, p, q; not.pred p, p; "          \
         "or.pred q, q, p; and.pred p, q, p; selp.b32 %0, %1, %2, p; }",                                               \
         (x < y) == (y < z) ? x : y)                                                                                   \
    FORM(lt_f32, W, F, F, F, PREDICATE("setp.lt.f32 p, %1, %2"), x < y)                                                \
    FORM(eq_f32, W, F, F, F, PREDICATE("setp.eq.f32 p, %1, %2"), x == y)                                               \
    FORM(ne_f32, W, F, F, F, PREDICATE("setp.ne.f32 p, %1, %2"), x<y || x> y)                                          \
    FORM(neu_f32, W, F, F, F, PREDICATE("setp.neu.f32 p, %1, %2"), x != y)                                             \
    FORM(equ_f32, W, F, F, F, PREDICATE("setp.equ.f32 p, %1, %2"), !(x < y) && !(x > y))                               \
    FORM(gtu_f32, W, F, F, F, PREDICATE("setp.gtu.f32 p, %1, %2"), !(x <= y))                                          \
    FORM(leu_f64, W, G, G, G, PREDICATE("setp.leu.f64 p, %1, %2"), !(x > y))                                           \
    FORM(num_f64, W, G, G, G, PREDICATE("setp.num.f64 p, %1, %2"), !isnan(x) && !isnan(y))                             \
    FORM(nan_f32, W, F, F, F, PREDICATE("setp.nan.f32 p, %1, %2"), isnan(x) || isnan(y))                               \
                                                                                                                       \
    FORM(add_f32, F, F, F, F, "add.f32 %0, %1, %2;", x + y)                                                            \
    FORM(sub_rn_f32, F, F, F, F, "sub.rn.f32 %0, %1, %2;", x - y)                                                      \
    FORM(mul_f32, F, F, F, F, "mul.f32 %0, %1, %2;", x *y)                                                             \
    FORM(fma_rn_f32, F, F, F, F, "fma.rn.f32 %0, %1, %2, %3;", fmaf(x, y, z))                                          \
    FORM(div_rn_f32, F, F, F, F, "div.rn.f32 %0, %1, %2;", x / y)                                                      \
    FORM(sqrt_rn_f32, F, F, F, F, "sqrt.rn.f32 %0, %1;", sqrtf(x))                                                     \
    FORM(rcp_rn_f32, F, F, F, F, "rcp.rn.f32 %0, %1;", 1 / x)                                                          \
    FORM(neg_f32, F, F, F, F, "neg.f32 %0, %1;", -x)                                                                   \
    FORM(abs_f32, F, F, F, F, "abs.f32 %0, %1;", fabsf(x))                                                             \
    FORM(min_f32, F, F, F, F, "min.f32 %0, %1, %2;", least(x, y))                                                      \
    FORM(max_f32, F, F, F, F, "max.f32 %0, %1, %2;", -least(-x, -y))                                                   \
    FORM(copysign_f32, F, F, F, F, "copysign.f32 %0, %1, %2;", copysignf(y, x))                                        \
    FORM(add_f64, G, G, G, G, "add.f64 %0, %1, %2;", x + y)                                                            \
    FORM(mul_rn_f64, G, G, G, G, "mul.rn.f64 %0, %1, %2;", x *y)                                                       \
    FORM(fma_rn_f64, G, G, G, G, "fma.rn.f64 %0, %1, %2, %3;", fma(x, y, z))                                           \
    FORM(div_rn_f64, G, G, G, G, "div.rn.f64 %0, %1, %2;", x / y)                                                      \
    FORM(sqrt_rn_f64, G, G, G, G, "sqrt.rn.f64 %0, %1;", sqrt(x))                                                      \
    FORM(min_f64, G, G, G, G, "min.f64 %0, %1, %2;", least(x, y))                                                      \
    FORM(add_rz_f32, F, F, F, F, "add.rz.f32 %0, %1, %2;", (float)rounded(FE_TOWARDZERO, '+', x, y, 0))                \
    FORM(mul_rp_f32, F, F, F, F, "mul.rp.f32 %0, %1, %2;", (float)rounded(FE_UPWARD, '*', x, y, 0))                    \
    FORM(fma_rm_f32, F, F, F, F, "fma.rm.f32 %0, %1, %2, %3;", (float)rounded(FE_DOWNWARD, 'f', x, y, z))              \
    FORM(div_rz_f32, F, F, F, F, "div.rz.f32 %0, %1, %2;", (float)rounded(FE_TOWARDZERO, '/', x, y, 0))                \
                                                                                                                       \
    FORM(u32_u8, W, W, W, W, "cvt.u32.u8 %0, %1;", x & 255)                                                            \
    FORM(s32_s8, W, W, W, W, "cvt.s32.s8 %0, %1;", (int8_t)x)                                                          \
    FORM(u16_u32, H, W, W, W, "cvt.u16.u32 %0, %1;", x)                                                                \
    FORM(s32_s16, W, H, H, H, "cvt.s32.s16 %0, %1;", (int16_t)x)                                                       \
    FORM(s64_s32, D, W, W, W, "cvt.s64.s32 %0, %1;", S(x))                                                             \
    FORM(u64_u32, D, W, W, W, "cvt.u64.u32 %0, %1;", x)                                                                \
    FORM(u32_u64, W, D, D, D, "cvt.u32.u64 %0, %1;", x)                                                                \
    FORM(s64_s16, D, H, H, H, "cvt.s64.s16 %0, %1;", (int16_t)x)                                                       \
    FORM(s16_sat_s32, H, W, W, W, "cvt.sat.s16.s32 %0, %1;", S(x) > 32767 ? 32767 : S(x) < -32768 ? -32768 : S(x))     \
    FORM(u8_sat_s32, W, W, W, W, "cvt.sat.u8.s32 %0, %1;", S(x) > 255 ? 255 : S(x) < 0 ? 0 : S(x))                     \
    FORM(f32_s32, F, W, W, W, "cvt.rn.f32.s32 %0, %1;", (float)S(x))                                                   \
    FORM(f32_u32, F, W, W, W, "cvt.rn.f32.u32 %0, %1;", (float)x)                                                      \
    FORM(f32_u64, F, D, D, D, "cvt.rn.f32.u64 %0, %1;", (float)x)                                                      \
    FORM(f32_rz_u32, F, W, W, W, "cvt.rz.f32.u32 %0, %1;",                                                             \
         (float)(ones(x) && highest(x) > 23 ? x & ~0u << (highest(x) - 23) : x))                                       \
    FORM(f64_s64, G, D, D, D, "cvt.rn.f64.s64 %0, %1;", (double)L(x))                                                  \
    FORM(f64_u32, G, W, W, W, "cvt.rn.f64.u32 %0, %1;", (double)x)                                                     \
    FORM(f64_f32, G, F, F, F, "cvt.f64.f32 %0, %1;", (double)x)                                                        \
    FORM(f32_f64, F, G, G, G, "cvt.rn.f32.f64 %0, %1;", (float)x)                                                      \
    FORM(s32_rzi_f32, W, F, F, F, "cvt.rzi.s32.f32 %0, %1;", clamped(trunc(x), -0x1p31, 0x1p31 - 1))                   \
    FORM(u32_rni_f32, W, F, F, F, "cvt.rni.u32.f32 %0, %1;", clamped(nearbyint(x), 0, 0x1p32 - 1))                     \
    FORM(s32_rmi_f32, W, F, F, F, "cvt.rmi.s32.f32 %0, %1;", clamped(floor(x), -0x1p31, 0x1p31 - 1))                   \
    FORM(u8_rpi_f32, W, F, F, F, "cvt.rpi.u8.f32 %0, %1;", clamped(ceil(x), 0, 255))                                   \
    FORM(s32_rni_f64, W, G, G, G, "cvt.rni.s32.f64 %0, %1;", clamped(nearbyint(x), -0x1p31, 0x1p31 - 1))               \
    FORM(rni_f32, F, F, F, F, "cvt.rni.f32.f32 %0, %1;", nearbyintf(x))                                                \
    FORM(rzi_f32, F, F, F, F, "cvt.rzi.f32.f32 %0, %1;", truncf(x))                                                    \
    FORM(rmi_f64, G, G, G, G, "cvt.rmi.f64.f64 %0, %1;", floor(x))                                                     \
    FORM(sat_f32, F, F, F, F, "cvt.sat.f32.f32 %0, %1;", x > 1 ? 1 : x > 0 ? x : 0)                                    \
    FORM(f32_f16, F, H, H, H, "cvt.f32.f16 %0, %1;", half_value(x))                                                    \
    FORM(f16_f32, H, F, F, F, "cvt.rn.f16.f32 %0, %1;", nearest_half((double)x))                                       \
    FORM(f16_f64, H, G, G, G, "cvt.rn.f16.f64 %0, %1;", nearest_half(x))

/* With the last bits left open: within `bound` of the exact value, relative. */
#define APPROXIMATIONS(FORM)                                                                                           \
    FORM(rcp_approx, F, F, F, F, "rcp.approx.ftz.f32 %0, %1;", 1 / (double)x)                                          \
    FORM(rsqrt_approx, F, F, F, F, "rsqrt.approx.f32 %0, %1;", 1 / sqrt((double)x))                                    \
    FORM(sqrt_approx, F, F, F, F, "sqrt.approx.f32 %0, %1;", sqrt((double)x))                                          \
    FORM(ex2_approx, F, F, F, F, "ex2.approx.f32 %0, %1;", exp2((double)x))                                            \
    FORM(lg2_approx, F, F, F, F, "lg2.approx.f32 %0, %1;", log2((double)x))                                            \
    FORM(div_full, F, F, F, F, "div.full.f32 %0, %1, %2;", (double)x / (double)y)

/* From sm_80 on. */
#define FORMS_80(FORM)                                                                                                 \
    FORM(bf16_f32, H, F, F, F, "cvt.rn.bf16.f32 %0, %1;", nearest_bf16(x))                                             \
    FORM(bf16x2, W, F, F, F, "cvt.rn.bf16x2.f32 %0, %1, %2;", (uint32_t)nearest_bf16(x) << 16 | nearest_bf16(y))       \
    FORM(f16x2, W, F, F, F, "cvt.rn.f16x2.f32 %0, %1, %2;",                                                            \
         (uint32_t)nearest_half((double)x) << 16 | nearest_half((double)y))                                            \
    FORM(tf32, W, F, F, F, "cvt.rna.tf32.f32 %0, %1;", nearest_tf32(x))
