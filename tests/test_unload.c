/* test_unload.c: plora_unload() as a whole: what becomes of weights, adapters, optimizer and stage, what is refused,
 * and the report. The kernels under it are in test_merge.c, residuals over many unloads in test_residual.c. */
#include "check.h"
#include "reference_unload.h"
#include "residual_fixture.h"

static void *allocate(size_t bytes)
{
    void *memory = malloc(bytes);
    CHECK(memory != NULL, "the test itself is out of memory");
    memset(memory, CHECK_POISON, bytes);
    return memory;
}

enum { LAYERS = 4 };

/* Layers 0 .. 2 are F32, BF16 and F16; layer 3 is stored [K,N]. */
struct fixture {
    struct check_allocator allocator;
    plora_context *context;
    plora_model *model;
    plora_adapters *adapters;
    plora_optimizer *optimizer;
    struct check_matrix weights[LAYERS];
    plora_adapter views[LAYERS];
    float *parameters, *gradients, *first, *second;
    int64_t count;
};

/* How the tests round: each runs with every mode. */
static plora_unload_options usual = PLORA_UNLOAD_OPTIONS_INIT;
static int32_t usual_residual;

static void setup(struct fixture *f, int32_t algorithm, int32_t threads)
{
    static const int64_t shapes[LAYERS][2] = {{37, 29}, {64, 96}, {11, 70}, {48, 33}}; /* N, K */
    memset(f, 0, sizeof *f);
    f->allocator = (struct check_allocator)CHECK_ALLOCATOR_INIT;
    f->context = check_context(&f->allocator, threads, 0);
    CHECK_OK(plora_model_create(f->context, &f->model));
    for (int i = 0; i < LAYERS; ++i) {
        char name[32];
        snprintf(name, sizeof name, "layer%d", i);
        const int transposed = i == 3;
        f->weights[i] = check_matrix_new(shapes[i][transposed], shapes[i][!transposed], shapes[i][!transposed] + i,
                                         transposed ? PLORA_BF16 : i);
        check_matrix_random(&f->weights[i], 0.5);
        CHECK_OK(check_add_linear(f->model, name, &f->weights[i].m, NULL, 0,
                                  transposed ? PLORA_LAYER_FAN_IN_FAN_OUT : 0, NULL));
    }
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = 5;
    options.alpha = 7;
    options.seed = check_next();
    options.residual = usual_residual;
    CHECK_OK(plora_adapters_create(f->model, &options, &f->adapters));
    plora_optimizer_options optimizer = PLORA_OPTIMIZER_OPTIONS_INIT;
    optimizer.algorithm = algorithm;
    CHECK_OK(plora_optimizer_create(f->adapters, &optimizer, &f->optimizer));
    CHECK_OK(plora_adapters_parameters(f->adapters, &f->parameters, &f->count));
    CHECK_OK(plora_adapters_gradients(f->adapters, &f->gradients, &f->count));
    CHECK_OK(plora_optimizer_state(f->optimizer, &f->first, &f->second, NULL, NULL));
    const size_t bytes = (size_t)f->count * sizeof(float);
    f->parameters = device_mirror(f->parameters, bytes);
    f->gradients = device_mirror(f->gradients, bytes);
    f->first = device_mirror(f->first, bytes);
    f->second = device_mirror(f->second, bytes);
    for (int i = 0; i < LAYERS; ++i) {
        plora_adapter *view = &f->views[i];
        *view = (plora_adapter)PLORA_ADAPTER_INIT;
        CHECK_OK(plora_adapters_layer(f->adapters, i, view));
        plora_matrix *const matrices[] = {&view->a, &view->b, &view->a_gradient, &view->b_gradient};
        for (int j = 0; j < CHECK_COUNT(matrices); ++j)
            matrices[j]->data = device_host_of(matrices[j]->data);
    }
}

