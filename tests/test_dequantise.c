/* test_dequantise.c: panels of quantised weights against the naive reference, to the bit: the kernels of every
 * instruction level of the CPU, or those of a GPU through its table (device.h). */
#include "check.h"
#include "cpu/dequantise_kernels.h"
#include "handles.h"
#include "levels.h"
#include "reference.h"

static plora_context *context;

static void dequantise(int level, int threads, const struct plora__dequantise_args *args)
{
    if (level != LEVEL_DEVICE) {
        cpu_dequantise_with(cpu_dequantise_kernels(level), threads, args);
        return;
    }
    struct plora__dequantise_args there = *args;
    there.weight.codes = device_of(args->weight.codes);
    there.weight.scales = device_of(args->weight.scales);
    there.weight.nested_codes = device_of(args->weight.nested_codes);
    there.weight.map = device_of(args->weight.map);
    there.out = device_matrix(args->out);
    CHECK_OK(DEVICE(context->backend->dequantise(context->device, &there, NULL)));
}

/* `offset` bytes past an aligned address, with nothing behind the end, and a twin. */
struct block {
    unsigned char *memory;
    void *data;
};

static struct block block_new(size_t bytes, size_t offset)
{
    struct block block = {malloc(offset + bytes), NULL};
    CHECK(block.memory != NULL, "the test itself is out of memory");
    for (size_t i = 0; i < offset + bytes; ++i)
        block.memory[i] = (unsigned char)check_next();
    device_twin(block.memory, offset + bytes);
    block.data = block.memory + offset;
    return block;
}

static void block_free(struct block *block)
{
    device_forget(block->memory);
    free(block->memory);
}

static void random_floats(const struct block *block, int64_t count)
{
    for (int64_t i = 0; i < count; ++i)
        ((float *)block->data)[i] = (float)ldexp(check_uniform(), (int)check_integer(-12, 4));
}

/* The 256 values of the signed dynamic code of 8 bits ("8-bit Approximations for Parallelism in Deep Learning", arXiv
 * 1511.04561): for each power of ten from -6 to 0 the middles of 1, 2, 4 ... 64 equal parts of [0.1, 1], both signs,
 * and 0 and 1. */
static int by_value(const void *left, const void *right)
{
    const float a = *(const float *)left, b = *(const float *)right;
    return (a > b) - (a < b);
}

static void dynamic_map(float *map)
{
    int count = 0;
    for (int power = 0; power < 7; ++power)
        for (int part = 0; part < 1 << power; ++part) {
            const double middle = 0.1 + 0.9 * (part + 0.5) / (1 << power);
            map[count++] = (float)(pow(10, power - 6) * middle);
            map[count++] = (float)-(pow(10, power - 6) * middle);
        }
    map[count++] = 0.0f;
    map[count++] = 1.0f;
    CHECK(count == 256, "the code has %d values", count);
    qsort(map, 256, sizeof *map, by_value);
}

struct dequantise_case {
    int32_t format;
    int64_t rows, columns, group; /* of W */
    int nested;
    int64_t first_row, first_column, out_rows, out_columns;
    int32_t dtype;
    int64_t stride;
    int aligned;
    uint32_t scale; /* the bits of every scale, 0 = random ones */
};

static const char *describe(const struct dequantise_case *c, int level)
{
    static char text[240];
    snprintf(text, sizeof text,
             "level %d, %s W[%lld,%lld] group %lld nested %d, panel [%lld,%lld] from (%lld,%lld), dtype %d stride %lld "
             "aligned %d scale 0x%08x",
             level, c->format == PLORA__QUANTISED_INT8 ? "int8" : "NF4", (long long)c->rows, (long long)c->columns,
             (long long)c->group, c->nested, (long long)c->out_rows, (long long)c->out_columns, (long long)c->first_row,
             (long long)c->first_column, (int)c->dtype, (long long)c->stride, c->aligned, (unsigned)c->scale);
    return text;
}

static float reference(const struct dequantise_case *c, const struct plora__quantised *w, int64_t i, int64_t j)
{
    if (c->format == PLORA__QUANTISED_INT8) return reference_int8(w->codes, w->scales, c->columns, c->group, i, j);
    return reference_nf4(w->codes, w->scales, w->nested_codes, w->map, w->offset, c->columns, i, j);
}

static struct check_matrix panel_new(const struct dequantise_case *c)
{
    struct check_matrix out = check_matrix_new(c->out_rows, c->out_columns, c->stride, c->dtype);
    while (c->aligned && ((unsigned char *)out.m.data - out.memory) % 16 != 0) {
        check_matrix_free(&out);
        out = check_matrix_new(c->out_rows, c->out_columns, c->stride, c->dtype);
    }
    return out;
}

