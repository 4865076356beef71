/* linear_fixture.h: one linear layer with random contents, the library's view of it beside the reference's, and the error bounds
 * of its results. fixture_forward() and fixture_backward() call the library with the twins of host matrices (device.h); on CUDA some
 * fixtures use a stream of their own.
 *
 * The bounds follow from the operation. With u32 the roundoff of fp32, a sum of n products is off by at most n u32 times the sum of
 * their magnitudes; storing y or dx rounds the base product and the total once each, to the output's dtype; when x and W are both
 * BF16, the low-rank part also has its operands rounded to bf16: x after dropout, A, B, and u or v. */
#ifndef PLORA_TESTS_LINEAR_FIXTURE_H
#define PLORA_TESTS_LINEAR_FIXTURE_H

#include "check.h"
#include "reference.h"

struct linear_case {
    int64_t tokens, in_features, out_features;
    int32_t rank;
    int32_t x_dtype, y_dtype, w_dtype, dx_dtype; /* dy has y_dtype */
    int32_t bias_dtype;                          /* -1 = no bias */
    int32_t layer_flags;
    int gaps;    /* strides larger than the number of columns */
    int aligned; /* the first element of every matrix is aligned to 16 bytes, not at random */
    int no_adapter;
    int rslora;
    double dropout;
    double alpha;             /* 0 = random */
    int64_t workspace_tokens; /* 0 = the default */
    uint32_t flags;           /* of the call */
    plora_shard shard;        /* of the layer, whose features are the shard's; all 0 = whole */
};

struct linear_fixture {
    struct linear_case c;
    void *stream;
    plora_model *model;
    plora_adapters *adapters;
    int32_t layer;
    plora_adapter adapter; /* on CUDA, mirrors of it */
    struct check_matrix other, w, bias, x, y, dy, dx;
    uint64_t seed, step, first_token;
    double alpha;
    struct reference_linear linear; /* with the mask that c.flags asks for */
    double *x_values, *w_values, *bias_values, *a_values, *b_values, *mask, *dy_values;
    char text[320];
};

static CHECK_UNUSED double *fixture_doubles(int64_t count)
{
    double *memory = calloc((size_t)count + 1, sizeof *memory);
    CHECK(memory != NULL, "the test itself is out of memory");
    return memory;
}

static CHECK_UNUSED struct reference_sum *fixture_sums(int64_t count)
{
    struct reference_sum *memory = calloc((size_t)count + 1, sizeof *memory);
    CHECK(memory != NULL, "the test itself is out of memory");
    return memory;
}

static CHECK_UNUSED struct check_matrix fixture_matrix(const struct linear_case *c, int64_t rows, int64_t columns,
                                                       int32_t dtype, double range)
{
    const int64_t stride = columns + (c->gaps ? check_integer(1, 9) : 0);
    struct check_matrix matrix = check_matrix_new(rows, columns, stride, dtype);
    while (c->aligned && ((unsigned char *)matrix.m.data - matrix.memory) % 16 != 0) {
        check_matrix_free(&matrix);
        matrix = check_matrix_new(rows, columns, stride, dtype);
    }
    check_matrix_random(&matrix, range);
    return matrix;
}

static CHECK_UNUSED void fixture_describe(struct linear_fixture *f)
{
    const struct linear_case *c = &f->c;
    snprintf(f->text, sizeof f->text,
             "T=%lld K=%lld N=%lld R=%d x %s y %s W %s dx %s bias %s layer flags %d gaps %d aligned %d adapter %d "
             "rslora %d dropout %g workspace_tokens %lld flags %u shard %lld,%lld of %lld,%lld",
             (long long)c->tokens, (long long)c->in_features, (long long)c->out_features, c->rank,
             plora__dtype_name(c->x_dtype), plora__dtype_name(c->y_dtype), plora__dtype_name(c->w_dtype),
             plora__dtype_name(c->dx_dtype), c->bias_dtype < 0 ? "none" : plora__dtype_name(c->bias_dtype),
             c->layer_flags, c->gaps, c->aligned, !c->no_adapter, c->rslora, c->dropout, (long long)c->workspace_tokens,
             c->flags, (long long)c->shard.first_row, (long long)c->shard.first_column, (long long)c->shard.rows,
             (long long)c->shard.columns);
}

