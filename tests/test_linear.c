/* test_linear.c: forward and backward of a linear layer with its adapter against the double reference, over dtypes, shapes, strides
 * and flags, with bounds that follow from the operation (linear_fixture.h). Refused calls are in test_linear_errors.c. */
#include "linear_fixture.h"

static plora_context *shared; /* one context for most tests: compiled products are kept in it */

static const struct {
    int64_t tokens, in_features, out_features;
    int32_t rank;
    int64_t workspace_tokens;
} shapes[] = {
    {1, 1, 1, 1, 0},      {0, 5, 3, 2, 0},     {1, 7, 5, 1, 0},         {3, 1, 4, 1, 0},       {4, 5, 1, 1, 0},
    {2, 13, 11, 3, 0},    {17, 31, 29, 5, 4},  {17, 257, 40, 3, 0},     {33, 64, 48, 16, 1},   {65, 96, 193, 8, 0},
    {70, 97, 80, 33, 16}, {19, 40, 300, 2, 0}, {257, 193, 131, 7, 100}, {400, 193, 131, 9, 0},
};

/* Somewhere in a larger weight, or all of one. */
static plora_shard random_shard(int64_t rows, int64_t columns)
{
    if (check_integer(0, 1) == 0) return (plora_shard){0, 0, 0, 0};
    const int64_t first_row = check_integer(0, 9), first_column = check_integer(0, 9);
    return (plora_shard){first_row, first_column, first_row + rows + check_integer(0, 5),
                         first_column + columns + check_integer(0, 5)};
}

static struct linear_case random_case(int shape)
{
    return (struct linear_case){
        .shard = random_shard(shapes[shape].out_features, shapes[shape].in_features),
        .tokens = shapes[shape].tokens,
        .in_features = shapes[shape].in_features,
        .out_features = shapes[shape].out_features,
        .rank = shapes[shape].rank,
        .workspace_tokens = shapes[shape].workspace_tokens,
        .x_dtype = (int32_t)check_integer(PLORA_F32, PLORA_BF16),
        .y_dtype = (int32_t)check_integer(PLORA_F32, PLORA_BF16),
        .dx_dtype = (int32_t)check_integer(PLORA_F32, PLORA_BF16),
        .w_dtype = (int32_t)check_integer(PLORA_F32, PLORA_F16),
        .bias_dtype = (int32_t)check_integer(-1, PLORA_F16),
        .layer_flags = (int32_t)check_integer(0, 1) * PLORA_LAYER_FAN_IN_FAN_OUT,
        .gaps = (int)check_integer(0, 1),
        .aligned = (int)check_integer(0, 1),
        .rslora = (int)check_integer(0, 1),
        .dropout = check_integer(0, 1) == 0 ? 0.0 : 0.3,
        .flags = (uint32_t)check_integer(0, 3), /* DROPOUT, DELTA_ONLY */
    };
}

/* What a matrix holds; poison where the operation must not read. */
static double *old_values(struct check_matrix *matrix, int read)
{
    double *old = fixture_doubles(matrix->m.rows * matrix->m.columns);
    if (read)
        reference_load(&matrix->m, 0, old);
    else
        for (int64_t i = 0; i < matrix->m.rows; ++i)
            memset((char *)matrix->m.data + (size_t)(i * matrix->m.stride) * plora__dtype_size(matrix->m.dtype),
                   CHECK_POISON, (size_t)matrix->m.columns * plora__dtype_size(matrix->m.dtype));
    return old;
}

static void check_inputs_kept(const struct linear_fixture *f)
{
    check_matrix_unchanged(&f->x, f->text);
    check_matrix_unchanged(&f->w, f->text);
    check_matrix_unchanged(&f->dy, f->text);
    if (f->c.bias_dtype >= 0) check_matrix_unchanged(&f->bias, f->text);
}

static void run_forward(plora_context *context, const struct linear_case *c)
{
    struct linear_fixture *f = fixture_create(context, c);
    double *old = old_values(&f->y, (c->flags & PLORA_LINEAR_DELTA_ONLY) != 0);
    check_matrix_snapshot(&f->x);
    check_matrix_snapshot(&f->w);
    check_matrix_snapshot(&f->dy);
    check_matrix_snapshot(&f->bias);
    CHECK_OK(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, c->flags));
    fixture_check_forward(f, old);
    check_inputs_kept(f);
    free(old);
    fixture_free(f);
}

