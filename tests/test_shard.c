/* test_shard.c: shards of a weight (plora_shard): put together, they are the whole.
 *
 *     init, dropout mask, every rounding of an unload        bit for bit
 *     y, dx, dA, dB                                          within the bounds of linear_fixture.h
 *
 * A weight is cut in one or both directions at places that no kernel knows. Dropout over dtypes and shapes is in test_linear.c, whose
 * layers are shards half of the time; what calls refuse, checkpoints and ledgers are in test_shard_files.c. */
#include "shard_fixture.h"

static plora_context *shared;

static const struct {
    int64_t n, k;
    int32_t rank;
} shapes[] = {{1, 2, 1}, {2, 1, 1}, {5, 7, 1}, {13, 29, 3}, {40, 257, 5}, {64, 96, 16}, {8, 8, 8}, {193, 66, 33}};

/* Calls `body` with each part of each of three cuts of a whole: by rows, by columns, by both. */
static void for_each_part(struct whole *whole, void (*body)(struct whole *, const struct part *))
{
    const int64_t row = check_integer(1, whole->n > 1 ? whole->n - 1 : 1),
                  column = check_integer(1, whole->k - (whole->k > 1));
    const int64_t rows[] = {whole->n, row, row}, columns[] = {column, whole->k, column};
    for (int cut = 0; cut < 3; ++cut)
        for (int below = 0; below < 2; ++below)
            for (int right = 0; right < 2; ++right) {
                const struct part part = {
                    .first_row = below ? rows[cut] : 0,
                    .first_column = right ? columns[cut] : 0,
                    .rows = below ? whole->n - rows[cut] : rows[cut],
                    .columns = right ? whole->k - columns[cut] : columns[cut],
                };
                if (part.rows > 0 && part.columns > 0) body(whole, &part);
            }
}

/* ---------------------------------------------------------------------------------------------------------------- init */

/* A and B of a shard are those of the whole, in its rows and columns. */
static void check_factors(const struct whole *whole, const struct piece *all, const struct piece *piece)
{
    const float *a = piece->adapter.a.data, *b = piece->adapter.b.data;
    const float *whole_a = all->adapter.a.data, *whole_b = all->adapter.b.data;
    const struct part *p = &piece->part;
    const int64_t row = piece->gathered ? 0 : p->first_row, column = piece->gathered ? 0 : p->first_column;
    const int64_t n = piece->gathered ? whole->n : p->rows, k = piece->gathered ? whole->k : p->columns;
    assert_int_equal(piece->adapter.a.columns, k);
    assert_int_equal(piece->adapter.b.rows, n);
    for (int64_t r = 0; r < whole->rank; ++r)
        for (int64_t j = 0; j < k; ++j) {
            const float got = a[r * k + j], want = whole_a[r * whole->k + column + j];
            CHECK(plora__float_bits(got) == plora__float_bits(want), "A[%lld,%lld] of shard %s is %.9g, want %.9g",
                  (long long)r, (long long)j, piece->text, (double)got, (double)want);
        }
    for (int64_t i = 0; i < n * whole->rank; ++i) {
        const float got = b[i], want = whole_b[row * whole->rank + i];
        CHECK(plora__float_bits(got) == plora__float_bits(want), "B[%lld] of shard %s is %.9g, want %.9g", (long long)i,
              piece->text, (double)got, (double)want);
    }
}

static void check_fresh(struct whole *whole, const struct part *part)
{
    for (int gathered = 0; gathered < 2; ++gathered) {
        struct piece *piece = piece_create(shared, whole, part, gathered);
        check_factors(whole, whole->all, piece);
        piece_free(piece);
    }
}

static void fresh_adapters(void **state)
{
    (void)state;
    check_reseed(1);
    for (int shape = 0; shape < CHECK_COUNT(shapes); ++shape)
        for (int bits = 0; bits < 4; ++bits) {
            struct whole whole = {.n = shapes[shape].n,
                                  .k = shapes[shape].k,
                                  .rank = shapes[shape].rank,
                                  .dtype = (int32_t)check_integer(PLORA_F32, PLORA_F16),
                                  .fan_in_fan_out = bits & 1,
                                  .init = bits & 2 ? PLORA_INIT_GAUSSIAN : PLORA_INIT_KAIMING_UNIFORM};
            whole_create(shared, &whole);
            for_each_part(&whole, check_fresh);
            whole_free(&whole);
        }
}

