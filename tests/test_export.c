/* test_export.c: ledgers exported as one adapter, against dense sums in double of what was seen to be unloaded: exact and truncated,
 * as PEFT directories, read back by plora_adapters_load(), and as GGUF files, read back by a reader of the test's own. */
#include "export_fixture.h"

/* ---------------------------------------------------------------------------------------------------------------- PEFT */

static void exact(void **state)
{
    static const double momenta[][3] = {{1.0, 1.0, 0.0}, {0.2, 0.7, 0.0}, {1.0, 0.0, 0.0}, {0.4, 0.4, 0.4}};
    (void)state;
    for (int round = 0; round < CHECK_COUNT(momenta); ++round) {
        struct fixture f;
        const plora_adapters_options given = different_ranks(2);
        plora_export_options options = defaults;
        char what[64];
        fixture_open(&f, 2, &given);
        for (int s = 0; s < 3 && momenta[round][s] > 0; ++s)
            train_and_unload(&f, momenta[round][s]);
        snprintf(what, sizeof what, "round %d, without the live adapter", round);
        options.live = 0;
        check_peft(&f, options, 1, what);
        /* It is also what the trained weights differ by from the original ones, up to their rounding. */
        for (int layer = 0; layer < LAYERS; ++layer) {
            double *sum = dense_sum(&f, layer, NULL);
            const plora_matrix *w = &f.weights[layer].m;
            const size_t front = (size_t)((unsigned char *)w->data - f.weights[layer].memory);
            const float *before = (const float *)(f.weights[layer].snapshot + front);
            float after[24 * 32];
            device_transfer(after, device_of(w->data),
                            (size_t)((w->rows - 1) * w->stride + w->columns) * sizeof(float));
            for (int64_t i = 0; i < w->rows * w->columns; ++i) {
                const int64_t at = i / w->columns * w->stride + i % w->columns;
                CHECK_CLOSE((double)after[at] - (double)before[at], sum[i], 1e-5, "layer %d: W_T - W_0", layer);
            }
            free(sum);
        }
        if (round == 3) { /* three stages are all the rank that k_proj may have when it is loaded */
            fixture_close(&f);
            continue;
        }
        train(&f, 1.0);
        snprintf(what, sizeof what, "round %d, with the live adapter", round);
        check_peft(&f, defaults, 1, what);
        fixture_close(&f);
    }
}

/* Stages of one scale: every number of the file is one that was unloaded. */
static void same_bits(void **state)
{
    (void)state;
    struct fixture f;
    const plora_adapters_options given = different_ranks(2);
    fixture_open(&f, 1, &given);
    train_and_unload(&f, 1.0);
    train_and_unload(&f, 1.0);
    train(&f, 1.0);
    CHECK_OK(export_to(&f, "peft", defaults, NULL));
    plora_adapters *adapters;
    CHECK_OK(plora_adapters_load(f.model, file_path("peft"), NULL, &adapters));
    for (int layer = 0; layer < LAYERS; ++layer) {
        const int64_t n = kinds[layer % PER_BLOCK].n, k = kinds[layer % PER_BLOCK].k;
        struct product product = read_product(adapters, layer);
        CHECK_CLOSE(product.scale, f.stages[0][layer].factor, 1e-15, "layer %d: scale", layer);
        int64_t at = 0;
        for (int s = 0; s < f.count; ++s) {
            const struct seen *seen = &f.stages[s][layer];
            CHECK(memcmp(product.a + at * k, seen->a, (size_t)(seen->rank * k) * sizeof(float)) == 0, "layer %d: A",
                  layer);
            for (int64_t i = 0; i < n; ++i)
                CHECK(memcmp(product.b + i * product.rank + at, seen->b + i * seen->rank,
                             (size_t)seen->rank * sizeof(float)) == 0,
                      "layer %d: B, row %lld", layer, (long long)i);
            at += seen->rank;
        }
        product_free(&product);
    }
    plora_adapters_destroy(adapters);
    fixture_close(&f);
}