/* Which NaN it is differs between processors. */
static int same(uint32_t got, uint32_t want)
{
    return got == want || (isnan(plora__float_from_bits(got)) && isnan(plora__float_from_bits(want)));
}

static void check_panel(const struct dequantise_case *c, const struct plora__quantised *w,
                        const struct check_matrix *out, const char *text)
{
    for (int64_t i = 0; i < c->out_rows; ++i)
        for (int64_t j = 0; j < c->out_columns; ++j) {
            const float value = reference(c, w, c->first_row + i, c->first_column + j);
            const int64_t at = i * c->stride + j;
            if (c->dtype == PLORA_F32)
                CHECK(same(plora__float_bits(((const float *)out->m.data)[at]), plora__float_bits(value)),
                      "(%lld,%lld) is %.9g, want %.9g: %s", (long long)i, (long long)j,
                      ((const float *)out->m.data)[at], value, text);
            else
                CHECK(same((uint32_t)((const uint16_t *)out->m.data)[at] << 16, (uint32_t)plora__float_to_bf16(value)
                                                                                    << 16),
                      "(%lld,%lld) is 0x%04x, want 0x%04x: %s", (long long)i, (long long)j,
                      ((const uint16_t *)out->m.data)[at], plora__float_to_bf16(value), text);
        }
    check_matrix_guards(out, text);
}

static void run(const struct dequantise_case *c)
{
    const int int8 = c->format == PLORA__QUANTISED_INT8;
    const int64_t elements = c->rows * c->columns, blocks = (elements + 63) / 64;
    const int64_t scales =
        int8 ? c->rows * ((c->columns + c->group - 1) / c->group) : (c->nested ? (blocks + 255) / 256 : blocks);
    struct block codes =
        block_new((size_t)(int8 ? elements : (elements + 1) / 2), c->aligned ? 0 : (size_t)check_integer(0, 7));
    struct block scale = block_new((size_t)scales * sizeof(float), 0);
    struct block nested = block_new((size_t)blocks, c->aligned ? 0 : (size_t)check_integer(0, 3));
    struct block map = block_new(256 * sizeof(float), 0);
    random_floats(&scale, scales);
    for (int64_t i = 0; c->scale != 0 && i < scales; ++i)
        ((uint32_t *)scale.data)[i] = c->scale;
    dynamic_map(map.data);
    struct plora__dequantise_args args = {.weight = {.format = c->format,
                                                     .rows = c->rows,
                                                     .columns = c->columns,
                                                     .group = c->group,
                                                     .codes = codes.data,
                                                     .scales = scale.data},
                                          .first_row = c->first_row,
                                          .first_column = c->first_column};
    if (c->nested) {
        args.weight.offset = (float)check_uniform();
        args.weight.nested_codes = nested.data;
        args.weight.map = map.data;
    }
    for (int level = first_level(); level <= last_level(); ++level) {
        struct check_matrix out = panel_new(c);
        args.out = out.m;
        dequantise(level, (int)check_integer(1, 3), &args);
        check_panel(c, &args.weight, &out, describe(c, level));
        check_matrix_free(&out);
    }
    block_free(&codes);
    block_free(&scale);
    block_free(&nested);
    block_free(&map);
}

static struct dequantise_case random_case(int32_t format, int64_t rows, int64_t columns)
{
    struct dequantise_case c = {.format = format, .rows = rows, .columns = columns};
    static const int64_t groups[] = {1, 2, 3, 7, 32, 64, 128};
    const int64_t group = groups[check_integer(0, CHECK_COUNT(groups) - 1)];
    c.group = check_integer(0, 2) == 0 ? columns : group;
    c.nested = format == PLORA__QUANTISED_NF4 && check_integer(0, 1);
    c.first_row = check_integer(0, rows - 1);
    c.out_rows = check_integer(1, rows - c.first_row);
    c.first_column = check_integer(0, columns - 1);
    c.out_columns = check_integer(1, columns - c.first_column);
    if (check_integer(0, 2) == 0) c.first_row = c.first_column = 0, c.out_rows = rows, c.out_columns = columns;
    c.dtype = check_integer(0, 1) ? PLORA_F32 : PLORA_BF16;
    c.aligned = (int)check_integer(0, 1);
    c.stride = c.aligned ? (c.out_columns + 7) / 8 * 8 : c.out_columns + check_integer(0, 9);
    return c;
}

