/* test_quantised.c: layers with int8 and NF4 weights: products against the reference of linear layers, unloads against those of an fp32 layer
 * of the same values, their records, and what goes wrong. The codes themselves are test_quantise.c's. */
#include <unistd.h>

#include "handles.h"
#include "quantised_fixture.h"

/* -------------------------------------------------------------------------------------------------------------- layers */

static plora_status add(plora_model *model, const struct arrays *a, int32_t master, float *values, int32_t flags,
                        const void *bias)
{
    plora_quantised_linear linear = PLORA_QUANTISED_LINEAR_INIT;
    linear.name = "block.layer";
    linear.weight = on_device(a);
    linear.bias = bias == NULL ? NULL : device_of(bias);
    linear.flags = flags;
    linear.master = master;
    if (values != NULL) linear.values = dense(values, a->w.rows, a->w.columns, PLORA_F32);
    linear.directory = master == PLORA_MASTER_FILE ? "/tmp" : NULL;
    return DEVICE(plora_model_add_quantised(model, &linear, NULL));
}

static plora_adapters *adapters_on(plora_model *model, int32_t rank)
{
    plora_adapters *adapters;
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = rank;
    options.alpha = 2.0 * rank;
    options.seed = 7;
    options.workspace_tokens = 8;
    CHECK_OK(plora_adapters_create(model, &options, &adapters));
    return adapters;
}

/* The same random factors for every set of one shape. */
static void draw_factors(plora_adapters *adapters, uint64_t salt, double size)
{
    float *data;
    int64_t count;
    CHECK_OK(plora_adapters_parameters(adapters, &data, &count));
    float *here = malloc((size_t)count * sizeof *here);
    CHECK(here != NULL, "the test itself is out of memory");
    check_reseed(salt);
    for (int64_t i = 0; i < count; ++i)
        here[i] = (float)(size * check_uniform());
    device_transfer(data, here, (size_t)count * sizeof *here);
    free(here);
}

/* One call each way against the reference: y and dx, with factors of any size. */
static void check_products(plora_adapters *adapters, const struct arrays *a, int32_t flags, const float *bias,
                           int32_t x_dtype, int32_t y_dtype, const char *text)
{
    const int fan = (flags & PLORA_LAYER_FAN_IN_FAN_OUT) != 0;
    const int64_t k = fan ? a->w.rows : a->w.columns, n = fan ? a->w.columns : a->w.rows, t = 11;
    struct check_matrix x = check_matrix_new(t, k, k + 3, x_dtype), y = check_matrix_new(t, n, n + 1, y_dtype);
    struct check_matrix dy = check_matrix_new(t, n, n, y_dtype), dx = check_matrix_new(t, k, k + 2, x_dtype);
    check_matrix_random(&x, 1.0);
    check_matrix_random(&dy, 1.0);
    plora_adapter view = PLORA_ADAPTER_INIT;
    CHECK_OK(plora_adapters_layer(adapters, 0, &view));
    const int64_t rank = view.a.rows;
    double *w = calloc((size_t)(n * k), sizeof *w), *xs = calloc((size_t)(t * k), sizeof *xs);
    double *dys = calloc((size_t)(t * n), sizeof *dys), *as = calloc((size_t)(rank * k), sizeof *as);
    double *bs = calloc((size_t)(n * rank), sizeof *bs), *biases = calloc((size_t)n, sizeof *biases);
    float *factors = malloc((size_t)(rank * (n + k)) * sizeof *factors);
    struct reference_sum *sums = calloc((size_t)(2 * t * (n + k) + rank * (n + k)), sizeof *sums);
    CHECK(w && xs && dys && as && bs && biases && factors && sums, "the test itself is out of memory");
    for (int64_t e = 0; e < n * k; ++e)
        w[fan ? e % n * k + e / n : e] = value_of(a, e);
    reference_load(&x.m, 0, xs);
    reference_load(&dy.m, 0, dys);
    device_transfer(factors, view.a.data, (size_t)(rank * k) * sizeof(float));
    for (int64_t i = 0; i < rank * k; ++i)
        as[i] = factors[i];
    device_transfer(factors, view.b.data, (size_t)(rank * n) * sizeof(float));
    for (int64_t i = 0; i < rank * n; ++i)
        bs[i] = factors[i];
    for (int64_t i = 0; bias != NULL && i < n; ++i)
        biases[i] = bias[i];
    const struct reference_linear linear = {.tokens = t,
                                            .in_features = k,
                                            .out_features = n,
                                            .rank = rank,
                                            .scale = view.scale,
                                            .x = xs,
                                            .w = w,
                                            .bias = biases,
                                            .a = as,
                                            .b = bs};
    struct reference_sum *base = sums, *low = base + t * n, *dbase = low + t * n, *dlow = dbase + t * k;
    struct reference_sum *da = dlow + t * k, *db = da + rank * k;
    reference_linear_forward(&linear, base, low);
    reference_linear_backward(&linear, dys, dbase, dlow, da, db);
    const plora_matrix device_x = device_matrix(x.m), device_y = device_matrix(y.m);
    const plora_matrix device_dy = device_matrix(dy.m), device_dx = device_matrix(dx.m);
    void *stream = device_is_cuda() && check_integer(0, 1) ? device_stream_create() : NULL;
    CHECK_OK(DEVICE(plora_linear_forward(adapters, 0, &device_x, &device_y, 0, stream)));
    CHECK_OK(DEVICE(plora_linear_backward(adapters, 0, &device_x, &device_dy, &device_dx, 0, stream)));
    if (stream != NULL) device_stream_destroy(stream);
    /* fp32 sums; where x is bf16, W and the low-rank operands are rounded to it; then the output. */
    const double operands = x_dtype == PLORA_BF16 ? 4.05 * check_roundoff(PLORA_BF16) : 0.0;
    for (int way = 0; way < 2; ++way) {
        const plora_matrix *out = way == 0 ? &y.m : &dx.m;
        const struct reference_sum *b = way == 0 ? base : dbase, *l = way == 0 ? low : dlow;
        const double terms = (double)(n + k + rank + 32) * check_roundoff(PLORA_F32), u = check_roundoff(out->dtype);
        for (int64_t i = 0; i < out->rows * out->columns; ++i) {
            const double size = b[i].magnitude + l[i].magnitude, want = b[i].value + l[i].value;
            CHECK_CLOSE(check_element(out, i / out->columns, i % out->columns), want,
                        (terms + operands) * size * (1 + u) + 2.02 * u * (fabs(b[i].value) + fabs(l[i].value)),
                        "%s[%lld]: %s", way == 0 ? "y" : "dx", (long long)i, text);
        }
    }
    check_matrix_guards(&y, text);
    check_matrix_guards(&dx, text);
    struct check_matrix *const matrices[] = {&x, &y, &dy, &dx};
    for (int i = 0; i < CHECK_COUNT(matrices); ++i)
        check_matrix_free(matrices[i]);
    void *const memory[] = {w, xs, dys, as, bs, biases, factors, sums};
    for (int i = 0; i < CHECK_COUNT(memory); ++i)
        free(memory[i]);
}

