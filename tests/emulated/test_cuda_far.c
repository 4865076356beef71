/* test_cuda_far.c: matrices of more than 2^31 elements and 2^32 bytes, on the emulated device (tests/emulator).
 *
 * Two rows that lie 5 GiB apart are such a matrix, without the memory: EMU_SPREAD keeps the second allocation away from the first. What
 * kernels make of it must have the bits of what they make of the same rows side by side. */
#include "emulated.h"
#include "handles.h"

enum { ROWS = 2, COLUMNS = 40, RANK = 3, ROW_BYTES = COLUMNS * 4 };

/* Two rows of the largest dtype's bytes, far apart. */
struct far {
    unsigned char *row[ROWS];
};

static struct far far_new(void)
{
    struct far far;
    far.row[0] = device_malloc(ROW_BYTES);
    setenv("EMU_SPREAD", "0x140000000", 1);
    far.row[1] = device_malloc(ROW_BYTES);
    unsetenv("EMU_SPREAD");
    CHECK(far.row[1] - far.row[0] > INT64_C(5) << 30, "rows at %p and %p are not far apart", (void *)far.row[0],
          (void *)far.row[1]);
    return far;
}

static void far_free(struct far *far)
{
    for (int i = 0; i < ROWS; ++i)
        device_free(far->row[i]);
}

static plora_matrix far_matrix(const struct far *far, int32_t dtype)
{
    const int64_t size = (int64_t)plora__dtype_size(dtype), distance = far->row[1] - far->row[0];
    CHECK(distance % (8 * size) == 0, "rows %lld bytes apart", (long long)distance);
    return (plora_matrix){far->row[0], ROWS, COLUMNS, distance / size, dtype, 0};
}

static plora_matrix near_matrix(int32_t dtype)
{
    return (plora_matrix){device_malloc(ROWS * ROW_BYTES), ROWS, COLUMNS, COLUMNS, dtype, 0};
}

/* Row i of a matrix, to or from the host. */
static void *row_of(const plora_matrix *matrix, int64_t i)
{
    return (unsigned char *)matrix->data + i * matrix->stride * (int64_t)plora__dtype_size(matrix->dtype);
}

static size_t row_bytes(const plora_matrix *matrix)
{
    return (size_t)matrix->columns * plora__dtype_size(matrix->dtype);
}

static void fill(const plora_matrix *matrix, uint64_t seed)
{
    check_reseed(seed);
    for (int64_t i = 0; i < matrix->rows; ++i) {
        unsigned char values[ROW_BYTES];
        for (int64_t j = 0; j < matrix->columns; ++j)
            plora__store(values, j, matrix->dtype, (float)check_uniform());
        device_copy(row_of(matrix, i), values, row_bytes(matrix));
    }
}

static void check_same(const plora_matrix *far, const plora_matrix *near, const char *what)
{
    for (int64_t i = 0; i < far->rows; ++i) {
        unsigned char got[ROW_BYTES], want[ROW_BYTES];
        device_copy(got, row_of(far, i), row_bytes(far));
        device_copy(want, row_of(near, i), row_bytes(near));
        CHECK(memcmp(got, want, row_bytes(far)) == 0, "%s of dtype %d: row %lld differs when it is far away", what,
              far->dtype, (long long)i);
    }
}

static float *device_values(int64_t count, uint64_t seed)
{
    float *values = malloc((size_t)count * sizeof *values), *device = device_malloc((size_t)count * sizeof *values);
    CHECK(values != NULL, "the test itself is out of memory");
    check_reseed(seed);
    for (int64_t i = 0; i < count; ++i)
        values[i] = (float)check_uniform();
    device_copy(device, values, (size_t)count * sizeof *values);
    free(values);
    return device;
}

