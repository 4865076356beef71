/* test_peft.c: adapters to and from PEFT directories: the exact text of the config, scales of PEFT's own rules, other element
 * types, and everything that is refused. */
#include "adapter_files_fixture.h"

enum { LAYERS = 5 };
static const struct fixture_layer layers[LAYERS] = {{"model.l.0.q", 6, 4, 20, 0},
                                                    {"model.l.0.v", 7, 6, 20, 0},
                                                    {"model.l.1.q", 8, 8, 20, 0},
                                                    {"model.l.1.v", 9, 10, 20, PLORA_LAYER_FAN_IN_FAN_OUT},
                                                    {"lm_head", 10, 12, 20, PLORA_LAYER_HEAD}};

static void fixture_open(struct fixture *f)
{
    fixture_open_layers(f, layers, LAYERS);
}

static void check_same(plora_adapters *a, plora_adapters *b)
{
    float *x, *y;
    int64_t x_count, y_count;
    CHECK_OK(plora_adapters_parameters(a, &x, &x_count));
    CHECK_OK(plora_adapters_parameters(b, &y, &y_count));
    CHECK(x_count == y_count, "%lld and %lld parameters", (long long)x_count, (long long)y_count);
    const size_t bytes = (size_t)x_count * sizeof *x;
    float *own_x = device_mirror(x, bytes), *own_y = device_mirror(y, bytes);
    CHECK(memcmp(own_x, own_y, bytes) == 0, "the parameters differ");
    device_forget(own_x);
    device_forget(own_y);
    for (int32_t layer = 0; layer < LAYERS; ++layer) {
        plora_adapter one = PLORA_ADAPTER_INIT, two = PLORA_ADAPTER_INIT;
        const plora_status status = plora_adapters_layer(a, layer, &one);
        CHECK(plora_adapters_layer(b, layer, &two) == status, "layer %d is in one set only", layer);
        CHECK(one.scale == two.scale && one.a.rows == two.a.rows, "layer %d: scale %g and %g", layer, one.scale,
              two.scale);
    }
}

static void check_config_has(const char *directory, const char *text)
{
    char path[512];
    size_t count;
    snprintf(path, sizeof path, "%s/adapter_config.json", directory);
    unsigned char *bytes = file_read(path, &count);
    CHECK(strstr((char *)bytes, text) != NULL, "no '%s' in\n%s", text, (char *)bytes);
    free(bytes);
}

static void round_trips(void **state)
{
    (void)state;
    struct fixture f;
    fixture_open(&f);
    const plora_adapters_override overrides[2] = {{"model.l.1.q", 0.1, 3, 0}, {"model.l.0.v", 0.0, 1, 0}};
    for (int round = 0; round < 4; ++round) {
        plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
        options.rank = 2;
        options.alpha = 5.0;
        options.rslora = round & 1;
        options.targets = round < 2 ? "all-linear" : "q,lm_head";
        options.overrides = overrides;
        options.override_count = round < 2 ? 2 : 1;
        plora_adapters *saved, *loaded;
        CHECK_OK(plora_adapters_create(f.model, &options, &saved));
        randomise(&f, saved);
        CHECK_OK(plora_adapters_save(saved, file_path("peft")));
        CHECK_OK(plora_adapters_load(f.model, file_path("peft"), NULL, &loaded));
        check_same(saved, loaded);
        /* Saved again, with nothing but the file to go by, it is the same file. */
        size_t before_count, after_count;
        unsigned char *before = file_read(file_path("peft/adapter_config.json"), &before_count);
        CHECK_OK(plora_adapters_save(loaded, file_path("peft")));
        unsigned char *after = file_read(file_path("peft/adapter_config.json"), &after_count);
        CHECK(before_count == after_count && memcmp(before, after, after_count) == 0, "configs differ:\n%s%s",
              (char *)before, (char *)after);
        free(before);
        free(after);
        plora_adapters_destroy(saved);
        plora_adapters_destroy(loaded);
        CHECK(file_count(file_path("peft")) == 2, "%d files", file_count(file_path("peft")));
        check_config_has(file_path("peft"), round & 1 ? "\"use_rslora\": true" : "\"use_rslora\": false");
        check_config_has(file_path("peft"), "\"r\": 2,\n  \"lora_alpha\": 5,");
        check_config_has(file_path("peft"), "\"alpha_pattern\": {\n    \"model.l.1.q\": 0.10000000000000001\n  }");
        check_config_has(file_path("peft"),
                         round < 2 ? "\"rank_pattern\": {\n    \"model.l.0.v\": 1,\n    \"model.l.1.q\": 3\n  }"
                                   : "\"rank_pattern\": {\n    \"model.l.1.q\": 3\n  }");
        check_config_has(file_path("peft"), round < 2 ? "\"target_modules\": [\n    \"q\",\n    \"v\"\n  ]"
                                                      : "\"target_modules\": [\n    \"q\",\n    \"lm_head\"\n  ]");
    }
    fixture_close(&f);
}