static void test_linear(void **state)
{
    (void)state;
    /* {3, 1100} and {2100, 3}: more than a panel of CUDA's each way */
    static const int64_t shapes[][2] = {{5, 7}, {67, 131}, {131, 67}, {3, 1100}, {2100, 3}, {300, 211}};
    for (int k = 0; k < CHECK_COUNT(kinds); ++k)
        for (int s = 0; s < CHECK_COUNT(shapes) - (device_is_cuda() || check_quick()); ++s)
            for (int flags = 0; flags <= PLORA_LAYER_FAN_IN_FAN_OUT; ++flags)
                for (int deterministic = 0; deterministic < 2; ++deterministic) {
                    if (device_is_cuda() && s > 2 && (k % 3 != 0 || deterministic)) continue; /* an emulator's time */
                    check_reseed(1000 + 8 * (uint64_t)k + (uint64_t)s);
                    plora_context *context = check_context(NULL, 0, deterministic);
                    plora_model *model;
                    const int64_t rows = shapes[s][0], columns = shapes[s][1];
                    struct arrays *a = arrays_new(&kinds[k], rows, columns);
                    float *values = random_values(rows * columns, 0.5),
                          *bias = twin((size_t)(rows + columns) * sizeof(float));
                    for (int64_t i = 0; i < rows + columns; ++i)
                        bias[i] = (float)check_uniform();
                    device_refresh(bias);
                    CHECK_OK(plora_model_create(context, &model));
                    CHECK_OK(add(model, a, PLORA_MASTER_MEMORY, values, flags, bias));
                    check_codes(a, values, describe(&kinds[k], rows, columns));
                    plora_adapters *adapters = adapters_on(model, 3);
                    draw_factors(adapters, 5, 0.3);
                    for (int dtypes = 0; dtypes < 4; ++dtypes)
                        check_products(adapters, a, flags, bias, dtypes & 1, dtypes >> 1,
                                       describe(&kinds[k], rows, columns));
                    plora_adapters_destroy(adapters);
                    plora_model_destroy(model);
                    plora_context_destroy(context);
                    device_forget(bias);
                    free(bias);
                    free(values);
                    arrays_free(a);
                }
}

/* ------------------------------------------------------------------------------------------------------------- masters */

static const float *master_of(const plora_model *model)
{
    plora_quantised_linear linear = PLORA_QUANTISED_LINEAR_INIT;
    CHECK_OK(plora_model_quantised(model, 0, &linear));
    return linear.values.data;
}

