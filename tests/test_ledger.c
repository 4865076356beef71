/* test_ledger.c: the stage ledger as its users see it: W_t comes back to the bit, wherever the run was interrupted; what is queried is
 * what was unloaded; what does not belong to a ledger is refused. Damage and failing disks are in test_ledger_file.c. */
#include "ledger_fixture.h"

static void check_position(const struct ledger_run *run, int64_t position, int64_t length)
{
    CHECK(plora_ledger_position(run->ledger) == position && plora_ledger_length(run->ledger) == length,
          "position %lld of %lld, want %lld of %lld", (long long)plora_ledger_position(run->ledger),
          (long long)plora_ledger_length(run->ledger), (long long)position, (long long)length);
}

/* Every W_t in any order, from the original and forward, then on from there. */
static void rolls_back(const char *path)
{
    struct ledger_run run, straight;
    struct ledger_picture pictures[LEDGER_STAGES + 1];
    ledger_run_open(&run, NULL, 3);
    CHECK_OK(ledger_attach(&run, path, 1));
    pictures[0] = ledger_picture_of(&run);
    for (int step = 0; step < LEDGER_STAGES; ++step) {
        ledger_stages(&run, step, step + 1);
        pictures[step + 1] = ledger_picture_of(&run);
        check_position(&run, step + 1, step + 1);
    }
    CHECK_OK(plora_ledger_verify(run.ledger));
    check_reseed(3);
    for (int trial = 0; trial < 40; ++trial) {
        const int t = (int)check_integer(0, LEDGER_STAGES);
        CHECK_OK(DEVICE(plora_ledger_roll_back(run.ledger, t, 0)));
        ledger_same_picture(&run, &pictures[t], 0, "rolled back");
        check_position(&run, t, LEDGER_STAGES);
        if (trial % 8 == 0) CHECK_OK(plora_ledger_verify(run.ledger));
    }
    /* the adapter stays */
    CHECK_OK(DEVICE(plora_ledger_roll_back(run.ledger, 5, 0)));
    CHECK_OK(DEVICE(plora_ledger_roll_back(run.ledger, 9, PLORA_LEDGER_WEIGHTS_ONLY)));
    ledger_same_picture(&run, &pictures[9], 1, "weights only");
    CHECK(memcmp(run.parameters, pictures[5].parameters, (size_t)run.count * sizeof(float)) == 0 &&
              plora_adapters_stage(run.adapters) == 5,
          "weights only, but the adapters changed");
    /* unloads go on at the end alone */
    CHECK_OK(DEVICE(plora_ledger_roll_back(run.ledger, 7, 0)));
    ledger_train(&run, 7);
    CHECK_FAILS(ledger_unload(&run, 7), PLORA_ERROR_INVALID_ARGUMENT, "24 records, the weights hold 7");
    ledger_same_picture(&run, &pictures[7], 1, "a refused unload");
    CHECK_FAILS(plora_ledger_truncate(run.ledger, 6), PLORA_ERROR_INVALID_ARGUMENT, "must be in 7 .. 24");
    CHECK_FAILS(plora_ledger_truncate(run.ledger, 25), PLORA_ERROR_INVALID_ARGUMENT, "must be in 7 .. 24");
    CHECK_OK(plora_ledger_truncate(run.ledger, 7));
    check_position(&run, 7, 7);
    CHECK_OK(ledger_unload(&run, 7));
    ledger_stages(&run, 8, 12);
    ledger_run_open(&straight, NULL, 3);
    ledger_stages(&straight, 0, 12);
    ledger_same_run(&run, &straight, "gone on after a roll back");
    ledger_run_close(&straight);
    ledger_run_close(&run);
    for (int i = 0; i <= LEDGER_STAGES; ++i)
        ledger_picture_free(&pictures[i]);
}

static void roll_back(void **state)
{
    (void)state;
    const struct ledger_path kept = ledger_path("roll");
    rolls_back(NULL);
    rolls_back(kept.text);
}

