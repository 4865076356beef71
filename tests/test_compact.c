/* test_compact.c: ranges of a ledger folded into one record: what the new ledger's sum lacks, that it can be gone on with, and what it
 * refuses. */
#include "export_fixture.h"

/* A model of the CPU with the weights that the fixture began with. */
static plora_model *original_model(struct fixture *f, plora_context **context)
{
    plora_model *model;
    CHECK_OK(plora_context_create(NULL, context));
    CHECK_OK(plora_model_create(*context, &model));
    for (int i = 0; i < LAYERS; ++i) {
        plora_linear linear = PLORA_LINEAR_INIT;
        char name[64];
        snprintf(name, sizeof name, "model.layers.%d.%s", i / PER_BLOCK, kinds[i % PER_BLOCK].layer);
        linear.name = name;
        linear.weight = f->weights[i].m;
        linear.weight.data = f->weights[i].snapshot + ((unsigned char *)f->weights[i].m.data - f->weights[i].memory);
        CHECK_OK(plora_model_add_linear(model, &linear, NULL));
    }
    return model;
}

static void reopen(struct fixture *f, const char *name, plora_model *original)
{
    plora_ledger_options options = PLORA_LEDGER_OPTIONS_INIT;
    plora_ledger_destroy(f->ledger);
    f->ledger = NULL;
    options.path = name == NULL ? NULL : file_path(name);
    options.original = original;
    options.sync = 0;
    CHECK_OK(plora_ledger_open(f->adapters, &options, &f->ledger));
}

/* The exact export has the dense sum, up to fp32 and `error` of its norm. */
static void check_sum(struct fixture *f, double error, const char *what)
{
    plora_export_options options = defaults;
    struct product products[LAYERS];
    options.format = PLORA_EXPORT_GGUF; /* whose ranks nothing bounds */
    options.heads = HEADS;
    options.kv_heads = KV_HEADS;
    CHECK_OK(export_to(f, "sum.gguf", options, NULL));
    read_gguf(file_path("sum.gguf"), products);
    double lost = 0, size = 0;
    for (int layer = 0; layer < LAYERS; ++layer) {
        const int64_t n = kinds[layer % PER_BLOCK].n, k = kinds[layer % PER_BLOCK].k;
        double *sum = dense_sum(f, layer, NULL);
        size = hypot(size, norm(sum, n * k));
        for (int64_t i = 0; i < n * k; ++i)
            lost = hypot(lost, sum[i] - product_element(&products[layer], k, i / k, i % k));
        product_free(&products[layer]);
        free(sum);
    }
    CHECK(lost <= (error + 1e-6) * size, "%s: error %g, at most %g", what, lost / size, error);
}

