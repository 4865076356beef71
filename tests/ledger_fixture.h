/* ledger_fixture.h: a small model of every dtype with trained-looking adapters, whose unloads depend on a step number alone, and
 * pictures of its state to compare with, bit for bit. */
#ifndef PLORA_TESTS_LEDGER_FIXTURE_H
#define PLORA_TESTS_LEDGER_FIXTURE_H

#include "file_fixture.h"
#include "residual_fixture.h"

/* Layers a, b, c, d are F32, BF16, F16 and BF16 stored [K,N]; e is tied to b. */
enum { LEDGER_WEIGHTS = 4, LEDGER_LAYERS = 5, LEDGER_STAGES = 24 };

/* How all runs round. */
static struct {
    int32_t residual, rounding; /* of the adapters' options; as recorded */
} ledger_mode = {PLORA_RESIDUAL_DEVICE, PLORA_ROUND_RESIDUAL};

struct ledger_run {
    plora_context *context;
    plora_model *model, *original;
    struct check_matrix weights[LEDGER_WEIGHTS], copies[LEDGER_WEIGHTS]; /* W, W_0 */
    plora_adapters *adapters;
    plora_optimizer *optimizer;
    float *parameters; /* on the host */
    int64_t count;
    plora_ledger *ledger;
};

/* What an unload may change. */
struct ledger_picture {
    unsigned char *weights[LEDGER_WEIGHTS];
    uint16_t *residuals[LEDGER_WEIGHTS];
    float *parameters;
    int64_t stage;
};

/* A path that stays. */
struct ledger_path {
    char text[256];
};

static CHECK_UNUSED struct ledger_path ledger_path(const char *name)
{
    struct ledger_path path;
    snprintf(path.text, sizeof path.text, "%s", file_path(name));
    return path;
}

static const char *const ledger_names[LEDGER_LAYERS] = {"a", "b", "c", "d", "e"};

static CHECK_UNUSED void ledger_add_layers(plora_model *model, struct check_matrix *weights)
{
    for (int i = 0; i < LEDGER_LAYERS; ++i)
        CHECK_OK(check_add_linear(model, ledger_names[i], &weights[i == 4 ? 1 : i].m, NULL, 0,
                                  i == 3 ? PLORA_LAYER_FAN_IN_FAN_OUT : 0, NULL));
}

/* Every run of a test program starts from the same weights. Without `original` only W exists. */
static CHECK_UNUSED void ledger_run_open(struct ledger_run *run, struct check_allocator *allocator, int rank)
{
    memset(run, 0, sizeof *run);
    check_reseed(71);
    run->context = check_context(allocator, 1, 1);
    CHECK_OK(plora_model_create(run->context, &run->model));
    CHECK_OK(plora_model_create(run->context, &run->original));
    for (int i = 0; i < LEDGER_WEIGHTS; ++i) {
        const int32_t dtype = i == 3 ? PLORA_BF16 : i;
        run->weights[i] = check_matrix_new(5 + i, 8 - i, 9, dtype);
        run->copies[i] = check_matrix_new(5 + i, 8 - i, 8 - i, dtype);
        check_matrix_random(&run->weights[i], 1.0);
        for (int64_t row = 0; row < run->weights[i].m.rows; ++row)
            for (int64_t column = 0; column < run->weights[i].m.columns; ++column)
                plora__store(run->copies[i].m.data, row * (8 - i) + column, dtype,
                             (float)check_element(&run->weights[i].m, row, column));
    }
    device_upload();
    ledger_add_layers(run->model, run->weights);
    ledger_add_layers(run->original, run->copies);
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = rank;
    options.seed = 11;
    options.residual = ledger_mode.residual;
    CHECK_OK(plora_adapters_create(run->model, &options, &run->adapters));
    CHECK_OK(plora_optimizer_create(run->adapters, NULL, &run->optimizer));
    CHECK_OK(plora_adapters_parameters(run->adapters, &run->parameters, &run->count));
    run->parameters = device_mirror(run->parameters, (size_t)run->count * sizeof(float));
}

static CHECK_UNUSED void ledger_run_close(struct ledger_run *run)
{
    device_forget(run->parameters);
    plora_ledger_destroy(run->ledger);
    plora_optimizer_destroy(run->optimizer);
    plora_adapters_destroy(run->adapters);
    plora_model_destroy(run->model);
    plora_model_destroy(run->original);
    plora_context_destroy(run->context);
    for (int i = 0; i < LEDGER_WEIGHTS; ++i) {
        check_matrix_free(&run->weights[i]);
        check_matrix_free(&run->copies[i]);
    }
}

static CHECK_UNUSED plora_status ledger_attach(struct ledger_run *run, const char *path, int with_original)
{
    plora_ledger_options options = PLORA_LEDGER_OPTIONS_INIT;
    options.path = path;
    options.original = with_original ? run->original : NULL;
    return plora_ledger_open(run->adapters, &options, &run->ledger);
}

/* The momentum of stage `step`'s unload. */
static CHECK_UNUSED double ledger_momentum(int step)
{
    static const double momenta[] = {1.0, 0.3, 0.125, 1.0, 0.7};
    return momenta[step % 5];
}