/* Some layers of a last component only: full names. */
static void partial_targets(void **state)
{
    (void)state;
    struct fixture f;
    fixture_open(&f);
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = 2;
    options.targets = "model.l.0.*";
    plora_adapters *adapters;
    CHECK_OK(plora_adapters_create(f.model, &options, &adapters));
    CHECK_OK(plora_adapters_save(adapters, file_path("peft")));
    check_config_has(file_path("peft"), "\"target_modules\": [\n    \"model.l.0.q\",\n    \"model.l.0.v\"\n  ]");
    CHECK_FAILS(plora_adapters_save(adapters, file_path("no/peft")), PLORA_ERROR_IO, "No such file");
    CHECK_FAILS(plora_adapters_save(NULL, "x"), PLORA_ERROR_INVALID_ARGUMENT, "adapters");
    CHECK_FAILS(plora_adapters_save(adapters, NULL), PLORA_ERROR_INVALID_ARGUMENT, "directory");
    plora_adapters_destroy(adapters);
    fixture_close(&f);
}

/* A directory with layer 0 [N=6,K=4] at rank 2, given the config and the header; the data is `count` elements of 0.5. */
static void write_peft(const char *config, const char *header, int dtype, int count)
{
    float data[64];
    CHECK(count * (int)plora__dtype_size(dtype) <= (int)sizeof data, "too much data");
    for (int i = 0; i < count; ++i) {
        plora__store(data, i, dtype, 0.5f);
    }
    mkdir(file_path("peft"), 0700);
    file_write_text(file_path("peft/adapter_config.json"), config);
    file_write_safetensors(file_path("peft/adapter_model.safetensors"), header, data,
                           (size_t)count * plora__dtype_size(dtype));
}

#define CONFIG(more) "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":6" more "}"
#define KEY(layer, part) "\"base_model.model." layer ".lora_" part ".weight\":"
#define TENSOR(dtype, shape, begin, end)                                                                               \
    "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]}"
#define GOOD                                                                                                           \
    "{" KEY("model.l.0.q", "A") TENSOR("F32", "[2,4]", 0, 32) "," KEY("model.l.0.q", "B")                              \
        TENSOR("F32", "[6,2]", 32, 80) "}"

