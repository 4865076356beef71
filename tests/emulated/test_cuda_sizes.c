/* test_cuda_sizes.c: sizes at which the kernels take turns that they take at no other, on the emulated device (tests/emulator): sums of
 * more parts than a block has threads, loops that go round more often than their buffers, panels that do not begin at column 0, and
 * arenas that end inside of 16 bytes. */
#include "emulated.h"
#include "handles.h"
#include "linear_fixture.h"
#include "reference_unload.h"

static void *twin(size_t bytes)
{
    void *memory = malloc(bytes);
    CHECK(memory != NULL, "the test itself is out of memory");
    memset(memory, CHECK_POISON, bytes);
    device_twin(memory, bytes);
    return memory;
}

static void forget(void *memory)
{
    device_forget(memory);
    free(memory);
}

/* More tiles of W than the last block has threads; more rows, then columns, than one slice of a Gram matrix. */
static void sums_of_many_parts(void **state)
{
    (void)state;
    plora_context *context = check_context(NULL, 0, 0);
    static const int64_t shapes[][3] = {{1, 33003, 1}, {1200, 20, 18}, {17, 1300, 17}};
    for (int s = 0; s < CHECK_COUNT(shapes); ++s) {
        const int64_t rows = shapes[s][0], columns = shapes[s][1], rank = shapes[s][2];
        struct check_matrix weight = check_matrix_new(rows, columns, columns, PLORA_F32);
        check_matrix_random(&weight, 0.5);
        float *left = twin((size_t)(rows * rank) * sizeof *left),
              *right = twin((size_t)(columns * rank) * sizeof *right);
        for (int64_t i = 0; i < rows * rank; ++i)
            left[i] = (float)check_uniform();
        for (int64_t i = 0; i < columns * rank; ++i)
            right[i] = (float)check_uniform();
        double ww = 0, dd = 0, *d = malloc((size_t)(rows * columns) * sizeof *d);
        double *magnitude = malloc((size_t)(rows * columns) * sizeof *magnitude);
        CHECK(d != NULL && magnitude != NULL, "the test itself is out of memory");
        reference_delta(0.5, rows, columns, rank, left, rank, 1, right, columns, 1, d, magnitude);
        for (int64_t i = 0; i < rows * columns; ++i) {
            const double w = check_element(&weight.m, i / columns, i % columns);
            ww += w * w;
            dd += d[i] * d[i];
        }
        struct plora__merge_sums *sums = twin(sizeof *sums);
        struct plora__merge_args args = {.weight = device_matrix(weight.m), .rank = rank, .factor = 0.5f};
        args.left = device_of(left);
        args.left_row_stride = rank;
        args.left_rank_stride = 1;
        args.right = device_of(right);
        args.right_rank_stride = columns;
        args.right_column_stride = 1;
        args.sums = device_of(sums);
        void *workspace = device_malloc(context->backend->merge_workspace(context->device, &args));
        args.workspace = workspace;
        CHECK_OK(DEVICE(context->backend->merge(context->device, &args, NULL)));
        CHECK_CLOSE(sums->ww, ww, 1e-9 * ww, "sum W^2 of [%lld,%lld]", (long long)rows, (long long)columns);
        CHECK_CLOSE(sums->dd, dd, 1e-4 * dd, "sum d^2 of [%lld,%lld]", (long long)rows, (long long)columns);
        CHECK(sums->changed > 0.9 * (double)(rows * columns), "%g elements have changed", sums->changed);
        double *flat =
            malloc((size_t)(rows * columns) * sizeof *flat); /* with the fewer rows, for the reference's sake */
        CHECK(flat != NULL, "the test itself is out of memory");
        for (int64_t i = 0; i < rows * columns; ++i)
            flat[rows < columns ? i : i % columns * rows + i / columns] = d[i];
        const double effective =
            reference_effective_rank(rows < columns ? rows : columns, rows < columns ? columns : rows, flat);
        CHECK_CLOSE(sums->effective_rank, effective, 1e-9 * (effective + 1), "effective rank of [%lld,%lld]",
                    (long long)rows, (long long)columns);
        free(flat);
        device_free(workspace);
        forget(left);
        forget(right);
        forget(sums);
        check_matrix_free(&weight);
        free(d);
        free(magnitude);
    }
    plora_context_destroy(context);
}

