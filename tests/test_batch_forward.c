/* test_batch_forward.c: plora_batch_forward(), token by token, against the naive reference, against plora_linear_forward() of the token's
 * adapter alone, and against the loop that applies one adapter after the other, over layers of every dtype: on the CPU, or on a GPU
 * (device.h). The kernels themselves are tested in test_batch.c. */
#include <inttypes.h>

#include "check.h"
#include "linear_fixture.h"
#include "quantised_fixture.h"
#include "reference.h"

enum { LAYERS_MAX = 3, ADAPTERS_MAX = 6 };

/* Layers that see the same x, and snapshots, some of which have no factors for some of the layers. */
struct setup {
    plora_context *context;
    void *stream;
    plora_model *model;
    plora_registry *registry;
    plora_batch *batch;
    int64_t in_features, out_features[LAYERS_MAX];
    int32_t layers[LAYERS_MAX], layer_count, adapter_count, w_dtype;
    int32_t strongest;            /* the adapter that has the highest rank */
    const struct kind *quantised; /* NULL = w_dtype says what the weights are */
    struct arrays *codes[LAYERS_MAX];
    int fan[LAYERS_MAX];                     /* fan-in-fan-out */
    struct check_matrix weights[LAYERS_MAX]; /* quantised ones as what their codes hold */
    struct check_matrix a[ADAPTERS_MAX][LAYERS_MAX], b[ADAPTERS_MAX][LAYERS_MAX];
    plora_adapters *alone[ADAPTERS_MAX][LAYERS_MAX]; /* the same factors on one layer; NULL = not made, or rank 0 */
    float *bias;
    double scales[ADAPTERS_MAX][LAYERS_MAX];
    plora_snapshot *snapshots[ADAPTERS_MAX];
    char text[200];
};

struct call {
    int64_t tokens;
    int32_t x_dtype, y_dtype;
    uint32_t flags;
    int gaps;
    int32_t *slots;
    struct check_matrix x, y[LAYERS_MAX];
};

/* The layer's weight as codes; its matrix becomes what they hold. */
static plora_status add_quantised(struct setup *s, int32_t i, const char *name, const void *bias, int32_t flags)
{
    const plora_matrix *values = &s->weights[i].m;
    s->codes[i] = arrays_new(s->quantised, values->rows, values->columns);
    plora_quantised_linear linear = PLORA_QUANTISED_LINEAR_INIT;
    linear.name = name;
    linear.weight = on_device(s->codes[i]);
    linear.bias = device_of(bias);
    linear.flags = flags;
    CHECK_OK(DEVICE(plora_quantise(s->context, values, &linear.weight, 0, NULL)));
    s->codes[i]->w.offset = linear.weight.offset;
    for (int64_t e = 0; e < values->rows * values->columns; ++e)
        plora__store(values->data, e, PLORA_F32, value_of(s->codes[i], e));
    return plora_model_add_quantised(s->model, &linear, &s->layers[i]);
}

static void add_layers(struct setup *s)
{
    s->bias = malloc(1024 * sizeof *s->bias);
    CHECK(s->bias != NULL, "the test itself is out of memory");
    for (int i = 0; i < 1024; ++i)
        s->bias[i] = (float)check_uniform();
    device_twin(s->bias, 1024 * sizeof *s->bias);
    for (int32_t i = 0; i < s->layer_count; ++i) {
        char name[16];
        snprintf(name, sizeof name, "l%d", i);
        const int fan = s->fan[i] = (int)check_integer(0, 1);
        const int64_t n = s->out_features[i], k = s->in_features;
        s->weights[i] = check_matrix_new(fan ? k : n, fan ? n : k, fan ? n : k, s->w_dtype);
        check_matrix_random(&s->weights[i], sqrt(3.0 / (double)k));
        const float *bias = i == 0 ? s->bias : NULL;
        const int32_t flags = fan ? PLORA_LAYER_FAN_IN_FAN_OUT : 0;
        CHECK_OK(s->quantised != NULL
                     ? add_quantised(s, i, name, bias, flags)
                     : check_add_linear(s->model, name, &s->weights[i].m, bias, PLORA_F32, flags, &s->layers[i]));
    }
}

