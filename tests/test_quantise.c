/* test_quantise.c: int8 and NF4 codes against naive ones and bitsandbytes' (vectors_quantised.h), and what they hold: plora_quantise(),
 * plora_dequantise(), and the kernels of every instruction level of the CPU. */
#include "cpu/isa.h"
#include "cpu/quantise_kernels.h"
#include "quantised_fixture.h"
#include "vectors_quantised.h"

static void test_bitsandbytes(void **state)
{
    (void)state;
    plora_context *context = check_context(NULL, 0, 0);
    float map[256];
    CHECK_OK(plora_quantised_map(map));
    for (int i = 1; i < 256; ++i) /* its CPU code overwrites the first with -1 */
        CHECK(map[i] == bitsandbytes_map[i], "map[%d] is %.9g, want %.9g", i, (double)map[i],
              (double)bitsandbytes_map[i]);
    for (int v = 0; v < CHECK_COUNT(quantised_vectors); ++v)
        for (int nested = 0; nested < 2; ++nested) {
            const struct quantised_vector *vector = &quantised_vectors[v];
            const struct kind kind = {PLORA_QUANTISED_NF4, 0, nested};
            const int64_t count = vector->rows * vector->columns;
            struct arrays *a = arrays_new(&kind, vector->rows, vector->columns);
            float *values = malloc((size_t)count * sizeof *values);
            CHECK(values != NULL, "the test itself is out of memory");
            for (int64_t i = 0; i < count; ++i)
                values[i] = (float)vector->values[i] * 0x1p-20f;
            if (nested) {
                memcpy((void *)(uintptr_t)a->w.map, bitsandbytes_map, sizeof bitsandbytes_map);
                device_refresh(a->w.map);
            }
            const plora_matrix matrix = dense(values, vector->rows, vector->columns, PLORA_F32);
            plora_quantised w = on_device(a);
            CHECK_OK(DEVICE(plora_quantise(context, &matrix, &w, 0, NULL)));
            if (nested) {
                CHECK_CLOSE(w.offset, *vector->offset, 1e-6 * fabs((double)*vector->offset), "offset of %s",
                            vector->name);
                w.offset = *vector->offset;
                CHECK_OK(DEVICE(plora_quantise(context, &matrix, &w, PLORA_QUANTISE_KEEP_OFFSET, NULL)));
                CHECK(w.offset == *vector->offset, "the offset was not kept");
            }
            for (size_t i = 0; i < a->codes_bytes; ++i)
                CHECK(((uint8_t *)a->w.codes)[i] == vector->codes[i], "%s: code %zu is 0x%02x, want 0x%02x",
                      vector->name, i, ((uint8_t *)a->w.codes)[i], vector->codes[i]);
            for (size_t i = 0; nested && i < a->nested_bytes; ++i)
                CHECK(a->w.nested_codes[i] == vector->nested[i], "%s: nested code %zu is %d, want %d", vector->name, i,
                      a->w.nested_codes[i], vector->nested[i]);
            const float *scales = nested ? vector->scales : vector->absmax;
            for (size_t i = 0; i < a->scales_bytes / sizeof(float); ++i)
                CHECK(a->w.scales[i] == scales[i], "%s: scale %zu is %.9g, want %.9g", vector->name, i,
                      (double)a->w.scales[i], (double)scales[i]);
            free(values);
            arrays_free(a);
        }
    plora_context_destroy(context);
}

/* Shapes that are no multiple of anything, dtypes, strides, more elements than one run; special values. */
static void test_quantise(void **state)
{
    (void)state;
    check_reseed(1);
    plora_context *context = check_context(NULL, 0, 0);
    static const int64_t shapes[][2] = {{1, 1},    {3, 5},     {7, 65},      {2, 64},     {13, 127},
                                        {5, 1031}, {3, 17001}, {1031, 1031}, {67, 17001}, {2, 1100000}};
    for (int k = 0; k < CHECK_COUNT(kinds); ++k)
        for (int s = 0; s < CHECK_COUNT(shapes) - (check_quick() ? 3 : 0); ++s) {
            const int64_t rows = shapes[s][0], columns = shapes[s][1];
            const int32_t dtype = s == 3 ? PLORA_BF16 : s == 4 ? PLORA_F16 : PLORA_F32;
            struct arrays *a = arrays_new(&kinds[k], rows, columns);
            struct check_matrix values = check_matrix_new(rows, columns, columns + check_integer(0, 3), dtype);
            check_matrix_random(&values, 0.1);
            if (s == 5) /* zeros, and numbers whose scale is subnormal */
                for (int64_t j = 0; j < 600; ++j)
                    plora__store(values.m.data, j, dtype, j < 300 ? 0.0f : (float)check_uniform() * 0x1p-141f);
            device_refresh(values.memory);
            const plora_matrix from = check_integer(0, 1) ? device_matrix(values.m) : values.m;
            plora_quantised w = on_device(a);
            CHECK_OK(DEVICE(plora_quantise(context, &from, &w, 0, NULL)));
            a->w.offset = w.offset;
            float *wide = malloc((size_t)(rows * columns) * sizeof *wide);
            CHECK(wide != NULL, "the test itself is out of memory");
            for (int64_t i = 0; i < rows * columns; ++i)
                wide[i] = (float)check_element(&values.m, i / columns, i % columns);
            check_codes(a, wide, describe(&kinds[k], rows, columns));
            free(wide);
            check_matrix_free(&values);
            arrays_free(a);
        }
    plora_context_destroy(context);
}

