/* test_convert.c: every instruction level's conversion kernels against the scalar definitions of dtype.h and philox.h, bit for bit,
 * over lengths around the vector sizes, dropout that starts inside a Philox block, and poisoned ends. */
#include "check.h"
#include "cpu/convert_kernels.h"
#include "cpu/isa.h"
#include "dtype.h"

enum { LENGTH_MAX = 333, GUARD = 64 };

static const int64_t lengths[] = {0, 1, 3, 15, 16, 17, 31, 64, 65, 127, LENGTH_MAX};

static float random_float(void)
{
    const float value = (float)(check_uniform() * 100.0);
    switch (check_integer(0, 20)) {
    case 0: return value * 0x1p-130f;
    case 1: return INFINITY;
    case 2: return NAN;
    case 3: return value * 0x1p+120f;
    default: return value;
    }
}

static int same_float(float a, float b)
{
    return plora__float_bits(a) == plora__float_bits(b) || (isnan(a) && isnan(b));
}

static void conversions(void **state)
{
    (void)state;
    check_reseed(1);
    for (int isa = 0; isa <= cpu_isa(); ++isa)
        for (int length = 0; length < CHECK_COUNT(lengths); ++length) {
            const struct cpu_convert_kernels *kernels = cpu_convert_kernels(isa);
            const int64_t count = lengths[length];
            float in[LENGTH_MAX], out[LENGTH_MAX + GUARD], scaled[LENGTH_MAX];
            uint16_t half[LENGTH_MAX], rounded[LENGTH_MAX + GUARD];
            for (int64_t i = 0; i < count; ++i) {
                in[i] = scaled[i] = random_float();
                half[i] = (uint16_t)check_integer(0, 65535);
            }
            for (int32_t dtype = PLORA_F32; dtype <= PLORA_F16; ++dtype) {
                const void *source = dtype == PLORA_F32 ? (const void *)in : half;
                memset(out, CHECK_POISON, sizeof out);
                kernels->widen(out, source, dtype, count);
                for (int64_t i = 0; i < count; ++i)
                    assert_true(same_float(out[i], plora__load(source, i, dtype)));
                for (int64_t i = 0; i < GUARD; ++i)
                    assert_int_equal(((unsigned char *)(out + count))[i], CHECK_POISON);
            }
            memset(rounded, CHECK_POISON, sizeof rounded);
            kernels->narrow(rounded, in, count);
            for (int64_t i = 0; i < count; ++i)
                assert_int_equal(rounded[i], plora__float_to_bf16(in[i]));
            assert_int_equal(((unsigned char *)(rounded + count))[0], CHECK_POISON);
            kernels->scale(scaled, rounded, 0.37f, count);
            for (int64_t i = 0; i < count; ++i) {
                assert_true(same_float(scaled[i], in[i] * 0.37f));
                assert_int_equal(rounded[i], plora__float_to_bf16(scaled[i]));
            }
        }
}

static void draws(void **state)
{
    (void)state;
    check_reseed(2);
    for (int isa = 0; isa <= cpu_isa(); ++isa)
        for (int round = 0; round < 50; ++round) {
            uint32_t words[4 * CPU_DRAWS];
            const uint64_t seed = (uint64_t)check_integer(0, INT64_MAX - 1),
                           step = (uint64_t)check_integer(0, INT32_MAX);
            const uint64_t first =
                (uint64_t)check_integer(0, 5) + (round % 2 ? UINT32_MAX - 3u : 0); /* past 2^32 too */
            const int32_t layer = (int32_t)check_integer(0, 1000);
            cpu_convert_kernels(isa)->draw(words, seed, PLORA__PURPOSE_INIT, step, layer, first);
            for (int j = 0; j < CPU_DRAWS; ++j) {
                const struct plora__words wanted =
                    plora__draw(seed, PLORA__PURPOSE_INIT, step, layer, first + (uint64_t)j);
                assert_memory_equal(words + 4 * j, wanted.word, sizeof wanted.word);
            }
            const float scale = (float)check_uniform();
            float values[4 * CPU_DRAWS];
            cpu_convert_kernels(isa)->symmetric(values, words, scale, 4 * CPU_DRAWS);
            for (int i = 0; i < 4 * CPU_DRAWS; ++i)
                assert_true(same_float(values[i], plora__symmetric(words[i]) * scale));
        }
}