static void add_adapter(struct setup *s, int32_t number, int64_t max_rank)
{
    plora_registry_layer layers[LAYERS_MAX];
    char name[16];
    int64_t count = 0;
    memset(layers, 0, sizeof layers);
    for (int32_t i = 0; i < s->layer_count; ++i) {
        const int64_t k = s->in_features, n = s->out_features[i], most = k < n ? k : n;
        int64_t rank = number == s->strongest ? max_rank : check_integer(i == 0 ? 1 : 0, max_rank);
        if (rank > most) rank = most;
        s->a[number][i] = check_matrix_new(rank, k, k + check_integer(0, 2), PLORA_F32);
        s->b[number][i] = check_matrix_new(n, rank, rank + check_integer(0, 2), PLORA_F32);
        check_matrix_random(&s->a[number][i], sqrt(3.0 / (double)k));
        check_matrix_random(&s->b[number][i], 1.0);
        s->scales[number][i] = 2 * check_uniform();
        if (rank == 0) continue;
        layers[count].a = s->a[number][i].m;
        layers[count].b = s->b[number][i].m;
        layers[count].scale = s->scales[number][i];
        layers[count++].layer = s->layers[i];
    }
    snprintf(name, sizeof name, "a%d", number);
    CHECK_OK(plora_registry_add(s->registry, name, layers, count, NULL));
    CHECK_OK(plora_registry_acquire(s->registry, name, &s->snapshots[number]));
}

/* The adapter's factors for one layer as a training host has them. */
static plora_adapters *alone(const struct setup *s, int32_t number, int32_t layer)
{
    const plora_matrix *const factors[2] = {&s->a[number][layer].m, &s->b[number][layer].m};
    const int64_t rank = factors[0]->rows;
    char name[16];
    plora_adapters *adapters = NULL;
    plora_adapter view = PLORA_ADAPTER_INIT;
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    if (rank == 0) return NULL;
    snprintf(name, sizeof name, "l%d", layer);
    options.targets = name;
    options.rank = (int32_t)rank;
    options.alpha = s->scales[number][layer] * (double)rank;
    options.residual = PLORA_RESIDUAL_NONE;
    CHECK_OK(plora_adapters_create(s->model, &options, &adapters));
    CHECK_OK(plora_adapters_layer(adapters, s->layers[layer], &view));
    for (int f = 0; f < 2; ++f)
        for (int64_t i = 0; i < factors[f]->rows; ++i)
            device_transfer((float *)(f == 0 ? view.a.data : view.b.data) + i * factors[f]->columns,
                            (const float *)factors[f]->data + i * factors[f]->stride,
                            (size_t)factors[f]->columns * sizeof(float));
    return adapters;
}

static struct setup *setup_new(plora_context *context, int64_t in_features, int64_t out_most, int64_t max_rank,
                               int32_t adapter_count, int64_t max_tokens)
{
    struct setup *s = calloc(1, sizeof *s);
    CHECK(s != NULL, "the test itself is out of memory");
    s->context = context;
    if (device_is_cuda() && check_integer(0, 1)) s->stream = device_stream_create();
    s->in_features = in_features;
    s->layer_count = (int32_t)check_integer(1, LAYERS_MAX);
    s->adapter_count = adapter_count;
    s->strongest = (int32_t)(max_tokens % adapter_count);
    s->w_dtype = (int32_t)check_integer(0, 2);
    if (check_integer(0, 3) == 0) {
        s->quantised = &kinds[check_integer(0, CHECK_COUNT(kinds) - 1)];
        s->w_dtype = PLORA_F32;
    }
    for (int32_t i = 0; i < s->layer_count; ++i) /* the first is wide enough for the strongest's rank */
        s->out_features[i] = i == 0 ? out_most : check_integer(1, out_most);
    CHECK_OK(plora_model_create(context, &s->model));
    add_layers(s);
    CHECK_OK(plora_registry_create(s->model, NULL, &s->registry));
    for (int32_t i = 0; i < adapter_count; ++i)
        add_adapter(s, i, max_rank);
    plora_batch_options options = PLORA_BATCH_OPTIONS_INIT;
    options.max_tokens = max_tokens;
    options.max_adapters = ADAPTERS_MAX;
    options.max_rank = (int32_t)max_rank;
    CHECK_OK(plora_batch_create(s->model, &options, &s->batch));
    return s;
}