/* A file is gone on with by a process that knows nothing but W_0. */
static void reopened(void **state)
{
    (void)state;
    const struct ledger_path kept = ledger_path("reopened");
    const char *path = kept.text;
    struct ledger_run straight;
    ledger_run_open(&straight, NULL, 2);
    ledger_stages(&straight, 0, 12);
    for (int step = 0; step < 12;) {
        struct ledger_run run;
        ledger_run_open(&run, NULL, 2);
        CHECK_OK(ledger_attach(&run, path, 0));
        check_position(&run, 0, step);
        if (step > 0) CHECK_FAILS(ledger_unload(&run, step), PLORA_ERROR_INVALID_ARGUMENT, "the weights hold 0");
        CHECK_OK(DEVICE(plora_ledger_roll_back(run.ledger, step, 0)));
        const int more = 1 + step % 3;
        ledger_stages(&run, step, step + more);
        step += more;
        if (step >= 12) {
            ledger_same_run(&run, &straight, "reopened");
            CHECK_FAILS(plora_ledger_roll_back(run.ledger, 3, 0), PLORA_ERROR_INVALID_ARGUMENT, "original weights");
            CHECK_FAILS(plora_ledger_verify(run.ledger), PLORA_ERROR_INVALID_ARGUMENT, "original weights");
            ledger_same_run(&run, &straight, "after a refused roll back");
        }
        ledger_run_close(&run);
    }
    /* at the weights of the end without their hash: an original is needed, and is enough */
    struct ledger_run other;
    ledger_run_open(&other, NULL, 2);
    ledger_stages(&other, 0, 12);
    CHECK_FAILS(ledger_attach(&other, path, 0), PLORA_ERROR_INVALID_ARGUMENT, "layer 'a'", "/reopened: ");
    CHECK_OK(ledger_attach(&other, path, 1));
    check_position(&other, -1, 12);
    CHECK_FAILS(ledger_unload(&other, 12), PLORA_ERROR_INVALID_ARGUMENT, "hold -1");
    CHECK_FAILS(plora_ledger_verify(other.ledger), PLORA_ERROR_INVALID_ARGUMENT, "not known");
    CHECK_OK(DEVICE(plora_ledger_roll_back(other.ledger, 12, 0)));
    ledger_same_run(&other, &straight, "rebuilt");
    ledger_run_close(&other);
    ledger_run_close(&straight);
}

/* Another rank from some stage on. */
static void ranks_change(void **state)
{
    (void)state;
    const struct ledger_path kept = ledger_path("ranks");
    const char *path = kept.text;
    struct ledger_run first, second;
    ledger_run_open(&first, NULL, 2);
    CHECK_OK(ledger_attach(&first, path, 0));
    ledger_stages(&first, 0, 2);
    plora_ledger_destroy(first.ledger);
    first.ledger = NULL;
    ledger_run_open(&second, NULL, 4);
    CHECK_OK(ledger_attach(&second, path, 1));
    CHECK_FAILS(plora_ledger_roll_back(second.ledger, 2, 0), PLORA_ERROR_SHAPE, "rank 2, here it has 4");
    CHECK_OK(DEVICE(plora_ledger_roll_back(second.ledger, 2, PLORA_LEDGER_WEIGHTS_ONLY)));
    ledger_same_weights(&first, &second, "records of rank 2 by adapters of rank 4");
    ledger_stages(&second, 2, 5);
    struct ledger_picture end = ledger_picture_of(&second);
    CHECK_OK(DEVICE(plora_ledger_roll_back(second.ledger, 0, PLORA_LEDGER_WEIGHTS_ONLY)));
    CHECK_OK(DEVICE(plora_ledger_roll_back(second.ledger, 5, 0)));
    ledger_same_picture(&second, &end, 0, "both ranks");
    ledger_picture_free(&end);
    ledger_run_close(&first);
    ledger_run_close(&second);
}