static void teardown(struct fixture *f)
{
    float *const mirrors[] = {f->parameters, f->gradients, f->first, f->second};
    for (int i = 0; i < CHECK_COUNT(mirrors); ++i)
        device_forget(mirrors[i]);
    plora_optimizer_destroy(f->optimizer);
    plora_adapters_destroy(f->adapters);
    plora_model_destroy(f->model);
    plora_context_destroy(f->context);
    check_allocator_empty(&f->allocator, "after an unload");
    for (int i = 0; i < LAYERS; ++i)
        check_matrix_free(&f->weights[i]);
}

/* A trained state: random A, B, gradients; moments by two steps. */
static void train(struct fixture *f)
{
    for (int i = 0; i < LAYERS; ++i)
        for (int64_t e = 0; e < f->views[i].b.rows * f->views[i].b.columns; ++e)
            ((float *)f->views[i].b.data)[e] = (float)(0.2 * check_uniform());
    for (int step = 0; step < 2; ++step) {
        for (int i = 0; i < LAYERS; ++i) {
            for (int64_t e = 0; e < f->views[i].a.rows * f->views[i].a.columns; ++e)
                ((float *)f->views[i].a_gradient.data)[e] = (float)check_uniform();
            for (int64_t e = 0; e < f->views[i].b.rows * f->views[i].b.columns; ++e)
                ((float *)f->views[i].b_gradient.data)[e] = (float)check_uniform();
        }
        CHECK_OK(DEVICE(plora_optimizer_step(f->optimizer, 1.0, NULL, NULL)));
    }
}

/* What a weight and its residual hold, in the order of [N,K]. */
static void values_of(const struct fixture *f, int layer, double *values)
{
    const plora_matrix *w = &f->weights[layer].m;
    uint16_t *residual = residual_of(f->model, layer);
    for (int64_t e = 0; e < w->rows * w->columns; ++e) {
        const int64_t row = e / w->columns, column = e % w->columns;
        const uint16_t *bits = (const uint16_t *)w->data + row * w->stride + column;
        values[layer == 3 ? column * w->rows + row : e] =
            residual != NULL ? plora__join_residual(*bits, residual[e], w->dtype) : check_element(w, row, column);
    }
    free(residual);
}

/* y[N] and its rounding bound's magnitude, of W[N,K] + s B A applied to x, in double. */
static void apply(const struct fixture *f, int layer, const double *x, double *y)
{
    const plora_adapter *view = &f->views[layer];
    const plora_matrix *w = &f->weights[layer].m;
    const int transposed = layer == 3;
    for (int64_t n = 0; n < view->b.rows; ++n) {
        y[n] = 0;
        for (int64_t k = 0; k < view->a.columns; ++k) {
            double weight = transposed ? check_element(w, k, n) : check_element(w, n, k);
            for (int64_t r = 0; r < view->a.rows; ++r)
                weight += view->scale * check_element(&view->b, n, r) * check_element(&view->a, r, k);
            y[n] += weight * x[k];
        }
    }
}