static void run_backward(plora_context *context, const struct linear_case *c, int with_dx, int calls)
{
    struct linear_fixture *f = fixture_create(context, c);
    const int kept = (c->flags & (PLORA_LINEAR_DELTA_ONLY | PLORA_LINEAR_ACCUMULATE)) != 0;
    double *old_dx = old_values(&f->dx, kept || !with_dx);
    double *old_da = fixture_doubles(c->rank * c->in_features), *old_db = fixture_doubles(c->rank * c->out_features);
    if (!c->no_adapter) {
        reference_load(&f->adapter.a_gradient, 0, old_da);
        reference_load(&f->adapter.b_gradient, 0, old_db);
    }
    struct check_matrix *const inputs[] = {&f->x, &f->w, &f->dy, &f->bias, &f->dx};
    for (int i = 0; i < CHECK_COUNT(inputs); ++i)
        check_matrix_snapshot(inputs[i]);
    for (int call = 0; call < calls; ++call)
        CHECK_OK(fixture_backward(f, f->adapters, f->layer, &f->x.m, &f->dy.m, with_dx && call == 0 ? &f->dx.m : NULL,
                                  c->flags));
    struct fixture_gradients g = fixture_reference_backward(f);
    if (with_dx)
        fixture_check_dx(f, &g, old_dx);
    else
        check_matrix_unchanged(&f->dx, "dx that was not asked for");
    if (!c->no_adapter) fixture_check_gradients(f, &g, old_da, old_db, calls);
    check_inputs_kept(f);
    fixture_gradients_free(&g);
    free(old_dx);
    free(old_da);
    free(old_db);
    fixture_free(f);
}

/* ------------------------------------------------------------------------------------------------- the reference itself */

/* sum dy y as a function of one number at p. */
static double objective(const struct reference_linear *linear, const double *dy, double *p, double value)
{
    const int64_t count = linear->tokens * linear->out_features;
    struct reference_sum *base = fixture_sums(count), *low = fixture_sums(count);
    const double kept = *p;
    *p = value;
    reference_linear_forward(linear, base, low);
    *p = kept;
    double sum = 0;
    for (int64_t i = 0; i < count; ++i)
        sum += dy[i] * (base[i].value + low[i].value);
    free(base);
    free(low);
    return sum;
}

/* The objective is linear in every single number, so a central difference is exact but for rounding, whatever the step. */
static void check_derivative(const struct linear_fixture *f, double *p, double gradient, double magnitude,
                             const char *what)
{
    const double up = objective(&f->linear, f->dy_values, p, *p + 1),
                 down = objective(&f->linear, f->dy_values, p, *p - 1);
    CHECK_CLOSE((up - down) / 2, gradient, 1e-12 * (fabs(up) + fabs(down) + magnitude + 1000), "d/d%s: %s", what,
                f->text);
}

static void reference_gradients_by_differences(void **state)
{
    (void)state;
    check_reseed(1);
    for (int bits = 0; bits < 8; ++bits) {
        struct linear_case c = {
            .tokens = 3, .in_features = 7, .out_features = 5, .rank = 2, .bias_dtype = bits & 1 ? 0 : -1};
        c.layer_flags = bits & 2 ? PLORA_LAYER_FAN_IN_FAN_OUT : 0;
        c.dropout = 0.4;
        c.flags = bits & 4 ? PLORA_LINEAR_DROPOUT : 0;
        struct linear_fixture *f = fixture_create(shared, &c);
        struct fixture_gradients g = fixture_reference_backward(f);
        for (int64_t i = 0; i < c.tokens * c.in_features; ++i)
            check_derivative(f, &f->x_values[i], g.base[i].value + g.low[i].value,
                             g.base[i].magnitude + g.low[i].magnitude, "x");
        for (int64_t i = 0; i < c.rank * c.in_features; ++i)
            check_derivative(f, &f->a_values[i], g.da[i].value, g.da[i].magnitude, "A");
        for (int64_t i = 0; i < c.rank * c.out_features; ++i)
            check_derivative(f, &f->b_values[i], g.db[i].value, g.db[i].magnitude, "B");
        fixture_gradients_free(&g);
        fixture_free(f);
    }
}