static void scales(void **state)
{
    static const struct {
        const char *config;
        double scale;
    } cases[] = {
        {CONFIG(""), 3.0},
        {CONFIG(",\"use_rslora\":true"), 6.0 / 1.4142135623730951},
        {CONFIG(",\"alpha_pattern\":{\"q\":1.5}"), 0.75},
        {CONFIG(",\"alpha_pattern\":{\"l.0.q\":1,\"q\":4}"), 0.5},
        {CONFIG(",\"alpha_pattern\":{\"v\":1,\"q\":4}"), 2.0},
        {CONFIG(",\"alpha_pattern\":{\"0\":1,\"l.1.q\":1}"), 3.0},
        {CONFIG(",\"alpha_pattern\":{\"^model.l.0.q\":4}"), 2.0},
        {CONFIG(",\"alpha_pattern\":{\"^q\":4}"), 3.0},
        {CONFIG(",\"alpha_pattern\":{\"model\\\\.l\\\\.0\\\\.q\":4}"), 2.0},
        {CONFIG(",\"alpha_pattern\":{\"l_0_q\":4}"), 3.0},
        {CONFIG(",\"alpha_pattern\":{\"l.0.q\":4}"), 2.0},
        {CONFIG(",\"alpha_pattern\":null,\"rank_pattern\":{\"v\":9}"), 3.0},
        {"{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":6,\"rank_pattern\":{\"l.0.q\":2}}", 3.0},
        {CONFIG(",\"bias\":\"none\",\"use_dora\":false,\"modules_to_save\":null,\"lora_bias\":false,\"layer_"
                "replication\":[],"
                "\"init_lora_weights\":\"gaussian\",\"task_type\":null,\"target_modules\":\"all-linear\""),
         3.0},
    };
    (void)state;
    struct fixture f;
    fixture_open(&f);
    for (int i = 0; i < CHECK_COUNT(cases); ++i) {
        plora_adapters *adapters;
        plora_adapter adapter = PLORA_ADAPTER_INIT;
        write_peft(cases[i].config, GOOD, PLORA_F32, 20);
        CHECK_OK(plora_adapters_load(f.model, file_path("peft"), NULL, &adapters));
        CHECK_OK(plora_adapters_layer(adapters, 0, &adapter));
        CHECK_CLOSE(adapter.scale, cases[i].scale, 1e-15, "%s", cases[i].config);
        CHECK(plora_adapters_layer(adapters, 1, &adapter) == PLORA_ERROR_NOT_FOUND, "layer 1 has no adapter");
        plora_adapters_destroy(adapters);
    }
    fixture_close(&f);
}

static void widened(void **state)
{
    (void)state;
    struct fixture f;
    fixture_open(&f);
    for (int dtype = PLORA_F32; dtype <= PLORA_F16; ++dtype) {
        write_peft(CONFIG(""),
                   dtype == PLORA_F32 ? GOOD
                   : dtype == PLORA_BF16
                       ? "{" KEY("model.l.0.q", "A") TENSOR("BF16", "[2,4]", 0, 16) "," KEY("model.l.0.q", "B")
                             TENSOR("BF16", "[6,2]", 16, 40) "}"
                       : "{" KEY("model.l.0.q", "A") TENSOR("F16", "[2,4]", 0, 16) "," KEY("model.l.0.q", "B")
                             TENSOR("F16", "[6,2]", 16, 40) "}",
                   dtype, 20);
        plora_adapters *adapters;
        plora_adapter adapter = PLORA_ADAPTER_INIT;
        CHECK_OK(plora_adapters_load(f.model, file_path("peft"), NULL, &adapters));
        CHECK_OK(plora_adapters_layer(adapters, 0, &adapter));
        CHECK(adapter.a.rows == 2 && adapter.b.rows == 6, "shapes");
        float *a = device_mirror(adapter.a.data, 8 * sizeof *a), *b = device_mirror(adapter.b.data, 12 * sizeof *b);
        for (int64_t i = 0; i < 8; ++i)
            CHECK(a[i] == 0.5f, "A[%lld] in %s", (long long)i, plora__dtype_name(dtype));
        for (int64_t i = 0; i < 12; ++i)
            CHECK(b[i] == 0.5f, "B[%lld] in %s", (long long)i, plora__dtype_name(dtype));
        device_forget(a);
        device_forget(b);
        plora_adapters_destroy(adapters);
    }
    fixture_close(&f);
}