static void setup_free(struct setup *s)
{
    plora_batch_destroy(s->batch);
    if (s->stream != NULL) device_stream_destroy(s->stream);
    for (int32_t i = 0; i < s->adapter_count; ++i) {
        plora_snapshot_release(s->snapshots[i]);
        for (int32_t j = 0; j < s->layer_count; ++j) {
            plora_adapters_destroy(s->alone[i][j]);
            check_matrix_free(&s->a[i][j]);
            check_matrix_free(&s->b[i][j]);
        }
    }
    plora_registry_destroy(s->registry);
    plora_model_destroy(s->model);
    for (int32_t i = 0; i < s->layer_count; ++i) {
        if (s->codes[i] != NULL) arrays_free(s->codes[i]);
        check_matrix_free(&s->weights[i]);
    }
    device_forget(s->bias);
    free(s->bias);
    free(s);
}

/* slots of all kinds: sorted runs (prefill), one token each (decode), all -1. */
static struct call call_new(struct setup *s, int64_t tokens)
{
    struct call c = {.tokens = tokens, .gaps = (int)check_integer(0, 1)};
    c.x_dtype = (int32_t)check_integer(0, 1);
    c.y_dtype = check_integer(0, 2) ? c.x_dtype : 1 - c.x_dtype;
    c.flags = check_integer(0, 1) ? PLORA_LINEAR_DELTA_ONLY : 0;
    c.slots = calloc((size_t)tokens + 1, sizeof *c.slots);
    CHECK(c.slots != NULL, "the test itself is out of memory");
    const int kind = (int)check_integer(0, 7);
    for (int64_t t = 0; t < tokens; ++t)
        c.slots[t] = kind == 0   ? -1
                     : kind == 1 ? (int32_t)(t * s->adapter_count / tokens)
                                 : (int32_t)check_integer(-1, s->adapter_count - 1);
    const struct linear_case like = {.gaps = c.gaps, .aligned = (int)check_integer(0, 1)};
    c.x = fixture_matrix(&like, tokens, s->in_features, c.x_dtype, 1.0);
    for (int32_t i = 0; i < s->layer_count; ++i) {
        c.y[i] = fixture_matrix(&like, tokens, s->out_features[i], c.y_dtype, 1.0);
        check_matrix_snapshot(&c.y[i]);
    }
    snprintf(s->text, sizeof s->text,
             "T=%" PRId64 " K=%" PRId64 " N=%" PRId64 ".. %d layers %d adapters x %s y %s W %s flags %u", tokens,
             s->in_features, s->out_features[0], s->layer_count, s->adapter_count, plora__dtype_name(c.x_dtype),
             plora__dtype_name(c.y_dtype),
             s->quantised == NULL                           ? plora__dtype_name(s->w_dtype)
             : s->quantised->format == PLORA_QUANTISED_INT8 ? "INT8"
                                                            : "NF4",
             c.flags);
    return c;
}

static void call_free(const struct setup *s, struct call *c)
{
    check_matrix_free(&c->x);
    for (int32_t i = 0; i < s->layer_count; ++i)
        check_matrix_free(&c->y[i]);
    free(c->slots);
}

static void restore(struct check_matrix *matrix)
{
    if (matrix->bytes > 0) memcpy(matrix->memory, matrix->snapshot, matrix->bytes);
}

static plora_status forward(const struct setup *s, const struct call *c, const int32_t *slots)
{
    plora_matrix y[LAYERS_MAX];
    for (int32_t i = 0; i < s->layer_count; ++i)
        y[i] = device_matrix(c->y[i].m);
    const plora_matrix x = device_matrix(c->x.m);
    device_upload();
    plora_status status = plora_batch_begin(s->batch, c->tokens, slots, s->snapshots, s->adapter_count, s->stream);
    if (status == PLORA_OK)
        status = plora_batch_forward(s->batch, s->layers, s->layer_count, &x, y, c->flags, s->stream);
    return device_download(status);
}

/* ----------------------------------------------------------------------------------------------- against the reference */

static void load(const plora_matrix *matrix, int turned, double *values)
{
    if (matrix->rows > 0) reference_load(matrix, turned, values);
}