static CHECK_UNUSED void fixture_matrices(struct linear_fixture *f)
{
    const struct linear_case *c = &f->c;
    const int turned = (c->layer_flags & PLORA_LAYER_FAN_IN_FAN_OUT) != 0;
    const double range = sqrt(3.0 / (double)c->in_features);
    f->other = fixture_matrix(c, 4, 4, PLORA_F32, 1.0);
    f->w = fixture_matrix(c, turned ? c->in_features : c->out_features, turned ? c->out_features : c->in_features,
                          c->w_dtype, range);
    if (c->bias_dtype >= 0) f->bias = fixture_matrix(c, 1, c->out_features, c->bias_dtype, 1.0);
    f->x = fixture_matrix(c, c->tokens, c->in_features, c->x_dtype, 2.0);
    f->y = fixture_matrix(c, c->tokens, c->out_features, c->y_dtype, 1.0);
    f->dy = fixture_matrix(c, c->tokens, c->out_features, c->y_dtype, 2.0);
    f->dx = fixture_matrix(c, c->tokens, c->in_features, c->dx_dtype, 1.0);
    f->w_values = fixture_doubles(c->in_features * c->out_features);
    f->bias_values = fixture_doubles(c->out_features);
    f->x_values = fixture_doubles(c->tokens * c->in_features);
    f->dy_values = fixture_doubles(c->tokens * c->out_features);
    reference_load(&f->w.m, turned, f->w_values);
    if (c->bias_dtype >= 0) reference_load(&f->bias.m, 0, f->bias_values);
    reference_load(&f->x.m, 0, f->x_values);
    reference_load(&f->dy.m, 0, f->dy_values);
}

/* The views of an adapter become mirrors of what they show. */
static CHECK_UNUSED void fixture_mirror(plora_adapter *adapter)
{
    plora_matrix *const views[] = {&adapter->a, &adapter->b, &adapter->a_gradient, &adapter->b_gradient};
    for (int i = 0; i < CHECK_COUNT(views); ++i)
        views[i]->data = device_mirror(views[i]->data, (size_t)(views[i]->rows * views[i]->columns) * sizeof(float));
}

static CHECK_UNUSED void fixture_forget(const plora_adapter *adapter)
{
    void *const views[] = {adapter->a.data, adapter->b.data, adapter->a_gradient.data, adapter->b_gradient.data};
    for (int i = 0; i < CHECK_COUNT(views); ++i)
        device_forget(views[i]);
}

/* The adapter's values, random; nonzero gradients, so that adding shows. */
static CHECK_UNUSED void fixture_adapter(struct linear_fixture *f)
{
    const struct linear_case *c = &f->c;
    f->a_values = fixture_doubles(c->rank * c->in_features);
    f->b_values = fixture_doubles(c->rank * c->out_features);
    if (c->no_adapter) return;
    f->adapter = (plora_adapter)PLORA_ADAPTER_INIT;
    CHECK_OK(plora_adapters_layer(f->adapters, f->layer, &f->adapter));
    fixture_mirror(&f->adapter);
    const double range = sqrt(3.0 / (double)c->in_features);
    for (int64_t i = 0; i < c->rank * c->in_features; ++i) {
        ((float *)f->adapter.a.data)[i] = (float)(range * check_uniform());
        ((float *)f->adapter.a_gradient.data)[i] = (float)check_uniform();
    }
    for (int64_t i = 0; i < c->rank * c->out_features; ++i) {
        ((float *)f->adapter.b.data)[i] = (float)check_uniform();
        ((float *)f->adapter.b_gradient.data)[i] = (float)check_uniform();
    }
    reference_load(&f->adapter.a, 0, f->a_values);
    reference_load(&f->adapter.b, 0, f->b_values);
}