/* The function of each layer is the same before and after, to the rounding of W and of the scaled factors. */
static void function_kept(double momentum)
{
    struct fixture f;
    double x[LAYERS][128], before[LAYERS][128], after[128], weight_bound[LAYERS], x_sum[LAYERS];
    setup(&f, PLORA_OPTIMIZER_ADAMW, 2);
    train(&f);
    for (int i = 0; i < LAYERS; ++i) {
        const plora_adapter *view = &f.views[i];
        double largest = 0, a_max = 0, b_max = 0;
        x_sum[i] = 0;
        for (int64_t k = 0; k < view->a.columns; ++k)
            x_sum[i] += fabs(x[i][k] = check_uniform());
        apply(&f, i, x[i], before[i]);
        const plora_matrix *w = &f.weights[i].m;
        for (int64_t e = 0; e < w->rows; ++e)
            for (int64_t j = 0; j < w->columns; ++j)
                largest = fmax(largest, fabs(check_element(w, e, j)));
        for (int64_t e = 0; e < view->a.rows * view->a.columns; ++e)
            a_max = fmax(a_max, fabs(((float *)view->a.data)[e]));
        for (int64_t e = 0; e < view->b.rows * view->b.columns; ++e)
            b_max = fmax(b_max, fabs(((float *)view->b.data)[e]));
        const double delta = (double)view->a.rows * a_max * b_max * view->scale;
        /* one rounding of W, at random up to twice as far; fp32 errors of D; each factor k A, k B with two roundings, of k and of the product */
        weight_bound[i] =
            (usual.rounding == PLORA_ROUND_STOCHASTIC ? 2 : 1) *
                reference_merge_error(w->dtype, largest + delta, reference_delta_error(view->a.rows, delta)) +
            5 * 0x1p-24 * delta;
    }
    plora_unload_options options = usual;
    options.momentum = momentum;
    CHECK_OK(DEVICE(plora_unload(f.adapters, f.optimizer, &options, NULL, NULL)));
    CHECK(plora_adapters_stage(f.adapters) == 1, "stage %lld after the first unload",
          (long long)plora_adapters_stage(f.adapters));
    for (int i = 0; i < LAYERS; ++i) {
        apply(&f, i, x[i], after);
        for (int64_t n = 0; n < f.views[i].b.rows; ++n)
            CHECK_CLOSE(after[n], before[i][n], weight_bound[i] * x_sum[i] + 1e-12, "layer %d, y[%lld], momentum %g", i,
                        (long long)n, momentum);
        check_matrix_guards(&f.weights[i], "W");
    }
    for (int64_t e = 0; e < f.count; ++e)
        CHECK(f.gradients[e] == 0.0f, "gradient %lld is %g after an unload", (long long)e, f.gradients[e]);
    teardown(&f);
}

static void test_function_is_kept(void **state)
{
    (void)state;
    check_reseed(10);
    const double momenta[] = {1.0, 0.2, 0.5, 0.97};
    for (int i = 0; i < CHECK_COUNT(momenta); ++i)
        function_kept(momenta[i]);
}

static void test_full_unload_resets(void **state)
{
    (void)state;
    check_reseed(11);
    struct fixture f;
    setup(&f, PLORA_OPTIMIZER_ADAMW, 2);
    float *initial = allocate((size_t)f.count * sizeof(float));
    memcpy(initial, f.parameters, (size_t)f.count * sizeof(float));
    train(&f);
    int64_t step = -1, nonzero = 0, same = 0, a_elements = 0;
    CHECK_OK(DEVICE(plora_unload(f.adapters, f.optimizer, &usual, NULL, NULL)));
    CHECK_OK(plora_optimizer_state(f.optimizer, NULL, NULL, NULL, &step));
    for (int64_t e = 0; e < f.count; ++e)
        nonzero += plora__float_bits(f.first[e]) != 0 || plora__float_bits(f.second[e]) != 0;
    CHECK(nonzero == 0, "%lld of %lld moments survived the reset", (long long)nonzero, (long long)f.count);
    CHECK(step == 0, "the step counter is %lld after the reset", (long long)step);
    for (int i = 0; i < LAYERS; ++i) {
        const plora_adapter *view = &f.views[i];
        const double bound = 1 / sqrt((double)view->a.columns);
        for (int64_t e = 0; e < view->b.rows * view->b.columns; ++e)
            CHECK(plora__float_bits(((float *)view->b.data)[e]) == 0, "B of layer %d is not 0", i);
        for (int64_t e = 0; e < view->a.rows * view->a.columns; ++e, ++a_elements) {
            const float value = ((float *)view->a.data)[e];
            CHECK(fabs(value) <= bound * 1.000001, "A of layer %d holds %g, bound %g", i, value, bound);
            same += value == initial[(float *)view->a.data - f.parameters + e];
        }
    }
    CHECK(same * 20 < a_elements, "%lld of %lld elements of A are those of stage 0", (long long)same,
          (long long)a_elements);
    free(initial);
    teardown(&f);
}