static void queries(void **state)
{
    (void)state;
    for (int file = 0; file < 2; ++file) {
        struct ledger_run run;
        float *kept[3];
        uint64_t lineage = 0, end = 0;
        ledger_run_open(&run, NULL, 3);
        CHECK_OK(ledger_attach(&run, file ? file_path("queries") : NULL, 0));
        for (int step = 0; step < 3; ++step) {
            ledger_train(&run, step);
            kept[step] = malloc((size_t)run.count * sizeof(float));
            CHECK(kept[step] != NULL, "the test itself is out of memory");
            memcpy(kept[step], run.parameters, (size_t)run.count * sizeof(float));
            CHECK_OK(ledger_unload(&run, step));
        }
        for (int step = 0; step < 3; ++step) {
            plora_ledger_record_info info = PLORA_LEDGER_RECORD_INFO_INIT;
            CHECK_OK(plora_ledger_record(run.ledger, step, &info));
            CHECK(info.stage == step && info.momentum == ledger_momentum(step) && info.seed == 11 &&
                      info.rounding == ledger_mode.rounding && info.hashed == 0,
                  "record %d: stage %lld, momentum %g", step, (long long)info.stage, info.momentum);
            CHECK(step == 0 || (info.lineage_before == lineage && info.offset >= end), "record %d: no chain", step);
            CHECK(info.lineage_after != info.lineage_before && info.bytes >= (uint64_t)run.count * sizeof(float),
                  "record %d: %llu bytes", step, (unsigned long long)info.bytes);
            lineage = info.lineage_after;
            end = info.offset + info.bytes;
            for (int32_t layer = 0; layer < LEDGER_LAYERS; ++layer) {
                plora_adapter view = PLORA_ADAPTER_INIT;
                plora_matrix a, b;
                double factor;
                CHECK_OK(plora_adapters_layer(run.adapters, layer, &view));
                CHECK_OK(plora_ledger_factors(run.ledger, step, layer, &a, &b, &factor));
                CHECK(a.rows == view.a.rows && a.columns == view.a.columns && b.rows == view.b.rows &&
                          b.columns == view.b.columns && a.stride == a.columns && b.stride == b.columns,
                      "layer %d: the shapes of factors", layer);
                const float *at_a = kept[step] + ((float *)device_host_of(view.a.data) - run.parameters);
                const float *at_b = kept[step] + ((float *)device_host_of(view.b.data) - run.parameters);
                CHECK(memcmp(a.data, at_a, (size_t)(a.rows * a.columns) * sizeof(float)) == 0 &&
                          memcmp(b.data, at_b, (size_t)(b.rows * b.columns) * sizeof(float)) == 0,
                      "record %d, layer %d: other factors", step, layer);
                CHECK(factor == ledger_momentum(step) * view.scale, "factor %g", factor);
            }
        }
        plora_ledger_record_info info = PLORA_LEDGER_RECORD_INFO_INIT;
        CHECK_FAILS(plora_ledger_record(run.ledger, 3, &info), PLORA_ERROR_INVALID_ARGUMENT, "has 3 records");
        CHECK_FAILS(plora_ledger_record(run.ledger, -1, &info), PLORA_ERROR_INVALID_ARGUMENT, "record -1");
        CHECK_FAILS(plora_ledger_record(run.ledger, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "NULL");
        CHECK_FAILS(plora_ledger_factors(run.ledger, 0, 5, NULL, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "layer 5");
        CHECK_FAILS(plora_ledger_factors(NULL, 0, 0, NULL, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "ledger");
        CHECK_FAILS(plora_ledger_roll_back(run.ledger, 4, 0), PLORA_ERROR_INVALID_ARGUMENT, "has 3 records");
        CHECK_FAILS(plora_ledger_roll_back(run.ledger, 0, 2), PLORA_ERROR_INVALID_ARGUMENT, "0x2");
        ledger_run_close(&run);
        for (int step = 0; step < 3; ++step)
            free(kept[step]);
    }
}

/* With hashes a ledger knows any W_t again, and sees that a weight was changed. */
static void hashed_weights(void **state)
{
    (void)state;
    struct ledger_run run;
    plora_ledger_options options = PLORA_LEDGER_OPTIONS_INIT;
    plora_ledger_record_info info[4];
    const struct ledger_path kept = ledger_path("hashed");
    options.path = kept.text;
    options.hash_weights = 1;
    ledger_run_open(&run, NULL, 2);
    CHECK_OK(plora_ledger_open(run.adapters, &options, &run.ledger));
    ledger_stages(&run, 0, 4);
    for (int i = 0; i < 4; ++i) {
        info[i] = (plora_ledger_record_info)PLORA_LEDGER_RECORD_INFO_INIT;
        CHECK_OK(plora_ledger_record(run.ledger, i, &info[i]));
        CHECK(info[i].hashed == 3 && info[i].weights_before != info[i].weights_after, "record %d", i);
        CHECK(i == 0 || info[i].weights_before == info[i - 1].weights_after, "record %d does not follow", i);
    }
    CHECK_OK(plora_ledger_verify(run.ledger));
    plora_ledger_destroy(run.ledger);
    run.ledger = NULL;
    CHECK_OK(plora_ledger_open(run.adapters, &options, &run.ledger)); /* the weights are W_4 */
    check_position(&run, 4, 4);
    ledger_stages(&run, 4, 5);
    CHECK_OK(plora_ledger_verify(run.ledger));
    uint16_t *element = (uint16_t *)run.weights[1].m.data + 9;
    *element ^= 1;
    device_upload();
    CHECK_FAILS(plora_ledger_verify(run.ledger), PLORA_ERROR_INVALID_ARGUMENT, "recorded with 5 records");
    plora_ledger_destroy(run.ledger);
    run.ledger = NULL;
    CHECK_FAILS(plora_ledger_open(run.adapters, &options, &run.ledger), PLORA_ERROR_INVALID_ARGUMENT, "layer 'a'");
    options.original = run.original;
    CHECK_OK(plora_ledger_open(run.adapters, &options, &run.ledger));
    check_position(&run, -1, 5);
    CHECK_OK(DEVICE(plora_ledger_roll_back(run.ledger, 5, 0)));
    CHECK_OK(plora_ledger_verify(run.ledger));
    *element ^= 1;
    device_upload();
    CHECK_FAILS(plora_ledger_verify(run.ledger), PLORA_ERROR_INVALID_ARGUMENT, "layer 'b'", "5 records");
    ledger_run_close(&run);
}

/* What a ledger is not for. */
static void other_models(void **state)
{
    (void)state;
    const struct ledger_path kept = ledger_path("models");
    const char *path = kept.text;
    struct ledger_run run;
    ledger_run_open(&run, NULL, 2);
    CHECK_OK(ledger_attach(&run, path, 0));
    ledger_stages(&run, 0, 2);
    plora_ledger *second = NULL;
    CHECK_FAILS(plora_ledger_open(run.adapters, NULL, &second), PLORA_ERROR_INVALID_ARGUMENT, "a ledger already");
    plora_ledger_options options = PLORA_LEDGER_OPTIONS_INIT;
    options.path = path;

    struct ledger_run locked;
    ledger_run_open(&locked, NULL, 2);
    CHECK_FAILS(ledger_attach(&locked, path, 0), PLORA_ERROR_IO, "locked");
    options.original = locked.model;
    CHECK_FAILS(plora_ledger_open(locked.adapters, &options, &second), PLORA_ERROR_INVALID_ARGUMENT, "own model");
    options.original = NULL;
    options.sync = 2;
    CHECK_FAILS(plora_ledger_open(locked.adapters, &options, &second), PLORA_ERROR_INVALID_ARGUMENT, "sync is 2");
    options.sync = 1;
    options.path = "";
    CHECK_FAILS(plora_ledger_open(locked.adapters, &options, &second), PLORA_ERROR_INVALID_ARGUMENT, "empty");
    options.path = file_path("no/such");
    CHECK_FAILS(plora_ledger_open(locked.adapters, &options, &second), PLORA_ERROR_IO, "No such file");
    options.path = file_directory;
    CHECK_FAILS(plora_ledger_open(locked.adapters, &options, &second), PLORA_ERROR_IO, "Is a directory");
    file_write_text(file_path("text"), "this is not a ledger, but it has more than sixty-four bytes for a header");
    options.path = file_path("text");
    CHECK_FAILS(plora_ledger_open(locked.adapters, &options, &second), PLORA_ERROR_FORMAT, "not a ledger", "/text: ");
    CHECK(second == NULL, "a failed call wrote its output");
    ledger_run_close(&locked);
    ledger_run_close(&run);

    options.path = path;
    for (int change = 0; change < 6; ++change) {
        static const char *const messages[6] = {"is of 4 adapters, here are 3",
                                                "is of layer 'a', here it is 'A'",
                                                "layer 'b': N=6, K=7, BF16 in the ledger, N=6, K=7, F16 here",
                                                "layer 'c': N=7, K=6, F16 in the ledger, N=6, K=6, F16 here",
                                                "layer 'd': N=5, K=8, BF16, stored [K,N] in the ledger",
                                                "layer 'c': its weight is not the one"};
        plora_context *context = check_context(NULL, 1, 1);
        plora_model *model;
        struct check_matrix weights[LEDGER_WEIGHTS];
        check_reseed(71);
        CHECK_OK(plora_model_create(context, &model));
        for (int i = 0; i < LEDGER_WEIGHTS; ++i) {
            int64_t rows = 5 + i, columns = 8 - i;
            int32_t dtype = i == 3 ? PLORA_BF16 : i;
            if (change == 2 && i == 1) dtype = PLORA_F16;
            if (change == 3 && i == 2) rows = 6;
            weights[i] = check_matrix_new(rows, columns, 9, dtype);
            struct check_matrix copy = check_matrix_new(5 + i, 8 - i, 8 - i, dtype);
            check_matrix_random(&weights[i], 1.0);
            check_matrix_free(&copy);
            if (change == 5 && i == 2) ((uint16_t *)weights[i].m.data)[10] ^= 1;
            device_upload();
            CHECK_OK(check_add_linear(model, change == 1 && i == 0 ? "A" : ledger_names[i], &weights[i].m, NULL, 0,
                                      i == 3 && change != 4 ? PLORA_LAYER_FAN_IN_FAN_OUT : 0, NULL));
        }
        plora_adapters_options adapters_options = PLORA_ADAPTERS_OPTIONS_INIT;
        plora_adapters *adapters;
        adapters_options.rank = 2;
        if (change == 0) adapters_options.exclude = "d";
        CHECK_OK(plora_adapters_create(model, &adapters_options, &adapters));
        CHECK_FAILS(plora_ledger_open(adapters, &options, &second), PLORA_ERROR_INVALID_ARGUMENT, messages[change],
                    "/models: ");
        plora_adapters_destroy(adapters);
        plora_model_destroy(model);
        plora_context_destroy(context);
        for (int i = 0; i < LEDGER_WEIGHTS; ++i)
            check_matrix_free(&weights[i]);
    }
}

/* An original that is not W_0 is found before anything is written. */
static void wrong_original(void **state)
{
    (void)state;
    struct ledger_run run;
    ledger_run_open(&run, NULL, 2);
    CHECK_OK(ledger_attach(&run, NULL, 1));
    ledger_stages(&run, 0, 3);
    struct ledger_picture picture = ledger_picture_of(&run);
    ((uint16_t *)run.copies[2].m.data)[3] ^= 0x80;
    device_upload();
    CHECK_FAILS(DEVICE(plora_ledger_roll_back(run.ledger, 1, 0)), PLORA_ERROR_INVALID_ARGUMENT,
                "layer 'c': the original weight");
    ledger_same_picture(&run, &picture, 0, "a refused roll back");
    check_position(&run, 3, 3);
    ((uint16_t *)run.copies[2].m.data)[3] ^= 0x80;
    device_upload();
    CHECK_OK(DEVICE(plora_ledger_roll_back(run.ledger, 1, 0)));
    ledger_picture_free(&picture);
    ledger_run_close(&run);
}

/* An opened model has its original weights in its files. */
static void opened_model(void **state)
{
    (void)state;
    struct ledger_run run;
    plora_model *model;
    plora_adapters *adapters;
    plora_ledger *ledger;
    ledger_run_open(&run, NULL, 2);
    CHECK_OK(plora_model_save(run.model, file_path("w0")));
    CHECK_OK(plora_model_open(run.context, file_path("w0"), &model));
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = 2;
    options.init = PLORA_INIT_GAUSSIAN;
    CHECK_OK(plora_adapters_create(model, &options, &adapters));
    CHECK_OK(plora_ledger_open(adapters, NULL, &ledger));
    size_t sizes[6];
    unsigned char *saved[6];
    for (int step = 0; step < 6; ++step) {
        CHECK_OK(plora_model_save(model, file_path("saved")));
        saved[step] = file_read(file_path("saved"), &sizes[step]);
        for (int32_t layer = 0; layer < LEDGER_LAYERS; ++layer) {
            plora_adapter view = PLORA_ADAPTER_INIT;
            CHECK_OK(plora_adapters_layer(adapters, layer, &view));
            const size_t bytes = (size_t)(view.b.rows * view.b.columns) * sizeof(float);
            float *b = device_mirror(view.b.data, bytes);
            for (int64_t i = 0; i < view.b.rows * view.b.columns; ++i)
                b[i] = (float)check_uniform();
            device_upload();
            device_forget(b);
        }
        plora_unload_options unload = PLORA_UNLOAD_OPTIONS_INIT;
        unload.momentum = ledger_momentum(step);
        CHECK_OK(plora_unload(adapters, NULL, &unload, NULL, NULL));
    }
    for (int t = 5; t >= 0; --t) {
        size_t size;
        CHECK_OK(plora_ledger_roll_back(ledger, t, 0));
        CHECK_OK(plora_model_save(model, file_path("saved")));
        unsigned char *now = file_read(file_path("saved"), &size);
        CHECK(size == sizes[t] && memcmp(now, saved[t], size) == 0, "W_%d differs", t);
        free(now);
    }
    /* in any order */
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    plora_ledger_destroy(ledger);
    for (int i = 0; i < 6; ++i)
        free(saved[i]);
    ledger_run_close(&run);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(roll_back),      cmocka_unit_test(reopened),       cmocka_unit_test(ranks_change),
        cmocka_unit_test(queries),        cmocka_unit_test(hashed_weights), cmocka_unit_test(other_models),
        cmocka_unit_test(wrong_original), cmocka_unit_test(opened_model),
    };
    static const int32_t residuals[] = {PLORA_RESIDUAL_NONE, PLORA_RESIDUAL_NONE, PLORA_RESIDUAL_HOST};
    int failures = 0;
    check_begin("test_ledger");
    for (int32_t rounding = PLORA_ROUND_NEAREST; rounding <= PLORA_ROUND_RESIDUAL; ++rounding) {
        ledger_mode.residual = residuals[rounding];
        ledger_mode.rounding = rounding;
        failures += cmocka_run_group_tests(tests, file_setup, file_teardown);
    }
    return failures;
}