/* The columns of the mask of the whole layer that x has. */
static CHECK_UNUSED void fixture_mask(struct linear_fixture *f)
{
    const struct linear_case *c = &f->c;
    const int64_t all = c->shard.columns > 0 ? c->shard.columns : c->in_features;
    double *whole = fixture_doubles(c->tokens * all);
    reference_dropout(c->dropout, f->seed, f->step, f->layer, f->first_token, c->tokens, all, whole);
    f->mask = fixture_doubles(c->tokens * c->in_features);
    for (int64_t t = 0; t < c->tokens; ++t)
        for (int64_t k = 0; k < c->in_features; ++k)
            f->mask[t * c->in_features + k] = whole[t * all + c->shard.first_column + k];
    free(whole);
}

static CHECK_UNUSED void fixture_reference(struct linear_fixture *f)
{
    const struct linear_case *c = &f->c;
    fixture_mask(f);
    f->linear = (struct reference_linear){
        .tokens = c->tokens,
        .in_features = c->in_features,
        .out_features = c->out_features,
        .rank = c->no_adapter ? 0 : c->rank,
        .scale = f->alpha / (c->rslora ? sqrt((double)c->rank) : (double)c->rank),
        .x = f->x_values,
        .w = f->w_values,
        .bias = c->bias_dtype >= 0 ? f->bias_values : NULL,
        .a = f->a_values,
        .b = f->b_values,
        .mask = (c->flags & PLORA_LINEAR_DROPOUT) != 0 ? f->mask : NULL,
    };
}

/* The layer "block.layer" has number 1, behind a layer "other". */
static CHECK_UNUSED struct linear_fixture *fixture_create(plora_context *context, const struct linear_case *c)
{
    struct linear_fixture *f = calloc(1, sizeof *f);
    CHECK(f != NULL, "the test itself is out of memory");
    f->c = *c;
    fixture_describe(f);
    fixture_matrices(f);
    CHECK_OK(plora_model_create(context, &f->model));
    CHECK_OK(check_add_linear(f->model, "other", &f->other.m, NULL, 0, 0, NULL));
    const plora_linear linear = {
        .struct_size = sizeof linear,
        .name = "block.layer",
        .weight = device_matrix(f->w.m),
        .bias = c->bias_dtype >= 0 ? device_of(f->bias.m.data) : NULL,
        .bias_dtype = c->bias_dtype >= 0 ? c->bias_dtype : PLORA_F32,
        .flags = c->layer_flags,
        .shard = c->shard,
    };
    CHECK_OK(plora_model_add_linear(f->model, &linear, &f->layer));
    f->seed = check_next();
    f->step = (uint64_t)check_integer(0, 100000);
    f->first_token = (uint64_t)check_integer(0, 1) == 0 ? 0 : check_next() >> 33;
    f->alpha = c->alpha != 0 ? c->alpha : 0.5 + 3 * fabs(check_uniform());
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = c->no_adapter ? 1 : c->rank;
    options.alpha = f->alpha;
    options.dropout = c->dropout;
    options.seed = f->seed;
    options.targets = c->no_adapter ? "other" : "layer";
    options.rslora = c->rslora;
    options.workspace_tokens = c->workspace_tokens;
    CHECK_OK(plora_adapters_create(f->model, &options, &f->adapters));
    CHECK_OK(plora_adapters_set_dropout_position(f->adapters, f->step, f->first_token));
    fixture_adapter(f);
    fixture_reference(f);
    if (device_is_cuda() && check_integer(0, 1) == 1) f->stream = device_stream_create();
    return f;
}

static CHECK_UNUSED plora_status fixture_forward(const struct linear_fixture *f, plora_adapters *adapters,
                                                 int32_t layer, const plora_matrix *x, const plora_matrix *y,
                                                 uint32_t flags)
{
    const plora_matrix device_x = device_matrix(*x), device_y = device_matrix(*y);
    return DEVICE(plora_linear_forward(adapters, layer, &device_x, &device_y, flags, f->stream));
}

