/* test_model_files.c: opening files and Hugging Face directories, which tensors become layers, and saving them again. */
#include "file_fixture.h"

#define ENTRY(name, dtype, shape, begin, end)                                                                          \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]}"

/* Padded to a multiple of 8 as the writer does, so that a save is byte for byte the same. */
static void pad(char *header)
{
    while (strlen(header) % 8 != 0)
        strcat(header, " ");
}

static char *whole_model(void)
{
    static const char *const entries[] = {
        "\"__metadata__\":{\"format\":\"pt\",\"a\":\"b\"}",
        ENTRY("model.embed_tokens.weight", "F32", "[5,4]", 0, 80),
        ENTRY("l.0.q.weight", "BF16", "[2,4]", 80, 96),
        ENTRY("l.0.q.bias", "F32", "[2]", 96, 104),
        ENTRY("l.0.k.weight", "F16", "[3,4]", 104, 128),
        ENTRY("l.0.k.bias", "F32", "[2]", 128, 136),
        ENTRY("norm.weight", "F32", "[4]", 136, 152),
        ENTRY("conv.weight", "F32", "[2,1,3]", 152, 176),
        ENTRY("ids.weight", "I64", "[1,2]", 176, 192),
        ENTRY("none.weight", "F32", "[0,4]", 192, 192),
        ENTRY("lm_head.weight", "F32", "[1,4]", 192, 208),
        ENTRY(".weight", "F32", "[1,1]", 208, 212),
        ENTRY("scalar", "F32", "[]", 212, 216),
    };
    static char header[2048];
    header[0] = '\0';
    for (int i = 0; i < CHECK_COUNT(entries); ++i) {
        strcat(header, i == 0 ? "{" : ",");
        strcat(header, entries[i]);
    }
    strcat(header, "}");
    pad(header);
    return header;
}

enum { WHOLE_BYTES = 216 };

static void check_same_bytes(const char *a, const char *b)
{
    size_t a_count, b_count;
    unsigned char *a_bytes = file_read(a, &a_count), *b_bytes = file_read(b, &b_count);
    CHECK(a_count == b_count && memcmp(a_bytes, b_bytes, a_count) == 0, "%s and %s differ", a, b);
    free(a_bytes);
    free(b_bytes);
}

static void layers_and_tensors(void **state)
{
    (void)state;
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    plora_context *context = check_context(&allocator, 1, 0);
    plora_model *model;
    file_write_safetensors(file_path("m"), whole_model(), NULL, WHOLE_BYTES);
    CHECK_OK(plora_model_open(context, file_path("m"), &model));
    static const struct {
        const char *name;
        int64_t rows, columns;
        int32_t dtype, flags, bias;
    } want[] = {
        {"model.embed_tokens", 5, 4, PLORA_F32, PLORA_LAYER_HEAD, 0},
        {"l.0.q", 2, 4, PLORA_BF16, 0, 1},
        {"l.0.k", 3, 4, PLORA_F16, 0, 0}, /* its bias has 2 elements */
        {"lm_head", 1, 4, PLORA_F32, PLORA_LAYER_HEAD, 0},
    };
    CHECK(plora_model_layer_count(model) == CHECK_COUNT(want), "%d layers", plora_model_layer_count(model));
    for (int32_t i = 0; i < CHECK_COUNT(want); ++i) {
        plora_linear linear = PLORA_LINEAR_INIT;
        CHECK_OK(plora_model_layer(model, i, &linear));
        CHECK(strcmp(linear.name, want[i].name) == 0, "layer %d is %s", i, linear.name);
        CHECK(linear.weight.rows == want[i].rows && linear.weight.columns == want[i].columns &&
                  linear.weight.stride == want[i].columns && linear.weight.dtype == want[i].dtype,
              "the weight of %s", linear.name);
        CHECK(linear.flags == want[i].flags && (linear.bias != NULL) == want[i].bias, "flags or bias of %s",
              linear.name);
    }
    plora_matrix t;
    CHECK_OK(plora_model_find_tensor(model, "norm.weight", &t));
    unsigned char *norm = device_mirror(t.data, 16);
    CHECK(t.rows == 1 && t.columns == 4 && norm[0] == 137 && norm[15] == 152, "norm.weight");
    device_forget(norm);
    CHECK_OK(plora_model_find_tensor(model, "conv.weight", &t));
    CHECK(t.rows == 2 && t.columns == 3, "conv.weight is [%lld,%lld]", (long long)t.rows, (long long)t.columns);
    CHECK_OK(plora_model_find_tensor(model, "scalar", &t));
    CHECK(t.rows == 1 && t.columns == 1, "scalar");
    CHECK_OK(plora_model_find_tensor(model, "none.weight", &t));
    CHECK(t.rows == 0 && t.columns == 4, "none.weight");
    CHECK_FAILS(plora_model_find_tensor(model, "ids.weight", &t), PLORA_ERROR_UNSUPPORTED, "ids.weight", "I64");
    CHECK_FAILS(plora_model_find_tensor(model, "norm", &t), PLORA_ERROR_NOT_FOUND, "'norm'");
    CHECK_FAILS(plora_model_find_tensor(NULL, "norm", &t), PLORA_ERROR_INVALID_ARGUMENT, "model");
    CHECK_FAILS(plora_model_find_tensor(model, NULL, &t), PLORA_ERROR_INVALID_ARGUMENT, "name");
    CHECK_FAILS(plora_model_find_tensor(model, "norm", NULL), PLORA_ERROR_INVALID_ARGUMENT, "tensor");
    plora_model_destroy(model);
    plora_context_destroy(context);
    check_allocator_empty(&allocator, "layers");
}