/* Of values in any dtype and from anywhere, or of what the codes hold. */
static void check_master(const struct kind *kind, int64_t rows, int64_t columns, int32_t source)
{
    enum { OF_CODES = PLORA_F16 + 1 };
    const int of_codes = source == OF_CODES;
    const int64_t count = rows * columns;
    plora_context *context = check_context(NULL, 0, 0);
    plora_model *model;
    struct arrays *a = arrays_new(kind, rows, columns);
    struct check_matrix values =
        check_matrix_new(rows, columns, columns + check_integer(0, 3), of_codes ? PLORA_F32 : source);
    float *want = malloc((size_t)count * sizeof *want);
    CHECK(want != NULL, "the test itself is out of memory");
    check_matrix_random(&values, 0.1);
    plora_quantised_linear linear = PLORA_QUANTISED_LINEAR_INIT;
    linear.name = "block.layer";
    linear.weight = on_device(a);
    linear.weight.offset = a->w.offset = kind->nested ? 0.05f : 0.0f;
    if (of_codes) {
        CHECK_OK(DEVICE(plora_quantise(context, &values.m, &linear.weight, 0, NULL)));
        a->w.offset = linear.weight.offset;
    } else {
        linear.values = check_integer(0, 1) ? device_matrix(values.m) : values.m;
    }
    linear.master = check_integer(0, 1) ? PLORA_MASTER_MEMORY : PLORA_MASTER_FILE;
    linear.directory = linear.master == PLORA_MASTER_FILE ? "/tmp" : NULL;
    for (int64_t i = 0; i < count; ++i)
        want[i] = of_codes ? value_of(a, i) : (float)check_element(&values.m, i / columns, i % columns);
    CHECK_OK(plora_model_create(context, &model));
    CHECK_OK(DEVICE(plora_model_add_quantised(model, &linear, NULL)));
    for (int64_t i = 0; i < count; ++i)
        CHECK(master_of(model)[i] == want[i], "source %d: master[%lld] is %.9g, want %.9g: %s", source, (long long)i,
              (double)master_of(model)[i], (double)want[i], describe(kind, rows, columns));
    check_codes(a, want, describe(kind, rows, columns));
    plora_model_destroy(model);
    plora_context_destroy(context);
    check_matrix_free(&values);
    arrays_free(a);
    free(want);
}

static void test_masters(void **state)
{
    (void)state;
    check_reseed(21);
    for (int k = 0; k < CHECK_COUNT(kinds); ++k)
        for (int32_t source = PLORA_F32; source <= PLORA_F16 + 1; ++source) {
            check_master(&kinds[k], 5, 7, source);
            check_master(&kinds[k], 33, 130, source);
            if (source > PLORA_F16 && k % 2 == 0) check_master(&kinds[k], 1031, 1031, source); /* two runs */
        }
}

/* -------------------------------------------------------------------------------------------------------------- unload */

/* An fp32 layer on the CPU, unloaded with the same factors: what a master must become. */
struct twin_layer {
    plora_context *context;
    plora_model *model;
    plora_adapters *adapters;
    float *weight;
};

static struct twin_layer twin_layer_new(const float *values, int64_t rows, int64_t columns, int32_t flags, int32_t rank)
{
    struct twin_layer t = {0};
    t.weight = malloc((size_t)(rows * columns) * sizeof(float));
    CHECK(t.weight != NULL, "the test itself is out of memory");
    memcpy(t.weight, values, (size_t)(rows * columns) * sizeof(float));
    plora_linear linear = PLORA_LINEAR_INIT;
    linear.name = "block.layer";
    linear.weight = dense(t.weight, rows, columns, PLORA_F32);
    linear.flags = flags;
    CHECK_OK(plora_context_create(NULL, &t.context));
    CHECK_OK(plora_model_create(t.context, &t.model));
    CHECK_OK(plora_model_add_linear(t.model, &linear, NULL));
    t.adapters = adapters_on(t.model, rank);
    return t;
}

static void twin_layer_free(struct twin_layer *t)
{
    plora_adapters_destroy(t->adapters);
    plora_model_destroy(t->model);
    plora_context_destroy(t->context);
    free(t->weight);
}

static void draw_here(plora_adapters *adapters, uint64_t salt, double size)
{
    float *data;
    int64_t count;
    CHECK_OK(plora_adapters_parameters(adapters, &data, &count));
    check_reseed(salt);
    for (int64_t i = 0; i < count; ++i)
        data[i] = (float)(size * check_uniform());
}

static void check_report(const struct arrays *a, const float *master, const plora_unload_report *got,
                         const plora_unload_report *want, const char *text)
{
    const double figures[][2] = {{got->captured, want->captured},
                                 {got->update_rms, want->update_rms},
                                 {got->weight_rms, want->weight_rms},
                                 {got->lost_rms, want->lost_rms},
                                 {got->lost_max, want->lost_max},
                                 {got->changed, want->changed},
                                 {got->effective_rank, want->effective_rank}};
    for (int i = 0; i < CHECK_COUNT(figures); ++i)
        CHECK_CLOSE(figures[i][0], figures[i][1], 1e-9 * (1 + fabs(figures[i][1])), "figure %d: %s", i, text);
    double square = 0, largest = 0;
    const int64_t count = a->w.rows * a->w.columns;
    for (int64_t i = 0; i < count; ++i) {
        const double lost = fabs((double)value_of(a, i) - master[i]);
        square += lost * lost;
        if (lost > largest) largest = lost;
    }
    CHECK_CLOSE(got->quantised_rms, sqrt(square / (double)count), 1e-9, "quantised_rms: %s", text);
    CHECK(got->quantised_max == largest, "quantised_max is %g, want %g: %s", got->quantised_max, largest, text);
    CHECK(got->layers[0].quantised_rms == got->quantised_rms && got->layers[0].quantised_max == largest, "layer: %s",
          text);
}

