/* test_linear_errors.c: linear calls that must be refused: the status, a message with the offending values, and nothing written; and
 * the calls at the edge that must not be refused. */
#include "linear_fixture.h"

static plora_context *shared;

static struct linear_fixture *small_layer(void)
{
    const struct linear_case c = {
        .tokens = 4, .in_features = 6, .out_features = 5, .rank = 2, .bias_dtype = -1, .gaps = 1};
    struct linear_fixture *f = fixture_create(shared, &c);
    struct check_matrix *const all[] = {&f->x, &f->w, &f->y, &f->dy, &f->dx};
    for (int i = 0; i < CHECK_COUNT(all); ++i)
        check_matrix_snapshot(all[i]);
    return f;
}

/* The gradients and parameters, to be compared afterwards. */
static float *arena_copy(const struct linear_fixture *f, int64_t *count)
{
    float *parameters = NULL, *gradients = NULL;
    device_upload();
    CHECK_OK(plora_adapters_parameters(f->adapters, &parameters, count));
    CHECK_OK(plora_adapters_gradients(f->adapters, &gradients, count));
    float *copy = malloc(2 * (size_t)*count * sizeof *copy);
    assert_non_null(copy);
    device_transfer(copy, parameters, (size_t)*count * sizeof *copy);
    device_transfer(copy + *count, gradients, (size_t)*count * sizeof *copy);
    return copy;
}

/* After any number of refused calls: nothing has changed, and the layer still computes. */
static void check_nothing_written(struct linear_fixture *f, float *before)
{
    int64_t count = 0;
    float *after = arena_copy(f, &count);
    assert_memory_equal(before, after, 2 * (size_t)count * sizeof *after);
    free(before);
    free(after);
    check_matrix_unchanged(&f->x, "x");
    check_matrix_unchanged(&f->w, "W");
    check_matrix_unchanged(&f->y, "y");
    check_matrix_unchanged(&f->dy, "dy");
    check_matrix_unchanged(&f->dx, "dx");
    CHECK_OK(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, 0));
    fixture_check_forward(f, NULL);
    fixture_free(f);
}

/* Forward and backward refuse one changed operand alike; x, y and dx are the fixture's, changed by the caller. */
static void refused(struct linear_fixture *f, const plora_matrix *x, const plora_matrix *y, plora_status status,
                    const char *first, const char *second)
{
    CHECK_FAILS(fixture_forward(f, f->adapters, f->layer, x, y, 0), status, first, second);
    CHECK_FAILS(fixture_backward(f, f->adapters, f->layer, x, y, &f->dx.m, 0), status, first, second);
}