/* W and its residual far apart, each way to round, with and without a report. */
static void merges(void **state)
{
    (void)state;
    plora_context *context = check_context(NULL, 0, 0);
    struct far far = far_new(), far_low = far_new();
    const plora_matrix low = far_matrix(&far_low, PLORA_F16), near_low = near_matrix(PLORA_F16);
    float *left = device_values(ROWS * RANK, 1), *right = device_values(RANK * COLUMNS, 2);
    struct plora__merge_sums *sums = device_malloc(sizeof *sums);
    for (int32_t dtype = PLORA_F32; dtype <= PLORA_F16; ++dtype)
        for (int32_t rounding = PLORA_ROUND_NEAREST; rounding <= PLORA_ROUND_RESIDUAL; ++rounding) {
            if (dtype == PLORA_F32 && rounding != PLORA_ROUND_NEAREST) continue;
            const plora_matrix w[2] = {far_matrix(&far, dtype), near_matrix(dtype)}, *lows[2] = {&low, &near_low};
            for (int report = 0; report < 2; ++report) {
                for (int i = 0; i < 2; ++i) {
                    struct plora__merge_args args = {.weight = w[i], .rank = RANK, .factor = 0.5f};
                    fill(&w[i], 3);
                    fill(lows[i], 4);
                    args.left = left;
                    args.left_row_stride = RANK;
                    args.left_rank_stride = 1;
                    args.right = right;
                    args.right_rank_stride = COLUMNS;
                    args.right_column_stride = 1;
                    args.rounding = rounding;
                    args.draw.row_elements = COLUMNS;
                    args.residual = rounding == PLORA_ROUND_RESIDUAL ? lows[i]->data : NULL;
                    args.residual_stride = rounding == PLORA_ROUND_RESIDUAL ? lows[i]->stride : 0;
                    args.sums = report ? sums : NULL;
                    args.workspace = device_malloc(context->backend->merge_workspace(context->device, &args));
                    CHECK_OK(context->backend->merge(context->device, &args, NULL));
                    device_wait();
                    device_free(args.workspace);
                }
                check_same(&w[0], &w[1], "W");
                check_same(&low, &near_low, "residual");
            }
            device_free(w[1].data);
        }
    far_free(&far);
    far_free(&far_low);
    device_free(near_low.data);
    device_free(left);
    device_free(right);
    device_free(sums);
    plora_context_destroy(context);
}

struct layer {
    plora_model *model;
    plora_adapters *adapters;
    plora_matrix x, y, dx;
};

static struct layer layer_new(plora_context *context, const plora_matrix *weight)
{
    struct layer layer = {0};
    plora_linear linear = PLORA_LINEAR_INIT;
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    plora_adapter adapter = PLORA_ADAPTER_INIT;
    linear.name = "layer";
    linear.weight = *weight;
    options.rank = 2;
    options.seed = 5;
    options.dropout = 0.25;
    CHECK_OK(plora_model_create(context, &layer.model));
    CHECK_OK(plora_model_add_linear(layer.model, &linear, NULL));
    CHECK_OK(plora_adapters_create(layer.model, &options, &layer.adapters));
    CHECK_OK(plora_adapters_layer(layer.adapters, 0, &adapter));
    fill(&adapter.b, 6);
    return layer;
}

static void layer_run(struct layer *layer)
{
    fill(&layer->x, 7);
    CHECK_OK(plora_linear_forward(layer->adapters, 0, &layer->x, &layer->y, PLORA_LINEAR_DROPOUT, NULL));
    CHECK_OK(plora_linear_backward(layer->adapters, 0, &layer->x, &layer->y, &layer->dx, PLORA_LINEAR_DROPOUT, NULL));
    device_wait();
}

/* W[2,40], and x, y, dx of two tokens; y's two columns lie in far rows too. */
static void linear_layers(void **state)
{
    (void)state;
    plora_context *context = check_context(NULL, 0, 0);
    struct far memory[4] = {far_new(), far_new(), far_new(), far_new()};
    for (int32_t w = PLORA_F32; w <= PLORA_F16; ++w)
        for (int32_t dtype = PLORA_F32; dtype <= PLORA_BF16; ++dtype) {
            struct layer layers[2];
            const plora_matrix weights[2] = {far_matrix(&memory[0], w), near_matrix(w)};
            for (int i = 0; i < 2; ++i) {
                fill(&weights[i], 8);
                layers[i] = layer_new(context, &weights[i]);
                layers[i].x = i == 0 ? far_matrix(&memory[1], dtype) : near_matrix(dtype);
                layers[i].y = i == 0 ? far_matrix(&memory[2], dtype) : near_matrix(dtype);
                layers[i].dx = i == 0 ? far_matrix(&memory[3], dtype) : near_matrix(dtype);
                layers[i].y.columns = ROWS;
                layer_run(&layers[i]);
            }
            check_same(&layers[0].y, &layers[1].y, "y");
            check_same(&layers[0].dx, &layers[1].dx, "dx");
            for (int i = 0; i < 2; ++i) {
                plora_adapters_destroy(layers[i].adapters);
                plora_model_destroy(layers[i].model);
            }
            const void *const blocks[] = {weights[1].data, layers[1].x.data, layers[1].y.data, layers[1].dx.data};
            for (int i = 0; i < CHECK_COUNT(blocks); ++i)
                device_free((void *)(uintptr_t)blocks[i]);
        }
    for (int i = 0; i < CHECK_COUNT(memory); ++i)
        far_free(&memory[i]);
    plora_context_destroy(context);
}