static void compacted(void **state)
{
    (void)state;
    for (int in_file = 0; in_file < 2; ++in_file) {
        struct fixture f;
        const plora_adapters_options given = different_ranks(3);
        plora_export_options options = defaults;
        plora_export_report report = PLORA_EXPORT_REPORT_INIT;
        plora_ledger_record_info info = PLORA_LEDGER_RECORD_INFO_INIT;
        plora_context *context;
        fixture_open(&f, 2, &given);
        plora_model *original = original_model(&f, &context);
        reopen(&f, in_file ? "ledger" : NULL, original);
        for (int s = 0; s < 5; ++s)
            train_and_unload(&f, s % 2 == 0 ? 1.0 : 0.4);

        /* Records 1 to 3 become one, without loss: the sum stays, and the weights before it can be rebuilt, those behind not. */
        CHECK_OK(plora_ledger_compact(f.ledger, file_path("small"), 1, 3, NULL, &report));
        CHECK(report.records == 3 && report.error <= 1e-6, "%lld records, error %g", (long long)report.records,
              report.error);
        CHECK(plora_ledger_length(f.ledger) == 5, "the ledger itself has changed");
        reopen(&f, "small", original);
        CHECK(plora_ledger_length(f.ledger) == 3 && plora_ledger_position(f.ledger) == 3, "length %lld, position %lld",
              (long long)plora_ledger_length(f.ledger), (long long)plora_ledger_position(f.ledger));
        CHECK_OK(plora_ledger_record(f.ledger, 1, &info));
        CHECK(info.folded == 3 && info.stage == 3 && info.fold_error <= 1e-6, "folded %lld, error %g",
              (long long)info.folded, info.fold_error);
        CHECK_OK(plora_ledger_record(f.ledger, 2, &info));
        CHECK(info.folded == 0 && info.stage == 4, "folded %lld", (long long)info.folded);
        check_sum(&f, 0.0, "folded without loss");
        CHECK_FAILS(plora_ledger_roll_back(f.ledger, 2, 0), PLORA_ERROR_UNSUPPORTED, "record 1 stands for 3 records");
        CHECK(plora_ledger_position(f.ledger) == 3, "a refused roll back has done something");

        /* It is gone on with, and folded once more, now to a low rank. */
        train_and_unload(&f, 1.0);
        check_sum(&f, 0.0, "one stage more");
        options.rank = 2;
        CHECK_OK(plora_ledger_compact(f.ledger, file_path("smaller"), 0, 3, &options, &report));
        CHECK(report.rank == 2 && report.error > 0.01 && report.error < 1.0, "rank %lld, error %g",
              (long long)report.rank, report.error);
        reopen(&f, "smaller", original);
        CHECK_OK(plora_ledger_record(f.ledger, 0, &info));
        CHECK(info.folded == 5, "folded %lld", (long long)info.folded);
        CHECK_CLOSE(info.fold_error, report.error, 1e-6, "the error on record");
        CHECK(plora_ledger_length(f.ledger) == 2 && plora_ledger_position(f.ledger) == 2, "length, position");
        check_sum(&f, 2 * report.error, "folded to rank 2");
        CHECK_OK(plora_ledger_verify(f.ledger)); /* by their hash */
        CHECK_OK(plora_ledger_truncate(f.ledger, 2));
        CHECK_OK(plora_ledger_roll_back(f.ledger, 2, 0)); /* is where they are */
        CHECK_OK(plora_ledger_roll_back(f.ledger, 0, 0));
        CHECK(plora_ledger_position(f.ledger) == 0, "position %lld", (long long)plora_ledger_position(f.ledger));
        fixture_close(&f);
        plora_model_destroy(original);
        plora_context_destroy(context);
        unlink(file_path("ledger"));
        unlink(file_path("small"));
        unlink(file_path("smaller"));
    }
}

static void refused_compactions(void **state)
{
    (void)state;
    struct fixture f;
    const plora_adapters_options given = different_ranks(2);
    plora_export_options options = defaults;
    fixture_open(&f, 1, &given);
    reopen(&f, "own", NULL);
    train_and_unload(&f, 1.0);
    train_and_unload(&f, 1.0);
    mkdir(file_path("room"), 0700);
    char path[256];
    snprintf(path, sizeof path, "%s", file_path("room/x"));
    CHECK_FAILS(plora_ledger_compact(f.ledger, path, 0, 3, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "has 2");
    CHECK_FAILS(plora_ledger_compact(f.ledger, path, -1, 1, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "from -1 on");
    CHECK_FAILS(plora_ledger_compact(f.ledger, path, 1, 0, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "0 records");
    CHECK_FAILS(plora_ledger_compact(f.ledger, "", 0, 1, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "path is empty");
    CHECK_FAILS(plora_ledger_compact(f.ledger, file_path("no/x"), 0, 1, NULL, NULL), PLORA_ERROR_IO, "No such file");
    CHECK_FAILS(plora_ledger_compact(f.ledger, file_path("own"), 0, 1, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "own file");
    options.live = 0;
    CHECK_FAILS(plora_ledger_compact(f.ledger, path, 0, 1, &options, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "only rank and max_error");
    int done = 0;
    for (int64_t k = 1; !done; ++k) {
        const int64_t live = f.allocator.live, failed = f.allocator.failed;
        f.allocator.fail_at = f.allocator.calls + k;
        const plora_status status = plora_ledger_compact(f.ledger, path, 0, 1, NULL, NULL);
        done = f.allocator.failed == failed;
        CHECK(status == (done ? PLORA_OK : PLORA_ERROR_OUT_OF_MEMORY), "allocation %lld: status %d", (long long)k,
              status);
        CHECK(f.allocator.live == live && file_count(file_path("room")) == done, "allocation %lld: something is left",
              (long long)k);
        CHECK(done ? k > 10 : k < 200, "%lld allocations", (long long)k);
    }
    f.allocator.fail_at = 0;
    fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(compacted),
        cmocka_unit_test(refused_compactions),
    };
    check_begin("test_compact");
    return cmocka_run_group_tests(tests, file_setup, file_teardown);
}