/* ------------------------------------------------------------------------------------------------- dtypes x shapes x flags */

/* Every combination of the three dtypes on every shape, the other choices at random. */
static void over_dtypes_and_shapes(void (*run)(const struct linear_case *))
{
    for (int shape = 0; shape < CHECK_COUNT(shapes); ++shape)
        for (int dtypes = 0; dtypes < 12; ++dtypes) {
            if (check_quick() && shape > 6 && dtypes % 5 != shape % 5) continue;
            struct linear_case c = random_case(shape);
            c.x_dtype = dtypes % 2;
            c.y_dtype = dtypes / 2 % 2;
            c.w_dtype = dtypes / 4;
            run(&c);
        }
}

/* Every combination of flags and layouts, the dtypes at random. */
static void over_flags(void (*run)(const struct linear_case *), uint32_t flags_end)
{
    for (int bits = 0; bits < 64; ++bits)
        for (uint32_t flags = 0; flags < flags_end; ++flags) {
            if (check_quick() && (bits + (int)flags) % 8 != 0) continue;
            struct linear_case c = random_case(5 + bits % 4);
            c.flags = flags;
            c.dropout = bits & 1 ? 0.3 : 0.0;
            c.layer_flags = bits & 2 ? PLORA_LAYER_FAN_IN_FAN_OUT : 0;
            c.no_adapter = (bits & 4) != 0;
            c.gaps = (bits & 8) != 0;
            c.bias_dtype = bits / 16 - 1;
            run(&c);
        }
}

static void forward_case(const struct linear_case *c)
{
    run_forward(shared, c);
}

static void backward_case(const struct linear_case *c)
{
    struct linear_case changed = *c;
    if (check_integer(0, 2) == 0) changed.flags |= PLORA_LINEAR_ACCUMULATE;
    run_backward(shared, &changed, check_integer(0, 4) != 0, (int)check_integer(1, 2));
}

static void backward_flags_case(const struct linear_case *c)
{
    run_backward(shared, c, 1, 1);
}

static void forward_over_dtypes_and_shapes(void **state)
{
    (void)state;
    check_reseed(2);
    over_dtypes_and_shapes(forward_case);
}

static void forward_over_flags(void **state)
{
    (void)state;
    check_reseed(3);
    over_flags(forward_case, 4);
}

static void backward_over_dtypes_and_shapes(void **state)
{
    (void)state;
    check_reseed(4);
    over_dtypes_and_shapes(backward_case);
}

static void backward_over_flags(void **state)
{
    (void)state;
    check_reseed(5);
    over_flags(backward_flags_case, 8);
}

static void bf16_throughout(void **state)
{
    (void)state;
    check_reseed(6);
    for (int shape = 0; shape < CHECK_COUNT(shapes); ++shape)
        for (int drop = 0; drop < 2; ++drop) {
            struct linear_case c = random_case(shape);
            c.x_dtype = c.y_dtype = c.w_dtype = c.dx_dtype = PLORA_BF16;
            c.dropout = drop ? 0.3 : 0.0;
            c.flags = PLORA_LINEAR_DROPOUT;
            run_forward(shared, &c);
            run_backward(shared, &c, 1, 1);
        }
}

/* K or N so long that the product with W is summed in pieces (a vocabulary). */
static void long_sums(void **state)
{
    (void)state;
    check_reseed(14);
    for (int32_t dtype = PLORA_F32; dtype <= PLORA_BF16; ++dtype)
        for (int tall = 0; tall < 2; ++tall)
            for (uint32_t flags = 0; flags <= PLORA_LINEAR_ACCUMULATE; flags += PLORA_LINEAR_ACCUMULATE) {
                struct linear_case c = {
                    .tokens = 3,
                    .in_features = tall ? 17 : 33003,
                    .out_features = tall ? 33003 : 17,
                    .rank = 3,
                    .x_dtype = dtype,
                    .y_dtype = dtype,
                    .dx_dtype = dtype,
                    .w_dtype = dtype,
                    .bias_dtype = dtype,
                };
                run_forward(shared, &c);
                c.flags = flags;
                run_backward(shared, &c, 1, 1);
            }
}

