/* test_checkpoint.c: a run that was saved and loaded goes on to the same bits as one that was not interrupted; what does not
 * fit or is damaged is refused and changes nothing. */
#include "file_fixture.h"
#include "json.h"
#include "residual_fixture.h"
#include "safetensors.h"

enum { LAYERS = 3 };

struct run {
    plora_context *context;
    plora_model *model;
    struct check_matrix weights[LAYERS];
    plora_adapters *adapters;
    plora_optimizer *optimizer;
};

static const plora_adapters_options base_options = {
    sizeof(plora_adapters_options), 2, PLORA_INIT_GAUSSIAN, 4.0, 0.25, 77, "all-linear", NULL, NULL, 0, 0, 0, 0, 0, 0};

static plora_optimizer_options optimizer_options(int32_t algorithm)
{
    plora_optimizer_options options = PLORA_OPTIMIZER_OPTIONS_INIT;
    options.algorithm = algorithm;
    options.schedule = algorithm == PLORA_OPTIMIZER_SGD ? PLORA_SCHEDULE_RELORA : PLORA_SCHEDULE_COSINE;
    options.learning_rate = 0.01;
    options.warmup_steps = 2;
    options.period_steps = 20;
    options.rewarmup_steps = 3;
    return options;
}

static void run_open_with(struct run *run, struct check_allocator *allocator, const plora_adapters_options *options,
                          const plora_optimizer_options *optimizer)
{
    memset(run, 0, sizeof *run);
    check_reseed(5); /* every run starts from the same weights */
    run->context = check_context(allocator, 1, 1);
    CHECK_OK(plora_model_create(run->context, &run->model));
    for (int i = 0; i < LAYERS; ++i) {
        static const char *const names[LAYERS] = {"a.q", "b.q", "c.v"};
        run->weights[i] = check_matrix_new(5 + i, 7 - i, 9, i);
        check_matrix_random(&run->weights[i], 1.0);
        CHECK_OK(check_add_linear(run->model, names[i], &run->weights[i].m, NULL, 0,
                                  i == 2 ? PLORA_LAYER_FAN_IN_FAN_OUT : 0, NULL));
    }
    CHECK_OK(plora_adapters_create(run->model, options, &run->adapters));
    CHECK_OK(plora_optimizer_create(run->adapters, optimizer, &run->optimizer));
}

static void run_open(struct run *run, struct check_allocator *allocator, int32_t algorithm)
{
    const plora_optimizer_options options = optimizer_options(algorithm);
    run_open_with(run, allocator, &base_options, &options);
}

static void run_close(struct run *run)
{
    plora_optimizer_destroy(run->optimizer);
    plora_adapters_destroy(run->adapters);
    plora_model_destroy(run->model);
    plora_context_destroy(run->context);
    for (int i = 0; i < LAYERS; ++i)
        check_matrix_free(&run->weights[i]);
}

/* Steps first .. last - 1, with gradients that depend on the step alone, and an unload after every fifth. */
static void run_steps(struct run *run, int first, int last)
{
    for (int step = first; step < last; ++step) {
        float *gradients;
        int64_t count;
        CHECK_OK(plora_adapters_gradients(run->adapters, &gradients, &count));
        float *host = device_mirror(gradients, (size_t)count * sizeof *gradients);
        check_reseed(1000 + (uint64_t)step);
        for (int32_t layer = 0; layer < LAYERS; ++layer) {
            plora_adapter adapter = PLORA_ADAPTER_INIT;
            if (plora_adapters_layer(run->adapters, layer, &adapter) != PLORA_OK) continue;
            float *a = device_host_of(adapter.a_gradient.data), *b = device_host_of(adapter.b_gradient.data);
            for (int64_t i = 0; i < adapter.a.rows * adapter.a.columns; ++i)
                a[i] = (float)check_uniform();
            for (int64_t i = 0; i < adapter.b.rows * adapter.b.columns; ++i)
                b[i] = (float)check_uniform();
        }
        CHECK_OK(plora_adapters_set_dropout_position(run->adapters, (uint64_t)step, 3));
        CHECK_OK(DEVICE(plora_optimizer_step(run->optimizer, 0.5, NULL, NULL)));
        if (step % 5 == 4) CHECK_OK(DEVICE(plora_unload(run->adapters, run->optimizer, NULL, NULL, NULL)));
        device_forget(host);
    }
}

