/* test_vectors_linear.c: the library, and the reference that all other tests trust, against results of torch and PEFT
 * (vectors_linear.h, made by python/make_vectors_linear.py). Both sides round in the same places, so each may be off by the bound of
 * linear_fixture.h: the reference by one bound, the library by two. */
#include "linear_fixture.h"
#include "vectors_linear.h"

static void fill(const plora_matrix *matrix, const float *values)
{
    for (int64_t i = 0; i < matrix->rows; ++i)
        for (int64_t j = 0; j < matrix->columns; ++j) {
            const float value = values[i * matrix->columns + j];
            plora__store(matrix->data, i * matrix->stride + j, matrix->dtype, value);
            CHECK(check_element(matrix, i, j) == (double)value, "the vector %.9g is no %s", (double)value,
                  plora__dtype_name(matrix->dtype));
        }
}

static struct linear_fixture *vector_fixture(plora_context *context, const struct linear_vector *v)
{
    struct linear_case c = {.tokens = v->tokens,
                            .in_features = v->in_features,
                            .out_features = v->out_features,
                            .rank = v->rank,
                            .rslora = v->rslora,
                            .layer_flags = v->flags,
                            .alpha = v->alpha,
                            .gaps = 1};
    c.x_dtype = c.y_dtype = c.w_dtype = c.dx_dtype = v->dtype;
    c.bias_dtype = v->bias != NULL ? v->dtype : -1;
    struct linear_fixture *f = fixture_create(context, &c);
    fill(&f->w.m, v->w);
    fill(&f->x.m, v->x);
    fill(&f->dy.m, v->dy);
    fill(&f->adapter.a, v->a);
    fill(&f->adapter.b, v->b);
    if (v->bias != NULL) fill(&f->bias.m, v->bias);
    memset(f->adapter.a_gradient.data, 0, (size_t)(c.rank * c.in_features) * sizeof(float));
    memset(f->adapter.b_gradient.data, 0, (size_t)(c.rank * c.out_features) * sizeof(float));
    reference_load(&f->w.m, (v->flags & PLORA_LAYER_FAN_IN_FAN_OUT) != 0, f->w_values);
    reference_load(&f->x.m, 0, f->x_values);
    reference_load(&f->dy.m, 0, f->dy_values);
    reference_load(&f->adapter.a, 0, f->a_values);
    reference_load(&f->adapter.b, 0, f->b_values);
    if (v->bias != NULL) reference_load(&f->bias.m, 0, f->bias_values);
    return f;
}

static void compare(const plora_matrix *got, int64_t i, double reference, double vector, double bound, const char *what,
                    const char *name)
{
    CHECK_CLOSE(reference, vector, bound, "%s[%lld] of '%s': the reference", what, (long long)i, name);
    CHECK_CLOSE(check_element(got, i / got->columns, i % got->columns), vector, 2 * bound,
                "%s[%lld] of '%s': the library", what, (long long)i, name);
}

static void compare_outputs(const plora_matrix *got, const struct linear_case *c, int64_t inner,
                            const struct reference_sum *base, const struct reference_sum *low, const float *vector,
                            const char *what, const char *name)
{
    for (int64_t i = 0; i < got->rows * got->columns; ++i) {
        double want, bound;
        fixture_output_bound(c, got->dtype, inner, 0.0, base[i], low[i], &want, &bound);
        compare(got, i, want, (double)vector[i], bound, what, name);
    }
}

static void compare_gradient(const plora_matrix *got, const struct linear_case *c, int64_t inner,
                             const struct reference_sum *sums, const float *vector, const char *what, const char *name)
{
    for (int64_t i = 0; i < got->rows * got->columns; ++i)
        compare(got, i, sums[i].value, (double)vector[i],
                fixture_low_error(c, (double)(c->tokens + inner) + 16, sums[i].magnitude), what, name);
}

static void peft_layers(void **state)
{
    (void)state;
    plora_context *context = check_context(NULL, 0, 0);
    for (int i = 0; i < CHECK_COUNT(linear_vectors); ++i) {
        const struct linear_vector *v = &linear_vectors[i];
        struct linear_fixture *f = vector_fixture(context, v);
        const struct linear_case *c = &f->c;
        struct reference_sum *base = fixture_sums(c->tokens * c->out_features),
                             *low = fixture_sums(c->tokens * c->out_features);
        reference_linear_forward(&f->linear, base, low);
        struct fixture_gradients g = fixture_reference_backward(f);
        CHECK_OK(fixture_forward(f, f->adapters, f->layer, &f->x.m, &f->y.m, 0));
        CHECK_OK(fixture_backward(f, f->adapters, f->layer, &f->x.m, &f->dy.m, &f->dx.m, 0));
        compare_outputs(&f->y.m, c, c->in_features, base, low, v->y, "y", v->name);
        compare_outputs(&f->dx.m, c, c->out_features, g.base, g.low, v->dx, "dx", v->name);
        compare_gradient(&f->adapter.a_gradient, c, c->out_features, g.da, v->da, "dA", v->name);
        compare_gradient(&f->adapter.b_gradient, c, c->in_features, g.db, v->db, "dB", v->name);
        fixture_gradients_free(&g);
        free(base);
        free(low);
        fixture_free(f);
    }
    plora_context_destroy(context);
}

int main(void)
{
    check_begin("test_vectors_linear");
    const struct CMUnitTest tests[] = {cmocka_unit_test(peft_layers)};
    return cmocka_run_group_tests_name("vectors_linear", tests, NULL, NULL);
}