/* The largest element of a segment that its block goes through several times. */
static void magnitudes_of_long_segments(void **state)
{
    (void)state;
    enum { COUNT = 20011, AT = 13 };
    plora_context *context = check_context(NULL, 0, 0);
    float *values = twin(COUNT * sizeof *values);
    struct plora__segment *segments = twin(2 * sizeof *segments);
    double *got = twin(2 * sizeof *got);
    segments[0] = (struct plora__segment){0, AT, 0, 0};
    segments[1] = (struct plora__segment){AT, COUNT, 1, 0};
    const struct plora__magnitude_args args = {device_of(values), device_of(segments), device_of(got), 2};
    for (int round = 0; round < 24; ++round) { /* the first, the last, any */
        const int64_t largest = round < 5 ? AT + round : round < 10 ? COUNT - 10 + round : check_integer(AT, COUNT - 1);
        for (int64_t i = 0; i < COUNT; ++i)
            values[i] = (float)(0.5 * check_uniform());
        values[largest] = largest % 2 == 0 ? 2.0f : -2.0f;
        CHECK_OK(DEVICE(context->backend->magnitudes(context->device, &args, NULL)));
        CHECK(got[0] < 0.6 && got[1] == 2.0, "the largest, element %lld: %g and %g", (long long)largest, got[0],
              got[1]);
    }
    forget(values);
    forget(segments);
    forget(got);
    plora_context_destroy(context);
}

/* ---------------------------------------------------------------------------------------------------------- linear layer */

/* In a workspace of just the size that is asked for. */
static void forward_and_backward(plora_context *context, const struct linear_case *c)
{
    struct linear_fixture *f = fixture_create(context, c);
    size_t bytes = 0;
    CHECK_OK(plora_adapters_workspace_size(f->adapters, c->tokens, &bytes));
    void *workspace = device_malloc(bytes);
    CHECK_OK(plora_adapters_set_workspace(f->adapters, workspace, bytes));
    double *old_da = fixture_doubles(c->rank * c->in_features), *old_db = fixture_doubles(c->rank * c->out_features);
    reference_load(&f->adapter.a_gradient, 0, old_da);
    reference_load(&f->adapter.b_gradient, 0, old_db);
    CHECK_OK(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, c->flags));
    fixture_check_forward(f, NULL);
    CHECK_OK(fixture_backward(f, f->adapters, f->layer, &f->x.m, &f->dy.m, &f->dx.m, c->flags));
    struct fixture_gradients g = fixture_reference_backward(f);
    fixture_check_dx(f, &g, NULL);
    fixture_check_gradients(f, &g, old_da, old_db, 1);
    fixture_gradients_free(&g);
    CHECK_OK(plora_adapters_set_workspace(f->adapters, NULL, 0));
    device_free(workspace);
    free(old_da);
    free(old_db);
    fixture_free(f);
}

/* On a small machine sums are not split: a block goes through all tokens, or columns, and its stages are filled again and again. */
static void one_multiprocessor(void **state)
{
    (void)state;
    check_reseed(3);
    setenv("EMU_MULTIPROCESSORS", "1", 1);
    plora_context *context = check_context(NULL, 0, 0);
    unsetenv("EMU_MULTIPROCESSORS");
    for (int32_t dtype = PLORA_F32; dtype <= PLORA_BF16; ++dtype)
        for (int shape = 0; shape < 3; ++shape) {
            struct linear_case c = {.tokens = shape == 0 ? 67 : 330,
                                    .rank = shape == 0   ? 5
                                            : shape == 1 ? 16
                                                         : 70,
                                    .bias_dtype = -1};
            c.in_features = shape == 1 ? 70 : 330;
            c.out_features = shape == 1 ? 335 : 72;
            c.x_dtype = c.y_dtype = c.w_dtype = c.dx_dtype = dtype;
            c.aligned = shape != 1;
            c.dropout = 0.2;
            c.flags = PLORA_LINEAR_DROPOUT;
            forward_and_backward(context, &c);
        }
    plora_context_destroy(context);
}

/* More inputs and outputs than a panel of fp32 sums: the masks of the second panel are not those of the first. */
static void wide_masks(void **state)
{
    (void)state;
    check_reseed(4);
    plora_context *context = check_context(NULL, 0, 0);
    for (int dtypes = 0; dtypes < 4; ++dtypes) {
        struct linear_case c = {.tokens = 3, .in_features = 2085, .out_features = 18, .rank = 2, .bias_dtype = -1};
        c.x_dtype = dtypes % 2;
        c.w_dtype = PLORA_F16;
        c.y_dtype = dtypes / 2;
        c.dx_dtype = PLORA_BF16;
        c.dropout = 0.5;
        c.flags = PLORA_LINEAR_DROPOUT;
        forward_and_backward(context, &c);
    }
    plora_context_destroy(context);
}

/* --------------------------------------------------------------------------------------------------------------- arenas */

static const int64_t lengths[] = {1, 2, 3, 4, 5, 6, 7, 1023, 4097, 4098, 8195};