/* ------------------------------------------------------------------------------------------------------------- dropout */

enum { MASK_TOKENS = 3 };

/* The mask of a layer, twice: as the backward's dx shows it and as its dA does. With ones for x, A and B, one nonzero of dy in one token
 * and p = 1/2 all products are exact. x and dx have the layer's columns. */
static void read_mask(const struct whole *whole, struct piece *piece, int32_t dtype, uint64_t first_token, float *mask)
{
    const int64_t k = piece->adapter.a.columns, n = piece->adapter.b.rows;
    struct check_matrix x = check_matrix_new(MASK_TOKENS, k, k, dtype),
                        dx = check_matrix_new(MASK_TOKENS, k, k, PLORA_F32);
    struct check_matrix dy = check_matrix_new(MASK_TOKENS, n, n, dtype);
    for (int64_t i = 0; i < MASK_TOKENS * k; ++i) {
        plora__store(x.m.data, i, dtype, 1.0f);
        ((float *)dx.m.data)[i] = 0.0f;
    }
    for (int64_t i = 0; i < whole->rank * k; ++i)
        ((float *)piece->adapter.a.data)[i] = i < k;
    for (int64_t i = 0; i < whole->rank * n; ++i)
        ((float *)piece->adapter.b.data)[i] = 1.0f;
    CHECK_OK(plora_adapters_set_dropout_position(piece->adapters, 5, first_token));
    for (int64_t token = 0; token < MASK_TOKENS; ++token) {
        float *gradient = piece->adapter.a_gradient.data;
        for (int64_t i = 0; i < MASK_TOKENS * n; ++i)
            plora__store(dy.m.data, i, dtype, i == token * n ? 1.0f : 0.0f);
        for (int64_t i = 0; i < whole->rank * k; ++i)
            gradient[i] = 0.0f;
        const plora_matrix device_x = device_matrix(x.m), device_dy = device_matrix(dy.m),
                           device_dx = device_matrix(dx.m);
        CHECK_OK(DEVICE(plora_linear_backward(piece->adapters, SHARD_LAYER, &device_x, &device_dy, &device_dx,
                                              PLORA_LINEAR_DROPOUT | PLORA_LINEAR_DELTA_ONLY, NULL)));
        for (int64_t j = 0; j < k; ++j) {
            mask[token * k + j] = ((float *)dx.m.data)[token * k + j];
            CHECK(gradient[j] == mask[token * k + j], "mask [%lld,%lld]: dA says %g, dx %g: %s", (long long)token,
                  (long long)j, (double)gradient[j], (double)mask[token * k + j], piece->text);
        }
    }
    check_matrix_free(&x);
    check_matrix_free(&dx);
    check_matrix_free(&dy);
}

static void check_masks(struct whole *whole, const struct part *part)
{
    float *want = calloc((size_t)(MASK_TOKENS * whole->k), sizeof *want),
          *got = calloc((size_t)(MASK_TOKENS * whole->k), sizeof *got);
    const int32_t dtype = (int32_t)check_integer(PLORA_F32, PLORA_BF16);
    const uint64_t first_token = check_next() >> 20;
    assert_non_null(want);
    assert_non_null(got);
    read_mask(whole, whole->all, dtype, first_token, want);
    for (int gathered = 0; gathered < 2; ++gathered) {
        struct piece *piece = piece_create(shared, whole, part, gathered);
        const int64_t column = gathered ? 0 : part->first_column, k = gathered ? whole->k : part->columns;
        read_mask(whole, piece, dtype, first_token, got);
        int64_t kept = 0;
        for (int64_t t = 0; t < MASK_TOKENS; ++t)
            for (int64_t j = 0; j < k; ++j) {
                const float there = want[t * whole->k + column + j];
                CHECK(got[t * k + j] == there && (there == 0.0f || there == 2.0f * whole->all->scale),
                      "mask [%lld,%lld] is %g, of the whole %g: %s", (long long)t, (long long)j, (double)got[t * k + j],
                      (double)there, piece->text);
                kept += there != 0.0f;
            }
        CHECK(MASK_TOKENS * k < 64 || (kept > 0 && kept < MASK_TOKENS * k), "%lld of %lld are kept: %s",
              (long long)kept, (long long)(MASK_TOKENS * k), piece->text);
        piece_free(piece);
    }
    free(want);
    free(got);
}