static void test_dequantise_shapes(void **state)
{
    (void)state;
    check_reseed(1);
    static const int64_t shapes[][2] = {{1, 1},   {1, 2},    {3, 5},     {2, 64},   {7, 65},  {5, 127},
                                        {16, 64}, {9, 1024}, {33, 1031}, {64, 576}, {2, 2500}};
    for (int s = 0; s < CHECK_COUNT(shapes); ++s)
        for (int32_t format = PLORA__QUANTISED_INT8; format <= PLORA__QUANTISED_NF4; ++format)
            for (int i = 0; i < (device_is_cuda() ? 3 : 12); ++i) {
                const struct dequantise_case c = random_case(format, shapes[s][0], shapes[s][1]);
                run(&c);
            }
    const struct dequantise_case nested = {.format = PLORA__QUANTISED_NF4, /* by more than one scale */
                                           .rows = 33,
                                           .columns = 1031,
                                           .group = 1031,
                                           .nested = 1,
                                           .out_rows = 33,
                                           .out_columns = 1031,
                                           .dtype = PLORA_F32,
                                           .stride = 1033};
    run(&nested);
}

static void test_dequantise_random(void **state)
{
    (void)state;
    check_reseed(2);
    for (int i = 0; i < (device_is_cuda() || check_quick() ? 60 : 500); ++i) {
        const struct dequantise_case c =
            random_case((int32_t)check_integer(0, 1), check_integer(1, 20), check_integer(1, 400));
        run(&c);
    }
}

/* Halfway between two bf16 numbers, subnormal, the largest, infinite, no number. */
static void test_dequantise_scales(void **state)
{
    (void)state;
    check_reseed(4);
    static const uint32_t scales[] = {0x3f808000, 0x3f818000, 0xbf808000, 0x00000001, 0x00018000,
                                      0x7f7fffff, 0x7f800000, 0x7fc00000, 0x7fffffff, 0xff800001};
    for (int s = 0; s < CHECK_COUNT(scales); ++s)
        for (int32_t format = PLORA__QUANTISED_INT8; format <= PLORA__QUANTISED_NF4; ++format)
            for (int32_t dtype = PLORA_F32; dtype <= PLORA_BF16; ++dtype)
                for (int nested = 0; nested <= (format == PLORA__QUANTISED_NF4); ++nested) {
                    struct dequantise_case c = random_case(format, 3, 203);
                    c.scale = scales[s];
                    c.dtype = dtype;
                    c.nested = nested;
                    run(&c);
                }
}

/* Every code with a scale of 1, whole: which bits mean what. */
static void test_dequantise_codes(void **state)
{
    (void)state;
    check_reseed(3);
    for (int level = first_level(); level <= last_level(); ++level)
        for (int32_t format = PLORA__QUANTISED_INT8; format <= PLORA__QUANTISED_NF4; ++format) {
            const int int8 = format == PLORA__QUANTISED_INT8;
            struct block codes = block_new(256, 0), scale = block_new(8 * sizeof(float), 0);
            for (int i = 0; i < 256; ++i)
                ((uint8_t *)codes.data)[i] = (uint8_t)i;
            for (int i = 0; i < 8; ++i)
                ((float *)scale.data)[i] = 1.0f;
            struct check_matrix out = check_matrix_new(1, int8 ? 256 : 512, int8 ? 256 : 512, PLORA_F32);
            const struct plora__dequantise_args args = {.weight = {.format = format,
                                                                   .rows = 1,
                                                                   .columns = out.m.columns,
                                                                   .group = out.m.columns,
                                                                   .codes = codes.data,
                                                                   .scales = scale.data},
                                                        .out = out.m};
            dequantise(level, 1, &args);
            const float *got = out.m.data;
            if (int8) {
                for (int i = 0; i < 256; ++i)
                    CHECK(got[i] == (float)(i < 128 ? i : i - 256), "code %d became %g", i, got[i]);
            } else {
                for (int i = 0; i < 256; ++i)
                    for (int half = 0; half < 2; ++half) {
                        const int code = half == 0 ? i / 16 : i % 16; /* the upper half comes first */
                        const float want = got[2 * code + 1];         /* byte `code`: its lower half is `code` */
                        CHECK(got[2 * i + half] == want, "byte %d, element %d: %g, want %g", i, half, got[2 * i + half],
                              want);
                    }
                CHECK(got[1] == -1.0f && got[15] == 0.0f && got[31] == 1.0f, "codes 0, 7, 15 are %g, %g, %g", got[1],
                      got[15], got[31]);
                for (int code = 1; code < 16; ++code)
                    CHECK(got[2 * code + 1] > got[2 * code - 1], "code %d is not above the one before", code);
            }
            check_matrix_free(&out);
            block_free(&codes);
            block_free(&scale);
        }
}

int main(void)
{
    check_begin("test_dequantise");
    if (device_is_cuda()) context = check_context(NULL, 0, 0);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dequantise_shapes),
        cmocka_unit_test(test_dequantise_random),
        cmocka_unit_test(test_dequantise_scales),
        cmocka_unit_test(test_dequantise_codes),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    plora_context_destroy(context);
    return failed;
}
