/* quantised_fixture.h: naive quantisation, and the arrays of a quantised weight, in host memory with twins on the device under test. */
#ifndef PLORA_TESTS_QUANTISED_FIXTURE_H
#define PLORA_TESTS_QUANTISED_FIXTURE_H

#include "check.h"
#include "nf4.h"
#include "reference.h"

/* -------------------------------------------------------------------------------------------------------- naive versions */

static CHECK_UNUSED float naive_absmax(const float *values, int64_t count)
{
    float largest = 0;
    for (int64_t i = 0; i < count; ++i)
        if (fabsf(values[i]) > largest) largest = fabsf(values[i]);
    return largest;
}

static CHECK_UNUSED int naive_nearest(const float *table, int count, float value)
{
    int best = 0;
    for (int i = 1; i < count; ++i)
        if (fabs((double)value - table[i]) < fabs((double)value - table[best])) best = i;
    return best;
}

/* The arrays of a quantised weight, in host memory with twins. */
struct arrays {
    plora_quantised w;
    size_t codes_bytes, scales_bytes, nested_bytes;
    float map[256];
};

static CHECK_UNUSED void naive_nf4(const struct arrays *a, const float *values, uint8_t *codes, float *scales,
                                   uint8_t *nested)
{
    static const float table[16] = {PLORA__NF4_VALUES};
    const int64_t count = a->w.rows * a->w.columns, blocks = (count + 63) / 64;
    float *absmax = calloc((size_t)blocks, sizeof *absmax);
    memset(codes, 0, a->codes_bytes);
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t size = count - b * 64 < 64 ? count - b * 64 : 64;
        absmax[b] = naive_absmax(values + b * 64, size);
        for (int64_t i = b * 64; i < b * 64 + size; ++i) {
            float scaled = values[i] * (1.0f / absmax[b]); /* infinite where absmax is subnormal */
            if (scaled > 1.0f) scaled = 1.0f;
            if (scaled < -1.0f) scaled = -1.0f;
            const int code = absmax[b] == 0.0f ? 0 : naive_nearest(table, 16, scaled);
            codes[i / 2] |= (uint8_t)(i % 2 ? code : code << 4);
        }
    }
    for (int64_t b = 0; b < blocks; ++b) {
        if (nested == NULL) {
            scales[b] = absmax[b];
            continue;
        }
        if (b % 256 == 0) {
            float differences[256];
            const int64_t size = blocks - b < 256 ? blocks - b : 256;
            for (int64_t i = 0; i < size; ++i)
                differences[i] = absmax[b + i] - a->w.offset;
            scales[b / 256] = naive_absmax(differences, size);
        }
        const float scale = scales[b / 256];
        nested[b] = scale == 0.0f ? 0 : (uint8_t)naive_nearest(a->map, 256, (absmax[b] - a->w.offset) * (1.0f / scale));
    }
    free(absmax);
}

static CHECK_UNUSED void naive_int8(const struct arrays *a, const float *values, int8_t *codes, float *scales)
{
    const int64_t group = a->w.group == 0 ? a->w.columns : a->w.group, columns = a->w.columns;
    for (int64_t i = 0; i < a->w.rows; ++i)
        for (int64_t g = 0; g * group < columns; ++g) {
            const int64_t first = i * columns + g * group, left = columns - g * group;
            const int64_t size = left < group ? left : group;
            const float scale = naive_absmax(values + first, size) / 127.0f;
            *scales++ = scale;
            for (int64_t j = first; j < first + size; ++j)
                codes[j] = (int8_t)(scale == 0.0f ? 0 : fmaxf(-127, fminf(127, rintf(values[j] / scale))));
        }
}

/* ---------------------------------------------------------------------------------------------------------------- setting */

struct kind {
    int32_t format;
    int64_t group;
    int nested;
};

static const struct kind kinds[] CHECK_UNUSED = {{PLORA_QUANTISED_INT8, 0, 0},  {PLORA_QUANTISED_INT8, 1, 0},
                                                 {PLORA_QUANTISED_INT8, 2, 0},  {PLORA_QUANTISED_INT8, 3, 0},
                                                 {PLORA_QUANTISED_INT8, 64, 0}, {PLORA_QUANTISED_NF4, 0, 0},
                                                 {PLORA_QUANTISED_NF4, 0, 1}};

static CHECK_UNUSED void *twin(size_t bytes)
{
    void *memory = malloc(bytes > 0 ? bytes : 1);
    CHECK(memory != NULL, "the test itself is out of memory");
    memset(memory, CHECK_POISON, bytes);
    device_twin(memory, bytes);
    return memory;
}