static void dropout_masks(void **state)
{
    (void)state;
    check_reseed(2);
    for (int shape = 0; shape < CHECK_COUNT(shapes); ++shape) {
        struct whole whole = {.n = shapes[shape].n,
                              .k = shapes[shape].k,
                              .rank = shapes[shape].rank,
                              .dtype = (int32_t)check_integer(PLORA_F32, PLORA_F16),
                              .fan_in_fan_out = (int)check_integer(0, 1),
                              .dropout = 0.5};
        whole_create(shared, &whole);
        for_each_part(&whole, check_masks);
        whole_free(&whole);
    }
}

/* -------------------------------------------------------------------------------------------------------------- unload */

static const int32_t roundings[] = {PLORA_ROUND_NEAREST, PLORA_ROUND_STOCHASTIC, PLORA_ROUND_RESIDUAL};

static void unload(const struct whole *whole, struct piece *piece, double momentum)
{
    plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
    plora_unload_layer layer;
    plora_unload_report report = PLORA_UNLOAD_REPORT_INIT;
    options.momentum = momentum;
    options.rounding = whole->rounding;
    report.layers = &layer;
    report.layer_capacity = 1;
    CHECK_OK(DEVICE(plora_unload(piece->adapters, NULL, &options, &report, NULL)));
    piece->report = layer;
}

/* Two stages: a share of the adapter moves, then the rest of it; then a fresh one. */
static void unload_twice(const struct whole *whole, struct piece *piece)
{
    piece_set_factors(whole, piece);
    unload(whole, piece, 0.25);
    unload(whole, piece, 1.0);
}

static void check_unloaded(struct whole *whole, const struct part *part)
{
    for (int gathered = 0; gathered < 2; ++gathered) {
        struct piece *piece = piece_create(shared, whole, part, gathered);
        unload_twice(whole, piece);
        piece_check_weight(whole, whole->all, piece);
        check_factors(whole, whole->all, piece);
        check_matrix_guards(&piece->w, piece->text);
        piece_free(piece);
    }
}

static void unloads_of_all_roundings(void **state)
{
    (void)state;
    check_reseed(3);
    for (int shape = 0; shape < CHECK_COUNT(shapes); ++shape)
        for (int i = 0; i < CHECK_COUNT(roundings); ++i)
            for (int32_t dtype = PLORA_F32; dtype <= PLORA_F16; ++dtype)
                for (int turned = 0; turned < 2; ++turned) {
                    if (check_quick() && (shape + i + dtype + turned) % 4 != 0) continue;
                    struct whole whole = {.n = shapes[shape].n,
                                          .k = shapes[shape].k,
                                          .rank = shapes[shape].rank,
                                          .dtype = dtype,
                                          .fan_in_fan_out = turned,
                                          .rounding = roundings[i],
                                          .residual = roundings[i] == PLORA_ROUND_RESIDUAL ? PLORA_RESIDUAL_DEFAULT
                                                                                           : PLORA_RESIDUAL_NONE};
                    whole_create(shared, &whole);
                    unload_twice(&whole, whole.all);
                    for_each_part(&whole, check_unloaded);
                    whole_free(&whole);
                }
}