/* Two tokens of two adapters. */
static void batches(void **state)
{
    (void)state;
    plora_context *context = check_context(NULL, 0, 0);
    struct far far_x = far_new(), far_y = far_new();
    float *a = device_values(RANK * COLUMNS, 9), *b = device_values(COLUMNS * RANK, 10);
    const struct plora__batch_slot slots[2] = {{a, b, RANK, 0.5f, NULL}, {a, b, RANK - 1, 2.0f, NULL}};
    struct plora__batch_segment segments[2] = {{0, 0, 1, 0}, {1, 1, 1, 0}};
    const int32_t tiles = plora__batch_cut(segments, 2);
    struct plora__batch_slot *device_slots = device_malloc(sizeof slots);
    const struct plora__batch_slot *const adapters[2] = {device_slots, device_slots + 1};
    void *device_adapters = device_malloc(sizeof adapters), *device_segments = device_malloc(sizeof segments);
    device_copy(device_slots, slots, sizeof slots);
    device_copy(device_adapters, adapters, sizeof adapters);
    device_copy(device_segments, segments, sizeof segments);
    for (int32_t dtype = PLORA_F32; dtype <= PLORA_BF16; ++dtype) {
        const plora_matrix x[2] = {far_matrix(&far_x, dtype), near_matrix(dtype)};
        const plora_matrix y[2] = {far_matrix(&far_y, dtype), near_matrix(dtype)};
        for (int i = 0; i < 2; ++i) {
            const struct plora__batch_target target = {0, RANK, COLUMNS, y[i]};
            struct plora__batch_args args = {.tokens = ROWS,
                                             .in_features = COLUMNS,
                                             .segment_count = 2,
                                             .tiles = tiles,
                                             .target_count = 1,
                                             .targets = &target,
                                             .segments = device_segments,
                                             .adapters = device_adapters,
                                             .x = x[i]};
            fill(&x[i], 11);
            fill(&y[i], 12);
            args.workspace = device_malloc(context->backend->batch_workspace(context->device, &args));
            CHECK_OK(context->backend->batch_forward(context->device, &args, NULL));
            device_wait();
            device_free(args.workspace);
        }
        check_same(&y[0], &y[1], "y");
        device_free(x[1].data);
        device_free(y[1].data);
    }
    void *const blocks[] = {a, b, device_slots, device_adapters, device_segments};
    for (int i = 0; i < CHECK_COUNT(blocks); ++i)
        device_free(blocks[i]);
    far_free(&far_x);
    far_free(&far_y);
    plora_context_destroy(context);
}

/* The address that `elements` of so many bytes before this one would have; they are not there. */
static const void *before(const void *data, int64_t elements, double bytes)
{
    return (const void *)((uintptr_t)data - (uintptr_t)((double)elements * bytes));
}

/* The last row of a quantised W of 2^27 + 1 rows. */
static void dequantised(void **state)
{
    (void)state;
    enum { WIDE = 64 };
    const int64_t last = INT64_C(1) << 27;
    plora_context *context = check_context(NULL, 0, 0);
    float *scale = device_values(1, 13), *out = device_malloc(WIDE * sizeof *out);
    unsigned char codes[WIDE], *device_codes = device_malloc(WIDE);
    for (int i = 0; i < WIDE; ++i)
        codes[i] = (unsigned char)check_next();
    device_copy(device_codes, codes, WIDE);
    for (int int8 = 0; int8 < 2; ++int8) {
        float got[2][WIDE];
        for (int far = 0; far < 2; ++far) {
            const int64_t row = far ? last : 0;
            const struct plora__dequantise_args args = {
                .weight = {.format = int8 ? PLORA__QUANTISED_INT8 : PLORA__QUANTISED_NF4,
                           .rows = row + 1,
                           .columns = WIDE,
                           .group = WIDE,
                           .codes = before(device_codes, row * WIDE, int8 ? 1 : 0.5),
                           .scales = before(scale, row, sizeof *scale)},
                .first_row = row,
                .out = {out, 1, WIDE, WIDE, PLORA_F32, 0}};
            CHECK_OK(context->backend->dequantise(context->device, &args, NULL));
            device_copy(got[far], out, sizeof got[far]);
        }
        CHECK(memcmp(got[0], got[1], sizeof got[0]) == 0, "%s: row %lld is not row 0", int8 ? "INT8" : "NF4",
              (long long)last);
    }
    device_free(scale);
    device_free(out);
    device_free(device_codes);
    plora_context_destroy(context);
}

int main(void)
{
    setenv("PLORA_TEST_BACKEND", "cuda", 1);
    emulated_open();
    check_begin("test_cuda_far");
    const struct CMUnitTest tests[] = {cmocka_unit_test(merges), cmocka_unit_test(linear_layers),
                                       cmocka_unit_test(batches), cmocka_unit_test(dequantised)};
    return cmocka_run_group_tests_name("cuda_far", tests, NULL, NULL);
}