static void test_moments_kept(void **state)
{
    (void)state;
    check_reseed(12);
    for (int32_t algorithm = PLORA_OPTIMIZER_ADAMW; algorithm <= PLORA_OPTIMIZER_SGD; ++algorithm) {
        struct fixture f;
        setup(&f, algorithm, 2);
        train(&f);
        const size_t bytes = (size_t)f.count * sizeof(float);
        float *p = allocate(bytes), *m = allocate(bytes), *v = allocate(bytes);
        memcpy(p, f.parameters, bytes);
        memcpy(m, f.first, bytes);
        if (f.second != NULL) memcpy(v, f.second, bytes);
        plora_unload_options options = usual;
        options.momentum = 0.5 + 0.4 * check_uniform();
        options.moments = check_integer(0, 1) ? PLORA_MOMENTS_KEEP : PLORA_MOMENTS_DEFAULT;
        CHECK_OK(DEVICE(plora_unload(f.adapters, f.optimizer, &options, NULL, NULL)));
        const float k = (float)sqrt(1 - options.momentum), k2 = (float)(1 - options.momentum);
        int64_t step = 0;
        CHECK_OK(plora_optimizer_state(f.optimizer, NULL, NULL, NULL, &step));
        CHECK(step == 2, "step %lld, want 2: moments were kept", (long long)step);
        for (int64_t e = 0; e < f.count; ++e) {
            CHECK(f.parameters[e] == p[e] * k, "parameter %lld", (long long)e);
            CHECK(f.first[e] == m[e] * k, "first moment %lld", (long long)e);
            CHECK(f.second == NULL || f.second[e] == v[e] * k2, "second moment %lld", (long long)e);
        }
        options.moments = PLORA_MOMENTS_RESET; /* may also be asked for below 1 */
        CHECK_OK(DEVICE(plora_unload(f.adapters, f.optimizer, &options, NULL, NULL)));
        CHECK_OK(plora_optimizer_state(f.optimizer, NULL, NULL, NULL, &step));
        CHECK(step == 0 && plora_adapters_stage(f.adapters) == 2, "step %lld after RESET", (long long)step);
        for (int64_t e = 0; e < f.count; ++e)
            CHECK(f.first[e] == 0 && (f.second == NULL || f.second[e] == 0), "moment %lld after RESET", (long long)e);
        free(p);
        free(m);
        free(v);
        teardown(&f);
    }
}

/* Runs an unload that must be refused, and compares every bit of every operand. */
static void refused(struct fixture *f, plora_optimizer *optimizer, const plora_unload_options *options,
                    plora_status status, const char *part)
{
    const size_t bytes = (size_t)f->count * sizeof(float);
    float *const arenas[4] = {f->parameters, f->gradients, f->first, f->second};
    unsigned char *copies = allocate(4 * bytes);
    for (int i = 0; i < 4; ++i)
        memcpy(copies + (size_t)i * bytes, arenas[i], bytes);
    for (int i = 0; i < LAYERS; ++i)
        check_matrix_snapshot(&f->weights[i]);
    const int64_t stage = plora_adapters_stage(f->adapters);
    int64_t step_before = 0, step_after = 0;
    CHECK_OK(plora_optimizer_state(f->optimizer, NULL, NULL, NULL, &step_before));
    plora_unload_report report = PLORA_UNLOAD_REPORT_INIT, untouched = PLORA_UNLOAD_REPORT_INIT;
    CHECK_FAILS(DEVICE(plora_unload(f->adapters, optimizer, options, &report, NULL)), status, part);
    CHECK(memcmp(&report, &untouched, sizeof report) == 0, "the report was touched");
    for (int i = 0; i < LAYERS; ++i)
        check_matrix_unchanged(&f->weights[i], "W after a refused unload");
    for (int i = 0; i < 4; ++i)
        CHECK(memcmp(copies + (size_t)i * bytes, arenas[i], bytes) == 0, "arena %d has changed", i);
    CHECK_OK(plora_optimizer_state(f->optimizer, NULL, NULL, NULL, &step_after));
    CHECK(plora_adapters_stage(f->adapters) == stage && step_after == step_before, "stage or step has changed");
    free(copies);
}