/* What plora_linear_forward() makes of what y was before, with each adapter for all tokens; those that were not made stay empty. */
static void run_alone(const struct setup *s, const struct call *c, int32_t layer,
                      struct check_matrix results[ADAPTERS_MAX])
{
    const plora_matrix x = device_matrix(c->x.m);
    for (int32_t i = 0; i < s->adapter_count; ++i) {
        if (s->alone[i][layer] == NULL) continue;
        results[i] = check_matrix_new(c->tokens, s->out_features[layer], c->y[layer].m.stride, c->y_dtype);
        const size_t front = (size_t)((unsigned char *)c->y[layer].m.data - c->y[layer].memory);
        const size_t bytes = (size_t)(c->tokens * c->y[layer].m.stride) * plora__dtype_size(c->y_dtype);
        if (bytes > 0) memcpy(results[i].m.data, c->y[layer].snapshot + front, bytes);
        const plora_matrix y = device_matrix(results[i].m);
        CHECK_OK(DEVICE(plora_linear_forward(s->alone[i][layer], s->layers[layer], &x, &y, c->flags, NULL)));
    }
}

/* A quantised W is made bf16 where x is: each weight is off by one rounding. */
static double weight_error(const struct setup *s, const struct call *c, double magnitude)
{
    return s->quantised != NULL && c->x_dtype == PLORA_BF16 ? 1.01 * check_roundoff(PLORA_BF16) * magnitude : 0.0;
}

/* One layer, token by token. */
static void check_layer(const struct setup *s, const struct call *c, int32_t layer)
{
    const int64_t k = s->in_features, n = s->out_features[layer];
    const int delta_only = (c->flags & PLORA_LINEAR_DELTA_ONLY) != 0;
    double *x = fixture_doubles(c->tokens * k), *w = fixture_doubles(k * n), *bias = fixture_doubles(n);
    double *a = fixture_doubles(512 * k), *b = fixture_doubles(512 * n);
    struct reference_sum *base = fixture_sums(n), *low = fixture_sums(n);
    struct check_matrix single[ADAPTERS_MAX] = {{.memory = NULL}};
    run_alone(s, c, layer, single);
    struct check_matrix before = c->y[layer];
    before.m.data = before.snapshot + ((unsigned char *)before.m.data - before.memory);
    load(&c->x.m, 0, x);
    load(&s->weights[layer].m, s->fan[layer], w);
    for (int64_t i = 0; i < n; ++i)
        bias[i] = s->bias[i];
    for (int64_t t = 0; t < c->tokens; ++t) {
        const int32_t slot = c->slots[t];
        const int64_t rank = slot < 0 ? 0 : s->a[slot][layer].m.rows;
        const struct linear_case bounds = {.rank = (int32_t)rank,
                                           .x_dtype = c->x_dtype,
                                           .w_dtype =
                                               c->x_dtype == PLORA_BF16 && device_is_cuda() ? c->y_dtype : PLORA_F32};
        struct linear_case bounds_alone = bounds;
        bounds_alone.w_dtype = s->quantised != NULL ? c->x_dtype : s->w_dtype;
        struct reference_linear linear = {.tokens = 1,
                                          .in_features = k,
                                          .out_features = n,
                                          .rank = rank,
                                          .x = x + t * k,
                                          .w = w,
                                          .bias = layer == 0 ? bias : NULL,
                                          .a = a,
                                          .b = b};
        if (rank > 0) {
            load(&s->a[slot][layer].m, 0, a);
            load(&s->b[slot][layer].m, 0, b);
            linear.scale = s->scales[slot][layer];
        }
        reference_linear_forward(&linear, base, low);
        for (int64_t i = 0; i < n; ++i) {
            const double old = delta_only ? check_element(&before.m, t, i) : 0.0;
            const double got = check_element(&c->y[layer].m, t, i);
            double want, bound, bound_alone;
            if (delta_only) base[i] = (struct reference_sum){0, 0};
            const double more = weight_error(s, c, base[i].magnitude) * (1 + check_roundoff(c->y_dtype));
            fixture_output_bound(&bounds, c->y_dtype, k, old, base[i], low[i], &want, &bound);
            if (delta_only && rank == 0) bound = 0; /* not touched */
            CHECK_CLOSE(got, want, bound + more, "y%d(%lld,%lld), slot %d of rank %lld: %s", layer, (long long)t,
                        (long long)i, slot, (long long)rank, s->text);
            if (slot < 0 || single[slot].memory == NULL) continue;
            fixture_output_bound(&bounds_alone, c->y_dtype, k, old, base[i], low[i], &want, &bound_alone);
            CHECK_CLOSE(got, check_element(&single[slot].m, t, i), bound + bound_alone + 2 * more,
                        "y%d(%lld,%lld), of slot %d of rank %lld alone: %s", layer, (long long)t, (long long)i, slot,
                        (long long)rank, s->text);
        }
    }
    check_matrix_guards(&c->y[layer], s->text);
    for (int32_t i = 0; i < s->adapter_count; ++i)
        if (single[i].memory != NULL) check_matrix_free(&single[i]);
    double *const values[] = {x, w, bias, a, b};
    for (int i = 0; i < CHECK_COUNT(values); ++i)
        free(values[i]);
    free(base);
    free(low);
}