/* dx may be NULL. */
static CHECK_UNUSED plora_status fixture_backward(const struct linear_fixture *f, plora_adapters *adapters,
                                                  int32_t layer, const plora_matrix *x, const plora_matrix *dy,
                                                  const plora_matrix *dx, uint32_t flags)
{
    const plora_matrix device_x = device_matrix(*x), device_dy = device_matrix(*dy);
    const plora_matrix device_dx = dx != NULL ? device_matrix(*dx) : device_x;
    return DEVICE(plora_linear_backward(adapters, layer, &device_x, &device_dy, dx != NULL ? &device_dx : NULL, flags,
                                        f->stream));
}

static CHECK_UNUSED void fixture_free(struct linear_fixture *f)
{
    if (f->stream != NULL) device_stream_destroy(f->stream);
    fixture_forget(&f->adapter);
    plora_adapters_destroy(f->adapters);
    plora_model_destroy(f->model);
    struct check_matrix *const matrices[] = {&f->other, &f->w, &f->bias, &f->x, &f->y, &f->dy, &f->dx};
    for (int i = 0; i < CHECK_COUNT(matrices); ++i)
        check_matrix_free(matrices[i]);
    double *const values[] = {f->x_values, f->w_values, f->bias_values, f->a_values,
                              f->b_values, f->mask,     f->dy_values};
    for (int i = 0; i < CHECK_COUNT(values); ++i)
        free(values[i]);
    free(f);
}

/* ------------------------------------------------------------------------------------------------------------- bounds */

/* x and W both BF16: the low-rank operands are rounded to bf16. */
static CHECK_UNUSED int fixture_low_bf16(const struct linear_case *c)
{
    return c->x_dtype == PLORA_BF16 && c->w_dtype == PLORA_BF16;
}

/* The error of the low-rank sums, before anything is stored: `terms` products in fp32, four operands in bf16. */
static CHECK_UNUSED double fixture_low_error(const struct linear_case *c, double terms, double magnitude)
{
    const double rounded = fixture_low_bf16(c) ? 4.05 * check_roundoff(PLORA_BF16) : 0.0;
    return (terms * check_roundoff(PLORA_F32) + rounded) * magnitude;
}

/* want and bound of out = old (when kept) + base + low; `inner` products per base sum. */
static CHECK_UNUSED void fixture_output_bound(const struct linear_case *c, int32_t dtype, int64_t inner, double old,
                                              struct reference_sum base, struct reference_sum low, double *want,
                                              double *bound)
{
    const double u = check_roundoff(dtype), u32 = check_roundoff(PLORA_F32);
    const double terms = (double)inner + c->rank + 16;
    double error = ((double)inner + 8) * u32 * base.magnitude + fixture_low_error(c, terms, low.magnitude);
    *want = old + base.value + low.value;
    error += u * (fabs(*want) + error);
    if (low.magnitude != 0) error += 1.01 * u * (fabs(old + base.value) + fabs(low.value));
    if (old != 0) error += 1.01 * u * fabs(base.value);
    *bound = error + 2 * u32 * (fabs(old) + base.magnitude + low.magnitude);
}

/* y against the reference; old_y is what it held before (read only with DELTA_ONLY). */
static CHECK_UNUSED void fixture_check_forward(const struct linear_fixture *f, const double *old_y)
{
    const struct linear_case *c = &f->c;
    const int64_t count = c->tokens * c->out_features;
    struct reference_sum *base = fixture_sums(count), *low = fixture_sums(count);
    double *want = fixture_doubles(count), *bound = fixture_doubles(count);
    reference_linear_forward(&f->linear, base, low);
    const int delta_only = (c->flags & PLORA_LINEAR_DELTA_ONLY) != 0;
    for (int64_t i = 0; i < count; ++i)
        fixture_output_bound(c, c->y_dtype, c->in_features, delta_only && old_y != NULL ? old_y[i] : 0.0,
                             delta_only ? (struct reference_sum){0, 0} : base[i], low[i], &want[i], &bound[i]);
    check_matrix_close(&f->y.m, want, bound, "y", f->text);
    check_matrix_guards(&f->y, f->text);
    free(base);
    free(low);
    free(want);
    free(bound);
}