static void test_refusals(void **state)
{
    (void)state;
    check_reseed(13);
    struct fixture f, other;
    setup(&f, PLORA_OPTIMIZER_ADAMW, 2);
    setup(&other, PLORA_OPTIMIZER_ADAMW, 2);
    train(&f);
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < LAYERS; ++i) /* the last layer too: nothing may have been merged before it is looked at */
        for (int kind = 0; kind < 3; ++kind)
            for (int is_b = 0; is_b < 2; ++is_b) {
                const plora_matrix *matrix = is_b ? &f.views[i].b : &f.views[i].a;
                float *element = (float *)matrix->data + check_integer(0, matrix->rows * matrix->columns - 1);
                const float kept = *element;
                char name[32];
                snprintf(name, sizeof name, "layer%d", i);
                *element = bad[kind];
                refused(&f, f.optimizer, &usual, PLORA_ERROR_NON_FINITE, name);
                *element = kept;
            }
    plora_unload_options options = usual;
    const double momenta[] = {0.0, -0.5, 1.0001, NAN, INFINITY};
    for (int i = 0; i < CHECK_COUNT(momenta); ++i) {
        options.momentum = momenta[i];
        refused(&f, f.optimizer, &options, PLORA_ERROR_INVALID_ARGUMENT, "momentum");
    }
    options = usual;
    options.moments = PLORA_MOMENTS_KEEP;
    refused(&f, f.optimizer, &options, PLORA_ERROR_INVALID_ARGUMENT, "momentum is 1");
    options.moments = 3;
    refused(&f, f.optimizer, &options, PLORA_ERROR_INVALID_ARGUMENT, "moments 3");
    options = usual;
    const int32_t unknown[] = {-2, 3};
    for (int i = 0; i < 2; ++i) {
        options.rounding = unknown[i];
        refused(&f, f.optimizer, &options, PLORA_ERROR_INVALID_ARGUMENT, "is unknown");
    }
    for (int32_t rounding = PLORA_ROUND_NEAREST; rounding <= PLORA_ROUND_RESIDUAL; ++rounding) {
        const int kept = usual_residual != PLORA_RESIDUAL_NONE;
        if (kept == (rounding == PLORA_ROUND_RESIDUAL)) continue;
        options.rounding = rounding;
        refused(&f, f.optimizer, &options, PLORA_ERROR_INVALID_ARGUMENT,
                kept ? "would lose the residual that layer 'layer3' keeps" : "which layer 'layer3' does not keep");
    }
    refused(&f, other.optimizer, NULL, PLORA_ERROR_INVALID_ARGUMENT, "other adapters");
    CHECK_FAILS(DEVICE(plora_unload(NULL, NULL, NULL, NULL, NULL)), PLORA_ERROR_INVALID_ARGUMENT, "adapters");
    CHECK_OK(DEVICE(plora_unload(f.adapters, f.optimizer, &usual, NULL, NULL))); /* the handles stayed usable */
    teardown(&other);
    teardown(&f);
}

/* An update that one weight cannot take is refused; the same update on smaller weights is merged. */
static void test_overflow(void **state)
{
    (void)state;
    check_reseed(14);
    for (int layer = 0; layer < LAYERS; ++layer) {
        struct fixture f;
        setup(&f, PLORA_OPTIMIZER_ADAMW, 2);
        train(&f);
        const plora_adapter *view = &f.views[layer];
        const plora_matrix *w = &f.weights[layer].m;
        const float top = w->dtype == PLORA_F32 ? 3.4028235e38f : w->dtype == PLORA_BF16 ? 3.3895314e38f : 65504.0f;
        float *a = view->a.data, *b = view->b.data;
        memset(a, 0, (size_t)(view->a.rows * view->a.columns) * sizeof(float));
        const int64_t n = check_integer(0, view->b.rows - 1), k = check_integer(0, view->a.columns - 1);
        const int64_t at = layer == 3 ? k * w->stride + n : n * w->stride + k;
        a[k] = sqrtf(top) / 2; /* rank 0, column k */
        b[n * view->b.columns] = (float)(sqrtf(top) / 4 / view->scale);
        plora__store(w->data, at, w->dtype, 0.9375f * top);
        refused(&f, f.optimizer, &usual, PLORA_ERROR_NON_FINITE, "overflow");
        plora__store(w->data, at, w->dtype, NAN); /* not this call's doing, and no reason to refuse */
        CHECK_OK(DEVICE(plora_unload(f.adapters, f.optimizer, &usual, NULL, NULL)));
        CHECK(isnan(plora__load(w->data, at, w->dtype)), "a NaN of W is gone");
        for (int64_t e = 0; e < w->rows * w->columns; ++e) {
            const int64_t place = e / w->columns * w->stride + e % w->columns;
            CHECK(place == at || isfinite(plora__load(w->data, place, w->dtype)), "W[%lld] is not finite",
                  (long long)place);
        }
        teardown(&f);
    }
}