enum { LONGEST = 8200 };

static void check_poison(const float *values, int64_t count, const char *what)
{
    for (int64_t i = count; i < LONGEST; ++i)
        CHECK(plora__float_bits(values[i]) == UINT32_MAX, "%s of %lld elements: wrote element %lld", what,
              (long long)count, (long long)i);
}

static void fresh_adapters_of_any_length(void **state)
{
    (void)state;
    plora_context *context = check_context(NULL, 0, 0);
    float *values = twin(LONGEST * sizeof *values);
    for (int i = 0; i < CHECK_COUNT(lengths); ++i)
        for (int32_t init = PLORA_INIT_KAIMING_UNIFORM; init <= PLORA_INIT_GAUSSIAN; ++init) {
            memset(values, CHECK_POISON, LONGEST * sizeof *values);
            const struct plora__init_args args = {.out = device_of(values),
                                                  .rows = 1,
                                                  .columns = lengths[i],
                                                  .row_elements = lengths[i],
                                                  .init = init,
                                                  .layer = 3,
                                                  .scale = 0.5f,
                                                  .seed = check_next(),
                                                  .stage = 2};
            CHECK_OK(DEVICE(context->backend->init_adapter(context->device, &args, NULL)));
            check_poison(values, lengths[i], "A");
            for (int64_t e = 0; e < lengths[i]; ++e)
                CHECK(isfinite(values[e]), "element %lld of %lld is %g", (long long)e, (long long)lengths[i],
                      values[e]);
        }
    forget(values);
    plora_context_destroy(context);
}

/* One step of SGD without momentum: p - rate g. */
static void steps_of_any_length(void **state)
{
    (void)state;
    check_reseed(5);
    plora_context *context = check_context(NULL, 0, 0);
    const struct plora__step_args most = {.count = LONGEST};
    const size_t bytes = context->backend->step_workspace(context->device, &most);
    float *p = twin(LONGEST * sizeof *p), *g = twin(LONGEST * sizeof *g), *m = twin(LONGEST * sizeof *m);
    struct plora__segment *segment = twin(sizeof *segment);
    struct plora__step_state *result = twin(sizeof *result);
    void *workspace = twin(bytes);
    memset(workspace, 0, bytes);
    memset(result, 0, sizeof *result);
    for (int i = 0; i < CHECK_COUNT(lengths); ++i) {
        const int64_t count = lengths[i];
        double square = 0;
        memset(p, CHECK_POISON, LONGEST * sizeof *p);
        memset(m, CHECK_POISON, LONGEST * sizeof *m);
        for (int64_t e = 0; e < LONGEST; ++e) {
            g[e] = (float)check_uniform();
            if (e >= count) continue;
            square += (double)g[e] * g[e];
            p[e] = 1.0f;
            m[e] = 0.0f;
        }
        *segment = (struct plora__segment){0, count, 0, 0};
        struct plora__step_args args = {.algorithm = PLORA_OPTIMIZER_SGD, .segment_count = 1, .count = count};
        args.parameters = device_of(p);
        args.gradients = device_of(g);
        args.first_moment = device_of(m);
        args.segments = device_of(segment);
        args.state = device_of(result);
        args.workspace = device_of(workspace);
        args.learning_rate[0] = args.learning_rate[1] = 0.5;
        args.gradient_scale = 1;
        CHECK_OK(DEVICE(context->backend->optimizer_step(context->device, &args, NULL)));
        CHECK_CLOSE(result->norm, sqrt(square), 1e-12 * sqrt(square), "norm of %lld elements", (long long)count);
        for (int64_t e = 0; e < count; ++e)
            CHECK_CLOSE(p[e], 1 - 0.5 * g[e], 0x1p-23, "element %lld of %lld", (long long)e, (long long)count);
        check_poison(p, count, "parameters");
        check_poison(m, count, "moments");
    }
    void *const blocks[] = {p, g, m, segment, result, workspace};
    for (int i = 0; i < CHECK_COUNT(blocks); ++i)
        forget(blocks[i]);
    plora_context_destroy(context);
}

int main(void)
{
    setenv("PLORA_TEST_BACKEND", "cuda", 1);
    emulated_open();
    check_begin("test_cuda_sizes");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sums_of_many_parts),  cmocka_unit_test(magnitudes_of_long_segments),
        cmocka_unit_test(one_multiprocessor),  cmocka_unit_test(wide_masks),
        cmocka_unit_test(steps_of_any_length), cmocka_unit_test(fresh_adapters_of_any_length),
    };
    return cmocka_run_group_tests_name("cuda_sizes", tests, NULL, NULL);
}