/* Ranks on both sides of every multiple that kernels are cut by, with rows that may and may not be read 16 bytes at a time. */
static void ranks_up_to_256(void **state)
{
    (void)state;
    check_reseed(15);
    static const int32_t ranks[] = {1,  2,  3,  4,  7,  8,   15,  16,  17,  31,  32, 33,
                                    48, 63, 64, 65, 96, 127, 128, 129, 200, 255, 256};
    for (int i = 0; i < CHECK_COUNT(ranks); ++i)
        for (int32_t dtype = PLORA_F32; dtype <= PLORA_BF16; ++dtype) {
            if (check_quick() && (i + dtype) % 4 != 0) continue;
            struct linear_case c = {.tokens = check_integer(1, 9) * (i % 4 == 0 ? 9 : 1), .rank = ranks[i]};
            const int64_t least = ranks[i] > 16 ? (ranks[i] + 7) / 8 : 2;
            c.in_features = 8 * check_integer(least, least + 9);
            c.out_features = 8 * check_integer(least, least + 9) + (i % 3 == 0 ? check_integer(1, 7) : 0);
            c.aligned = i % 3 != 1;
            c.gaps = i % 3 == 1;
            c.x_dtype = c.y_dtype = c.dx_dtype = c.w_dtype = dtype;
            c.bias_dtype = (int32_t)check_integer(-1, PLORA_F16);
            c.layer_flags = (int32_t)check_integer(0, 1) * PLORA_LAYER_FAN_IN_FAN_OUT;
            c.dropout = i % 2 == 0 ? 0.0 : 0.2;
            c.flags = PLORA_LINEAR_DROPOUT;
            run_forward(shared, &c);
            run_backward(shared, &c, 1, 1);
        }
}

/* W and x so large that they are widened in several panels. */
static void widened_panels(void **state)
{
    (void)state;
    check_reseed(16);
    for (int dtypes = 0; dtypes < 12; ++dtypes) {
        if (check_quick() && (uint64_t)dtypes != check_seed_value % 12) continue;
        struct linear_case c = {.tokens = 3, .in_features = 1101, .out_features = 2117, .rank = 2};
        c.x_dtype = dtypes % 2;
        c.y_dtype = dtypes / 2 % 2;
        c.w_dtype = dtypes / 4;
        c.dx_dtype = (int32_t)check_integer(PLORA_F32, PLORA_BF16);
        c.bias_dtype = (int32_t)check_integer(-1, PLORA_F16);
        c.layer_flags = (int32_t)check_integer(0, 1) * PLORA_LAYER_FAN_IN_FAN_OUT;
        c.gaps = (int)check_integer(0, 1);
        c.dropout = 0.3;
        c.flags = (uint32_t)check_integer(0, 1);
        run_forward(shared, &c);
        c.flags |= (uint32_t)check_integer(0, 1) * PLORA_LINEAR_ACCUMULATE;
        run_backward(shared, &c, 1, 1);
    }
}

/* As many threads as there may be, and both modes: the grids above ran with the default. */
static void threads_and_modes(void **state)
{
    (void)state;
    check_reseed(7);
    for (int threads = 1; threads <= 3; ++threads)
        for (int deterministic = 0; deterministic < 2; ++deterministic) {
            plora_context *context = check_context(NULL, threads, deterministic);
            for (int shape = 6; shape < CHECK_COUNT(shapes); shape += check_quick() || threads != 2 ? 3 : 1) {
                struct linear_case c = random_case(shape);
                run_forward(context, &c);
                run_backward(context, &c, 1, 1);
                c = random_case(shape);
                c.x_dtype = c.y_dtype = c.w_dtype = PLORA_BF16;
                run_forward(context, &c);
                run_backward(context, &c, 1, 1);
            }
            plora_context_destroy(context);
        }
}

/* ---------------------------------------------------------------------------------------------------------- determinism */

struct bits {
    struct check_matrix y, dx;
    float *gradients;
    int64_t count;
};

