/* test_dtype.c: the scalar conversions of dtype.h, exhaustively where 16 bits are on one side, against the compiler's
 * _Float16 and against exact comparisons in double. */
#include "check.h"

static float from_half(int32_t dtype, uint16_t half)
{
    return dtype == PLORA_BF16 ? plora__bf16_to_float(half) : plora__f16_to_float(half);
}

static uint16_t to_half(int32_t dtype, float value)
{
    return dtype == PLORA_BF16 ? plora__float_to_bf16(value) : plora__float_to_f16(value);
}

/* The value of a 16-bit number from its fields, in double: sign, exponent field, fraction. */
static double decode(int32_t dtype, uint16_t half)
{
    const int fraction_bits = dtype == PLORA_BF16 ? 7 : 10, bias = dtype == PLORA_BF16 ? 127 : 15;
    const int exponent_max = dtype == PLORA_BF16 ? 255 : 31;
    const int fraction = half & ((1 << fraction_bits) - 1), exponent = (half & 0x7fff) >> fraction_bits;
    const double sign = half & 0x8000 ? -1.0 : 1.0;
    if (exponent == exponent_max) return fraction != 0 ? (double)NAN : sign * INFINITY;
    if (exponent == 0) return sign * ldexp(fraction, 1 - bias - fraction_bits);
    return sign * ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
}

static void every_half_value(void **state)
{
    (void)state;
    for (int dtype = PLORA_BF16; dtype <= PLORA_F16; ++dtype)
        for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
            const uint16_t half = (uint16_t)bits;
            const float value = from_half(dtype, half);
            const double want = decode(dtype, half);
            const uint16_t back = to_half(dtype, value);
            if (isnan(want)) {
                CHECK(isnan(value), "%s 0x%04x is a NaN, read as %g", plora__dtype_name(dtype), bits, (double)value);
                CHECK(isnan(decode(dtype, back)), "%s 0x%04x: a NaN became 0x%04x", plora__dtype_name(dtype), bits,
                      back);
                CHECK((back & 0x8000) == (half & 0x8000), "%s 0x%04x: a NaN lost its sign", plora__dtype_name(dtype),
                      bits);
            } else {
                CHECK((double)value == want && !signbit(value) == !signbit(want), "%s 0x%04x is %.9g, read as %.9g",
                      plora__dtype_name(dtype), bits, want, (double)value);
                CHECK(back == half, "%s 0x%04x came back as 0x%04x", plora__dtype_name(dtype), bits, back);
            }
        }
}

/* The halves are ordered as their bits, so the nearest one of a float is found among neighbours; ties have an even last bit. */
static void check_rounding(int32_t dtype, float value)
{
    const uint16_t got = to_half(dtype, value);
    if (isnan(value)) {
        CHECK(isnan(decode(dtype, got)), "a NaN became %s 0x%04x", plora__dtype_name(dtype), got);
        return;
    }
    CHECK((got >> 15) == (signbit(value) != 0), "%.9g became %s 0x%04x", (double)value, plora__dtype_name(dtype), got);
    const uint16_t infinity = dtype == PLORA_BF16 ? 0x7f80 : 0x7c00;
    const uint16_t magnitude = got & 0x7fff;
    CHECK(magnitude <= infinity, "%.9g became a NaN", (double)value);
    if (isinf(value)) {
        CHECK(magnitude == infinity, "infinity became %s 0x%04x", plora__dtype_name(dtype), got);
        return;
    }
    /* Infinity stands for the number that would follow the largest finite one. */
    const double wanted = fabs((double)value);
    const double beyond = 2.0 * decode(dtype, infinity - 1) - decode(dtype, infinity - 2);
    const double here = magnitude == infinity ? beyond : decode(dtype, magnitude);
    const double error = fabs(wanted - here);
    if (magnitude > 0) {
        const double below = fabs(wanted - decode(dtype, magnitude - 1));
        CHECK(error < below || (error == below && magnitude % 2 == 0), "%a became %s 0x%04x, which is too large",
              (double)value, plora__dtype_name(dtype), got);
    }
    if (magnitude < infinity) {
        const double next = magnitude + 1 == infinity ? beyond : decode(dtype, magnitude + 1);
        const double above = fabs(next - wanted);
        CHECK(error < above || (error == above && magnitude % 2 == 0), "%a became %s 0x%04x, which is too small",
              (double)value, plora__dtype_name(dtype), got);
    }
}