struct fixture_gradients {
    struct reference_sum *base, *low, *da, *db;
};

static CHECK_UNUSED struct fixture_gradients fixture_reference_backward(const struct linear_fixture *f)
{
    const struct linear_case *c = &f->c;
    const struct fixture_gradients g = {
        fixture_sums(c->tokens * c->in_features), fixture_sums(c->tokens * c->in_features),
        fixture_sums(c->rank * c->in_features), fixture_sums(c->rank * c->out_features)};
    reference_linear_backward(&f->linear, f->dy_values, g.base, g.low, g.da, g.db);
    return g;
}

static CHECK_UNUSED void fixture_gradients_free(struct fixture_gradients *g)
{
    free(g->base);
    free(g->low);
    free(g->da);
    free(g->db);
}

/* dx against the reference; old_dx is what it held before (read only with DELTA_ONLY or ACCUMULATE). */
static CHECK_UNUSED void fixture_check_dx(const struct linear_fixture *f, const struct fixture_gradients *g,
                                          const double *old_dx)
{
    const struct linear_case *c = &f->c;
    const int64_t count = c->tokens * c->in_features;
    double *want = fixture_doubles(count), *bound = fixture_doubles(count);
    const int delta_only = (c->flags & PLORA_LINEAR_DELTA_ONLY) != 0;
    const int kept = delta_only || (c->flags & PLORA_LINEAR_ACCUMULATE) != 0;
    CHECK(!kept || old_dx != NULL, "the test itself did not keep dx");
    for (int64_t i = 0; i < count; ++i)
        fixture_output_bound(c, c->dx_dtype, c->out_features, kept ? old_dx[i] : 0.0,
                             delta_only ? (struct reference_sum){0, 0} : g->base[i], g->low[i], &want[i], &bound[i]);
    check_matrix_close(&f->dx.m, want, bound, "dx", f->text);
    check_matrix_guards(&f->dx, f->text);
    free(want);
    free(bound);
}

/* One gradient after `calls` equal calls: old + calls * g. Each pass over the workspace adds to the arena with one rounding. */
static CHECK_UNUSED void fixture_check_gradient(const struct linear_fixture *f, const plora_matrix *got,
                                                const double *old, const struct reference_sum *sums, int64_t inner,
                                                int calls, const char *what)
{
    const struct linear_case *c = &f->c;
    const int64_t count = got->rows * got->columns;
    double *want = fixture_doubles(count), *bound = fixture_doubles(count);
    const double u32 = check_roundoff(PLORA_F32), passes = (double)calls * ((double)c->tokens + 1);
    for (int64_t i = 0; i < count; ++i) {
        const double magnitude = calls * sums[i].magnitude;
        want[i] = old[i] + calls * sums[i].value;
        bound[i] = fixture_low_error(c, (double)(c->tokens + inner) + 16, magnitude) +
                   passes * u32 * (fabs(old[i]) + magnitude);
    }
    check_matrix_close(got, want, bound, what, f->text);
    free(want);
    free(bound);
}

static CHECK_UNUSED void fixture_check_gradients(const struct linear_fixture *f, const struct fixture_gradients *g,
                                                 const double *old_da, const double *old_db, int calls)
{
    fixture_check_gradient(f, &f->adapter.a_gradient, old_da, g->da, f->c.out_features, calls, "dA");
    fixture_check_gradient(f, &f->adapter.b_gradient, old_db, g->db, f->c.in_features, calls, "dB");
}

#endif