static void run_unloads(const struct kind *kind, int64_t rows, int64_t columns, int32_t master, int32_t flags,
                        int unloads)
{
    const char *text = describe(kind, rows, columns);
    plora_context *context = check_context(NULL, 0, 0);
    plora_model *model;
    check_reseed(31);
    float *values = random_values(rows * columns, 0.1);
    struct arrays *a = arrays_new(kind, rows, columns);
    const plora_matrix matrix = dense(values, rows, columns, PLORA_F32);
    plora_quantised w = on_device(a);
    CHECK_OK(DEVICE(plora_quantise(context, &matrix, &w, 0, NULL)));
    a->w.offset = w.offset;
    struct twin_layer other = twin_layer_new(values, rows, columns, flags, 2);
    CHECK_OK(plora_model_create(context, &model));
    CHECK_OK(add(model, a, master, values, flags, NULL));
    plora_adapters *adapters = adapters_on(model, 2);
    plora_memory_statistics before = PLORA_MEMORY_STATISTICS_INIT, after = PLORA_MEMORY_STATISTICS_INIT;
    CHECK_OK(plora_memory_stats(context, &before));
    for (int t = 0; t < unloads; ++t) {
        plora_unload_layer layers[2];
        plora_unload_report got = PLORA_UNLOAD_REPORT_INIT, want = PLORA_UNLOAD_REPORT_INIT;
        plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
        options.momentum = t % 3 == 2 ? 0.5 : 1.0;
        got.layers = layers;
        got.layer_capacity = 2;
        draw_factors(adapters, 100 + (uint64_t)t, 0.02);
        draw_here(other.adapters, 100 + (uint64_t)t, 0.02);
        CHECK_OK(DEVICE(plora_unload(adapters, NULL, &options, &got, NULL)));
        CHECK_OK(plora_unload(other.adapters, NULL, &options, &want, NULL));
        const float *now = master_of(model);
        for (int64_t i = 0; i < rows * columns; ++i)
            CHECK(now[i] == other.weight[i], "unload %d: master[%lld] is %.9g, want %.9g: %s", t, (long long)i,
                  (double)now[i], (double)other.weight[i], text);
        check_codes(a, now, text);
        check_report(a, now, &got, &want, text);
    }
    CHECK_OK(plora_memory_stats(context, &after));
    CHECK(after.current_bytes == before.current_bytes && after.allocations == before.allocations &&
              after.device_allocations == before.device_allocations,
          "unloads took %lld allocations: %s", (long long)(after.allocations - before.allocations), text);
    CHECK((master == PLORA_MASTER_FILE) == (after.mapped_bytes > 0), "%zu bytes are mapped", after.mapped_bytes);
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    CHECK_OK(plora_memory_stats(context, &after));
    CHECK(after.mapped_bytes == 0, "%zu bytes stay mapped", after.mapped_bytes);
    plora_context_destroy(context);
    twin_layer_free(&other);
    arrays_free(a);
    free(values);
}

static void test_unload(void **state)
{
    (void)state;
    static const int64_t shapes[][2] = {{5, 7}, {67, 131}, {64, 64}, {1543, 1021}};
    for (int k = 0; k < CHECK_COUNT(kinds); ++k)
        for (int s = 0; s < CHECK_COUNT(shapes) - (device_is_cuda() || check_quick()); ++s)
            run_unloads(&kinds[k], shapes[s][0], shapes[s][1], PLORA_MASTER_HOST + (k + s) % 3, s == 1,
                        s == 0 ? 32 : 3);
}