/* Unchanged: the same bytes. Changed: the original file stays as it is, and the very file that is mapped can be saved to. */
static void save_opened(void **state)
{
    (void)state;
    plora_context *context = check_context(NULL, 1, 0);
    plora_model *model;
    file_write_safetensors(file_path("a"), whole_model(), NULL, WHOLE_BYTES);
    file_write_safetensors(file_path("b"), whole_model(), NULL, WHOLE_BYTES);
    CHECK_OK(plora_model_open(context, file_path("a"), &model));
    CHECK_OK(plora_model_save(model, file_path("c")));
    check_same_bytes(file_path("a"), file_path("c"));
    plora_linear linear = PLORA_LINEAR_INIT;
    CHECK_OK(plora_model_layer(model, 0, &linear));
    float *weight = device_mirror(linear.weight.data, 20 * sizeof *weight);
    weight[7] = 42.0f;
    check_same_bytes(file_path("a"), file_path("b"));
    CHECK_OK(DEVICE(plora_model_save(model, file_path("a"))));
    weight[8] = 43.0f;
    CHECK_OK(DEVICE(plora_model_save(model, file_path("a"))));
    device_forget(weight);
    plora_model_destroy(model);
    plora_matrix t;
    CHECK_OK(plora_model_open(context, file_path("a"), &model));
    CHECK_OK(plora_model_find_tensor(model, "model.embed_tokens.weight", &t));
    weight = device_mirror(t.data, 20 * sizeof *weight);
    CHECK(weight[7] == 42.0f && weight[8] == 43.0f, "the changes were not saved");
    device_forget(weight);
    CHECK_FAILS(plora_model_save(model, file_path("no/x")), PLORA_ERROR_IO, "No such file");
    CHECK_FAILS(plora_model_save(model, NULL), PLORA_ERROR_INVALID_ARGUMENT, "path");
    CHECK_FAILS(plora_model_save(NULL, "x"), PLORA_ERROR_INVALID_ARGUMENT, "model");
    plora_model_destroy(model);
    plora_context_destroy(context);
}

static void write_shards(const char *map)
{
    char text[1024];
    mkdir(file_path("hf"), 0700);
    snprintf(text, sizeof text, "{\"metadata\":{\"total_size\":1},\"weight_map\":{%s}}", map);
    file_write_text(file_path("hf/model.safetensors.index.json"), text);
    file_write_safetensors(
        file_path("hf/s2"),
        "{\"__metadata__\":{\"format\":\"pt\",\"z\":\"2\"}," ENTRY("b.weight", "F32", "[1,2]", 0, 8) "}", NULL, 8);
    file_write_safetensors(file_path("hf/s1"),
                           "{\"__metadata__\":{\"format\":\"pt\"}," ENTRY("a.weight", "F32", "[1,1]", 0, 4) "," ENTRY(
                               "b.bias", "F32", "[1]", 4, 8) "}",
                           NULL, 8);
}