/* All results of one case; the same seed state gives the same inputs. */
static struct bits results_of(int threads, const struct linear_case *c, uint64_t salt)
{
    check_reseed(salt);
    plora_context *context = check_context(NULL, threads, 1);
    struct linear_fixture *f = fixture_create(context, c);
    CHECK_OK(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, c->flags));
    CHECK_OK(fixture_backward(f, f->adapters, f->layer, &f->x.m, &f->dy.m, &f->dx.m, c->flags));
    float *gradients = NULL;
    struct bits bits = {f->y, f->dx, NULL, 0};
    CHECK_OK(plora_adapters_gradients(f->adapters, &gradients, &bits.count));
    bits.gradients = malloc((size_t)bits.count * sizeof *gradients);
    assert_non_null(bits.gradients);
    device_transfer(bits.gradients, gradients, (size_t)bits.count * sizeof *gradients);
    memset(&f->y, 0, sizeof f->y);
    memset(&f->dx, 0, sizeof f->dx);
    fixture_free(f);
    plora_context_destroy(context);
    return bits;
}

static void same_bits_with_any_number_of_threads(void **state)
{
    (void)state;
    for (int i = 0; i < (check_quick() ? 3 : 24); ++i) {
        check_reseed(100 + (uint64_t)i);
        struct linear_case c =
            random_case(i % 2 == 0 ? CHECK_COUNT(shapes) - 1 : (int)check_integer(6, CHECK_COUNT(shapes) - 1));
        if (i % 3 == 0) c.x_dtype = c.y_dtype = c.w_dtype = PLORA_BF16;
        if (i % 3 == 1) c.x_dtype = c.y_dtype = c.w_dtype = PLORA_F32;
        struct bits one = results_of(1, &c, 200 + (uint64_t)i);
        for (int threads = 2; threads <= 3; ++threads) {
            struct bits more = results_of(threads, &c, 200 + (uint64_t)i);
            CHECK(memcmp(one.y.memory, more.y.memory, one.y.bytes) == 0, "y differs between 1 and %d threads, case %d",
                  threads, i);
            CHECK(memcmp(one.dx.memory, more.dx.memory, one.dx.bytes) == 0,
                  "dx differs between 1 and %d threads, case %d", threads, i);
            CHECK(memcmp(one.gradients, more.gradients, (size_t)one.count * sizeof(float)) == 0,
                  "the gradients differ between 1 and %d threads, case %d", threads, i);
            check_matrix_free(&more.y);
            check_matrix_free(&more.dx);
            free(more.gradients);
        }
        check_matrix_free(&one.y);
        check_matrix_free(&one.dx);
        free(one.gradients);
    }
}

/* ------------------------------------------------------------------------------------------------------ dropout position */

static plora_matrix rows_of(const plora_matrix *matrix, int64_t first, int64_t rows)
{
    plora_matrix part = *matrix;
    part.data = (char *)matrix->data + (size_t)(first * matrix->stride) * plora__dtype_size(matrix->dtype);
    part.rows = rows;
    return part;
}

/* A batch in chunks, each with its own first_token, is the whole batch: y, dx and both gradients. */
static void chunks_of_a_batch_draw_its_masks(void **state)
{
    (void)state;
    check_reseed(8);
    for (int shape = 6; shape < CHECK_COUNT(shapes); shape += check_quick() ? 5 : 1) {
        struct linear_case c = random_case(shape);
        c.dropout = 0.3;
        c.flags = PLORA_LINEAR_DROPOUT;
        struct linear_fixture *f = fixture_create(shared, &c);
        double *old_da = fixture_doubles(c.rank * c.in_features), *old_db = fixture_doubles(c.rank * c.out_features);
        reference_load(&f->adapter.a_gradient, 0, old_da);
        reference_load(&f->adapter.b_gradient, 0, old_db);
        int64_t first = 0;
        while (first < c.tokens) {
            const int64_t rows = check_integer(1, c.tokens - first);
            const plora_matrix x = rows_of(&f->x.m, first, rows), y = rows_of(&f->y.m, first, rows);
            const plora_matrix dy = rows_of(&f->dy.m, first, rows), dx = rows_of(&f->dx.m, first, rows);
            CHECK_OK(plora_adapters_set_dropout_position(f->adapters, f->step, f->first_token + (uint64_t)first));
            CHECK_OK(fixture_forward(f, f->adapters, f->layer, &x, &y, c.flags));
            CHECK_OK(fixture_backward(f, f->adapters, f->layer, &x, &dy, &dx, c.flags));
            first += rows;
        }
        fixture_check_forward(f, NULL);
        struct fixture_gradients g = fixture_reference_backward(f);
        fixture_check_dx(f, &g, NULL);
        fixture_check_gradients(f, &g, old_da, old_db, 1);
        fixture_gradients_free(&g);
        free(old_da);
        free(old_db);
        fixture_free(f);
    }
}