/* Dropout masks too: the output of a forward in training mode. */
static void check_same_runs(struct run *a, struct run *b, const char *what)
{
    float *x[3], *y[3];
    int64_t count, b_count, a_step, b_step;
    CHECK_OK(plora_adapters_parameters(a->adapters, &x[0], &count));
    CHECK_OK(plora_adapters_parameters(b->adapters, &y[0], &b_count));
    CHECK(count == b_count, "%s: %lld and %lld parameters", what, (long long)count, (long long)b_count);
    CHECK_OK(plora_optimizer_state(a->optimizer, &x[1], &x[2], NULL, &a_step));
    CHECK_OK(plora_optimizer_state(b->optimizer, &y[1], &y[2], NULL, &b_step));
    for (int i = 0; i < 3; ++i) {
        x[i] = device_mirror(x[i], (size_t)count * sizeof(float));
        y[i] = device_mirror(y[i], (size_t)count * sizeof(float));
        CHECK((x[i] == NULL) == (y[i] == NULL) &&
                  (x[i] == NULL || memcmp(x[i], y[i], (size_t)count * sizeof(float)) == 0),
              "%s: arena %d differs", what, i);
        device_forget(x[i]);
        device_forget(y[i]);
    }
    CHECK(a_step == b_step && plora_adapters_stage(a->adapters) == plora_adapters_stage(b->adapters), "%s: counters",
          what);
    CHECK(plora_optimizer_learning_rate(a->optimizer) == plora_optimizer_learning_rate(b->optimizer), "%s: schedule",
          what);
    for (int i = 0; i < LAYERS; ++i)
        for (int64_t r = 0; r < a->weights[i].m.rows; ++r) {
            const size_t size = plora__dtype_size(a->weights[i].m.dtype), stride = 9 * size;
            CHECK(memcmp((char *)a->weights[i].m.data + (size_t)r * stride,
                         (char *)b->weights[i].m.data + (size_t)r * stride,
                         (size_t)a->weights[i].m.columns * size) == 0,
                  "%s: row %lld of weight %d", what, (long long)r, i);
        }
    CHECK(same_residuals(a->model, b->model), "%s: residuals differ", what);
    float input[4][7], output[2][4][9];
    check_reseed(9);
    for (int i = 0; i < 28; ++i)
        input[i / 7][i % 7] = (float)check_uniform();
    memset(output, 0, sizeof output);
    device_twin(input, sizeof input);
    device_twin(output, sizeof output);
    for (int k = 0; k < 2; ++k) {
        const plora_matrix in = {device_of(input), 4, 7, 7, PLORA_F32, 0},
                           out = {device_of(output[k]), 4, 5, 9, PLORA_F32, 0};
        CHECK_OK(DEVICE(plora_linear_forward((k ? b : a)->adapters, 0, &in, &out, PLORA_LINEAR_DROPOUT, NULL)));
    }
    device_forget(input);
    device_forget(output);
    CHECK(memcmp(output[0], output[1], sizeof output[0]) == 0, "%s: a forward with dropout differs", what);
}

static void resumed(void **state)
{
    (void)state;
    for (int32_t algorithm = PLORA_OPTIMIZER_ADAMW; algorithm <= PLORA_OPTIMIZER_SGD; ++algorithm)
        for (int at = 0; at <= 12; at += 3) {
            struct run whole, second;
            run_open(&whole, NULL, algorithm);
            run_steps(&whole, 0, at);
            CHECK_OK(
                plora_checkpoint_save(whole.adapters, whole.optimizer, file_path("run"), PLORA_CHECKPOINT_WEIGHTS));
            run_open(&second, NULL, algorithm);
            run_steps(&second, 0, 2); /* whatever it held before */
            CHECK_OK(DEVICE(plora_checkpoint_load(second.adapters, second.optimizer, file_path("run"))));
            check_same_runs(&whole, &second, "loaded");
            run_steps(&whole, at, at + 7);
            run_steps(&second, at, at + 7);
            check_same_runs(&whole, &second, "went on");
            for (int i = 0; i < LAYERS; ++i)
                check_matrix_guards(&second.weights[i], "the weight that was loaded");
            run_close(&whole);
            run_close(&second);
        }
}