static void truncated(void **state)
{
    static const double errors[] = {0.6, 0.2, 0.03, 1e-3};
    (void)state;
    for (int32_t threads = 1; threads <= 3; threads += 2) {
        struct fixture f;
        const plora_adapters_options given = different_ranks(4);
        fixture_open(&f, threads, &given);
        train_and_unload(&f, 1.0);
        train_and_unload(&f, 0.3);
        train_and_unload(&f, 0.6);
        train(&f, 1.0); /* 16 in all: as much as any layer has, and more than some */
        char what[64];
        for (int64_t rank = 0; rank <= 8; ++rank)
            for (int i = 0; i < CHECK_COUNT(errors); ++i) {
                const double error = errors[i];
                plora_export_options options = defaults;
                options.rank = rank;
                options.max_error = error;
                snprintf(what, sizeof what, "rank %lld, error %g", (long long)rank, error);
                check_peft(&f, options, 0, what);
            }
        plora_export_options options = defaults;
        options.rank = 3;
        check_peft(&f, options, 0, "rank 3");
        fixture_close(&f);
    }
}

/* The first records alone, after a roll back too; and nothing at all. */
static void parts(void **state)
{
    (void)state;
    struct fixture f;
    const plora_adapters_options given = different_ranks(2);
    plora_export_options options = defaults;
    plora_export_report report = PLORA_EXPORT_REPORT_INIT;
    fixture_open(&f, 1, &given);
    options.live = 1;
    CHECK_OK(export_to(&f, "peft", options, &report)); /* B = 0 */
    CHECK(report.records == 0 && report.live == 0 && report.rank == 1 && report.error == 0.0, "nothing: rank %lld",
          (long long)report.rank);
    plora_adapters *adapters;
    CHECK_OK(plora_adapters_load(f.model, file_path("peft"), NULL, &adapters));
    for (int layer = 0; layer < LAYERS; ++layer) {
        struct product product = read_product(adapters, layer);
        for (int64_t i = 0; i < kinds[layer % PER_BLOCK].n; ++i)
            CHECK(product.b[i] == 0.0f, "nothing: B is %g", (double)product.b[i]);
        product_free(&product);
    }
    plora_adapters_destroy(adapters);
    options.rank = 2;
    CHECK_OK(export_to(&f, "peft", options, &report));
    CHECK(report.rank == 1 && report.norm == 0.0 && report.error == 0.0, "nothing, truncated");

    for (int s = 0; s < 3; ++s)
        train_and_unload(&f, 1.0);
    options = defaults;
    CHECK_OK(export_to(&f, "peft", options, &report));
    CHECK(report.records == 3 && report.live == 0, "%lld records", (long long)report.records);
    --f.count; /* is to be left out */
    options.records = 2;
    options.live = 0;
    check_peft(&f, options, 1, "2 of 3 records");
    fixture_close(&f);
}

/* ---------------------------------------------------------------------------------------------------------------- GGUF */

static void gguf(void **state)
{
    static const double alphas[] = {2.5 * 6, 0.0,
                                    6.0}; /* one scale for all; ranks differ; scales differ, so B has them */
    (void)state;
    for (int round = 0; round < CHECK_COUNT(alphas); ++round) {
        struct fixture f;
        plora_adapters_options given = different_ranks(2);
        if (round != 1) given.override_count = 0;
        fixture_open(&f, 1, &given);
        train_and_unload(&f, 1.0);
        train_and_unload(&f, round == 2 ? 0.3 : 1.0);
        train(&f, 1.0);
        plora_export_options options = defaults;
        struct product products[LAYERS];
        options.format = PLORA_EXPORT_GGUF;
        options.heads = HEADS;
        options.kv_heads = KV_HEADS;
        CHECK_OK(export_to(&f, "adapter.gguf", options, NULL));
        CHECK_CLOSE((double)read_gguf(file_path("adapter.gguf"), products), alphas[round], 0.0, "alpha");
        for (int layer = 0; layer < LAYERS; ++layer) {
            const int64_t n = kinds[layer % PER_BLOCK].n, k = kinds[layer % PER_BLOCK].k;
            double magnitude[24 * 24];
            double *sum = dense_sum(&f, layer, magnitude);
            for (int64_t i = 0; i < n * k; ++i)
                CHECK_CLOSE(product_element(&products[layer], k, i / k, i % k), sum[i], 1.01 * 0x1p-24 * magnitude[i],
                            "round %d, layer %d", round, layer);
            product_free(&products[layer]);
            free(sum);
        }
        options.rank = 1;
        CHECK_OK(export_to(&f, "adapter.gguf", options, NULL));
        CHECK_CLOSE((double)read_gguf(file_path("adapter.gguf"), products), 1.0, 0.0, "alpha of rank 1");
        for (int layer = 0; layer < LAYERS; ++layer) {
            CHECK(products[layer].rank == 1, "rank %lld", (long long)products[layer].rank);
            product_free(&products[layer]);
        }
        fixture_close(&f);
    }
}