/* Another step, another layer: other masks. Without the flag: none. */
static void masks_change_with_the_step(void **state)
{
    (void)state;
    check_reseed(9);
    struct linear_case c = {
        .tokens = 9, .in_features = 24, .out_features = 16, .rank = 4, .bias_dtype = -1, .dropout = 0.5};
    c.flags = PLORA_LINEAR_DROPOUT;
    struct linear_fixture *f = fixture_create(shared, &c);
    CHECK_OK(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, c.flags));
    check_matrix_snapshot(&f->y);
    CHECK_OK(plora_adapters_set_dropout_position(f->adapters, f->step + 1, f->first_token));
    CHECK_OK(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, c.flags));
    CHECK(memcmp(f->y.memory, f->y.snapshot, f->y.bytes) != 0, "the mask of step + 1 is that of the step");
    CHECK_OK(plora_adapters_set_dropout_position(f->adapters, f->step, f->first_token));
    CHECK_OK(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, c.flags));
    check_matrix_unchanged(&f->y, "y of the same step drawn again");
    f->linear.mask = NULL;
    CHECK_OK(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, 0));
    f->c.flags = 0;
    fixture_check_forward(f, NULL);
    fixture_free(f);
}

/* --------------------------------------------------------------------------------------------------- layers and workspaces */

/* The host's workspace: any size from that of one token on, nothing outside it is touched. */
static void host_workspace(void **state)
{
    (void)state;
    check_reseed(10);
    for (int i = 0; i < (check_quick() ? 4 : 24); ++i) {
        struct linear_case c = random_case(6 + i % (CHECK_COUNT(shapes) - 6));
        if (i % 2 == 0) c.x_dtype = c.y_dtype = c.w_dtype = c.dx_dtype = PLORA_BF16;
        struct linear_fixture *f = fixture_create(shared, &c);
        size_t bytes = 0;
        const int64_t tokens = i % 3 == 0 ? 1 : check_integer(1, c.tokens);
        CHECK_OK(plora_adapters_workspace_size(f->adapters, tokens, &bytes));
        unsigned char guards[2][64];
        memset(guards, CHECK_POISON, sizeof guards);
        unsigned char *memory =
            device_is_cuda() ? device_malloc(bytes + 128) : aligned_alloc(64, (bytes + 63) / 64 * 64 + 128);
        assert_non_null(memory);
        if (!device_is_cuda()) memset(memory, CHECK_POISON, bytes + 128);
        device_transfer(memory, guards[0], 64);
        device_transfer(memory + 64 + bytes, guards[1], 64);
        CHECK_OK(plora_adapters_set_workspace(f->adapters, memory + 64, bytes));
        double *old_y = old_values(&f->y, 1), *old_dx = old_values(&f->dx, 1);
        CHECK_OK(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, c.flags));
        CHECK_OK(fixture_backward(f, f->adapters, f->layer, &f->x.m, &f->dy.m, &f->dx.m, c.flags));
        fixture_check_forward(f, old_y);
        struct fixture_gradients g = fixture_reference_backward(f);
        fixture_check_dx(f, &g, old_dx);
        fixture_gradients_free(&g);
        device_transfer(guards[0], memory, 64);
        device_transfer(guards[1], memory + 64 + bytes, 64);
        for (size_t at = 0; at < 64; ++at)
            CHECK(guards[0][at] == CHECK_POISON && guards[1][at] == CHECK_POISON,
                  "wrote outside of a workspace of %zu bytes, %zu from its edge: %s", bytes, at, f->text);
        CHECK_OK(plora_adapters_set_workspace(f->adapters, NULL, 0));
        if (device_is_cuda())
            device_free(memory);
        else
            free(memory);
        free(old_y);
        free(old_dx);
        fixture_free(f);
    }
}