/* What the reports of the parts say together is what that of the whole says. */
static void reports_add_up(void **state)
{
    (void)state;
    check_reseed(4);
    struct whole whole = {.n = 37,
                          .k = 51,
                          .rank = 4,
                          .dtype = PLORA_BF16,
                          .rounding = PLORA_ROUND_NEAREST,
                          .residual = PLORA_RESIDUAL_NONE};
    whole_create(shared, &whole);
    piece_set_factors(&whole, whole.all);
    unload(&whole, whole.all, 1.0);
    for (int gathered = 0; gathered < 2; ++gathered) {
        double squares = 0, changed = 0, lost = 0, elements = 0;
        for (int below = 0; below < 2; ++below) {
            const struct part part = {
                .first_row = below ? 11 : 0, .rows = below ? whole.n - 11 : 11, .columns = whole.k};
            struct piece *piece = piece_create(shared, &whole, &part, gathered);
            piece_set_factors(&whole, piece);
            unload(&whole, piece, 1.0);
            const double count = (double)(part.rows * part.columns);
            squares += piece->report.update_rms * piece->report.update_rms * count;
            changed += piece->report.changed * count;
            lost = fmax(lost, piece->report.lost_max);
            elements += count;
            piece_free(piece);
        }
        const plora_unload_layer *report = &whole.all->report;
        CHECK_CLOSE(sqrt(squares / elements), report->update_rms, 1e-5 * report->update_rms, "update_rms");
        CHECK_CLOSE(changed / elements, report->changed, 1e-12, "changed");
        CHECK_CLOSE(lost, report->lost_max, 0.0, "lost_max");
    }
    whole_free(&whole);
}

/* ------------------------------------------------------------------------------------------------ forward and backward */

/* Elements of parts against sums of the whole: each part's own bound is that of a share of the sum, so `parts` times that of the whole
 * holds for the sum of them. */
static void check_sum(const struct linear_fixture *f, const double *got, const struct reference_sum *base,
                      const struct reference_sum *low, int64_t count, int64_t inner, int32_t dtype, const char *what)
{
    for (int64_t i = 0; i < count; ++i) {
        double want, bound;
        fixture_output_bound(&f->c, dtype, inner, 0.0, base[i], low[i], &want, &bound);
        bound = 2 * bound + 2 * check_roundoff(dtype) * (base[i].magnitude + low[i].magnitude);
        CHECK_CLOSE(got[i], want, bound, "%s[%lld]: %s", what, (long long)i, f->text);
    }
}

static void add_matrix(const plora_matrix *from, double *to, int64_t first_column, int64_t stride)
{
    for (int64_t i = 0; i < from->rows; ++i)
        for (int64_t j = 0; j < from->columns; ++j)
            to[i * stride + first_column + j] += check_element(from, i, j);
}

static struct check_matrix columns_of(const struct check_matrix *from, int64_t first, int64_t count)
{
    struct check_matrix part = check_matrix_new(from->m.rows, count, count + check_integer(0, 3), from->m.dtype);
    for (int64_t i = 0; i < from->m.rows; ++i)
        for (int64_t j = 0; j < count; ++j)
            plora__store(part.m.data, i * part.m.stride + j, part.m.dtype,
                         (float)check_element(&from->m, i, first + j));
    device_refresh(part.memory);
    return part;
}

/* What the ranks of a group compute, and the host sums. */
struct sums {
    double *y, *dx, *da, *db;
};

static void run_part(struct linear_fixture *f, const struct whole *whole, const struct part *part, struct sums *sums)
{
    const struct linear_case *c = &f->c;
    struct piece *piece = piece_create(shared, whole, part, 0);
    piece_set_factors(whole, piece);
    memset(piece->adapter.a_gradient.data, 0, (size_t)(c->rank * part->columns) * sizeof(float));
    memset(piece->adapter.b_gradient.data, 0, (size_t)(c->rank * part->rows) * sizeof(float));
    CHECK_OK(plora_adapters_set_dropout_position(piece->adapters, f->step, f->first_token));
    struct check_matrix x = columns_of(&f->x, part->first_column, part->columns);
    struct check_matrix dy = columns_of(&f->dy, part->first_row, part->rows);
    struct check_matrix y = check_matrix_new(c->tokens, part->rows, part->rows, c->y_dtype);
    struct check_matrix dx = check_matrix_new(c->tokens, part->columns, part->columns, c->dx_dtype);
    CHECK_OK(fixture_forward(f, piece->adapters, SHARD_LAYER, &x.m, &y.m, c->flags));
    CHECK_OK(fixture_backward(f, piece->adapters, SHARD_LAYER, &x.m, &dy.m, &dx.m, c->flags));
    add_matrix(&y.m, sums->y, part->first_row, c->out_features);
    add_matrix(&dx.m, sums->dx, part->first_column, c->in_features);
    add_matrix(&piece->adapter.a_gradient, sums->da, part->first_column, c->in_features);
    add_matrix(&piece->adapter.b_gradient, sums->db + part->first_row * c->rank, 0, c->rank);
    check_matrix_free(&x);
    check_matrix_free(&dy);
    check_matrix_free(&y);
    check_matrix_free(&dx);
    piece_free(piece);
}