/* Without PLORA_CHECKPOINT_WEIGHTS and without an optimizer. */
static void parts(void **state)
{
    (void)state;
    struct run a, b;
    run_open(&a, NULL, PLORA_OPTIMIZER_ADAMW);
    run_open(&b, NULL, PLORA_OPTIMIZER_ADAMW);
    run_steps(&a, 0, 7);
    CHECK_OK(plora_checkpoint_save(a.adapters, a.optimizer, file_path("run"), 0));
    for (int i = 0; i < LAYERS; ++i)
        check_matrix_snapshot(&b.weights[i]);
    CHECK_OK(DEVICE(plora_checkpoint_load(b.adapters, NULL, file_path("run"))));
    for (int i = 0; i < LAYERS; ++i)
        check_matrix_unchanged(&b.weights[i], "a weight that is not in the file");
    CHECK(same_residuals(a.model, b.model), "residuals are in the file even when weights are not");
    CHECK(plora_adapters_stage(b.adapters) == 1, "stage %lld", (long long)plora_adapters_stage(b.adapters));
    int64_t step;
    CHECK_OK(plora_optimizer_state(b.optimizer, NULL, NULL, NULL, &step));
    CHECK(step == 0, "the optimizer was not given, but is at step %lld", (long long)step);
    CHECK_OK(plora_checkpoint_save(a.adapters, NULL, file_path("run"), 0));
    CHECK_OK(DEVICE(plora_checkpoint_load(b.adapters, NULL, file_path("run"))));
    CHECK_FAILS(plora_checkpoint_load(b.adapters, b.optimizer, file_path("run")), PLORA_ERROR_INVALID_ARGUMENT,
                "without an optimizer");
    CHECK_FAILS(plora_checkpoint_save(a.adapters, b.optimizer, file_path("run"), 0), PLORA_ERROR_INVALID_ARGUMENT,
                "other adapters");
    CHECK_FAILS(plora_checkpoint_save(a.adapters, NULL, file_path("run"), 2), PLORA_ERROR_INVALID_ARGUMENT, "0x2");
    CHECK_FAILS(plora_checkpoint_save(NULL, NULL, "x", 0), PLORA_ERROR_INVALID_ARGUMENT, "adapters");
    CHECK_FAILS(plora_checkpoint_load(a.adapters, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "path");
    CHECK_FAILS(plora_checkpoint_load(a.adapters, NULL, file_path("absent")), PLORA_ERROR_IO, "absent");
    CHECK_FAILS(plora_checkpoint_save(a.adapters, NULL, file_path("no/x"), 0), PLORA_ERROR_IO, "No such file");
    run_close(&a);
    run_close(&b);
}

static void other_options(void **state)
{
    (void)state;
    struct run run;
    run_open(&run, NULL, PLORA_OPTIMIZER_ADAMW);
    run_steps(&run, 0, 2);
    CHECK_OK(plora_checkpoint_save(run.adapters, run.optimizer, file_path("run"), 0));
    run_close(&run);
    for (int change = 0; change < 9; ++change) {
        static const char *const messages[9] = {"adapters.seed = 77, here it is 78",
                                                "adapters.init = 1",
                                                "adapters.dropout = 0.25",
                                                "a.q N=5 K=7 rank=2 scale=2'",
                                                "rank=2 scale=2', here is 'a.q N=5 K=7 rank=1",
                                                "optimizer.learning_rate = 0.01",
                                                "optimizer.algorithm = 0",
                                                "optimizer.warmup_steps = 2, here it is 4",
                                                "weights.residuals = 2, here it is 0"};
        plora_adapters_options options = base_options;
        plora_optimizer_options optimizer = optimizer_options(PLORA_OPTIMIZER_ADAMW);
        if (change == 0) options.seed = 78;
        if (change == 1) options.init = PLORA_INIT_KAIMING_UNIFORM;
        if (change == 2) options.dropout = 0.5;
        if (change == 3) options.targets = "b.q,c.v";
        if (change == 4) options.rank = 1;
        if (change == 5) optimizer.learning_rate = 0.02;
        if (change == 6) optimizer.algorithm = PLORA_OPTIMIZER_SGD;
        if (change == 7) optimizer.warmup_steps = 4;
        if (change == 8) options.residual = PLORA_RESIDUAL_NONE;
        struct run other;
        run_open_with(&other, NULL, &options, &optimizer);
        CHECK_FAILS(plora_checkpoint_load(other.adapters, other.optimizer, file_path("run")),
                    PLORA_ERROR_INVALID_ARGUMENT, messages[change], "/run: ");
        run_close(&other);
    }
}

/* A layer of another name, shape or dtype, and one more. */
static void other_models(void **state)
{
    static const char *const messages[] = {"'a.q N=5 K=7 rank=2 scale=2', here is 'z.q N=5",
                                           "'a.q N=5 K=7 rank=2 scale=2', here is 'a.q N=6 K=7",
                                           "weights.residuals = 2, here it is 0", "here is 'd.q N=4 K=4"};
    (void)state;
    struct run run;
    run_open(&run, NULL, PLORA_OPTIMIZER_ADAMW);
    run_steps(&run, 0, 2);
    CHECK_OK(plora_checkpoint_save(run.adapters, NULL, file_path("run"), PLORA_CHECKPOINT_WEIGHTS));
    run_close(&run);
    for (int change = 0; change < CHECK_COUNT(messages); ++change) {
        static const char *const names[LAYERS + 1] = {"a.q", "b.q", "c.v", "d.q"};
        struct check_matrix weights[LAYERS + 1];
        plora_context *context = check_context(NULL, 1, 1);
        plora_model *model;
        plora_adapters *adapters;
        CHECK_OK(plora_model_create(context, &model));
        for (int i = 0; i < LAYERS + (change == 3); ++i) {
            const int64_t rows = i == LAYERS ? 4 : 5 + i + (change == 1 && i == 0);
            weights[i] = check_matrix_new(rows, i == LAYERS ? 4 : 7 - i, 9,
                                          i == LAYERS             ? PLORA_F32
                                          : change == 2 && i == 0 ? PLORA_BF16
                                                                  : i);
            check_matrix_random(&weights[i], 1.0);
            check_matrix_snapshot(&weights[i]);
            CHECK_OK(check_add_linear(model, change == 0 && i == 0 ? "z.q" : names[i], &weights[i].m, NULL, 0,
                                      i == 2 ? PLORA_LAYER_FAN_IN_FAN_OUT : 0, NULL));
        }
        plora_adapters_options options = base_options;
        options.residual = change == 2 ? PLORA_RESIDUAL_NONE : options.residual;
        CHECK_OK(plora_adapters_create(model, &options, &adapters));
        const plora_status status = DEVICE(plora_checkpoint_load(adapters, NULL, file_path("run")));
        CHECK(status == PLORA_ERROR_INVALID_ARGUMENT || status == PLORA_ERROR_SHAPE, "model %d: status %d", change,
              status);
        CHECK(strstr(plora_last_error(), messages[change]) != NULL, "model %d: '%s'", change, plora_last_error());
        for (int i = 0; i < LAYERS + (change == 3); ++i)
            check_matrix_unchanged(&weights[i], "a weight of another model");
        CHECK(plora_adapters_stage(adapters) == 0, "model %d: a stage was loaded", change);
        plora_adapters_destroy(adapters);
        plora_model_destroy(model);
        plora_context_destroy(context);
        for (int i = 0; i < LAYERS + (change == 3); ++i)
            check_matrix_free(&weights[i]);
    }
}

/* Writes the checkpoint `from` again to `to`, after one change. */
static void rewrite(plora_context *context, const char *from, const char *to, int change)
{
    struct plora__safetensors file;
    struct plora__tensor tensors[8];
    struct plora__metadata metadata[64];
    static const int64_t other_shape[2] = {1, 35};
    CHECK_OK(plora__safetensors_open(context, from, &file));
    int32_t count = file.tensor_count, metadata_count = file.metadata_count;
    CHECK(count == 8 && metadata_count < 64, "%d tensors", count);
    memcpy(tensors, file.tensors, (size_t)count * sizeof *tensors);
    memcpy(metadata, file.metadata, (size_t)metadata_count * sizeof *metadata);
    for (int32_t i = 0; i < metadata_count; ++i) {
        const char *key = metadata[i].key;
        if (change == 0 && strcmp(key, "version") == 0) metadata[i].value = "2";
        if (change == 1 && strcmp(key, "state.stage") == 0) metadata[i].value = "-1";
        if (change == 2 && strcmp(key, "state.step") == 0) metadata[i].value = "99999999999999999999";
        if (change == 3 && strcmp(key, "state.total_steps") == 0) metadata[i].value = "0";
        if (change == 4 && strcmp(key, "state.dropout_step") == 0) metadata[i].key = "state.other";
        if (change == 5 && strcmp(key, "format") == 0) metadata[i].value = "pt";
    }
    if (change == 6) ((float *)tensors[0].data)[1] = NAN;
    if (change == 7) ((float *)tensors[2].data)[1] = -1.0f;
    if (change == 8) ((uint16_t *)tensors[4].data)[3] = 0x7f80;
    if (change == 9) --count;
    if (change == 10) tensors[1].name = "third_moment";
    if (change == 11) tensors[3].shape = other_shape;
    if (change == 12) tensors[4].dtype = "F16";
    if (change == 13) tensors[5].name = "weight.d";
    if (change == 14) tensors[6].dtype = "I16";
    if (change == 15) tensors[7].name = "residual.d";
    if (change == 16) { /* a weight of 0 that was rounded away from something */
        ((uint16_t *)tensors[4].data)[3] = 0x8000;
        ((uint16_t *)tensors[6].data)[3] = 0x8000;
    }
    if (change == 17) {
        ((uint16_t *)tensors[5].data)[2] = 0;
        ((uint16_t *)tensors[7].data)[2] = 0xffff;
    }
    if (change == 18)
        for (int32_t i = 0; i < metadata_count; ++i)
            if (strcmp(metadata[i].key, "state.stage") == 0) metadata[i].value = "9223372036854775807";
    CHECK_OK(plora__safetensors_write(context, to, tensors, count, metadata, metadata_count));
    plora__safetensors_close(&file);
}

static void damaged(void **state)
{
    static const struct {
        plora_status status;
        const char *message;
    } cases[19] = {
        {PLORA_ERROR_FORMAT, "version is '2'"},         {PLORA_ERROR_FORMAT, "state.stage is '-1'"},
        {PLORA_ERROR_FORMAT, "exceeds 64 bits"},        {PLORA_ERROR_FORMAT, "contradict"},
        {PLORA_ERROR_FORMAT, "state.dropout_step"},     {PLORA_ERROR_FORMAT, "format is 'pt'"},
        {PLORA_ERROR_FORMAT, "'parameters'"},           {PLORA_ERROR_FORMAT, "'second_moment'"},
        {PLORA_ERROR_FORMAT, "'weight.b.q'"},           {PLORA_ERROR_FORMAT, "no tensor 'residual.c.v'"},
        {PLORA_ERROR_FORMAT, "first_moment"},           {PLORA_ERROR_SHAPE, "'weight.a.q'"},
        {PLORA_ERROR_SHAPE, "is F16, here it is BF16"}, {PLORA_ERROR_FORMAT, "no tensor 'weight.c.v'"},
        {PLORA_ERROR_SHAPE, "is I16, here it is U16"},  {PLORA_ERROR_FORMAT, "no tensor 'residual.c.v'"},
        {PLORA_ERROR_FORMAT, "'residual.b.q'"},         {PLORA_ERROR_FORMAT, "'residual.c.v'"},
        {PLORA_ERROR_FORMAT, "exceeds 62 bits"},
    };
    (void)state;
    struct run run, twin;
    run_open(&run, NULL, PLORA_OPTIMIZER_ADAMW);
    run_open(&twin, NULL, PLORA_OPTIMIZER_ADAMW);
    run_steps(&run, 0, 6);
    CHECK_OK(plora_checkpoint_save(run.adapters, run.optimizer, file_path("run"), PLORA_CHECKPOINT_WEIGHTS));
    run_steps(&run, 6, 8);
    run_steps(&twin, 0, 8);
    for (int change = 0; change < CHECK_COUNT(cases); ++change) {
        rewrite(run.context, file_path("run"), file_path("bad"), change);
        CHECK_FAILS(DEVICE(plora_checkpoint_load(run.adapters, run.optimizer, file_path("bad"))), cases[change].status,
                    cases[change].message, "/bad: ");
        check_same_runs(&run, &twin, "after a refused load");
    }
    run_close(&run);
    run_close(&twin);
}

/* Residuals in a file without weights are checked against the weights that are there. */
static void residual_of_another_weight(void **state)
{
    (void)state;
    struct run run, twin;
    struct plora__safetensors file;
    run_open(&run, NULL, PLORA_OPTIMIZER_ADAMW);
    run_open(&twin, NULL, PLORA_OPTIMIZER_ADAMW);
    run_steps(&run, 0, 6);
    run_steps(&twin, 0, 6);
    CHECK_OK(plora_checkpoint_save(run.adapters, run.optimizer, file_path("run"), 0));
    CHECK_OK(plora__safetensors_open(run.context, file_path("run"), &file));
    const struct plora__tensor *residual = plora__safetensors_find(&file, "residual.b.q");
    CHECK(residual != NULL, "no residual");
    int64_t large = 0; /* an element whose low half is large: its weight was rounded away from 0 */
    while (((uint16_t *)residual->data)[large] < 0x8000)
        ++large;
    plora__safetensors_close(&file);
    const int64_t columns = run.weights[1].m.columns, at = large / columns * 9 + large % columns;
    for (int round = 0; round < 2; ++round) {
        ((uint16_t *)run.weights[1].m.data)[at] = ((uint16_t *)twin.weights[1].m.data)[at] = round ? 0x8000 : 0x7f80;
        device_refresh(run.weights[1].memory);
        device_refresh(twin.weights[1].memory);
        CHECK_FAILS(plora_checkpoint_load(run.adapters, run.optimizer, file_path("run")), PLORA_ERROR_FORMAT,
                    "tensor 'residual.b.q': the low half at byte", round ? "weight 0x8000" : "weight 0x7f80");
        check_same_runs(&run, &twin, "after a refused load");
    }
    run_close(&run);
    run_close(&twin);
}

/* One file that ends after each of its bytes, or in which one bit is flipped, of every byte: refused, and nothing has changed. */
static void every_byte(void **state)
{
    (void)state;
    struct run run, twin;
    run_open(&run, NULL, PLORA_OPTIMIZER_ADAMW);
    run_open(&twin, NULL, PLORA_OPTIMIZER_ADAMW);
    run_steps(&run, 0, 6);
    CHECK_OK(plora_checkpoint_save(run.adapters, run.optimizer, file_path("run"), PLORA_CHECKPOINT_WEIGHTS));
    run_steps(&run, 6, 8);
    run_steps(&twin, 0, 8);
    size_t count;
    unsigned char *bytes = file_read(file_path("run"), &count);
    const size_t stride = check_quick() || device_is_cuda() ? 17 : 1;
    for (size_t i = 0; i < count; i += stride) {
        file_write(file_path("bad"), bytes, i);
        CHECK_FAILS(plora_checkpoint_load(run.adapters, run.optimizer, file_path("bad")), PLORA_ERROR_FORMAT, "/bad: ");
        bytes[i] ^= (unsigned char)(1 << i % 8);
        file_write(file_path("bad"), bytes, count);
        const plora_status status = plora_checkpoint_load(run.adapters, run.optimizer, file_path("bad"));
        CHECK(status == PLORA_ERROR_FORMAT || status == PLORA_ERROR_INVALID_ARGUMENT || status == PLORA_ERROR_SHAPE,
              "bit %zu of byte %zu: status %d", i % 8, i, status);
        bytes[i] ^= (unsigned char)(1 << i % 8);
        if (i % 512 < stride) check_same_runs(&run, &twin, "after a refused load");
    }
    bytes[count] = 0;
    file_write(file_path("bad"), bytes, count + 1);
    CHECK_FAILS(plora_checkpoint_load(run.adapters, run.optimizer, file_path("bad")), PLORA_ERROR_FORMAT, "/bad: ");
    check_same_runs(&run, &twin, "after all refused loads");
    CHECK_OK(DEVICE(plora_checkpoint_load(run.adapters, run.optimizer, file_path("run"))));
    free(bytes);
    run_close(&run);
    run_close(&twin);
}

/* ------------------------------------------------------------------------------------- another number of threads, a GPU */

enum { WIDE = 200, TALL = 320, WIDE_TOKENS = 96, WIDE_RANK = 6 };

/* Layers large enough to be shared out, trained by backward calls. */
struct wide_run {
    plora_context *context;
    plora_model *model;
    struct check_matrix weights[2], x[2], dy[2];
    plora_adapters *adapters;
    plora_optimizer *optimizer;
};

static void wide_open(struct wide_run *run, int32_t threads)
{
    memset(run, 0, sizeof *run);
    check_reseed(6);
    run->context = check_context(NULL, threads, 1);
    CHECK_OK(plora_model_create(run->context, &run->model));
    for (int i = 0; i < 2; ++i) {
        run->weights[i] = check_matrix_new(TALL, WIDE, WIDE, i == 0 ? PLORA_BF16 : PLORA_F32);
        run->x[i] = check_matrix_new(WIDE_TOKENS, WIDE, WIDE, i == 0 ? PLORA_BF16 : PLORA_F32);
        run->dy[i] = check_matrix_new(WIDE_TOKENS, TALL, TALL, i == 0 ? PLORA_BF16 : PLORA_F32);
        check_matrix_random(&run->weights[i], 0.1);
        CHECK_OK(check_add_linear(run->model, i == 0 ? "a" : "b", &run->weights[i].m, NULL, 0, 0, NULL));
    }
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = WIDE_RANK;
    options.dropout = 0.2;
    CHECK_OK(plora_adapters_create(run->model, &options, &run->adapters));
    const plora_optimizer_options rule = optimizer_options(PLORA_OPTIMIZER_ADAMW);
    CHECK_OK(plora_optimizer_create(run->adapters, &rule, &run->optimizer));
}

static void wide_close(struct wide_run *run)
{
    plora_optimizer_destroy(run->optimizer);
    plora_adapters_destroy(run->adapters);
    plora_model_destroy(run->model);
    plora_context_destroy(run->context);
    for (int i = 0; i < 2; ++i) {
        check_matrix_free(&run->weights[i]);
        check_matrix_free(&run->x[i]);
        check_matrix_free(&run->dy[i]);
    }
}

static void wide_steps(struct wide_run *run, int first, int last)
{
    for (int step = first; step < last; ++step) {
        check_reseed(2000 + (uint64_t)step);
        CHECK_OK(plora_optimizer_zero_gradients(run->optimizer, NULL));
        CHECK_OK(plora_adapters_set_dropout_position(run->adapters, (uint64_t)step, 0));
        for (int32_t i = 0; i < 2; ++i) {
            check_matrix_random(&run->x[i], 1.0);
            check_matrix_random(&run->dy[i], 1.0);
            const plora_matrix x = device_matrix(run->x[i].m), dy = device_matrix(run->dy[i].m);
            CHECK_OK(plora_linear_backward(run->adapters, i, &x, &dy, NULL, PLORA_LINEAR_DROPOUT, NULL));
        }
        CHECK_OK(DEVICE(plora_optimizer_step(run->optimizer, 1.0, NULL, NULL)));
        if (step % 5 == 4) CHECK_OK(DEVICE(plora_unload(run->adapters, run->optimizer, NULL, NULL, NULL)));
    }
}

/* Arena `which` on the host: parameters, first moments, second moments. To be freed. */
static float *wide_arena(struct wide_run *run, int which, int64_t *count)
{
    float *arenas[3];
    CHECK_OK(plora_adapters_parameters(run->adapters, &arenas[0], count));
    CHECK_OK(plora_optimizer_state(run->optimizer, &arenas[1], &arenas[2], NULL, NULL));
    const size_t bytes = (size_t)*count * sizeof(float);
    float *copy = malloc(bytes);
    CHECK(copy != NULL, "the test itself is out of memory");
    device_transfer(copy, arenas[which], bytes);
    return copy;
}

/* The values of weight `i`, residual included. To be freed. */
static float *wide_weight(const struct wide_run *run, int i)
{
    float *values = malloc(sizeof(float) * TALL * WIDE);
    CHECK(values != NULL, "the test itself is out of memory");
    uint16_t *low = residual_of(run->model, i);
    CHECK((low != NULL) == (i == 0), "residual of weight %d", i);
    for (int64_t e = 0; e < (int64_t)TALL * WIDE; ++e)
        values[e] = low == NULL ? ((float *)run->weights[i].m.data)[e]
                                : plora__join_residual(((uint16_t *)run->weights[i].m.data)[e], low[e], PLORA_BF16);
    free(low);
    return values;
}

static void wide_same(struct wide_run *a, struct wide_run *b, const char *what)
{
    for (int which = 0; which < 3; ++which) {
        int64_t count, b_count;
        float *x = wide_arena(a, which, &count), *y = wide_arena(b, which, &b_count);
        CHECK(count == b_count && memcmp(x, y, (size_t)count * sizeof *x) == 0, "%s: arena %d differs", what, which);
        free(x);
        free(y);
    }
    for (int i = 0; i < 2; ++i) {
        float *x = wide_weight(a, i), *y = wide_weight(b, i);
        CHECK(memcmp(x, y, sizeof *x * TALL * WIDE) == 0, "%s: weight %d differs", what, i);
        free(x);
        free(y);
    }
}

/* Saved by one number of threads in the middle of a stage, gone on with by another: deterministic contexts, the same bits. */
static void other_threads(void **state)
{
    (void)state;
    if (device_is_cuda()) return; /* whose threads are not the context's: on_cuda() */
    struct wide_run whole;
    wide_open(&whole, 1);
    wide_steps(&whole, 0, 7);
    CHECK_OK(plora_checkpoint_save(whole.adapters, whole.optimizer, file_path("wide"), PLORA_CHECKPOINT_WEIGHTS));
    wide_steps(&whole, 7, 12);
    for (int32_t threads = 2; threads <= 5; ++threads) {
        struct wide_run other;
        wide_open(&other, threads);
        CHECK_OK(plora_checkpoint_load(other.adapters, other.optimizer, file_path("wide")));
        wide_steps(&other, 7, 12);
        wide_same(&whole, &other, "another number of threads");
        wide_close(&other);
    }
    wide_close(&whole);
}

/* What a run holds, on the host. */
struct picture {
    float *arenas[3], *weights[LAYERS];
    int64_t count;
};

static struct picture picture_of(struct run *run)
{
    struct picture picture;
    float *arenas[3];
    CHECK_OK(plora_adapters_parameters(run->adapters, &arenas[0], &picture.count));
    CHECK_OK(plora_optimizer_state(run->optimizer, &arenas[1], &arenas[2], NULL, NULL));
    for (int i = 0; i < 3; ++i) {
        picture.arenas[i] = calloc((size_t)picture.count, sizeof(float));
        CHECK(picture.arenas[i] != NULL, "the test itself is out of memory");
        device_transfer(picture.arenas[i], arenas[i], (size_t)picture.count * sizeof(float));
    }
    for (int i = 0; i < LAYERS; ++i) {
        const plora_matrix *m = &run->weights[i].m;
        uint16_t *low = residual_of(run->model, i);
        picture.weights[i] = calloc((size_t)(m->rows * m->columns), sizeof(float));
        CHECK(picture.weights[i] != NULL, "the test itself is out of memory");
        for (int64_t e = 0; e < m->rows * m->columns; ++e) {
            const int64_t at = e / m->columns * m->stride + e % m->columns;
            picture.weights[i][e] = low == NULL ? plora__load(m->data, at, m->dtype)
                                                : plora__join_residual(((uint16_t *)m->data)[at], low[e], m->dtype);
        }
        free(low);
    }
    return picture;
}

static void picture_free(struct picture *picture)
{
    for (int i = 0; i < 3; ++i)
        free(picture->arenas[i]);
    for (int i = 0; i < LAYERS; ++i)
        free(picture->weights[i]);
}

/* Each parameter after `steps` steps of AdamW from the same bits with the same gradients: a step is lr m / sqrt(v), of which AdamW lets
 * at most 1 / sqrt(1 - b2) = 32 through and in which each backend rounds less than 8 times, then p is rounded. */
static double parameter_bound(double value, int steps)
{
    return steps * (0x1p-24 * 8 * 32 * 0.01 + 0x1p-23 * fabs(value));
}

static void check_near(const struct picture *got, const struct picture *want, int steps, int after_unload)
{
    double largest = 0.0;
    for (int64_t i = 0; i < want->count; ++i) {
        const double value = (double)want->arenas[0][i];
        largest = fmax(largest, fabs(value));
        CHECK_CLOSE((double)got->arenas[0][i], value, after_unload ? 0.0 : parameter_bound(value, steps),
                    "parameter %lld", (long long)i);
    }
    /* W + s B A with s = 2 and R = 2, |A| and |B| below 2: what they differ by, and the rounding of three fp32 operations. */
    CHECK(largest < 2.0, "a parameter of %g", largest);
    static const int64_t elements[LAYERS] = {35, 36, 35};
    for (int i = 0; i < LAYERS; ++i)
        for (int64_t e = 0; e < elements[i]; ++e)
            CHECK_CLOSE((double)got->weights[i][e], (double)want->weights[i][e],
                        after_unload ? 2 * 2 * 2 * 2.0 * parameter_bound(2.0, steps) +
                                           0x1p-22 * (16.0 + fabs((double)want->weights[i][e]))
                                     : 0.0,
                        "weight %d, element %lld", i, (long long)e);
}

/* A checkpoint of the CPU's: the GPU has its bits, and goes on as the CPU does, within the rounding of the steps and the merge. */
static void on_cuda(void **state)
{
    enum { SAVED = 6, STEPS = 3 };
    (void)state;
    if (!device_is_cuda()) return; /* other_threads() */
    struct run run;
    struct picture saved, stepped, unloaded, here;
    setenv("PLORA_TEST_BACKEND", "cpu", 1);
    run_open(&run, NULL, PLORA_OPTIMIZER_ADAMW);
    run_steps(&run, 0, SAVED);
    CHECK_OK(plora_checkpoint_save(run.adapters, run.optimizer, file_path("cpu"), PLORA_CHECKPOINT_WEIGHTS));
    saved = picture_of(&run);
    run_steps(&run, SAVED, SAVED + STEPS);
    stepped = picture_of(&run);
    run_steps(&run, SAVED + STEPS, SAVED + STEPS + 1); /* an unload at its end */
    unloaded = picture_of(&run);
    run_close(&run);
    setenv("PLORA_TEST_BACKEND", "cuda", 1);

    run_open(&run, NULL, PLORA_OPTIMIZER_ADAMW);
    run_steps(&run, 0, 2); /* whatever it held before */
    CHECK_OK(DEVICE(plora_checkpoint_load(run.adapters, run.optimizer, file_path("cpu"))));
    here = picture_of(&run);
    for (int i = 0; i < 3; ++i)
        CHECK(memcmp(here.arenas[i], saved.arenas[i], (size_t)saved.count * sizeof(float)) == 0,
              "arena %d is not the CPU's", i);
    check_near(&here, &saved, 0, 0);
    picture_free(&here);
    run_steps(&run, SAVED, SAVED + STEPS);
    here = picture_of(&run);
    check_near(&here, &stepped, STEPS, 0);
    picture_free(&here);
    run_steps(&run, SAVED + STEPS, SAVED + STEPS + 1);
    here = picture_of(&run);
    check_near(&here, &unloaded, STEPS + 1, 1);
    picture_free(&here);
    picture_free(&saved);
    picture_free(&stepped);
    picture_free(&unloaded);
    run_close(&run);
}

static void out_of_memory(void **state)
{
    (void)state;
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    struct run run;
    run_open(&run, &allocator, PLORA_OPTIMIZER_ADAMW);
    const int64_t base = allocator.live;
    int done = 0;
    for (int64_t k = 1; !done; ++k) {
        allocator.fail_at = allocator.calls + k;
        const int64_t failed = allocator.failed;
        plora_status status =
            plora_checkpoint_save(run.adapters, run.optimizer, file_path("oom"), PLORA_CHECKPOINT_WEIGHTS);
        if (status == PLORA_OK) status = plora_checkpoint_load(run.adapters, run.optimizer, file_path("oom"));
        done = allocator.failed == failed;
        CHECK(status == (done ? PLORA_OK : PLORA_ERROR_OUT_OF_MEMORY), "allocation %lld: status %d", (long long)k,
              status);
        CHECK(allocator.live == base, "allocation %lld: %lld blocks left", (long long)k,
              (long long)(allocator.live - base));
        CHECK(done ? k > 8 : k < 200, "%lld allocations", (long long)k);
    }
    allocator.fail_at = 0;
    run_steps(&run, 0, 6);
    run_close(&run);
    check_allocator_empty(&allocator, "out of memory");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(resumed),       cmocka_unit_test(parts),         cmocka_unit_test(other_options),
        cmocka_unit_test(other_models),  cmocka_unit_test(damaged),       cmocka_unit_test(residual_of_another_weight),
        cmocka_unit_test(every_byte),    cmocka_unit_test(other_threads), cmocka_unit_test(on_cuda),
        cmocka_unit_test(out_of_memory),
    };
    check_begin("test_checkpoint");
    return cmocka_run_group_tests(tests, file_setup, file_teardown);
}