/* Two layers over one weight share an adapter: equal views, gradients that add up. */
static void tied_layers(void **state)
{
    (void)state;
    check_reseed(11);
    struct linear_case c = {.tokens = 6, .in_features = 12, .out_features = 10, .rank = 3, .bias_dtype = -1};
    struct linear_fixture *f = fixture_create(shared, &c);
    plora_model *model = NULL;
    plora_adapters *adapters = NULL;
    CHECK_OK(plora_model_create(shared, &model));
    CHECK_OK(check_add_linear(model, "first", &f->w.m, NULL, 0, 0, NULL));
    CHECK_OK(check_add_linear(model, "second", &f->w.m, NULL, 0, 0, NULL));
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = c.rank;
    options.alpha = f->alpha;
    CHECK_OK(plora_adapters_create(model, &options, &adapters));
    plora_adapter first = PLORA_ADAPTER_INIT, second = PLORA_ADAPTER_INIT;
    CHECK_OK(plora_adapters_layer(adapters, 0, &first));
    CHECK_OK(plora_adapters_layer(adapters, 1, &second));
    assert_ptr_equal(first.a.data, second.a.data);
    assert_ptr_equal(first.b_gradient.data, second.b_gradient.data);
    fixture_mirror(&first);
    memcpy(first.a.data, f->adapter.a.data, (size_t)(c.rank * c.in_features) * sizeof(float));
    memcpy(first.b.data, f->adapter.b.data, (size_t)(c.rank * c.out_features) * sizeof(float));
    for (int32_t layer = 0; layer < 2; ++layer) {
        CHECK_OK(fixture_forward(f, adapters, layer, &f->x.m, &f->y.m, 0));
        fixture_check_forward(f, NULL);
        CHECK_OK(fixture_backward(f, adapters, layer, &f->x.m, &f->dy.m, NULL, 0));
    }
    struct fixture_gradients g = fixture_reference_backward(f);
    double *zero = fixture_doubles(c.rank * (c.in_features + c.out_features));
    const plora_adapter own = f->adapter;
    f->adapter = first;
    fixture_check_gradients(f, &g, zero, zero, 2);
    f->adapter = own;
    fixture_gradients_free(&g);
    free(zero);
    fixture_forget(&first);
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    fixture_free(f);
}

/* A second set on the same model adds its own low-rank part to what the first gave. */
static void two_sets_on_one_model(void **state)
{
    (void)state;
    check_reseed(12);
    struct linear_case c = {
        .tokens = 7, .in_features = 20, .out_features = 9, .rank = 4, .bias_dtype = PLORA_F32, .gaps = 1};
    struct linear_fixture *f = fixture_create(shared, &c);
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = 2;
    options.alpha = 3;
    options.targets = "layer";
    plora_adapters *second = NULL;
    CHECK_OK(plora_adapters_create(f->model, &options, &second));
    plora_adapter adapter = PLORA_ADAPTER_INIT;
    CHECK_OK(plora_adapters_layer(second, f->layer, &adapter));
    assert_ptr_not_equal(adapter.a.data, f->adapter.a.data);
    fixture_mirror(&adapter);
    for (int64_t i = 0; i < 2 * c.out_features; ++i)
        ((float *)adapter.b.data)[i] = (float)check_uniform();
    CHECK_OK(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, 0));
    fixture_check_forward(f, NULL);
    double *old = fixture_doubles(c.tokens * c.out_features);
    reference_load(&f->y.m, 0, old);
    CHECK_OK(fixture_forward(f, second, f->layer, &f->x.m, &f->y.m, PLORA_LINEAR_DELTA_ONLY));
    f->c.flags = PLORA_LINEAR_DELTA_ONLY;
    f->c.rank = 2;
    reference_load(&adapter.a, 0, f->a_values);
    reference_load(&adapter.b, 0, f->b_values);
    f->linear.rank = 2;
    f->linear.scale = 1.5;
    fixture_check_forward(f, old);
    free(old);
    fixture_forget(&adapter);
    plora_adapters_destroy(second);
    fixture_free(f);
}