/* Every instruction level gives the codes of `values`. */
static void check_levels(struct arrays *a, float *values, const char *text)
{
    for (int level = 0; level <= cpu_isa(); ++level) {
        const struct plora__quantise_args args = {
            .values = dense(values, a->w.rows, a->w.columns, PLORA_F32),
            .format = a->w.format,
            .offset = a->w.offset,
            .group = a->w.group == 0 ? a->w.columns : a->w.group,
            .map = a->w.map,
            .count = a->w.rows * a->w.columns,
            .codes = a->w.codes,
            .scales = a->w.scales,
            .nested_codes = a->w.nested_codes,
        };
        memset(a->w.codes, CHECK_POISON, a->codes_bytes);
        cpu_quantise_with(level, (int)check_integer(1, 3), &args);
        check_codes(a, values, text);
    }
}

static void test_quantise_levels(void **state)
{
    (void)state;
    check_reseed(2);
    for (int k = 0; k < CHECK_COUNT(kinds) && !device_is_cuda(); ++k)
        for (int s = 0; s < 20; ++s) {
            const int64_t rows = check_integer(1, 40), columns = check_integer(1, 900);
            struct arrays *a = arrays_new(&kinds[k], rows, columns);
            float *values = random_values(rows * columns, 1.0);
            a->w.offset = 0.3f;
            check_levels(a, values, describe(&kinds[k], rows, columns));
            free(values);
            arrays_free(a);
        }
}

/* Halfway between two codes, and beside that. */
static void test_quantise_ties(void **state)
{
    (void)state;
    if (device_is_cuda()) return; /* codes are made by the CPU's kernels */
    enum { BLOCKS = 300, BLOCK = PLORA__NF4_BLOCK };
    const struct kind int8 = {PLORA_QUANTISED_INT8, 0, 0}, nf4 = {PLORA_QUANTISED_NF4, 0, 0};
    const struct kind nested = {PLORA_QUANTISED_NF4, 0, 1};
    static const float middles[15] = {PLORA__NF4_MIDDLES};
    static float values[BLOCKS * BLOCK];
    for (int i = 0; i < 254; ++i)
        values[i] = (float)i - 126.5f;
    values[254] = 127.0f; /* the scale is 1 */
    struct arrays *a = arrays_new(&int8, 1, 255);
    check_levels(a, values, "n + 1/2");
    arrays_free(a);

    for (int i = 0; i < 15; ++i) {
        values[3 * i] = middles[i];
        values[3 * i + 1] = nextafterf(middles[i], 2.0f);
        values[3 * i + 2] = nextafterf(middles[i], -2.0f);
    }
    values[45] = 1.0f;
    a = arrays_new(&nf4, 1, 46);
    check_levels(a, values, "middles of NF4");
    arrays_free(a);

    a = arrays_new(&nested, BLOCKS, BLOCK); /* absmax halfway in a map of 128ths, of scale 1 */
    for (int i = 0; i < 256; ++i)
        ((float *)(uintptr_t)a->w.map)[i] = a->map[i] = (float)(i - 128) / 128.0f;
    memset(values, 0, sizeof values);
    for (int b = 0; b < BLOCKS; ++b)
        values[b * BLOCK + b % BLOCK] = b % 128 == 127 ? 1.0f : ((float)(b % 128) + 0.5f) / 128.0f;
    check_levels(a, values, "middles of the map");
    arrays_free(a);
}