/* Trains, after a fashion: adds to A and B what depends on the step alone. */
static CHECK_UNUSED void ledger_train(struct ledger_run *run, int step)
{
    check_reseed(1000 + (uint64_t)step);
    for (int32_t layer = 0; layer < LEDGER_WEIGHTS; ++layer) {
        plora_adapter view = PLORA_ADAPTER_INIT;
        CHECK_OK(plora_adapters_layer(run->adapters, layer, &view));
        float *a = device_host_of(view.a.data), *b = device_host_of(view.b.data);
        for (int64_t i = 0; i < view.a.rows * view.a.columns; ++i)
            a[i] += (float)(0.1 * check_uniform());
        for (int64_t i = 0; i < view.b.rows * view.b.columns; ++i)
            b[i] += (float)(0.1 * check_uniform());
    }
}

static CHECK_UNUSED plora_status ledger_unload(struct ledger_run *run, int step)
{
    plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
    plora_unload_report report = PLORA_UNLOAD_REPORT_INIT;
    options.momentum = ledger_momentum(step);
    options.rounding =
        step % 3 == 0 && ledger_mode.rounding != PLORA_ROUND_STOCHASTIC ? PLORA_ROUND_DEFAULT : ledger_mode.rounding;
    return DEVICE(plora_unload(run->adapters, run->optimizer, &options, step % 2 ? &report : NULL, NULL));
}

/* Stages first .. last - 1. */
static CHECK_UNUSED void ledger_stages(struct ledger_run *run, int first, int last)
{
    for (int step = first; step < last; ++step) {
        ledger_train(run, step);
        CHECK_OK(ledger_unload(run, step));
    }
}

static CHECK_UNUSED struct ledger_picture ledger_picture_of(const struct ledger_run *run)
{
    struct ledger_picture picture;
    for (int i = 0; i < LEDGER_WEIGHTS; ++i) {
        picture.weights[i] = malloc(run->weights[i].bytes);
        CHECK(picture.weights[i] != NULL, "the test itself is out of memory");
        memcpy(picture.weights[i], run->weights[i].memory, run->weights[i].bytes);
        picture.residuals[i] = residual_of(run->model, i);
    }
    const size_t bytes = (size_t)run->count * sizeof(float);
    picture.parameters = malloc(bytes);
    CHECK(picture.parameters != NULL, "the test itself is out of memory");
    memcpy(picture.parameters, run->parameters, bytes);
    picture.stage = plora_adapters_stage(run->adapters);
    return picture;
}

static CHECK_UNUSED void ledger_picture_free(struct ledger_picture *picture)
{
    for (int i = 0; i < LEDGER_WEIGHTS; ++i) {
        free(picture->weights[i]);
        free(picture->residuals[i]);
    }
    free(picture->parameters);
}

/* Row by row: two runs may have aligned their memory differently. */
static CHECK_UNUSED void ledger_same_weights(const struct ledger_run *a, const struct ledger_run *b, const char *what)
{
    for (int i = 0; i < LEDGER_WEIGHTS; ++i) {
        const plora_matrix *x = &a->weights[i].m, *y = &b->weights[i].m;
        const size_t size = plora__dtype_size(x->dtype), stride = (size_t)x->stride * size;
        for (int64_t row = 0; row < x->rows; ++row)
            CHECK(memcmp((char *)x->data + (size_t)row * stride, (char *)y->data + (size_t)row * stride,
                         (size_t)x->columns * size) == 0,
                  "%s: row %lld of weight %d differs", what, (long long)row, i);
    }
    CHECK(same_residuals(a->model, b->model), "%s: residuals differ", what);
}

static CHECK_UNUSED void ledger_same_run(const struct ledger_run *a, const struct ledger_run *b, const char *what)
{
    ledger_same_weights(a, b, what);
    CHECK(a->count == b->count && memcmp(a->parameters, b->parameters, (size_t)a->count * sizeof(float)) == 0,
          "%s: adapters differ", what);
    CHECK(plora_adapters_stage(a->adapters) == plora_adapters_stage(b->adapters), "%s: stages %lld and %lld", what,
          (long long)plora_adapters_stage(a->adapters), (long long)plora_adapters_stage(b->adapters));
}

/* With guards and gaps, which nothing may write to. */
static CHECK_UNUSED void ledger_same_picture(const struct ledger_run *run, const struct ledger_picture *picture,
                                             int weights_only, const char *what)
{
    for (int i = 0; i < LEDGER_WEIGHTS; ++i) {
        CHECK(memcmp(run->weights[i].memory, picture->weights[i], run->weights[i].bytes) == 0, "%s: weight %d differs",
              what, i);
        uint16_t *residual = residual_of(run->model, i);
        const size_t bytes = (size_t)(run->weights[i].m.rows * run->weights[i].m.columns) * sizeof *residual;
        CHECK((residual == NULL) == (picture->residuals[i] == NULL) &&
                  (residual == NULL || memcmp(residual, picture->residuals[i], bytes) == 0),
              "%s: residual %d differs", what, i);
        free(residual);
    }
    if (weights_only) return;
    CHECK(memcmp(run->parameters, picture->parameters, (size_t)run->count * sizeof(float)) == 0, "%s: adapters differ",
          what);
    CHECK(plora_adapters_stage(run->adapters) == picture->stage, "%s: stage %lld, want %lld", what,
          (long long)plora_adapters_stage(run->adapters), (long long)picture->stage);
}

#endif