static void shards(void **state)
{
    (void)state;
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    plora_context *context = check_context(&allocator, 1, 0);
    plora_model *model;
    mkdir(file_path("hf"), 0700);
    CHECK_FAILS(plora_model_open(context, file_path("hf"), &model), PLORA_ERROR_IO, "neither model.safetensors nor");
    write_shards("\"b.weight\":\"s2\",\"a.weight\":\"s1\"");
    CHECK_OK(plora_model_open(context, file_path("hf"), &model));
    plora_linear linear = PLORA_LINEAR_INIT;
    CHECK(plora_model_layer_count(model) == 2, "%d layers", plora_model_layer_count(model));
    CHECK_OK(plora_model_layer(model, 1, &linear));
    CHECK(strcmp(linear.name, "b") == 0 && linear.bias != NULL, "the bias is in another shard");
    CHECK_OK(plora_model_save(model, file_path("joined")));
    plora_model_destroy(model);
    size_t count;
    unsigned char *bytes = file_read(file_path("joined"), &count);
    static const char want[] =
        "{\"__metadata__\":{\"format\":\"pt\",\"z\":\"2\"}," ENTRY("a.weight", "F32", "[1,1]", 0, 4) "," ENTRY(
            "b.bias", "F32", "[1]", 4, 8) "," ENTRY("b.weight", "F32", "[1,2]", 8, 16) "}";
    CHECK(memcmp(bytes + 8, want, strlen(want)) == 0, "%s", (char *)bytes + 8);
    free(bytes);

    static const struct {
        const char *map;
        plora_status status;
        const char *message;
    } bad[] = {
        {"", PLORA_ERROR_FORMAT, "is empty"},
        {"\"a.weight\":1", PLORA_ERROR_FORMAT, "its shard at byte"},
        {"\"a.weight\":\"../hf/s1\"", PLORA_ERROR_FORMAT, "plain file name"},
        {"\"a.weight\":\"..\"", PLORA_ERROR_FORMAT, "plain file name"},
        {"\"a.weight\":\"\"", PLORA_ERROR_FORMAT, "plain file name"},
        {"\"a.weight\":\"s2\"", PLORA_ERROR_FORMAT, "'a.weight' is not in its shard 's2'"},
        {"\"a.weight\":\"s3\"", PLORA_ERROR_IO, "s3"},
    };
    for (int i = 0; i < CHECK_COUNT(bad); ++i) {
        write_shards(bad[i].map);
        CHECK_FAILS(plora_model_open(context, file_path("hf"), &model), bad[i].status, bad[i].message, "index.json");
    }
    write_shards("\"b.weight\":\"s2\",\"a.weight\":\"s1\"");
    file_write_safetensors(file_path("hf/s2"), "{" ENTRY("a.weight", "F32", "[1,2]", 0, 8) "}", NULL, 8);
    CHECK_FAILS(plora_model_open(context, file_path("hf"), &model), PLORA_ERROR_FORMAT, "'a.weight'", "another shard");
    file_write_text(file_path("hf/model.safetensors.index.json"), "{\"weight_map\":[]}");
    CHECK_FAILS(plora_model_open(context, file_path("hf"), &model), PLORA_ERROR_FORMAT, "weight_map");
    file_write_text(file_path("hf/model.safetensors.index.json"), "");
    CHECK_FAILS(plora_model_open(context, file_path("hf"), &model), PLORA_ERROR_FORMAT, "JSON");
    file_write_safetensors(file_path("hf/model.safetensors"), "{" ENTRY("c.weight", "F32", "[1,2]", 0, 8) "}", NULL, 8);
    CHECK_OK(plora_model_open(context, file_path("hf"), &model)); /* the single file comes first */
    CHECK(plora_model_layer_count(model) == 1, "%d layers", plora_model_layer_count(model));
    plora_model_destroy(model);
    CHECK_FAILS(plora_model_open(context, file_path("absent"), &model), PLORA_ERROR_IO, "absent");
    CHECK_FAILS(plora_model_open(context, NULL, &model), PLORA_ERROR_INVALID_ARGUMENT, "path");
    plora_memory_statistics statistics = PLORA_MEMORY_STATISTICS_INIT;
    CHECK_OK(plora_memory_stats(context, &statistics));
    CHECK(statistics.mapped_bytes == 0, "%zu bytes are still mapped", statistics.mapped_bytes);
    plora_context_destroy(context);
    check_allocator_empty(&allocator, "shards");
}