static CHECK_UNUSED struct arrays *arrays_new(const struct kind *kind, int64_t rows, int64_t columns)
{
    struct arrays *a = calloc(1, sizeof *a);
    CHECK(a != NULL, "the test itself is out of memory");
    a->w = (plora_quantised){.rows = rows, .columns = columns, .group = kind->group, .format = kind->format};
    CHECK_OK(plora_quantised_size(&a->w, kind->nested, &a->codes_bytes, &a->scales_bytes, &a->nested_bytes));
    CHECK_OK(plora_quantised_map(a->map));
    a->w.codes = twin(a->codes_bytes);
    a->w.scales = twin(a->scales_bytes);
    if (!kind->nested) return a;
    a->w.nested_codes = twin(a->nested_bytes);
    float *map = twin(sizeof a->map);
    memcpy(map, a->map, sizeof a->map);
    device_refresh(map);
    a->w.map = map;
    return a;
}

static CHECK_UNUSED void arrays_free(struct arrays *a)
{
    void *const all[] = {a->w.codes, a->w.scales, a->w.nested_codes, (void *)(uintptr_t)a->w.map};
    for (int i = 0; i < CHECK_COUNT(all); ++i) {
        if (all[i] != NULL) device_forget(all[i]);
        free(all[i]);
    }
    free(a);
}

static CHECK_UNUSED plora_quantised on_device(const struct arrays *a)
{
    plora_quantised w = a->w;
    w.codes = device_of(w.codes);
    w.scales = device_of(w.scales);
    w.nested_codes = w.nested_codes == NULL ? NULL : device_of(w.nested_codes);
    w.map = w.map == NULL ? NULL : device_of(w.map);
    return w;
}

static CHECK_UNUSED float value_of(const struct arrays *a, int64_t e)
{
    const int64_t columns = a->w.columns, group = a->w.group == 0 ? columns : a->w.group;
    if (a->w.format == PLORA_QUANTISED_INT8)
        return reference_int8(a->w.codes, a->w.scales, columns, group, e / columns, e % columns);
    return reference_nf4(a->w.codes, a->w.scales, a->w.nested_codes, a->w.map, a->w.offset, columns, e / columns,
                         e % columns);
}

static CHECK_UNUSED float *random_values(int64_t count, double range)
{
    float *values = malloc((size_t)count * sizeof *values);
    CHECK(values != NULL, "the test itself is out of memory");
    for (int64_t i = 0; i < count; ++i)
        values[i] = (float)(range * check_uniform() * check_uniform());
    return values;
}

static CHECK_UNUSED plora_matrix dense(void *data, int64_t rows, int64_t columns, int32_t dtype)
{
    return (plora_matrix){data, rows, columns, columns, dtype, 0};
}

/* The codes are those of `values`. */
static CHECK_UNUSED void check_codes(const struct arrays *a, const float *values, const char *text)
{
    uint8_t *codes = calloc(1, a->codes_bytes);
    uint8_t *nested = a->w.nested_codes != NULL ? calloc(1, a->nested_bytes) : NULL;
    float *scales = calloc(1, a->scales_bytes);
    CHECK(codes != NULL && scales != NULL, "the test itself is out of memory");
    if (a->w.format == PLORA_QUANTISED_INT8)
        naive_int8(a, values, (int8_t *)codes, scales);
    else
        naive_nf4(a, values, codes, scales, nested);
    for (size_t i = 0; i < a->scales_bytes / sizeof(float); ++i)
        CHECK(memcmp(&a->w.scales[i], &scales[i], sizeof(float)) == 0, "scale %zu is %.9g, want %.9g: %s", i,
              (double)a->w.scales[i], (double)scales[i], text);
    for (size_t i = 0; nested != NULL && i < a->nested_bytes; ++i)
        CHECK(a->w.nested_codes[i] == nested[i], "nested code %zu is %d, want %d: %s", i, a->w.nested_codes[i],
              nested[i], text);
    for (size_t i = 0; i < a->codes_bytes; ++i)
        CHECK(((uint8_t *)a->w.codes)[i] == codes[i], "code %zu is 0x%02x, want 0x%02x: %s", i,
              ((uint8_t *)a->w.codes)[i], codes[i], text);
    free(codes);
    free(scales);
    free(nested);
}

static CHECK_UNUSED const char *describe(const struct kind *kind, int64_t rows, int64_t columns)
{
    static char text[120];
    snprintf(text, sizeof text, "%s group %lld nested %d [%lld,%lld]",
             kind->format == PLORA_QUANTISED_INT8 ? "INT8" : "NF4", (long long)kind->group, kind->nested,
             (long long)rows, (long long)columns);
    return text;
}

#endif