static void keep(struct call *c, const struct setup *s, unsigned char *rows[LAYERS_MAX])
{
    for (int32_t i = 0; i < s->layer_count; ++i) {
        rows[i] = malloc(c->y[i].bytes);
        CHECK(rows[i] != NULL, "the test itself is out of memory");
        memcpy(rows[i], c->y[i].memory, c->y[i].bytes);
    }
}

/* Token `t` has the bits that it had in the whole batch. */
static void check_same(const struct setup *s, const struct call *c, unsigned char *const rows[LAYERS_MAX], int64_t t,
                       const char *what)
{
    for (int32_t i = 0; i < s->layer_count; ++i) {
        const plora_matrix *y = &c->y[i].m;
        const size_t size = plora__dtype_size(y->dtype);
        const size_t at = (size_t)((unsigned char *)y->data - c->y[i].memory) + (size_t)(t * y->stride) * size;
        CHECK(rows[i] != NULL && memcmp(rows[i] + at, c->y[i].memory + at, (size_t)y->columns * size) == 0,
              "y%d, token %lld %s: %s", i, (long long)t, what, s->text);
    }
}

/* The loop that the batch stands for: one adapter after the other, the other tokens as those of the backbone alone. */
static void check_one_by_one(const struct setup *s, struct call *c)
{
    unsigned char *rows[LAYERS_MAX] = {NULL};
    int32_t *slots = malloc((size_t)(c->tokens + 1) * sizeof *slots);
    CHECK(slots != NULL, "the test itself is out of memory");
    keep(c, s, rows);
    for (int32_t adapter = -1; adapter < s->adapter_count; ++adapter) {
        int64_t own = 0;
        for (int64_t t = 0; t < c->tokens; ++t) {
            slots[t] = c->slots[t] == adapter ? adapter : -1;
            own += c->slots[t] == adapter;
        }
        if (own == 0) continue;
        for (int32_t i = 0; i < s->layer_count; ++i)
            restore(&c->y[i]);
        CHECK_OK(forward(s, c, slots));
        for (int64_t t = 0; t < c->tokens; ++t)
            if (c->slots[t] == adapter) check_same(s, c, rows, t, "is another one among others");
    }
    for (int32_t i = 0; i < s->layer_count; ++i)
        free(rows[i]);
    free(slots);
}

/* ------------------------------------------------------------------------------------------------------------ tests */

static void run(plora_context *context, int64_t in_features, int64_t out_most, int64_t max_rank, int64_t tokens,
                int calls, int with_alone)
{
    struct setup *s =
        setup_new(context, in_features, out_most, max_rank, (int32_t)check_integer(1, ADAPTERS_MAX), tokens + 1);
    for (int32_t i = 0; with_alone && i < s->adapter_count; ++i)
        for (int32_t layer = 0; layer < s->layer_count; ++layer)
            s->alone[i][layer] = alone(s, i, layer);
    for (int i = 0; i < calls; ++i) {
        struct call c = call_new(s, i == 0 ? tokens : check_integer(0, tokens));
        CHECK_OK(forward(s, &c, c.slots));
        for (int32_t layer = 0; layer < s->layer_count; ++layer)
            check_layer(s, &c, layer);
        check_one_by_one(s, &c);
        call_free(s, &c);
    }
    setup_free(s);
}

