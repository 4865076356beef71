/* test_quantise.c: int8 and NF4 codes against naive ones and bitsandbytes' (vectors_quantised.h): plora_quantise(), and the kernels of every
 * instruction level of the CPU. */
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
    static const int64_t shapes[][2] = {{1, 1},    {3, 5},    {7, 65},    {2, 64},
                                        {13, 127}, {5, 1031}, {3, 17001}, {1031, 1031}};
    for (int k = 0; k < CHECK_COUNT(kinds); ++k)
        for (int s = 0; s < CHECK_COUNT(shapes) - (device_is_cuda() || check_quick()); ++s) {
            const int64_t rows = shapes[s][0], columns = shapes[s][1];
            const int32_t dtype = s == 3 ? PLORA_BF16 : s == 4 ? PLORA_F16 : PLORA_F32;
            struct arrays *a = arrays_new(&kinds[k], rows, columns);
            struct check_matrix values = check_matrix_new(rows, columns, columns + check_integer(0, 3), dtype);
            check_matrix_random(&values, 0.1);
            if (s == 5) /* zeros, and numbers whose scale is subnormal */
                for (int64_t j = 0; j < 600; ++j)
                    plora__store(values.m.data, j, dtype, j < 300 ? 0.0f : (float)check_uniform() * 0x1p-146f);
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

/* Every instruction level gives the bits of the first. */
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
            for (int level = 0; level <= cpu_isa(); ++level) {
                const struct plora__quantise_args args = {
                    .values = dense(values, rows, columns, PLORA_F32),
                    .format = kinds[k].format,
                    .offset = a->w.offset,
                    .group = kinds[k].group == 0 ? columns : kinds[k].group,
                    .map = a->w.map,
                    .count = rows * columns,
                    .codes = a->w.codes,
                    .scales = a->w.scales,
                    .nested_codes = a->w.nested_codes,
                };
                memset(a->w.codes, CHECK_POISON, a->codes_bytes);
                cpu_quantise_with(level, (int)check_integer(1, 3), &args);
                check_codes(a, values, describe(&kinds[k], rows, columns));
            }
            free(values);
            arrays_free(a);
        }
}

int main(void)
{
    check_begin("test_quantise");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bitsandbytes),
        cmocka_unit_test(test_quantise),
        cmocka_unit_test(test_quantise_levels),
    };
    return cmocka_run_group_tests_name("quantise", tests, NULL, NULL);
}