/* y before and after differ by what quantising moves, at most. */
static void test_function(void **state)
{
    (void)state;
    for (int k = 0; k < CHECK_COUNT(kinds); ++k) {
        enum { ROWS = 37, COLUMNS = 130, TOKENS = 4 };
        plora_context *context = check_context(NULL, 0, 0);
        plora_model *model;
        check_reseed(41 + (uint64_t)k);
        float *values = random_values(ROWS * COLUMNS, 0.1), old[ROWS * COLUMNS], moved[ROWS * COLUMNS];
        struct arrays *a = arrays_new(&kinds[k], ROWS, COLUMNS);
        CHECK_OK(plora_model_create(context, &model));
        CHECK_OK(add(model, a, PLORA_MASTER_MEMORY, values, 0, NULL));
        plora_adapters *adapters = adapters_on(model, 4);
        draw_factors(adapters, 9, 0.05);
        struct check_matrix x = check_matrix_new(TOKENS, COLUMNS, COLUMNS, PLORA_F32);
        struct check_matrix y[2] = {check_matrix_new(TOKENS, ROWS, ROWS, PLORA_F32),
                                    check_matrix_new(TOKENS, ROWS, ROWS, PLORA_F32)};
        check_matrix_random(&x, 1.0);
        const plora_matrix device_x = device_matrix(x.m), device_y[2] = {device_matrix(y[0].m), device_matrix(y[1].m)};
        for (int i = 0; i < ROWS * COLUMNS; ++i)
            old[i] = value_of(a, i) - master_of(model)[i];
        CHECK_OK(DEVICE(plora_linear_forward(adapters, 0, &device_x, &device_y[0], 0, NULL)));
        CHECK_OK(DEVICE(plora_unload(adapters, NULL, NULL, NULL, NULL)));
        CHECK_OK(DEVICE(plora_linear_forward(adapters, 0, &device_x, &device_y[1], 0, NULL)));
        for (int i = 0; i < ROWS * COLUMNS; ++i)
            moved[i] = value_of(a, i) - master_of(model)[i] - old[i];
        for (int64_t i = 0; i < TOKENS * ROWS; ++i) {
            double shift = 0, size = 1;
            for (int64_t j = 0; j < COLUMNS; ++j) {
                const double input = check_element(&x.m, i / ROWS, j);
                shift += input * moved[i % ROWS * COLUMNS + j];
                size += fabs(input);
            }
            CHECK_CLOSE(check_element(&y[1].m, i / ROWS, i % ROWS) - check_element(&y[0].m, i / ROWS, i % ROWS), shift,
                        400 * check_roundoff(PLORA_F32) * size, "y[%lld]: %s", (long long)i,
                        describe(&kinds[k], ROWS, COLUMNS));
        }
        check_matrix_free(&x);
        check_matrix_free(&y[0]);
        check_matrix_free(&y[1]);
        plora_adapters_destroy(adapters);
        plora_model_destroy(model);
        plora_context_destroy(context);
        arrays_free(a);
        free(values);
    }
}

/* Without a master: refused with the figure that an unload in place then reports; nothing but codes is written by that. */
static void test_without_master(void **state)
{
    (void)state;
    static const int64_t shapes[][2] = {{33, 130}, {700, 1601}};
    for (int k = 0; k < CHECK_COUNT(kinds); ++k)
        for (int s = 0; s < CHECK_COUNT(shapes) - (device_is_cuda() || check_quick()); ++s) {
            const int64_t rows = shapes[s][0], columns = shapes[s][1], count = rows * columns;
            plora_context *context = check_context(NULL, 0, 0);
            plora_model *model;
            check_reseed(51);
            float *values = random_values(count, 0.1), *held = malloc((size_t)count * sizeof *held);
            CHECK(held != NULL, "the test itself is out of memory");
            struct arrays *a = arrays_new(&kinds[k], rows, columns);
            const plora_matrix matrix = dense(values, rows, columns, PLORA_F32);
            plora_quantised w = on_device(a);
            CHECK_OK(DEVICE(plora_quantise(context, &matrix, &w, 0, NULL)));
            a->w.offset = w.offset;
            CHECK_OK(plora_model_create(context, &model));
            CHECK_OK(add(model, a, PLORA_MASTER_NONE, NULL, 0, NULL));
            plora_adapters *adapters = adapters_on(model, 2);
            draw_factors(adapters, 61, 0.02);
            for (int64_t i = 0; i < count; ++i)
                values[i] = held[i] = value_of(a, i);
            CHECK_FAILS(DEVICE(plora_unload(adapters, NULL, NULL, NULL, NULL)), PLORA_ERROR_UNSUPPORTED, "block.layer",
                        "without a master", "would hold", "without_master");
            const char *figure = strstr(plora_last_error(), "would hold ") + strlen("would hold ");
            const double told = strtod(figure, NULL);
            for (int64_t i = 0; i < count; ++i)
                CHECK(value_of(a, i) == held[i], "a refused unload changed element %lld", (long long)i);
            struct twin_layer other = twin_layer_new(values, rows, columns, 0, 2); /* of what the codes hold */
            draw_here(other.adapters, 61, 0.02);
            plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
            plora_unload_report report = PLORA_UNLOAD_REPORT_INIT;
            options.without_master = 1;
            CHECK_OK(DEVICE(plora_unload(adapters, NULL, &options, &report, NULL)));
            CHECK_OK(plora_unload(other.adapters, NULL, NULL, NULL, NULL));
            double dd = 0, gd = 0;
            for (int64_t i = 0; i < count; ++i) {
                const double d = (double)other.weight[i] - values[i];
                dd += d * d;
                gd += d * ((double)value_of(a, i) - values[i]);
            }
            CHECK_CLOSE(report.captured, gd / dd, 1e-4 * (1 + fabs(gd / dd)), "captured: %s",
                        describe(&kinds[k], rows, columns));
            CHECK_CLOSE(told, report.captured, 0.51e-4, "told: %s", describe(&kinds[k], rows, columns));
            CHECK(report.quantised_rms == 0, "there is no master, but quantised_rms is %g", report.quantised_rms);
            twin_layer_free(&other);
            plora_adapters_destroy(adapters);
            plora_model_destroy(model);
            plora_context_destroy(context);
            arrays_free(a);
            free(values);
            free(held);
        }
}