static void refused(void **state)
{
    static const struct {
        const char *config, *header;
        int count;
        plora_status status;
        const char *message;
    } cases[] = {
        {"", GOOD, 20, PLORA_ERROR_FORMAT, "JSON"},
        {"{}", GOOD, 20, PLORA_ERROR_FORMAT, "peft_type"},
        {"{\"peft_type\":\"LOHA\",\"r\":2,\"lora_alpha\":6}", GOOD, 20, PLORA_ERROR_UNSUPPORTED, "LOHA"},
        {"{\"peft_type\":\"LORA\",\"lora_alpha\":6}", GOOD, 20, PLORA_ERROR_FORMAT, "\"r\""},
        {"{\"peft_type\":\"LORA\",\"r\":0,\"lora_alpha\":6}", GOOD, 20, PLORA_ERROR_FORMAT, "\"r\""},
        {"{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":\"6\"}", GOOD, 20, PLORA_ERROR_FORMAT, "lora_alpha"},
        {CONFIG(",\"r\":2"), GOOD, 20, PLORA_ERROR_FORMAT, "\"r\" occurs twice"},
        {CONFIG(",\"use_rslora\":1"), GOOD, 20, PLORA_ERROR_FORMAT, "use_rslora"},
        {CONFIG(",\"use_dora\":true"), GOOD, 20, PLORA_ERROR_UNSUPPORTED, "\"use_dora\" is true"},
        {CONFIG(",\"lora_bias\":true"), GOOD, 20, PLORA_ERROR_UNSUPPORTED, "lora_bias"},
        {CONFIG(",\"modules_to_save\":[\"lm_head\"]"), GOOD, 20, PLORA_ERROR_UNSUPPORTED, "modules_to_save"},
        {CONFIG(",\"bias\":\"all\""), GOOD, 20, PLORA_ERROR_UNSUPPORTED, "\"bias\" is all"},
        {CONFIG(",\"init_lora_weights\":\"pissa\""), GOOD, 20, PLORA_ERROR_UNSUPPORTED, "pissa"},
        {CONFIG(",\"new_thing\":3"), GOOD, 20, PLORA_ERROR_UNSUPPORTED, "new_thing"},
        {CONFIG(",\"alpha_pattern\":{\"q.*\":4}"), GOOD, 20, PLORA_ERROR_UNSUPPORTED, "q.*"},
        {CONFIG(",\"alpha_pattern\":{\"q|v\":4}"), GOOD, 20, PLORA_ERROR_UNSUPPORTED, "regular expression"},
        {CONFIG(",\"alpha_pattern\":{\"q\":\"4\"}"), GOOD, 20, PLORA_ERROR_FORMAT, "finite number"},
        {CONFIG(",\"rank_pattern\":{\"q\":1.5}"), GOOD, 20, PLORA_ERROR_FORMAT, "positive integer"},
        {CONFIG(",\"rank_pattern\":[]"), GOOD, 20, PLORA_ERROR_FORMAT, "rank_pattern"},
        {CONFIG(",\"rank_pattern\":{\"l.0.q\":3}"), GOOD, 20, PLORA_ERROR_SHAPE, "rank 3"},
        {CONFIG(""), "{}", 0, PLORA_ERROR_FORMAT, "no tensors"},
        {CONFIG(""), "{" KEY("model.l.0.q", "A") TENSOR("F32", "[2,4]", 0, 32) "}", 8, PLORA_ERROR_FORMAT,
         "without its partner, lora_B of layer 'model.l.0.q'"},
        {CONFIG(""), "{" KEY("model.l.7.q", "A") TENSOR("F32", "[2,4]", 0, 32) "}", 8, PLORA_ERROR_NOT_FOUND,
         "model.l.7.q"},
        {CONFIG(""), "{" KEY("model.l.0.q", "C") TENSOR("F32", "[2,4]", 0, 32) "}", 8, PLORA_ERROR_UNSUPPORTED,
         "lora_C"},
        {CONFIG(""), "{\"model.l.0.q.lora_A.weight\":" TENSOR("F32", "[2,4]", 0, 32) "}", 8, PLORA_ERROR_UNSUPPORTED,
         "'model.l.0.q.lora_A.weight'"},
        {CONFIG(""), "{\"base_model.model.model.l.0.q.lora_magnitude_vector\":" TENSOR("F32", "[6]", 0, 24) "}", 6,
         PLORA_ERROR_UNSUPPORTED, "lora_magnitude_vector"},
        {CONFIG(""), "{" KEY("model.l.0.q", "A") TENSOR("F32", "[8]", 0, 32) "}", 8, PLORA_ERROR_SHAPE, "1 dimensions"},
        {CONFIG(""), "{" KEY("model.l.0.q", "A") TENSOR("I32", "[2,4]", 0, 32) "}", 8, PLORA_ERROR_UNSUPPORTED, "I32"},
        {CONFIG(""),
         "{" KEY("model.l.0.q", "A") TENSOR("F32", "[2,4]", 0, 32) "," KEY("model.l.0.q", "B")
             TENSOR("F32", "[2,6]", 32, 80) "}",
         20, PLORA_ERROR_SHAPE, "lora_B is [2,6]"},
    };
    (void)state;
    struct fixture f;
    fixture_open(&f);
    plora_adapters *adapters;
    for (int i = 0; i < CHECK_COUNT(cases); ++i) {
        write_peft(cases[i].config, cases[i].header, PLORA_F32, cases[i].count);
        CHECK_FAILS(plora_adapters_load(f.model, file_path("peft"), NULL, &adapters), cases[i].status, cases[i].message,
                    "/peft/adapter_");
    }
    for (int bad = 0; bad < 2; ++bad) {
        float data[20] = {0};
        data[13] = bad ? NAN : INFINITY;
        write_peft(CONFIG(""), GOOD, PLORA_F32, 20);
        file_write_safetensors(file_path("peft/adapter_model.safetensors"), GOOD, data, sizeof data);
        CHECK_FAILS(plora_adapters_load(f.model, file_path("peft"), NULL, &adapters), PLORA_ERROR_FORMAT, "lora_B",
                    bad ? "nan" : "inf");
    }
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.dropout = 1.0;
    CHECK_FAILS(plora_adapters_load(f.model, file_path("peft"), &options, &adapters), PLORA_ERROR_INVALID_ARGUMENT,
                "dropout");
    CHECK_FAILS(plora_adapters_load(f.model, file_path("none"), NULL, &adapters), PLORA_ERROR_IO,
                "adapter_config.json");
    CHECK_FAILS(plora_adapters_load(NULL, "x", NULL, &adapters), PLORA_ERROR_INVALID_ARGUMENT, "model");
    fixture_close(&f);
}