static void test_report(void **state)
{
    (void)state;
    check_reseed(15);
    struct fixture f;
    setup(&f, PLORA_OPTIMIZER_ADAMW, 2);
    train(&f);
    double *before[LAYERS], *d[LAYERS], *magnitude[LAYERS];
    const double momentum = 0.25;
    for (int i = 0; i < LAYERS; ++i) {
        const plora_adapter *v = &f.views[i];
        const int64_t n = v->b.rows, k = v->a.columns, rank = v->a.rows;
        before[i] = allocate((size_t)(n * k) * sizeof(double));
        d[i] = allocate((size_t)(n * k) * sizeof(double));
        magnitude[i] = allocate((size_t)(n * k) * sizeof(double));
        reference_delta(momentum * v->scale, n, k, rank, v->b.data, rank, 1, v->a.data, k, 1, d[i], magnitude[i]);
        values_of(&f, i, before[i]);
    }
    plora_unload_layer layers[LAYERS];
    memset(layers, CHECK_POISON, sizeof layers);
    plora_unload_report report = PLORA_UNLOAD_REPORT_INIT;
    report.layers = layers;
    report.layer_capacity = LAYERS - 1;
    plora_unload_options options = usual;
    options.momentum = momentum;
    CHECK_OK(DEVICE(plora_unload(f.adapters, f.optimizer, &options, &report, NULL)));
    CHECK(report.stage == 0 && report.weights == LAYERS, "stage %lld, weights %d", (long long)report.stage,
          report.weights);
    unsigned char poison[sizeof layers[0]];
    memset(poison, CHECK_POISON, sizeof poison);
    CHECK(memcmp(&layers[LAYERS - 1], poison, sizeof poison) == 0, "wrote past layer_capacity");

    double all = 0, dd_all = 0, gd_all = 0, ww_all = 0, ll_all = 0, changed_all = 0, effective_all = 0, lost_all = 0;
    for (int i = 0; i < LAYERS; ++i) {
        const int64_t n = f.views[i].b.rows, k = f.views[i].a.columns;
        double dd = 0, gd = 0, ww = 0, ll = 0, changed = 0, lost = 0;
        double *after = allocate((size_t)(n * k) * sizeof(double));
        values_of(&f, i, after);
        for (int64_t e = 0; e < n * k; ++e) {
            const double g = after[e] - before[i][e];
            dd += d[i][e] * d[i][e];
            gd += g * d[i][e];
            ww += before[i][e] * before[i][e];
            ll += (d[i][e] - g) * (d[i][e] - g);
            changed += g != 0;
            lost = fmax(lost, fabs(d[i][e] - g));
        }
        const double effective = reference_effective_rank(n, k, d[i]), elements = (double)(n * k);
        if (i < LAYERS - 1) {
            CHECK(layers[i].layer == i && layers[i].rank == 5, "layer %d, rank %d", layers[i].layer, layers[i].rank);
            CHECK_CLOSE(layers[i].scale, momentum * f.views[i].scale, 1e-15, "scale");
            CHECK_CLOSE(layers[i].update_rms, sqrt(dd / elements), 1e-5 * sqrt(dd / elements), "update_rms of %d", i);
            CHECK_CLOSE(layers[i].weight_rms, sqrt(ww / elements), 1e-12, "weight_rms of %d", i);
            CHECK_CLOSE(layers[i].captured, gd / dd, 1e-5, "captured of %d", i);
            CHECK_CLOSE(layers[i].changed, changed / elements, 1e-12, "changed of %d", i);
            CHECK_CLOSE(layers[i].lost_max, lost, 1e-6 * sqrt(dd / elements), "lost_max of %d", i);
            CHECK_CLOSE(layers[i].lost_rms, sqrt(ll / elements), 1e-6 * sqrt(dd / elements), "lost_rms of %d", i);
            CHECK_CLOSE(layers[i].effective_rank, effective, 1e-4, "effective_rank of %d", i);
        }
        free(after);
        all += elements, dd_all += dd, gd_all += gd, ww_all += ww, ll_all += ll, changed_all += changed;
        effective_all += effective / LAYERS;
        lost_all = fmax(lost_all, lost);
    }
    CHECK_CLOSE(report.update_rms, sqrt(dd_all / all), 1e-5 * sqrt(dd_all / all), "update_rms");
    CHECK_CLOSE(report.weight_rms, sqrt(ww_all / all), 1e-12, "weight_rms");
    CHECK_CLOSE(report.captured, gd_all / dd_all, 1e-5, "captured");
    CHECK_CLOSE(report.changed, changed_all / all, 1e-12, "changed");
    CHECK_CLOSE(report.lost_max, lost_all, 1e-6 * sqrt(dd_all / all), "lost_max");
    CHECK_CLOSE(report.lost_rms, sqrt(ll_all / all), 1e-6 * sqrt(dd_all / all), "lost_rms");
    CHECK_CLOSE(report.effective_rank, effective_all, 1e-4, "effective_rank");

    CHECK_OK(DEVICE(plora_unload(f.adapters, f.optimizer, &usual, NULL, NULL)));
    report = (plora_unload_report)PLORA_UNLOAD_REPORT_INIT;
    CHECK_OK(DEVICE(plora_unload(f.adapters, f.optimizer, &usual, &report, NULL))); /* B = 0: nothing to merge */
    CHECK(report.stage == 2 && report.captured == 1 && report.update_rms == 0 && report.effective_rank == 0 &&
              report.lost_max == 0,
          "captured %g, update_rms %g, effective_rank %g of an empty update", report.captured, report.update_rms,
          report.effective_rank);
    for (int i = 0; i < LAYERS; ++i) {
        free(before[i]);
        free(d[i]);
        free(magnitude[i]);
    }
    teardown(&f);
}