/* ------------------------------------------------------------------------------------------------- ledger, checkpoint, file */

static void test_records(void **state)
{
    (void)state;
    char path[64];
    snprintf(path, sizeof path, "/tmp/plora_test_quantised.%ld", (long)getpid());
    for (int k = 0; k < CHECK_COUNT(kinds); k += 3) {
        enum { ROWS = 41, COLUMNS = 97, COUNT = ROWS * COLUMNS };
        plora_context *context = check_context(NULL, 0, 0);
        plora_model *model, *original;
        check_reseed(71);
        float *values = random_values(COUNT, 0.1);
        struct arrays *a = arrays_new(&kinds[k], ROWS, COLUMNS);
        struct twin_layer other = twin_layer_new(values, ROWS, COLUMNS, 0, 2);
        original = other.model; /* the same values, in fp32, on the CPU */
        CHECK_OK(plora_model_create(context, &model));
        CHECK_OK(add(model, a, PLORA_MASTER_MEMORY, values, 0, NULL));
        plora_adapters *adapters = adapters_on(model, 2);
        plora_ledger_options options = PLORA_LEDGER_OPTIONS_INIT;
        plora_ledger *ledger;
        options.original = original;
        options.hash_weights = 1;
        CHECK_OK(plora_ledger_open(adapters, &options, &ledger));
        float *masters[3];
        for (int t = 0; t < 3; ++t) {
            draw_factors(adapters, 80 + (uint64_t)t, 0.02);
            CHECK_OK(DEVICE(plora_unload(adapters, NULL, NULL, NULL, NULL)));
            masters[t] = malloc(COUNT * sizeof(float));
            memcpy(masters[t], master_of(model), COUNT * sizeof(float));
            if (t == 1) CHECK_OK(plora_checkpoint_save(adapters, NULL, path, PLORA_CHECKPOINT_WEIGHTS));
        }
        CHECK_OK(plora_ledger_verify(ledger));
        CHECK_OK(DEVICE(plora_ledger_roll_back(ledger, 1, 0)));
        CHECK(memcmp(master_of(model), masters[0], COUNT * sizeof(float)) == 0, "the master is not that of one record");
        check_codes(a, masters[0], "rolled back");
        CHECK_OK(DEVICE(plora_ledger_roll_back(ledger, 0, 0)));
        check_codes(a, values, "rolled back to the start");
        CHECK_OK(DEVICE(plora_ledger_roll_back(ledger, 3, 0)));
        check_codes(a, masters[2], "rolled forward");
        CHECK_OK(DEVICE(plora_checkpoint_load(adapters, NULL, path)));
        CHECK(memcmp(master_of(model), masters[1], COUNT * sizeof(float)) == 0, "the master is not the checkpoint's");
        check_codes(a, masters[1], "loaded");
        CHECK(plora_ledger_position(ledger) == 2, "position %lld", (long long)plora_ledger_position(ledger));
        CHECK_OK(plora_model_save(model, path));
        plora_model *saved;
        plora_matrix tensor;
        CHECK_OK(plora_model_open(other.context, path, &saved));
        CHECK_OK(plora_model_find_tensor(saved, "block.layer.weight", &tensor));
        CHECK(tensor.dtype == PLORA_F32 && memcmp(tensor.data, masters[1], COUNT * sizeof(float)) == 0,
              "the saved weight differs");
        plora_model_destroy(saved);
        ((float *)(uintptr_t)master_of(model))[5] = 3.0f;
        CHECK_OK(DEVICE(plora_model_requantise(model, NULL)));
        check_codes(a, master_of(model), "written by the host");
        unlink(path);
        plora_ledger_destroy(ledger);
        plora_adapters_destroy(adapters);
        plora_model_destroy(model);
        plora_context_destroy(context);
        twin_layer_free(&other);
        arrays_free(a);
        for (int t = 0; t < 3; ++t)
            free(masters[t]);
        free(values);
    }
}

/* -------------------------------------------------------------------------------------------------------------- errors */