/* 1,000 batches of random adapters on the CPU, some of rank 512. */
static void test_forward_random(void **state)
{
    (void)state;
    check_reseed(1);
    plora_context *context = check_context(NULL, 2, 0);
    const int setups = check_quick() ? 8 : device_is_cuda() ? 15 : 250;
    for (int i = 0; i < setups; ++i)
        run(context, check_integer(1, 90), check_integer(1, 90), check_integer(1, 24), check_integer(1, 24), 4,
            i % 3 == 0);
    for (int i = 0; i < (check_quick() ? 1 : 3); ++i)
        run(context, 520, 530, 512, 9, 2, 1);
    plora_context_destroy(context);
}

/* Long runs of one adapter, as in a prefill, whose pieces several threads take. */
static void test_forward_long(void **state)
{
    (void)state;
    check_reseed(2);
    plora_context *context = check_context(NULL, 3, 1);
    for (int i = 0; i < (check_quick() ? 1 : 4); ++i)
        run(context, check_integer(100, 300), check_integer(100, 256), check_integer(4, 40), check_integer(200, 300), 1,
            i == 0);
    for (int i = 0; i < 2; ++i) /* a list that no launch takes at once */
        run(context, 12, 12, 3, 1300, 1, 0);
    plora_context_destroy(context);
}

static void test_forward_nothing(void **state)
{
    (void)state;
    check_reseed(3);
    plora_context *context = check_context(NULL, 1, 0);
    struct setup *s = setup_new(context, 20, 30, 4, 2, 8);
    struct call c = call_new(s, 8);
    c.flags = PLORA_LINEAR_DELTA_ONLY;
    for (int i = 0; i < 8; ++i)
        c.slots[i] = -1;
    CHECK_OK(forward(s, &c, c.slots));
    for (int32_t i = 0; i < s->layer_count; ++i)
        check_matrix_unchanged(&c.y[i], "all slots -1");
    call_free(s, &c);
    for (int flags = 0; flags < 2; ++flags) {
        c = call_new(s, 0);
        c.flags = flags ? PLORA_LINEAR_DELTA_ONLY : 0;
        CHECK_OK(forward(s, &c, NULL));
        call_free(s, &c);
    }
    setup_free(s);
    plora_context_destroy(context);
}