/* 32 unloads allocate nothing; after each the adapter learns at once: B = 0 but A is not, so dB is not 0. */
static void test_many_unloads(void **state)
{
    (void)state;
    check_reseed(16);
    struct fixture f;
    setup(&f, PLORA_OPTIMIZER_ADAMW, 2);
    plora_memory_statistics start = PLORA_MEMORY_STATISTICS_INIT, now = PLORA_MEMORY_STATISTICS_INIT;
    CHECK_OK(plora_memory_stats(f.context, &start));
    for (int unload = 0; unload < 32; ++unload) {
        train(&f);
        plora_unload_options options = usual;
        plora_unload_report report = PLORA_UNLOAD_REPORT_INIT;
        options.momentum = unload % 3 == 0 ? 0.3 : 1.0;
        CHECK_OK(DEVICE(plora_unload(f.adapters, f.optimizer, &options, unload % 2 ? &report : NULL, NULL)));
        CHECK_OK(plora_memory_stats(f.context, &now));
        CHECK(now.current_bytes == start.current_bytes && now.peak_bytes == start.peak_bytes &&
                  now.allocations == start.allocations && now.device_peak_bytes == start.device_peak_bytes &&
                  now.device_allocations == start.device_allocations,
              "unload %d: %zu bytes, peak %zu, %lld allocations; at the start %zu, %zu, %lld", unload,
              now.current_bytes, now.peak_bytes, (long long)now.allocations, start.current_bytes, start.peak_bytes,
              (long long)start.allocations);
        CHECK(plora_adapters_stage(f.adapters) == unload + 1, "stage %lld",
              (long long)plora_adapters_stage(f.adapters));
    }
    teardown(&f);
}