static void null_pointers_and_indices(void **state)
{
    (void)state;
    check_reseed(1);
    struct linear_fixture *f = small_layer();
    int64_t count = 0;
    float *before = arena_copy(f, &count);
    const plora_matrix *x = &f->x.m, *y = &f->y.m, *dy = &f->dy.m, *dx = &f->dx.m;
    CHECK_FAILS(plora_linear_forward(NULL, f->layer, x, y, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "adapters is NULL");
    CHECK_FAILS(plora_linear_forward(f->adapters, f->layer, NULL, y, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "x is NULL");
    CHECK_FAILS(plora_linear_forward(f->adapters, f->layer, x, NULL, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "y is NULL");
    CHECK_FAILS(plora_linear_backward(NULL, f->layer, x, dy, dx, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "adapters is NULL");
    CHECK_FAILS(plora_linear_backward(f->adapters, f->layer, NULL, dy, dx, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "x is NULL");
    CHECK_FAILS(plora_linear_backward(f->adapters, f->layer, x, NULL, dx, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "dy is NULL");
    static const int32_t layers[] = {-1, 2, INT32_MAX, INT32_MIN};
    for (int i = 0; i < CHECK_COUNT(layers); ++i) {
        char number[16];
        snprintf(number, sizeof number, "%d", layers[i]);
        CHECK_FAILS(fixture_forward(f, f->adapters, layers[i], x, y, 0), PLORA_ERROR_INVALID_ARGUMENT, number,
                    "0 .. 1");
        CHECK_FAILS(fixture_backward(f, f->adapters, layers[i], x, dy, dx, 0), PLORA_ERROR_INVALID_ARGUMENT, number);
    }
    plora_matrix no_data = *x;
    no_data.data = NULL;
    refused(f, &no_data, y, PLORA_ERROR_INVALID_ARGUMENT, "x.data", "NULL");
    no_data = *y;
    no_data.data = NULL;
    refused(f, x, &no_data, PLORA_ERROR_INVALID_ARGUMENT, "y.data", "NULL");
    no_data = *dx;
    no_data.data = NULL;
    CHECK_FAILS(fixture_backward(f, f->adapters, f->layer, x, dy, &no_data, 0), PLORA_ERROR_INVALID_ARGUMENT,
                "dx.data");
    check_nothing_written(f, before);
}

static void flags_and_streams(void **state)
{
    (void)state;
    check_reseed(2);
    struct linear_fixture *f = small_layer();
    int64_t count = 0;
    float *before = arena_copy(f, &count);
    CHECK_FAILS(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, 8), PLORA_ERROR_INVALID_ARGUMENT, "0x8");
    CHECK_FAILS(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, PLORA_LINEAR_ACCUMULATE),
                PLORA_ERROR_INVALID_ARGUMENT, "0x4"); /* backward only */
    CHECK_FAILS(fixture_backward(f, f->adapters, f->layer, &f->x.m, &f->dy.m, &f->dx.m, 0x80000001u),
                PLORA_ERROR_INVALID_ARGUMENT, "0x80000000");
    if (!device_is_cuda()) { /* the CPU has no streams */
        int stream;
        CHECK_FAILS(plora_linear_forward(f->adapters, f->layer, &f->x.m, &f->y.m, 0, &stream),
                    PLORA_ERROR_INVALID_ARGUMENT, "stream");
        CHECK_FAILS(plora_linear_backward(f->adapters, f->layer, &f->x.m, &f->dy.m, NULL, 0, &stream),
                    PLORA_ERROR_INVALID_ARGUMENT, "stream");
    }
    check_nothing_written(f, before);
}

static void shapes_and_strides(void **state)
{
    (void)state;
    check_reseed(3);
    struct linear_fixture *f = small_layer();
    int64_t count = 0;
    float *before = arena_copy(f, &count);
    plora_matrix changed = f->x.m;
    changed.columns = 5;
    refused(f, &changed, &f->y.m, PLORA_ERROR_SHAPE, "[4,5]", "[4,6]");
    changed = f->x.m;
    changed.rows = -1;
    refused(f, &changed, &f->y.m, PLORA_ERROR_SHAPE, "-1", "x");
    changed = f->x.m;
    changed.stride = 5;
    refused(f, &changed, &f->y.m, PLORA_ERROR_SHAPE, "stride 5", "6");
    changed = f->y.m;
    changed.rows = 3;
    refused(f, &f->x.m, &changed, PLORA_ERROR_SHAPE, "[3,5]", "[4,5]");
    changed = f->y.m;
    changed.columns = 6;
    refused(f, &f->x.m, &changed, PLORA_ERROR_SHAPE, "[4,6]", "[4,5]");
    changed = f->y.m;
    changed.stride = -7;
    refused(f, &f->x.m, &changed, PLORA_ERROR_SHAPE, "stride -7", "5");
    changed = f->dx.m;
    changed.columns = 7;
    CHECK_FAILS(fixture_backward(f, f->adapters, f->layer, &f->x.m, &f->dy.m, &changed, 0), PLORA_ERROR_SHAPE, "dx",
                "[4,7]", "[4,6]");
    changed = f->dx.m;
    changed.stride = 1;
    CHECK_FAILS(fixture_backward(f, f->adapters, f->layer, &f->x.m, &f->dy.m, &changed, 0), PLORA_ERROR_SHAPE, "dx",
                "stride 1");
    /* sizes whose product overflows */
    plora_matrix huge_x = f->x.m, huge_y = f->y.m;
    huge_x.rows = huge_y.rows = INT64_MAX / 2;
    refused(f, &huge_x, &huge_y, PLORA_ERROR_SHAPE, "4611686018427387903", "x");
    plora_matrix wide = f->x.m;
    wide.stride = INT64_MAX;
    refused(f, &wide, &f->y.m, PLORA_ERROR_SHAPE, "9223372036854775807", "x");
    check_nothing_written(f, before);
}

static void dtypes_and_alignment(void **state)
{
    (void)state;
    check_reseed(4);
    struct linear_fixture *f = small_layer();
    int64_t count = 0;
    float *before = arena_copy(f, &count);
    static const int32_t dtypes[] = {PLORA_F16, 3, -1, 1000};
    for (int i = 0; i < CHECK_COUNT(dtypes); ++i) {
        char number[16];
        snprintf(number, sizeof number, "%d", dtypes[i]);
        plora_matrix changed = f->x.m;
        changed.dtype = dtypes[i];
        refused(f, &changed, &f->y.m, PLORA_ERROR_UNSUPPORTED, "x", number);
        changed = f->y.m;
        changed.dtype = dtypes[i];
        refused(f, &f->x.m, &changed, PLORA_ERROR_UNSUPPORTED, "y", number);
        changed = f->dx.m;
        changed.dtype = dtypes[i];
        CHECK_FAILS(fixture_backward(f, f->adapters, f->layer, &f->x.m, &f->dy.m, &changed, 0), PLORA_ERROR_UNSUPPORTED,
                    "dx", number);
    }
    plora_matrix changed = f->x.m;
    changed.data = (char *)changed.data + 2;
    refused(f, &changed, &f->y.m, PLORA_ERROR_INVALID_ARGUMENT, "x", "aligned");
    changed = f->x.m;
    changed.reserved = 1;
    refused(f, &changed, &f->y.m, PLORA_ERROR_INVALID_ARGUMENT, "x", "reserved");
    check_nothing_written(f, before);
}

static void overlapping_operands(void **state)
{
    (void)state;
    check_reseed(5);
    struct linear_fixture *f = small_layer();
    int64_t count = 0;
    float *before = arena_copy(f, &count);
    plora_matrix y = f->x.m; /* in place */
    y.columns = 5;
    CHECK_FAILS(fixture_forward(f, f->adapters, f->layer, &f->x.m, &y, 0), PLORA_ERROR_INVALID_ARGUMENT, "overlap");
    y.data = (float *)f->x.m.data + 3 * f->x.m.stride + 5; /* begins at the last element of x */
    CHECK_FAILS(fixture_forward(f, f->adapters, f->layer, &f->x.m, &y, 0), PLORA_ERROR_INVALID_ARGUMENT, "overlap");
    y.dtype = PLORA_BF16; /* another dtype over the same bytes */
    y.data = f->x.m.data;
    CHECK_FAILS(fixture_forward(f, f->adapters, f->layer, &f->x.m, &y, 0), PLORA_ERROR_INVALID_ARGUMENT, "overlap");
    CHECK_FAILS(fixture_backward(f, f->adapters, f->layer, &f->x.m, &f->dy.m, &f->x.m, 0), PLORA_ERROR_INVALID_ARGUMENT,
                "overlaps");
    plora_matrix dx = f->dy.m;
    dx.columns = dx.stride = 6;
    CHECK_FAILS(fixture_backward(f, f->adapters, f->layer, &f->x.m, &f->dy.m, &dx, 0), PLORA_ERROR_INVALID_ARGUMENT,
                "overlaps");
    check_nothing_written(f, before);
}

/* x and y as column slices of one buffer interleave without sharing an element: a fused q, k, v projection. */
static void slices_of_one_buffer(void **state)
{
    (void)state;
    check_reseed(6);
    struct linear_fixture *f = small_layer();
    const struct linear_case *c = &f->c;
    struct check_matrix both = check_matrix_new(c->tokens, c->in_features + c->out_features, 13, PLORA_F32);
    check_matrix_random(&both, 1.0);
    plora_matrix x = both.m, y = both.m;
    x.columns = c->in_features;
    y.columns = c->out_features;
    y.data = (float *)both.m.data + c->in_features;
    reference_load(&x, 0, f->x_values);
    CHECK_OK(fixture_forward(f, f->adapters, f->layer, &x, &y, 0));
    for (int64_t t = 0; t < c->tokens; ++t)
        for (int64_t n = 0; n < c->out_features; ++n)
            plora__store(f->y.m.data, t * f->y.m.stride + n, PLORA_F32, (float)check_element(&y, t, n));
    fixture_check_forward(f, NULL);
    check_matrix_guards(&both, "the shared buffer");
    check_matrix_free(&both);
    fixture_free(f);
}

/* T = 0 with NULL data is a call like any other: it does nothing. */
static void no_tokens(void **state)
{
    (void)state;
    check_reseed(7);
    struct linear_fixture *f = small_layer();
    int64_t count = 0;
    float *before = arena_copy(f, &count);
    plora_matrix x = f->x.m, y = f->y.m, dx = f->dx.m;
    x.rows = y.rows = dx.rows = 0;
    x.data = y.data = dx.data = NULL;
    for (uint32_t flags = 0; flags < 4; ++flags) {
        CHECK_OK(fixture_forward(f, f->adapters, f->layer, &x, &y, flags));
        CHECK_OK(fixture_backward(f, f->adapters, f->layer, &x, &y, &dx, flags));
        CHECK_OK(fixture_backward(f, f->adapters, f->layer, &x, &y, NULL, flags));
    }
    x.columns = 5; /* still checked */
    CHECK_FAILS(fixture_forward(f, f->adapters, f->layer, &x, &y, 0), PLORA_ERROR_SHAPE, "[0,5]", "[0,6]");
    check_nothing_written(f, before);
}

/* Linear calls of a kind that was seen before allocate nothing. */
static void hot_calls_do_not_allocate(void **state)
{
    (void)state;
    check_reseed(8);
    struct linear_fixture *f = small_layer();
    plora_memory_statistics first = PLORA_MEMORY_STATISTICS_INIT, last = PLORA_MEMORY_STATISTICS_INIT;
    for (int i = 0; i < 20; ++i) {
        CHECK_OK(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, 0));
        CHECK_OK(fixture_backward(f, f->adapters, f->layer, &f->x.m, &f->dy.m, &f->dx.m, 0));
        if (i == 0) CHECK_OK(plora_memory_stats(shared, &first));
    }
    CHECK_OK(plora_memory_stats(shared, &last));
    assert_int_equal(first.allocations, last.allocations);
    assert_int_equal(first.device_allocations, last.device_allocations);
    assert_int_equal(first.current_bytes, last.current_bytes);
    fixture_free(f);
}

static int group_setup(void **state)
{
    (void)state;
    CHECK_OK(check_context_create(NULL, NULL, 0, 0, &shared));
    return 0;
}

static int group_teardown(void **state)
{
    (void)state;
    plora_context_destroy(shared);
    return 0;
}

int main(void)
{
    check_begin("test_linear_errors");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(null_pointers_and_indices),
        cmocka_unit_test(flags_and_streams),
        cmocka_unit_test(shapes_and_strides),
        cmocka_unit_test(dtypes_and_alignment),
        cmocka_unit_test(overlapping_operands),
        cmocka_unit_test(slices_of_one_buffer),
        cmocka_unit_test(no_tokens),
        cmocka_unit_test(hot_calls_do_not_allocate),
    };
    return cmocka_run_group_tests_name("linear_errors", tests, group_setup, group_teardown);
}