static void check_refused(struct setup *s, struct call *c)
{
    const plora_matrix x = device_matrix(c->x.m);
    plora_matrix y[LAYERS_MAX] = {{NULL, 0, 0, 0, 0, 0}}, other;
    const int32_t beyond = 99;
    for (int32_t i = 0; i < s->layer_count; ++i)
        y[i] = device_matrix(c->y[i].m);
    CHECK_FAILS(plora_batch_forward(NULL, s->layers, 1, &x, y, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "batch");
    CHECK_FAILS(plora_batch_forward(s->batch, NULL, 1, &x, y, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "layers");
    CHECK_FAILS(plora_batch_forward(s->batch, s->layers, 1, NULL, y, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "x");
    CHECK_FAILS(plora_batch_forward(s->batch, s->layers, 1, &x, NULL, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "y");
    CHECK_FAILS(plora_batch_forward(s->batch, s->layers, 0, &x, y, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "0");
    CHECK_FAILS(plora_batch_forward(s->batch, &beyond, 1, &x, y, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "99",
                "layers[0]");
    CHECK_FAILS(plora_batch_forward(s->batch, s->layers, 1, &x, y, 5, NULL), PLORA_ERROR_INVALID_ARGUMENT, "0x5");
    CHECK_FAILS(plora_batch_forward(s->batch, s->layers, 1, &x, &x, 0, NULL),
                x.columns == y[0].columns ? PLORA_ERROR_INVALID_ARGUMENT : PLORA_ERROR_SHAPE, "l0");
    other = x;
    other.rows--;
    CHECK_FAILS(plora_batch_forward(s->batch, s->layers, 1, &other, y, 0, NULL), PLORA_ERROR_SHAPE, "l0", "[5,20]",
                "[6,20]");
    other = y[0];
    other.dtype = PLORA_F16;
    CHECK_FAILS(plora_batch_forward(s->batch, s->layers, 1, &x, &other, 0, NULL), PLORA_ERROR_UNSUPPORTED, "y", "F32");
    const int32_t twice[2] = {s->layers[0], s->layers[0]};
    const plora_matrix same[2] = {y[0], y[0]};
    CHECK_FAILS(plora_batch_forward(s->batch, twice, 2, &x, same, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "y[0]",
                "y[1]", "overlap");
}

static void test_forward_errors(void **state)
{
    (void)state;
    check_reseed(4);
    plora_context *context = check_context(NULL, 1, 0);
    struct setup *s = setup_new(context, 20, 30, 4, 2, 8);
    struct call c = call_new(s, 6);
    int32_t wrong[9] = {0, 1, 0, 2, -1, 0, 0, 0, 0};
    plora_snapshot *holed[2] = {s->snapshots[0], NULL};
    CHECK_OK(forward(s, &c, c.slots));
    for (int32_t i = 0; i < s->layer_count; ++i)
        check_matrix_snapshot(&c.y[i]);
    CHECK_FAILS(plora_batch_begin(NULL, 1, wrong, s->snapshots, 1, NULL), PLORA_ERROR_INVALID_ARGUMENT, "batch");
    CHECK_FAILS(plora_batch_begin(s->batch, 10, wrong, s->snapshots, 2, NULL), PLORA_ERROR_INVALID_ARGUMENT, "10", "8");
    CHECK_FAILS(plora_batch_begin(s->batch, -1, wrong, s->snapshots, 2, NULL), PLORA_ERROR_INVALID_ARGUMENT, "-1");
    CHECK_FAILS(plora_batch_begin(s->batch, 6, wrong, s->snapshots, 2, NULL), PLORA_ERROR_INVALID_ARGUMENT, "slots[3]",
                "2", "1");
    wrong[3] = -2;
    CHECK_FAILS(plora_batch_begin(s->batch, 6, wrong, s->snapshots, 2, NULL), PLORA_ERROR_INVALID_ARGUMENT, "slots[3]",
                "-2");
    CHECK_FAILS(plora_batch_begin(s->batch, 6, NULL, s->snapshots, 2, NULL), PLORA_ERROR_INVALID_ARGUMENT, "slots");
    CHECK_FAILS(plora_batch_begin(s->batch, 1, wrong, NULL, 2, NULL), PLORA_ERROR_INVALID_ARGUMENT, "snapshots");
    CHECK_FAILS(plora_batch_begin(s->batch, 1, wrong, holed, 2, NULL), PLORA_ERROR_INVALID_ARGUMENT, "snapshots[1]");
    CHECK_FAILS(plora_batch_begin(s->batch, 1, wrong, s->snapshots, 7, NULL), PLORA_ERROR_INVALID_ARGUMENT, "7", "6");
    check_refused(s, &c);
    plora_batch_options options = PLORA_BATCH_OPTIONS_INIT;
    plora_batch *small = NULL;
    options.max_rank = 3;
    CHECK_OK(plora_batch_create(s->model, &options, &small));
    CHECK_FAILS(plora_batch_begin(small, 1, wrong, s->snapshots, 1, NULL), PLORA_ERROR_INVALID_ARGUMENT, "'a0'", "4",
                "3");
    plora_batch_destroy(small);
    options.max_rank = 0;
    CHECK_FAILS(plora_batch_create(s->model, &options, &small), PLORA_ERROR_INVALID_ARGUMENT, "max_rank", "0");
    options = (plora_batch_options)PLORA_BATCH_OPTIONS_INIT;
    options.max_tokens = 0;
    CHECK_FAILS(plora_batch_create(s->model, &options, &small), PLORA_ERROR_INVALID_ARGUMENT, "max_tokens", "0");
    options = (plora_batch_options)PLORA_BATCH_OPTIONS_INIT;
    options.max_adapters = 0;
    CHECK_FAILS(plora_batch_create(s->model, &options, &small), PLORA_ERROR_INVALID_ARGUMENT, "max_adapters", "0");
    /* What was begun before is as it was, and nothing was written. */
    for (int32_t i = 0; i < s->layer_count; ++i)
        check_matrix_unchanged(&c.y[i], "after errors");
    call_free(s, &c);
    setup_free(s);
    plora_context_destroy(context);
}

int main(void)
{
    check_begin("test_batch_forward");
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_forward_random), cmocka_unit_test(test_forward_long),
                                       cmocka_unit_test(test_forward_nothing), cmocka_unit_test(test_forward_errors)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