/* The weight and the adapter of a fixture. */
static struct whole whole_of(const struct linear_fixture *f, const struct linear_case *c)
{
    return (struct whole){.n = c->out_features,
                          .k = c->in_features,
                          .rank = c->rank,
                          .dtype = c->w_dtype,
                          .fan_in_fan_out = c->layer_flags != 0,
                          .dropout = c->dropout,
                          .alpha = c->alpha,
                          .seed = f->seed,
                          .values = f->w_values,
                          .a = f->adapter.a.data,
                          .b = f->adapter.b.data};
}

static void check_parts(struct linear_fixture *f, const struct whole *whole, int by_rows)
{
    const struct linear_case *c = &f->c;
    const int64_t extent = by_rows ? c->out_features : c->in_features, cut = check_integer(1, extent - 1);
    struct sums sums = {fixture_doubles(c->tokens * c->out_features), fixture_doubles(c->tokens * c->in_features),
                        fixture_doubles(c->rank * c->in_features), fixture_doubles(c->rank * c->out_features)};
    for (int second = 0; second < 2; ++second) {
        const int64_t first = second ? cut : 0, length = second ? extent - cut : cut;
        const struct part part = {.first_row = by_rows ? first : 0,
                                  .first_column = by_rows ? 0 : first,
                                  .rows = by_rows ? length : c->out_features,
                                  .columns = by_rows ? c->in_features : length};
        run_part(f, whole, &part, &sums);
    }
    struct reference_sum *base = fixture_sums(c->tokens * c->out_features),
                         *low = fixture_sums(c->tokens * c->out_features);
    reference_linear_forward(&f->linear, base, low);
    struct fixture_gradients g = fixture_reference_backward(f);
    struct reference_sum *none = fixture_sums((c->in_features + c->out_features) * c->rank);
    check_sum(f, sums.y, base, low, c->tokens * c->out_features, c->in_features, c->y_dtype,
              by_rows ? "y by rows" : "y");
    check_sum(f, sums.dx, g.base, g.low, c->tokens * c->in_features, c->out_features, c->dx_dtype, "dx");
    check_sum(f, sums.da, none, g.da, c->rank * c->in_features, c->tokens + c->out_features, PLORA_F32, "dA");
    check_sum(f, sums.db, none, g.db, c->rank * c->out_features, c->tokens + c->in_features, PLORA_F32, "dB");
    free(none);
    free(base);
    free(low);
    fixture_gradients_free(&g);
    free(sums.y);
    free(sums.dx);
    free(sums.da);
    free(sums.db);
}

static void forward_and_backward(void **state)
{
    (void)state;
    check_reseed(5);
    for (int shape = 2; shape < CHECK_COUNT(shapes); ++shape)
        for (int bits = 0; bits < 8; ++bits) {
            if (check_quick() && (shape + bits) % 3 != 0) continue;
            const struct linear_case c = {.tokens = check_integer(1, 9),
                                          .in_features = shapes[shape].k,
                                          .out_features = shapes[shape].n,
                                          .rank = shapes[shape].rank,
                                          .x_dtype = bits & 1 ? PLORA_BF16 : PLORA_F32,
                                          .y_dtype = bits & 1 ? PLORA_BF16 : PLORA_F32,
                                          .dx_dtype = (int32_t)check_integer(PLORA_F32, PLORA_BF16),
                                          .w_dtype = bits & 2 ? PLORA_BF16 : PLORA_F32,
                                          .bias_dtype = -1,
                                          .layer_flags = (int32_t)check_integer(0, 1) * PLORA_LAYER_FAN_IN_FAN_OUT,
                                          .dropout = 0.3,
                                          .alpha = 2.0,
                                          .flags = bits & 4 ? PLORA_LINEAR_DROPOUT : 0};
            struct linear_fixture *f = fixture_create(shared, &c);
            struct whole whole = whole_of(f, &c);
            check_parts(f, &whole, 0);
            check_parts(f, &whole, 1);
            fixture_free(f);
        }
}