/* An error writes nothing. */
static void test_quantise_errors(void **state)
{
    (void)state;
    check_reseed(3);
    plora_context *context = check_context(NULL, 0, 0);
    const struct kind kind = {PLORA_QUANTISED_NF4, 0, 1};
    enum { ROWS = 1031, COLUMNS = 1031 }; /* two runs */
    struct arrays *a = arrays_new(&kind, ROWS, COLUMNS);
    float *values = random_values((int64_t)ROWS * COLUMNS, 0.1);
    const plora_matrix good = dense(values, ROWS, COLUMNS, PLORA_F32);
    plora_quantised w = on_device(a);
    w.offset = 0.25f;
#define REFUSED(change, status, ...)                                                                                   \
    do {                                                                                                               \
        plora_matrix from = good;                                                                                      \
        plora_quantised to = w;                                                                                        \
        change;                                                                                                        \
        CHECK_FAILS(DEVICE(plora_quantise(context, &from, &to, 0, NULL)), status, __VA_ARGS__);                        \
        CHECK(to.offset == 0.25f, "a refused call changed the offset");                                                \
    } while (0)
    REFUSED(from.rows--, PLORA_ERROR_SHAPE, "[1030,1031]", "[1031,1031]");
    REFUSED(from.stride--, PLORA_ERROR_SHAPE, "stride 1030");
    REFUSED(from.dtype = 7, PLORA_ERROR_INVALID_ARGUMENT, "dtype 7");
    REFUSED(from.data = NULL, PLORA_ERROR_INVALID_ARGUMENT, "values");
    REFUSED(to.scales = NULL, PLORA_ERROR_INVALID_ARGUMENT, "scales is NULL");
    REFUSED(to.format = 2, PLORA_ERROR_INVALID_ARGUMENT, "format 2");
    CHECK_FAILS(plora_quantise(context, &good, &w, 2, NULL), PLORA_ERROR_INVALID_ARGUMENT, "0x2");
    CHECK_FAILS(plora_quantise(context, &good, NULL, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "weight is NULL");
    values[(int64_t)ROWS * COLUMNS - 2] = -INFINITY;
    REFUSED((void)0, PLORA_ERROR_NON_FINITE, "(1030,1029)", "-inf");
    values[5] = NAN;
    REFUSED((void)0, PLORA_ERROR_NON_FINITE, "(0,5)", "nan");
    for (size_t i = 0; i < a->codes_bytes; ++i)
        CHECK(((uint8_t *)a->w.codes)[i] == CHECK_POISON, "a refused call wrote code %zu", i);
    for (size_t i = 0; i < a->nested_bytes; ++i)
        CHECK(a->w.nested_codes[i] == CHECK_POISON, "a refused call wrote nested code %zu", i);
    free(values);
    arrays_free(a);
    plora_context_destroy(context);
}

/* ----------------------------------------------------------------------------------------------------- plora_dequantise */

static void test_dequantise(void **state)
{
    (void)state;
    check_reseed(4);
    plora_context *context = check_context(NULL, 0, 0);
    static const int64_t shapes[][2] = {{1, 1}, {7, 65}, {33, 1031}};
    for (int k = 0; k < CHECK_COUNT(kinds); ++k)
        for (int s = 0; s < CHECK_COUNT(shapes); ++s)
            for (int32_t dtype = PLORA_F32; dtype <= PLORA_BF16; ++dtype) {
                const int64_t rows = shapes[s][0], columns = shapes[s][1];
                struct arrays *a = arrays_new(&kinds[k], rows, columns);
                float *values = random_values(rows * columns, 0.1);
                const plora_matrix from = dense(values, rows, columns, PLORA_F32);
                plora_quantised w = on_device(a);
                CHECK_OK(DEVICE(plora_quantise(context, &from, &w, 0, NULL)));
                a->w.offset = w.offset;
                struct check_matrix out = check_matrix_new(rows, columns, columns + check_integer(0, 3), dtype);
                plora_matrix to = device_matrix(out.m);
                CHECK_OK(DEVICE(plora_dequantise(context, &w, &to, NULL)));
                for (int64_t e = 0; e < rows * columns; ++e) {
                    const float held = value_of(a, e);
                    const double want = dtype == PLORA_F32 ? held : plora__bf16_to_float(plora__float_to_bf16(held));
                    const double got = check_element(&out.m, e / columns, e % columns);
                    CHECK(got == want, "W[%lld] is %.9g, want %.9g: %s", (long long)e, got, want,
                          describe(&kinds[k], rows, columns));
                }
                check_matrix_guards(&out, describe(&kinds[k], rows, columns));
                to.columns--;
                CHECK_FAILS(plora_dequantise(context, &w, &to, NULL), PLORA_ERROR_SHAPE, "out is [");
                to = device_matrix(out.m);
                to.dtype = PLORA_F16;
                CHECK_FAILS(plora_dequantise(context, &w, &to, NULL), PLORA_ERROR_UNSUPPORTED, "F16");
                w.codes = NULL;
                CHECK_FAILS(plora_dequantise(context, &w, &to, NULL), PLORA_ERROR_INVALID_ARGUMENT, "codes is NULL");
                CHECK_FAILS(plora_dequantise(context, NULL, &to, NULL), PLORA_ERROR_INVALID_ARGUMENT, "weight is NULL");
                check_matrix_free(&out);
                free(values);
                arrays_free(a);
            }
    plora_context_destroy(context);
}

int main(void)
{
    check_begin("test_quantise");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bitsandbytes),    cmocka_unit_test(test_quantise),
        cmocka_unit_test(test_quantise_levels), cmocka_unit_test(test_quantise_ties),
        cmocka_unit_test(test_quantise_errors), cmocka_unit_test(test_dequantise),
    };
    return cmocka_run_group_tests_name("quantise", tests, NULL, NULL);
}