static void test_gradients_after_unload(void **state)
{
    (void)state;
    check_reseed(17);
    struct fixture f;
    setup(&f, PLORA_OPTIMIZER_ADAMW, 2);
    train(&f);
    CHECK_OK(DEVICE(plora_unload(f.adapters, f.optimizer, &usual, NULL, NULL)));
    for (int i = 0; i < LAYERS; ++i) {
        const int64_t n = f.views[i].b.rows, k = f.views[i].a.columns;
        struct check_matrix x = check_matrix_new(3, k, k, PLORA_F32), dy = check_matrix_new(3, n, n, PLORA_F32);
        check_matrix_random(&x, 1);
        check_matrix_random(&dy, 1);
        const plora_matrix there[2] = {device_matrix(x.m), device_matrix(dy.m)};
        CHECK_OK(DEVICE(plora_linear_backward(f.adapters, i, &there[0], &there[1], NULL, 0, NULL)));
        int64_t zeros = 0;
        for (int64_t e = 0; e < n * f.views[i].b.columns; ++e)
            zeros += ((float *)f.views[i].b_gradient.data)[e] == 0;
        CHECK(zeros == 0, "layer %d: %lld elements of dB are 0: the adapter would not learn", i, (long long)zeros);
        check_matrix_free(&x);
        check_matrix_free(&dy);
    }
    plora_step_report report = PLORA_STEP_REPORT_INIT;
    CHECK_OK(DEVICE(plora_optimizer_step(f.optimizer, 1.0, &report, NULL)));
    CHECK(report.gradient_norm > 0 && report.step == 1, "norm %g, step %lld", report.gradient_norm,
          (long long)report.step);
    teardown(&f);
}

/* The same bits of W, report and moments with 1, 2 and 3 threads. */
static void test_threads(void **state)
{
    (void)state;
    struct fixture f[3];
    plora_unload_report report[3];
    for (int t = 0; t < 3; ++t) {
        check_reseed(18);
        setup(&f[t], PLORA_OPTIMIZER_ADAMW, t + 1);
        train(&f[t]);
        report[t] = (plora_unload_report)PLORA_UNLOAD_REPORT_INIT;
        CHECK_OK(DEVICE(plora_unload(f[t].adapters, f[t].optimizer, &usual, &report[t], NULL)));
        CHECK(memcmp(&report[t], &report[0], sizeof report[0]) == 0, "the report differs with %d threads", t + 1);
        CHECK(memcmp(f[t].parameters, f[0].parameters, (size_t)f[0].count * sizeof(float)) == 0,
              "parameters, %d threads", t + 1);
        for (int i = 0; i < LAYERS; ++i)
            for (int64_t row = 0; row < f[t].weights[i].m.rows; ++row)
                for (int64_t j = 0; j < f[t].weights[i].m.columns; ++j)
                    CHECK(check_element(&f[t].weights[i].m, row, j) == check_element(&f[0].weights[i].m, row, j),
                          "W differs with %d threads", t + 1);
    }
    for (int t = 0; t < 3; ++t)
        teardown(&f[t]);
}

int main(void)
{
    check_begin("test_unload");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_function_is_kept), cmocka_unit_test(test_full_unload_resets),
        cmocka_unit_test(test_moments_kept),     cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_overflow),         cmocka_unit_test(test_report),
        cmocka_unit_test(test_many_unloads),     cmocka_unit_test(test_gradients_after_unload),
        cmocka_unit_test(test_threads),
    };
    static const int32_t modes[][2] = {{PLORA_ROUND_NEAREST, PLORA_RESIDUAL_NONE},
                                       {PLORA_ROUND_STOCHASTIC, PLORA_RESIDUAL_NONE},
                                       {PLORA_ROUND_RESIDUAL, PLORA_RESIDUAL_DEVICE},
                                       {PLORA_ROUND_DEFAULT, PLORA_RESIDUAL_HOST}};
    int failures = 0;
    for (int i = 0; i < CHECK_COUNT(modes); ++i) {
        usual.rounding = modes[i][0];
        usual_residual = modes[i][1];
        failures += cmocka_run_group_tests(tests, NULL, NULL);
    }
    return failures;
}