static float keep_factor(const struct plora__dropout *dropout, uint64_t element)
{
    const struct plora__words words =
        plora__draw(dropout->seed, PLORA__PURPOSE_DROPOUT, dropout->step, dropout->layer, element / 4);
    const int kept = words.word[element % 4] >= plora__dropout_threshold(dropout->probability);
    return kept ? (float)(1.0 / (1.0 - dropout->probability)) : 0.0f;
}

static void dropout(void **state)
{
    (void)state;
    check_reseed(3);
    for (int isa = 0; isa <= cpu_isa(); ++isa)
        for (int length = 0; length < CHECK_COUNT(lengths); ++length)
            for (int32_t dtype = PLORA_F32; dtype <= PLORA_BF16; ++dtype) {
                const struct cpu_convert_kernels *kernels = cpu_convert_kernels(isa);
                const int64_t count = lengths[length];
                const uint64_t first = (uint64_t)check_integer(0, 1000);
                const struct plora__dropout rule = {
                    .probability = 0.3, .seed = (uint64_t)check_integer(0, INT64_MAX - 1), .step = 7, .layer = 3};
                float in[LENGTH_MAX], delta[LENGTH_MAX], out[LENGTH_MAX + GUARD];
                for (int64_t i = 0; i < count; ++i) {
                    plora__store(in, i, dtype, (float)check_uniform());
                    delta[i] = (float)check_uniform();
                }
                memset(out, CHECK_POISON, sizeof out);
                kernels->dropout(out, in, dtype, &rule, first, count);
                for (int64_t i = 0; i < count; ++i) {
                    float wanted[1];
                    plora__store(wanted, 0, dtype, plora__load(in, i, dtype) * keep_factor(&rule, first + (uint64_t)i));
                    assert_true(same_float(plora__load(out, i, dtype), plora__load(wanted, 0, dtype)));
                }
                assert_int_equal(((unsigned char *)out)[(size_t)count * plora__dtype_size(dtype)], CHECK_POISON);
                memcpy(out, in, sizeof in);
                kernels->dropout_add(out, dtype, delta, &rule, first, count);
                for (int64_t i = 0; i < count; ++i) { /* with or without a fused multiply-add: one rounding apart */
                    const double wanted = (double)plora__load(in, i, dtype) +
                                          (double)delta[i] * (double)keep_factor(&rule, first + (uint64_t)i);
                    const double unit = dtype == PLORA_F32 ? 0x1p-23 : 0x1p-8;
                    CHECK_CLOSE(plora__load(out, i, dtype), wanted, unit * 2.5, "element %lld, level %d", (long long)i,
                                isa);
                }
            }
}

static void additions(void **state)
{
    (void)state;
    check_reseed(4);
    for (int isa = 0; isa <= cpu_isa(); ++isa) {
        enum { ROWS = 5, COLUMNS = 37, BEGIN = 3, END = 29 };
        float in[ROWS * COLUMNS], out[ROWS * COLUMNS], before[ROWS * COLUMNS];
        for (int i = 0; i < ROWS * COLUMNS; ++i) {
            in[i] = (float)check_uniform();
            out[i] = before[i] = (float)check_uniform();
        }
        cpu_convert_kernels(isa)->transpose_add(out, in, ROWS, COLUMNS, BEGIN, END);
        for (int j = 0; j < COLUMNS; ++j)
            for (int i = 0; i < ROWS; ++i) {
                const float added = j >= BEGIN && j < END ? in[i * COLUMNS + j] : 0.0f;
                assert_true(same_float(out[j * ROWS + i], before[j * ROWS + i] + added));
            }
        memcpy(out, before, sizeof out);
        cpu_convert_kernels(isa)->add(out, in, ROWS * COLUMNS - 1);
        for (int i = 0; i < ROWS * COLUMNS; ++i)
            assert_true(same_float(out[i], i < ROWS * COLUMNS - 1 ? before[i] + in[i] : before[i]));
    }
}

int main(void)
{
    check_begin("test_convert");
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(conversions),
        cmocka_unit_test(draws),
        cmocka_unit_test(dropout),
        cmocka_unit_test(additions),
    };
    return cmocka_run_group_tests_name("convert", tests, NULL, NULL);
}