/* -------------------------------------------------------------------------------------------------------------- errors */

static void refused(void **state)
{
    static const struct {
        plora_export_options options;
        plora_status status;
        const char *message;
    } cases[] = {
        {{sizeof(plora_export_options), 2, 1, -1, 0, 0.0, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "format 2"},
        {{sizeof(plora_export_options), 0, 2, -1, 0, 0.0, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "live is 2"},
        {{sizeof(plora_export_options), 0, 1, 2, 0, 0.0, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "the ledger has 1"},
        {{sizeof(plora_export_options), 0, 1, -2, 0, 0.0, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "records is -2"},
        {{sizeof(plora_export_options), 0, 1, -1, -1, 0.0, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "rank is -1"},
        {{sizeof(plora_export_options), 0, 1, -1, 0, 1.0, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "max_error is 1"},
        {{sizeof(plora_export_options), 0, 1, -1, 0, NAN, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "max_error"},
        {{sizeof(plora_export_options), 1, 1, -1, 0, 0.0, -1, 0}, PLORA_ERROR_INVALID_ARGUMENT, "heads is -1"},
        {{sizeof(plora_export_options), 1, 1, -1, 0, 0.0, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "num_attention_heads"},
        {{sizeof(plora_export_options), 1, 1, -1, 0, 0.0, 3, 1}, PLORA_ERROR_SHAPE, "16 rows are not 3 heads"},
        {{sizeof(plora_export_options), 1, 1, -1, 0, 0.0, 16, 8}, PLORA_ERROR_SHAPE, "16 heads of an even size"},
        {{sizeof(plora_export_options), 1, 1, -1, 0, 0.0, 2, 2}, PLORA_ERROR_SHAPE, "those of other layers"},
    };
    (void)state;
    struct fixture f;
    const plora_adapters_options given = different_ranks(2);
    fixture_open(&f, 1, &given);
    train_and_unload(&f, 1.0);
    for (int i = 0; i < CHECK_COUNT(cases); ++i)
        CHECK_FAILS(export_to(&f, "refused", cases[i].options, NULL), cases[i].status, cases[i].message);
    CHECK(access(file_path("refused"), F_OK) != 0, "a refused export left something behind");
    CHECK_FAILS(plora_ledger_export(NULL, "x", NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "ledger is NULL");
    CHECK_FAILS(plora_ledger_export(f.ledger, NULL, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "path is NULL");
    CHECK_FAILS(plora_ledger_export(f.ledger, file_path("no/peft"), NULL, NULL), PLORA_ERROR_IO, "No such file");
    plora_export_report report = PLORA_EXPORT_REPORT_INIT;
    report.layer_capacity = 1;
    CHECK_FAILS(plora_ledger_export(f.ledger, file_path("refused"), NULL, &report), PLORA_ERROR_INVALID_ARGUMENT,
                "layer_capacity");
    train(&f, 1.0);
    plora_adapter adapter = PLORA_ADAPTER_INIT;
    const float bad = NAN;
    CHECK_OK(plora_adapters_layer(f.adapters, 3, &adapter));
    device_transfer((float *)adapter.b.data + 5, &bad, sizeof bad);
    CHECK_FAILS(plora_ledger_export(f.ledger, file_path("refused"), NULL, NULL), PLORA_ERROR_NON_FINITE,
                "o_proj': B[5] is");
    CHECK(access(file_path("refused"), F_OK) != 0, "a refused export left something behind");
    fixture_close(&f);
}

/* Layers that GGUF has no name for, and an output head that is an embedding as well. */
static void refused_names(void **state)
{
    static const struct {
        const char *first, *second, *message; /* second: tied to the first */
        int names;
    } cases[] = {
        {"transformer.h.0.attn.c_attn", NULL, "'transformer.h.0.attn.c_attn'", 0},
        {"model.layers.0.self_attn.qkv_proj", NULL, "qkv_proj", 0},
        {"model.layers.x.mlp.up_proj", NULL, "layers.x", 0},
        {"model.embed_tokens", "lm_head", "'lm_head' is tied to 'model.embed_tokens'", 0},
        {"lm_head", NULL, "", 1},
    };
    (void)state;
    for (int i = 0; i < CHECK_COUNT(cases); ++i) {
        plora_context *context = check_context(NULL, 1, 0);
        plora_model *model;
        plora_adapters *adapters;
        plora_ledger *ledger;
        struct check_matrix weight = check_matrix_new(6, 4, 4, PLORA_F32);
        check_matrix_random(&weight, 1.0);
        device_refresh(weight.memory);
        CHECK_OK(plora_model_create(context, &model));
        CHECK_OK(check_add_linear(model, cases[i].first, &weight.m, NULL, 0, 0, NULL));
        if (cases[i].second != NULL) CHECK_OK(check_add_linear(model, cases[i].second, &weight.m, NULL, 0, 0, NULL));
        plora_adapters_options given = PLORA_ADAPTERS_OPTIONS_INIT;
        plora_export_options options = defaults;
        given.rank = 2;
        options.format = PLORA_EXPORT_GGUF;
        options.heads = 1;
        CHECK_OK(plora_adapters_create(model, &given, &adapters));
        CHECK_OK(plora_ledger_open(adapters, NULL, &ledger));
        if (cases[i].names)
            CHECK_OK(plora_ledger_export(ledger, file_path("named.gguf"), &options, NULL));
        else
            CHECK_FAILS(plora_ledger_export(ledger, file_path("refused.gguf"), &options, NULL), PLORA_ERROR_UNSUPPORTED,
                        cases[i].message);
        plora_ledger_destroy(ledger);
        plora_adapters_destroy(adapters);
        plora_model_destroy(model);
        plora_context_destroy(context);
        check_matrix_free(&weight);
    }
    CHECK(access(file_path("refused.gguf"), F_OK) != 0, "a refused export left something behind");
}

/* Every allocation fails once: the error comes back, nothing leaks, no file appears half. */
static void out_of_memory(void **state)
{
    (void)state;
    struct fixture f;
    const plora_adapters_options given = different_ranks(2);
    fixture_open(&f, 2, &given);
    train_and_unload(&f, 1.0);
    train(&f, 1.0);
    mkdir(file_path("memory"), 0700);
    for (int format = PLORA_EXPORT_PEFT; format <= PLORA_EXPORT_GGUF; ++format) {
        plora_export_options options = defaults;
        options.format = format;
        options.heads = HEADS;
        options.kv_heads = KV_HEADS;
        options.rank = 2;
        int done = 0;
        for (int64_t k = 1; !done; ++k) {
            const int64_t live = f.allocator.live, failed = f.allocator.failed;
            f.allocator.fail_at = f.allocator.calls + k;
            const plora_status status =
                export_to(&f, format == PLORA_EXPORT_GGUF ? "memory/x" : "memory/peft", options, NULL);
            done = f.allocator.failed == failed;
            CHECK(status == (done ? PLORA_OK : PLORA_ERROR_OUT_OF_MEMORY), "allocation %lld: status %d", (long long)k,
                  status);
            CHECK(f.allocator.live == live, "allocation %lld: %lld blocks left", (long long)k,
                  (long long)(f.allocator.live - live));
            CHECK(done ? k > 10 : k < 200, "%lld allocations", (long long)k);
            if (format == PLORA_EXPORT_GGUF)
                CHECK(file_count(file_path("memory")) == 1 + done, "allocation %lld: %d files", (long long)k,
                      file_count(file_path("memory")));
        }
        f.allocator.fail_at = 0;
    }
    fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exact),         cmocka_unit_test(same_bits),     cmocka_unit_test(truncated),
        cmocka_unit_test(parts),         cmocka_unit_test(gguf),          cmocka_unit_test(refused),
        cmocka_unit_test(refused_names), cmocka_unit_test(out_of_memory),
    };
    check_begin("test_export");
    return cmocka_run_group_tests(tests, file_setup, file_teardown);
}