static void test_errors(void **state)
{
    (void)state;
    enum { ROWS = 6, COLUMNS = 70 };
    plora_context *context = check_context(NULL, 0, 0);
    plora_model *model;
    float *values = random_values(ROWS * COLUMNS, 0.1);
    const struct kind nf4 = {PLORA_QUANTISED_NF4, 0, 1}, int8 = {PLORA_QUANTISED_INT8, 3, 0};
    struct arrays *a = arrays_new(&nf4, ROWS, COLUMNS), *b = arrays_new(&int8, ROWS, COLUMNS);
    CHECK_OK(plora_model_create(context, &model));
    plora_quantised_linear linear = PLORA_QUANTISED_LINEAR_INIT;
    linear.name = "first";
    linear.weight = on_device(a);
    const plora_quantised_linear good = linear;
    const struct {
        plora_status status;
        const char *says;
    } cases[] = {{PLORA_ERROR_INVALID_ARGUMENT, "format 5"},
                 {PLORA_ERROR_INVALID_ARGUMENT, "group is 32"},
                 {PLORA_ERROR_SHAPE, "[0,70]"},
                 {PLORA_ERROR_INVALID_ARGUMENT, "codes is NULL"},
                 {PLORA_ERROR_INVALID_ARGUMENT, "together"},
                 {PLORA_ERROR_INVALID_ARGUMENT, "only NF4"},
                 {PLORA_ERROR_INVALID_ARGUMENT, "master 9"},
                 {PLORA_ERROR_INVALID_ARGUMENT, "directory is NULL"},
                 {PLORA_ERROR_INVALID_ARGUMENT, "no master"},
                 {PLORA_ERROR_SHAPE, "[5,70]"},
                 {PLORA_ERROR_UNSUPPORTED, "a master is F32"},
                 {PLORA_ERROR_INVALID_ARGUMENT, "offset is nan"},
                 {PLORA_ERROR_INVALID_ARGUMENT, "values.data is NULL"},
                 {PLORA_ERROR_IO, "/nowhere"},
                 {PLORA_ERROR_NON_FINITE, "(2,3)"},
                 {PLORA_ERROR_INVALID_ARGUMENT, "name is empty"},
                 {PLORA_ERROR_NON_FINITE, "(2,3)"},
                 {PLORA_ERROR_INVALID_ARGUMENT, "map[8] is"}};
    for (int i = 0; i < CHECK_COUNT(cases); ++i) {
        linear = good;
        const plora_matrix matrix = dense(values, ROWS, COLUMNS, PLORA_F32);
        if (i == 0) linear.weight.format = 5;
        if (i == 1) linear.weight.group = 32;
        if (i == 2) linear.weight.rows = 0;
        if (i == 3) linear.weight.codes = NULL;
        if (i == 4) linear.weight.map = NULL;
        if (i == 5) linear.weight.format = PLORA_QUANTISED_INT8;
        if (i == 6) linear.master = 9;
        if (i == 7) linear.master = PLORA_MASTER_FILE;
        if (i == 8) linear.values = matrix;
        if (i == 9) linear.master = PLORA_MASTER_MEMORY, linear.values = matrix, linear.values.rows = 5;
        if (i == 10) linear.master = PLORA_MASTER_HOST, linear.values = matrix, linear.values.dtype = PLORA_BF16;
        if (i == 11) linear.weight.offset = NAN;
        if (i == 12) linear.master = PLORA_MASTER_HOST;
        if (i == 13) linear.master = PLORA_MASTER_FILE, linear.directory = "/nowhere", linear.values = matrix;
        if (i == 14) linear.master = PLORA_MASTER_HOST, linear.values = matrix;
        if (i == 15) linear.name = "";
        if (i == 16) linear.master = PLORA_MASTER_MEMORY, linear.values = matrix;
        const float kept = values[2 * COLUMNS + 3];
        if (i == 14 || i == 16) values[2 * COLUMNS + 3] = INFINITY;
        float *seventh = (float *)(uintptr_t)a->w.map + 7;
        if (i == 17) *seventh = 1.0f;
        CHECK_FAILS(DEVICE(plora_model_add_quantised(model, &linear, NULL)), cases[i].status, cases[i].says);
        values[2 * COLUMNS + 3] = kept;
        *seventh = a->map[7];
        for (size_t c = 0; c < a->codes_bytes; ++c)
            CHECK(((uint8_t *)a->w.codes)[c] == CHECK_POISON, "case %d wrote code %zu", i, c);
    }
    CHECK(plora_model_layer_count(model) == 0, "a refused layer is there");

    linear = good; /* tied, and nearly so */
    linear.master = PLORA_MASTER_MEMORY;
    linear.values = dense(values, ROWS, COLUMNS, PLORA_F32);
    CHECK_OK(DEVICE(plora_model_add_quantised(model, &linear, NULL)));
    linear.name = "second";
    CHECK_FAILS(DEVICE(plora_model_add_quantised(model, &linear, NULL)), PLORA_ERROR_INVALID_ARGUMENT, "second",
                "first", "PLORA_MASTER_NONE");
    linear.master = PLORA_MASTER_NONE;
    linear.values.data = NULL;
    linear.weight.offset = 0.5f;
    CHECK_FAILS(DEVICE(plora_model_add_quantised(model, &linear, NULL)), PLORA_ERROR_INVALID_ARGUMENT, "overlap");
    linear.weight.offset = 0.0f;
    CHECK_OK(DEVICE(plora_model_add_quantised(model, &linear, NULL)));
    CHECK(model->weight_count == 1 && model->layer_count == 2, "%d weights", model->weight_count);
    linear.name = "third";
    linear.weight = on_device(b);
    memset(b->w.codes, 1, b->codes_bytes);
    for (size_t i = 0; i < b->scales_bytes / sizeof(float); ++i)
        b->w.scales[i] = 0.01f;
    CHECK_OK(DEVICE(plora_model_add_quantised(model, &linear, NULL)));

    plora_linear plain = PLORA_LINEAR_INIT;
    CHECK_OK(plora_model_layer(model, 2, &plain));
    CHECK(plain.weight.data == NULL && plain.weight.rows == ROWS && plain.weight.columns == COLUMNS,
          "of a quantised layer");
    plora_adapters *adapters = adapters_on(model, 2);
    CHECK(adapters->adapter_count == 2, "%d adapters", adapters->adapter_count);
    plora_ledger *ledger;
    CHECK_FAILS(plora_ledger_open(adapters, NULL, &ledger), PLORA_ERROR_UNSUPPORTED, "third", "no ledger");
    CHECK_FAILS(plora_checkpoint_save(adapters, NULL, "/tmp/never", PLORA_CHECKPOINT_WEIGHTS), PLORA_ERROR_UNSUPPORTED,
                "third");
    CHECK_FAILS(plora_model_save(model, "/tmp/never"), PLORA_ERROR_UNSUPPORTED, "third");
    plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
    options.without_master = 2;
    CHECK_FAILS(plora_unload(adapters, NULL, &options, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "without_master is 2");

    options.without_master = 1; /* a master that would overflow */
    ((float *)(uintptr_t)master_of(model))[0] = 3e38f;
    draw_factors(adapters, 3, 1e19);
    CHECK_FAILS(DEVICE(plora_unload(adapters, NULL, &options, NULL, NULL)), PLORA_ERROR_NON_FINITE, "overflow");
    CHECK(master_of(model)[0] == 3e38f, "a refused unload wrote the master");
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    plora_context_destroy(context);
    arrays_free(a);
    arrays_free(b);
    free(values);
}

/* Each allocation fails once: an error, nothing written, nothing leaks; then all goes well. */
static void test_out_of_memory(void **state)
{
    (void)state;
    enum { ROWS = 9, COLUMNS = 70 };
    const struct kind kind = {PLORA_QUANTISED_NF4, 0, 1};
    float *values = random_values(ROWS * COLUMNS, 0.1);
    int64_t last = 0;
    for (int64_t fail_at = 1; last == 0; ++fail_at) {
        struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
        plora_context *context = check_context(&allocator, 1, 0);
        plora_model *model = NULL;
        plora_adapters *adapters = NULL;
        struct arrays *a = arrays_new(&kind, ROWS, COLUMNS);
        plora_quantised w = on_device(a);
        const plora_matrix matrix = dense(values, ROWS, COLUMNS, PLORA_F32);
        plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
        options.rank = 2;
        options.workspace_tokens = 1;
        allocator.fail_at = allocator.calls + fail_at;
        plora_status status = DEVICE(plora_quantise(context, &matrix, &w, 0, NULL));
        if (status == PLORA_OK) status = plora_model_create(context, &model);
        if (status == PLORA_OK) {
            memset(a->w.codes, CHECK_POISON, a->codes_bytes);
            status = add(model, a, PLORA_MASTER_FILE, values, 0, NULL);
            if (status != PLORA_OK)
                for (size_t i = 0; i < a->codes_bytes; ++i)
                    CHECK(((uint8_t *)a->w.codes)[i] == CHECK_POISON, "allocation %lld: code %zu was written",
                          (long long)fail_at, i);
        }
        if (status == PLORA_OK) status = plora_adapters_create(model, &options, &adapters);
        if (status == PLORA_OK) status = DEVICE(plora_unload(adapters, NULL, NULL, NULL, NULL));
        if (status == PLORA_OK) status = DEVICE(plora_model_requantise(model, NULL));
        CHECK(status == PLORA_OK || status == PLORA_ERROR_OUT_OF_MEMORY, "allocation %lld: %s", (long long)fail_at,
              plora_last_error());
        CHECK((status == PLORA_OK) == (allocator.failed == 0), "allocation %lld: status %d", (long long)fail_at,
              status);
        plora_adapters_destroy(adapters);
        plora_model_destroy(model);
        plora_context_destroy(context);
        CHECK(allocator.live == 0 && allocator.errors == 0, "allocation %lld: %lld live, %lld errors",
              (long long)fail_at, (long long)allocator.live, (long long)allocator.errors);
        if (status == PLORA_OK) last = fail_at;
        arrays_free(a);
    }
    CHECK(last > 10, "only %lld allocations", (long long)last);
    free(values);
}

int main(void)
{
    check_begin("test_quantised");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear),   cmocka_unit_test(test_masters),        cmocka_unit_test(test_unload),
        cmocka_unit_test(test_function), cmocka_unit_test(test_without_master), cmocka_unit_test(test_records),
        cmocka_unit_test(test_errors),   cmocka_unit_test(test_out_of_memory),
    };
    return cmocka_run_group_tests_name("quantised", tests, NULL, NULL);
}