static void check_float(uint32_t bits)
{
    const float value = plora__float_from_bits(bits);
    check_rounding(PLORA_BF16, value);
    check_rounding(PLORA_F16, value);
#if defined(__FLT16_MAX__) && !defined(__clang__)
    if (!isnan(value)) {
        __extension__ const _Float16 compiled = (_Float16)value;
        uint16_t want;
        memcpy(&want, &compiled, sizeof want);
        CHECK(plora__float_to_f16(value) == want, "%a became 0x%04x, the compiler's _Float16 is 0x%04x", (double)value,
              plora__float_to_f16(value), want);
    }
#endif
}

/* Around every representable value and every midpoint between two: the last place where rounding can go wrong. */
static void rounding_at_boundaries(void **state)
{
    (void)state;
    for (int dtype = PLORA_BF16; dtype <= PLORA_F16; ++dtype)
        for (uint32_t half = 0; half < (dtype == PLORA_BF16 ? 0x7f80u : 0x7c00u); half += check_quick() ? 7 : 1) {
            const uint32_t exact = plora__float_bits(from_half(dtype, (uint16_t)half));
            const float middle = (float)((decode(dtype, (uint16_t)half) + decode(dtype, (uint16_t)(half + 1))) / 2);
            const uint32_t halfway = plora__float_bits(isinf(middle) ? 65520.0f : middle);
            for (int step = -1; step <= 1; ++step)
                for (uint32_t sign = 0; sign < 2; ++sign) {
                    if (exact > 0 || step >= 0) check_float((exact + (uint32_t)step) | sign << 31);
                    check_float((halfway + (uint32_t)step) | sign << 31);
                }
        }
    check_float(0x7f7fffffu); /* the largest float */
    check_float(0x7f7f8000u); /* a tie between the largest bf16 and infinity */
    check_float(0x7f7f7fffu);
    check_float(0x7f800000u);
    check_float(0x7f800001u); /* a signalling NaN whose upper half alone would be infinity */
    check_float(0xffffffffu);
    check_float(0x00000001u);
    check_float(0x33000000u); /* 2^-25: a tie between 0 and the smallest f16 */
    check_float(0x33000001u);
}

static void rounding_of_random_floats(void **state)
{
    (void)state;
    check_reseed(1);
    for (int i = 0; i < (check_quick() ? 20000 : 2000000); ++i) {
        check_float((uint32_t)check_next());
        check_float(plora__float_bits((float)ldexp(check_uniform(), (int)check_integer(-30, 17)))); /* f16's range */
    }
}

static void load_and_store(void **state)
{
    (void)state;
    check_reseed(2);
    for (int dtype = PLORA_F32; dtype <= PLORA_F16; ++dtype) {
        struct check_matrix matrix = check_matrix_new(3, 5, 7, dtype);
        for (int64_t i = 0; i < 3; ++i)
            for (int64_t j = 0; j < 5; ++j) {
                const float value = (float)check_uniform();
                plora__store(matrix.m.data, i * 7 + j, dtype, value);
                const double want = dtype == PLORA_F32 ? (double)value : decode(dtype, to_half(dtype, value));
                CHECK(check_element(&matrix.m, i, j) == want, "%s (%lld,%lld)", plora__dtype_name(dtype), (long long)i,
                      (long long)j);
            }
        check_matrix_guards(&matrix, plora__dtype_name(dtype));
        check_matrix_free(&matrix);
    }
}

static void names_and_sizes(void **state)
{
    (void)state;
    assert_int_equal(plora__dtype_size(PLORA_F32), sizeof(float));
    assert_int_equal(plora__dtype_size(PLORA_BF16), 2);
    assert_int_equal(plora__dtype_size(PLORA_F16), 2);
    assert_string_equal(plora__dtype_name(PLORA_F32), "F32");
    assert_string_equal(plora__dtype_name(PLORA_BF16), "BF16");
    assert_string_equal(plora__dtype_name(PLORA_F16), "F16");
    assert_string_equal(plora__dtype_name(17), "unknown dtype");
    assert_true(plora__dtype_known(PLORA_F16));
    assert_false(plora__dtype_known(-1));
    assert_false(plora__dtype_known(3));
}

int main(void)
{
    check_begin("test_dtype");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_half_value),          cmocka_unit_test(rounding_at_boundaries),
        cmocka_unit_test(rounding_of_random_floats), cmocka_unit_test(load_and_store),
        cmocka_unit_test(names_and_sizes),
    };
    return cmocka_run_group_tests_name("dtype", tests, NULL, NULL);
}