/* Forward and backward, twice: on CUDA as a graph that is captured once. Dropout, which would be the same both times, is refused. */
static void twice_by_a_graph(void **state)
{
    (void)state;
    check_reseed(17);
    for (int shape = 6; shape < CHECK_COUNT(shapes); shape += check_quick() ? 3 : 1) {
        struct linear_case c = random_case(shape);
        c.flags = 0;
        if (shape % 2 == 0) c.x_dtype = c.y_dtype = c.w_dtype = c.dx_dtype = PLORA_BF16;
        struct linear_fixture *f = fixture_create(shared, &c);
        double *old_da = fixture_doubles(c.rank * c.in_features), *old_db = fixture_doubles(c.rank * c.out_features);
        reference_load(&f->adapter.a_gradient, 0, old_da);
        reference_load(&f->adapter.b_gradient, 0, old_db);
        const int captured = device_is_cuda();
        if (captured && f->stream == NULL) f->stream = device_stream_create();
        const plora_matrix x = device_matrix(f->x.m), y = device_matrix(f->y.m), dy = device_matrix(f->dy.m),
                           dx = device_matrix(f->dx.m);
        device_upload();
        if (captured) device_capture_begin(f->stream);
        for (int i = 0; i < (captured ? 1 : 2); ++i) {
            CHECK_OK(plora_linear_forward(f->adapters, f->layer, &x, &y, c.flags, f->stream));
            CHECK_OK(plora_linear_backward(f->adapters, f->layer, &x, &dy, &dx, c.flags, f->stream));
        }
        if (captured)
            CHECK_FAILS(plora_linear_forward(f->adapters, f->layer, &x, &y, PLORA_LINEAR_DROPOUT, f->stream),
                        PLORA_ERROR_UNSUPPORTED, "captured");
        void *graph = captured ? device_capture_end(f->stream) : NULL;
        for (int i = 0; captured && i < 2; ++i)
            device_graph_launch(graph, f->stream);
        CHECK_OK(device_download(PLORA_OK));
        if (captured) device_graph_destroy(graph);
        fixture_check_forward(f, NULL);
        struct fixture_gradients g = fixture_reference_backward(f);
        fixture_check_dx(f, &g, NULL);
        fixture_check_gradients(f, &g, old_da, old_db, 2);
        fixture_gradients_free(&g);
        free(old_da);
        free(old_db);
        fixture_free(f);
    }
}

/* A NaN in one token stays in that token. */
static void non_finite_inputs_spread_by_rows_only(void **state)
{
    (void)state;
    check_reseed(13);
    for (int dtype = PLORA_F32; dtype <= PLORA_BF16; ++dtype) {
        struct linear_case c = {.tokens = 5, .in_features = 33, .out_features = 18, .rank = 3, .bias_dtype = -1};
        c.x_dtype = c.y_dtype = c.w_dtype = dtype;
        struct linear_fixture *f = fixture_create(shared, &c);
        plora__store(f->x.m.data, 2 * f->x.m.stride + 7, dtype, NAN);
        CHECK_OK(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, 0));
        for (int64_t t = 0; t < c.tokens; ++t)
            for (int64_t n = 0; n < c.out_features; ++n)
                CHECK(isnan(check_element(&f->y.m, t, n)) == (t == 2), "y[%lld,%lld] is %g", (long long)t, (long long)n,
                      check_element(&f->y.m, t, n));
        fixture_free(f);
    }
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
    check_begin("test_linear");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reference_gradients_by_differences),
        cmocka_unit_test(forward_over_dtypes_and_shapes),
        cmocka_unit_test(forward_over_flags),
        cmocka_unit_test(backward_over_dtypes_and_shapes),
        cmocka_unit_test(backward_over_flags),
        cmocka_unit_test(bf16_throughout),
        cmocka_unit_test(long_sums),
        cmocka_unit_test(ranks_up_to_256),
        cmocka_unit_test(widened_panels),
        cmocka_unit_test(threads_and_modes),
        cmocka_unit_test(same_bits_with_any_number_of_threads),
        cmocka_unit_test(chunks_of_a_batch_draw_its_masks),
        cmocka_unit_test(masks_change_with_the_step),
        cmocka_unit_test(host_workspace),
        cmocka_unit_test(tied_layers),
        cmocka_unit_test(two_sets_on_one_model),
        cmocka_unit_test(twice_by_a_graph),
        cmocka_unit_test(non_finite_inputs_spread_by_rows_only),
    };
    return cmocka_run_group_tests_name("linear", tests, group_setup, group_teardown);
}