static void save_built(void **state)
{
    (void)state;
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    plora_context *context = check_context(&allocator, 1, 0);
    for (int32_t dtype = PLORA_F32; dtype <= PLORA_F16; ++dtype) {
        plora_model *model;
        CHECK_OK(plora_model_create(context, &model));
        struct check_matrix w = check_matrix_new(3, 5, 7, dtype);
        check_matrix_random(&w, 1.0);
        uint16_t bias[3] = {0x3f80, 0x4000, 0x4040};
        device_twin(bias, sizeof bias);
        CHECK_OK(check_add_linear(model, "x.y", &w.m, bias, PLORA_BF16, 0, NULL));
        CHECK_OK(check_add_linear(model, "tied", &w.m, NULL, 0, 0, NULL));
        CHECK_OK(DEVICE(plora_model_save(model, file_path("built"))));
        plora_model_destroy(model);

        CHECK_OK(plora_model_open(context, file_path("built"), &model));
        CHECK(plora_model_layer_count(model) == 2, "%d layers", plora_model_layer_count(model));
        for (int32_t layer = 0; layer < 2; ++layer) {
            plora_linear linear = PLORA_LINEAR_INIT;
            CHECK_OK(plora_model_layer(model, layer, &linear));
            CHECK(linear.weight.dtype == dtype && linear.weight.rows == 3 && linear.weight.columns == 5, "layer %d",
                  layer);
            plora_matrix weight = linear.weight;
            weight.data = device_mirror(weight.data, 15 * plora__dtype_size(dtype));
            for (int64_t i = 0; i < 3; ++i)
                for (int64_t j = 0; j < 5; ++j)
                    CHECK(check_element(&weight, i, j) == check_element(&w.m, i, j), "layer %d (%d,%d)", layer, (int)i,
                          (int)j);
            device_forget(weight.data);
            CHECK((linear.bias != NULL) == (layer == 0), "bias of layer %d", layer);
            if (layer > 0) continue;
            void *saved = device_mirror(device_of(linear.bias), sizeof bias);
            CHECK(memcmp(saved, bias, sizeof bias) == 0, "values of the bias");
            device_forget(saved);
        }
        plora_model_destroy(model);
        check_matrix_free(&w);
        device_forget(bias);
    }
    plora_model *empty;
    CHECK_OK(plora_model_create(context, &empty));
    CHECK_OK(plora_model_save(empty, file_path("built")));
    plora_model_destroy(empty);
    plora_context_destroy(context);
    check_allocator_empty(&allocator, "a built model");
}

static void out_of_memory(void **state)
{
    (void)state;
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    plora_context *context = check_context(&allocator, 1, 0);
    const int64_t base = allocator.live;
    unlink(file_path("hf/model.safetensors"));
    write_shards("\"b.weight\":\"s2\",\"a.weight\":\"s1\"");
    /* A header of odd length: tensors are copied to aligned memory. */
    file_write_safetensors(file_path("hf/s2"), "{" ENTRY("b.weight", "F32", "[1,2]", 0, 8) "} ", NULL, 8);
    int done = 0;
    for (int64_t k = 1; !done; ++k) {
        plora_model *model = NULL;
        allocator.fail_at = allocator.calls + k;
        const int64_t failed = allocator.failed;
        plora_status status = plora_model_open(context, file_path("hf"), &model);
        if (status == PLORA_OK) {
            status = plora_model_save(model, file_path("kept"));
            if (status != PLORA_OK) CHECK_OK(plora_model_save(model, file_path("kept"))); /* usable after the failure */
            plora_model_destroy(model);
        }
        done = allocator.failed == failed;
        CHECK(status == (done ? PLORA_OK : PLORA_ERROR_OUT_OF_MEMORY), "allocation %lld: status %d", (long long)k,
              status);
        CHECK(allocator.live == base, "allocation %lld: %lld blocks left", (long long)k,
              (long long)(allocator.live - base));
        CHECK(done ? k > 10 : k < 200, "%lld allocations", (long long)k);
    }
    allocator.fail_at = 0;
    plora_context_destroy(context);
    check_allocator_empty(&allocator, "out of memory");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layers_and_tensors), cmocka_unit_test(save_opened),   cmocka_unit_test(shards),
        cmocka_unit_test(save_built),         cmocka_unit_test(out_of_memory),
    };
    check_begin("test_model_files");
    return cmocka_run_group_tests(tests, file_setup, file_teardown);
}