/* A gathered layer computes what the whole one does, to the bit. */
static void gathered_products(void **state)
{
    (void)state;
    check_reseed(6);
    for (int bits = 0; bits < 8; ++bits) {
        const struct linear_case c = {.tokens = 7,
                                      .in_features = 45,
                                      .out_features = 34,
                                      .rank = 5,
                                      .x_dtype = bits & 1 ? PLORA_BF16 : PLORA_F32,
                                      .y_dtype = bits & 1 ? PLORA_BF16 : PLORA_F32,
                                      .dx_dtype = bits & 1 ? PLORA_BF16 : PLORA_F32,
                                      .w_dtype = bits & 2 ? PLORA_BF16 : PLORA_F32,
                                      .bias_dtype = -1,
                                      .layer_flags = bits & 4 ? PLORA_LAYER_FAN_IN_FAN_OUT : 0,
                                      .dropout = 0.3,
                                      .alpha = 2.0,
                                      .flags = PLORA_LINEAR_DROPOUT | PLORA_LINEAR_DELTA_ONLY};
        struct linear_fixture *f = fixture_create(shared, &c);
        struct whole whole = whole_of(f, &c);
        const struct part part = {.first_row = 3, .first_column = 8, .rows = 14, .columns = 5};
        struct piece *piece = piece_create(shared, &whole, &part, 1);
        piece_set_factors(&whole, piece);
        memcpy(piece->adapter.a_gradient.data, f->adapter.a_gradient.data,
               (size_t)(c.rank * c.in_features) * sizeof(float));
        memcpy(piece->adapter.b_gradient.data, f->adapter.b_gradient.data,
               (size_t)(c.rank * c.out_features) * sizeof(float));
        CHECK_OK(plora_adapters_set_dropout_position(piece->adapters, f->step, f->first_token));
        struct check_matrix y = columns_of(&f->y, 0, c.out_features), dx = columns_of(&f->dx, 0, c.in_features);
        CHECK_OK(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, c.flags));
        CHECK_OK(fixture_forward(f, piece->adapters, SHARD_LAYER, &f->x.m, &y.m, c.flags));
        CHECK_OK(fixture_backward(f, f->adapters, f->layer, &f->x.m, &f->dy.m, &f->dx.m, c.flags));
        CHECK_OK(fixture_backward(f, piece->adapters, SHARD_LAYER, &f->x.m, &f->dy.m, &dx.m, c.flags));
        const plora_matrix *const pairs[][2] = {{&y.m, &f->y.m},
                                                {&dx.m, &f->dx.m},
                                                {&piece->adapter.a_gradient, &f->adapter.a_gradient},
                                                {&piece->adapter.b_gradient, &f->adapter.b_gradient}};
        for (int p = 0; p < CHECK_COUNT(pairs); ++p)
            for (int64_t i = 0; i < pairs[p][0]->rows; ++i)
                for (int64_t j = 0; j < pairs[p][0]->columns; ++j)
                    CHECK_CLOSE(check_element(pairs[p][0], i, j), check_element(pairs[p][1], i, j), 0.0,
                                "matrix %d [%lld,%lld]: %s", p, (long long)i, (long long)j, f->text);
        check_matrix_free(&y);
        check_matrix_free(&dx);
        piece_free(piece);
        fixture_free(f);
    }
}

int main(void)
{
    check_begin("test_shard");
    shared = check_context(NULL, 0, 0);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fresh_adapters),           cmocka_unit_test(dropout_masks),
        cmocka_unit_test(unloads_of_all_roundings), cmocka_unit_test(reports_add_up),
        cmocka_unit_test(forward_and_backward),     cmocka_unit_test(gathered_products),
    };
    const int failed = cmocka_run_group_tests_name("shard", tests, NULL, NULL);
    plora_context_destroy(shared);
    return failed;
}