static void out_of_memory(void **state)
{
    (void)state;
    struct fixture f;
    fixture_open(&f);
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = 2;
    plora_adapters *adapters;
    CHECK_OK(plora_adapters_create(f.model, &options, &adapters));
    randomise(&f, adapters);
    const int64_t base = f.allocator.live;
    int done = 0;
    for (int64_t k = 1; !done; ++k) {
        plora_adapters *loaded = NULL;
        f.allocator.fail_at = f.allocator.calls + k;
        const int64_t failed = f.allocator.failed;
        plora_status status = plora_adapters_save(adapters, file_path("peft"));
        if (status == PLORA_OK) status = plora_adapters_load(f.model, file_path("peft"), NULL, &loaded);
        done = f.allocator.failed == failed;
        CHECK(status == (done ? PLORA_OK : PLORA_ERROR_OUT_OF_MEMORY), "allocation %lld: status %d", (long long)k,
              status);
        if (done) check_same(adapters, loaded);
        plora_adapters_destroy(loaded);
        CHECK(f.allocator.live == base, "allocation %lld: %lld blocks left", (long long)k,
              (long long)(f.allocator.live - base));
        CHECK(done ? k > 10 : k < 200, "%lld allocations", (long long)k);
    }
    f.allocator.fail_at = 0;
    plora_adapters_destroy(adapters);
    fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(round_trips), cmocka_unit_test(partial_targets), cmocka_unit_test(scales),
        cmocka_unit_test(widened),     cmocka_unit_test(refused),         cmocka_unit_test(out_of_memory),
    };
    check_begin("test_peft");
    return cmocka_run_group_tests(tests, file_setup, file_teardown);
}
