/* test_model.c: host-built models and the adapters on them: layers, ties, overlaps, target patterns, overrides, arena layout,
 * workspaces, life times, and every allocation made to fail once. Files are not here. */
#include "check.h"

static struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
static plora_context *context;

/* A block of a LLaMA-like model: names, shapes [N,K], flags. */
static const struct {
    const char *name;
    int64_t rows, columns;
    int32_t dtype, flags;
} layers[] = {
    {"model.embed_tokens", 40, 12, PLORA_BF16, PLORA_LAYER_HEAD},
    {"model.layers.0.self_attn.q_proj", 12, 12, PLORA_F32, 0},
    {"model.layers.0.self_attn.k_proj", 5, 12, PLORA_F16, 0},
    {"model.layers.0.mlp.down_proj", 12, 31, PLORA_BF16, PLORA_LAYER_FAN_IN_FAN_OUT},
    {"model.layers.1.self_attn.q_proj", 12, 12, PLORA_F32, 0},
    {"model.layers.1.mlp.q_proj_like", 7, 12, PLORA_F32, 0},
    {"lm_head", 40, 12, PLORA_BF16, PLORA_LAYER_HEAD}, /* tied to the first */
};
enum { LAYERS = sizeof layers / sizeof layers[0], EMBEDDING = 0, HEAD = LAYERS - 1 };

static struct check_matrix weights[LAYERS];

static int setup(void **state)
{
    (void)state;
    check_reseed(99);
    allocator = (struct check_allocator)CHECK_ALLOCATOR_INIT;
    if (check_context_create(&allocator, NULL, 2, 0, &context) != PLORA_OK) return -1;
    for (int i = 0; i < LAYERS; ++i) {
        weights[i] = check_matrix_new(layers[i].rows, layers[i].columns, layers[i].columns + i % 3, layers[i].dtype);
        check_matrix_random(&weights[i], 1.0);
        check_matrix_snapshot(&weights[i]);
    }
    return 0;
}

/* Whatever a test did, all memory is back and no weight was written. */
static int teardown(void **state)
{
    (void)state;
    plora_context_destroy(context);
    device_download(PLORA_OK);
    int failed = allocator.live != 0 || allocator.live_bytes != 0 || allocator.errors != 0;
    if (failed)
        print_error("%lld allocations of %lld bytes left, %lld bad frees\n", (long long)allocator.live,
                    (long long)allocator.live_bytes, (long long)allocator.errors);
    for (int i = 0; i < LAYERS; ++i) {
        failed |= memcmp(weights[i].memory, weights[i].snapshot, weights[i].bytes) != 0;
        check_matrix_free(&weights[i]);
    }
    return failed;
}

static plora_status build(plora_model **model)
{
    plora_model *created = NULL;
    plora_status status = plora_model_create(context, &created);
    for (int i = 0; i < LAYERS && status == PLORA_OK; ++i)
        status = check_add_linear(created, layers[i].name, &weights[i == HEAD ? EMBEDDING : i].m, NULL, 0,
                                  layers[i].flags, NULL);
    if (status == PLORA_OK)
        *model = created;
    else
        plora_model_destroy(created);
    return status;
}

static plora_model *built(void)
{
    plora_model *model = NULL;
    CHECK_OK(build(&model));
    return model;
}

/* -------------------------------------------------------------------------------------------------------------- layers */

static void layers_are_found(void **state)
{
    (void)state;
    plora_model *model = built();
    assert_int_equal(plora_model_layer_count(model), LAYERS);
    assert_int_equal(plora_model_layer_count(NULL), 0);
    for (int32_t i = 0; i < LAYERS; ++i) {
        int32_t found = -1;
        CHECK_OK(plora_model_find_layer(model, layers[i].name, &found));
        assert_int_equal(found, i);
        plora_linear linear = PLORA_LINEAR_INIT;
        CHECK_OK(plora_model_layer(model, i, &linear));
        assert_string_equal(linear.name, layers[i].name);
        assert_ptr_not_equal(linear.name, layers[i].name); /* copied */
        assert_int_equal(linear.flags, layers[i].flags);
        assert_int_equal(linear.weight.rows, layers[i].rows);
        assert_int_equal(linear.weight.dtype, layers[i].dtype);
        assert_ptr_equal(linear.weight.data, device_of(weights[i == HEAD ? EMBEDDING : i].m.data));
        assert_int_equal(linear.struct_size, sizeof linear);
    }
    int32_t layer = 77;
    plora_linear linear = PLORA_LINEAR_INIT;
    CHECK_FAILS(plora_model_find_layer(model, "q_proj", &layer), PLORA_ERROR_NOT_FOUND, "'q_proj'");
    CHECK_FAILS(plora_model_find_layer(model, NULL, &layer), PLORA_ERROR_INVALID_ARGUMENT, "name is NULL");
    CHECK_FAILS(plora_model_find_layer(NULL, "a", &layer), PLORA_ERROR_INVALID_ARGUMENT, "model is NULL");
    assert_int_equal(layer, 77);
    CHECK_FAILS(plora_model_layer(model, LAYERS, &linear), PLORA_ERROR_INVALID_ARGUMENT, "7", "0 .. 6");
    CHECK_FAILS(plora_model_layer(model, -1, &linear), PLORA_ERROR_INVALID_ARGUMENT, "-1");
    CHECK_FAILS(plora_model_layer(model, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "NULL");
    CHECK_FAILS(plora_model_layer(NULL, 0, &linear), PLORA_ERROR_INVALID_ARGUMENT, "NULL");
    plora_model_destroy(model);
    plora_model_destroy(NULL);
    CHECK_FAILS(plora_model_create(NULL, &model), PLORA_ERROR_INVALID_ARGUMENT, "context is NULL");
    CHECK_FAILS(plora_model_create(context, NULL), PLORA_ERROR_INVALID_ARGUMENT, "model is NULL");
}

static void bad_layers_are_refused(void **state)
{
    (void)state;
    plora_model *model = built();
    struct check_matrix matrix = check_matrix_new(4, 6, 8, PLORA_F32);
    int32_t layer = 77;
    plora_matrix w = matrix.m;
    CHECK_FAILS(check_add_linear(NULL, "new", &w, NULL, 0, 0, &layer), PLORA_ERROR_INVALID_ARGUMENT, "model is NULL");
    CHECK_FAILS(plora_model_add_linear(model, NULL, &layer), PLORA_ERROR_INVALID_ARGUMENT, "linear is NULL");
    CHECK_FAILS(check_add_linear(model, NULL, &w, NULL, 0, 0, &layer), PLORA_ERROR_INVALID_ARGUMENT, "name");
    CHECK_FAILS(check_add_linear(model, "", &w, NULL, 0, 0, &layer), PLORA_ERROR_INVALID_ARGUMENT, "name");
    CHECK_FAILS(check_add_linear(model, "lm_head", &w, NULL, 0, 0, &layer), PLORA_ERROR_INVALID_ARGUMENT, "'lm_head'",
                "6");
    CHECK_FAILS(check_add_linear(model, "new", &w, NULL, 0, 8, &layer), PLORA_ERROR_INVALID_ARGUMENT, "'new'", "0x8");
    CHECK_FAILS(check_add_linear(model, "new", &w, matrix.m.data, 9, 0, &layer), PLORA_ERROR_INVALID_ARGUMENT, "bias",
                "9");
    static const int32_t dtypes[] = {-1, 3, 99};
    for (int i = 0; i < CHECK_COUNT(dtypes); ++i) {
        w = matrix.m;
        w.dtype = dtypes[i];
        CHECK_FAILS(check_add_linear(model, "new", &w, NULL, 0, 0, &layer), PLORA_ERROR_INVALID_ARGUMENT, "'new'",
                    "dtype");
    }
    static const int64_t bad[][3] = {
        {0, 6, 8}, {4, 0, 8}, {-1, 6, 8}, {4, 6, 5}, {4, 6, -8}, {INT64_MAX / 4, 6, 8}, {2, 6, INT64_MAX}};
    for (int i = 0; i < CHECK_COUNT(bad); ++i) {
        char rows[32];
        snprintf(rows, sizeof rows, "%lld", (long long)bad[i][0]);
        w = (plora_matrix){matrix.m.data, bad[i][0], bad[i][1], bad[i][2], PLORA_F32, 0};
        CHECK_FAILS(check_add_linear(model, "new", &w, NULL, 0, 0, &layer), PLORA_ERROR_SHAPE, "'new'", rows);
    }
    w = matrix.m;
    w.data = NULL;
    CHECK_FAILS(check_add_linear(model, "new", &w, NULL, 0, 0, &layer), PLORA_ERROR_INVALID_ARGUMENT, "'new'", "NULL");
    w.data = (char *)matrix.m.data + 1;
    CHECK_FAILS(check_add_linear(model, "new", &w, NULL, 0, 0, &layer), PLORA_ERROR_INVALID_ARGUMENT, "'new'",
                "aligned");
    assert_int_equal(layer, 77);
    assert_int_equal(plora_model_layer_count(model), LAYERS);
    CHECK_OK(check_add_linear(model, "new", &matrix.m, NULL, 0, 0, &layer));
    assert_int_equal(layer, LAYERS);
    plora_model_destroy(model);
    check_matrix_free(&matrix);
}

static void overlapping_weights(void **state)
{
    (void)state;
    plora_model *model = NULL;
    CHECK_OK(plora_model_create(context, &model));
    struct check_matrix matrix = check_matrix_new(6, 8, 8, PLORA_F32);
    float *data = matrix.m.data;
    const plora_matrix whole = {data, 3, 4, 8, PLORA_F32, 0};
    CHECK_OK(check_add_linear(model, "left", &whole, NULL, 0, 0, NULL));
    const struct {
        plora_matrix m;
        int allowed;
    } cases[] = {
        {{data + 4, 3, 4, 8, PLORA_F32, 0}, 1},  /* the columns to the right: a slice of one fused matrix */
        {{data + 24, 3, 8, 8, PLORA_F32, 0}, 1}, /* the rows below */
        {{data + 3, 3, 4, 8, PLORA_F32, 0}, 0},  /* one column in common */
        {{data + 16, 3, 4, 8, PLORA_F32, 0}, 0}, /* one row in common */
        {{data, 3, 3, 8, PLORA_F32, 0}, 0},      /* a part of it */
        {{data, 3, 4, 7, PLORA_F32, 0}, 0},      /* another stride */
        {{data, 3, 4, 8, PLORA_BF16, 0}, 0},     /* another dtype */
        {{data + 19, 1, 1, 1, PLORA_F32, 0}, 0}, /* its last element */
        {{data + 20, 1, 4, 4, PLORA_F32, 0}, 0}, /* the right slice again, in part */
    };
    for (int i = 0; i < CHECK_COUNT(cases); ++i) {
        char name[16];
        snprintf(name, sizeof name, "case%d", i);
        if (cases[i].allowed)
            CHECK_OK(check_add_linear(model, name, &cases[i].m, NULL, 0, 0, NULL));
        else
            CHECK_FAILS(check_add_linear(model, name, &cases[i].m, NULL, 0, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                        name, "overlap");
    }
    CHECK_OK(check_add_linear(model, "tied", &whole, NULL, 0, 0, NULL));
    CHECK_FAILS(check_add_linear(model, "turned", &whole, NULL, 0, PLORA_LAYER_FAN_IN_FAN_OUT, NULL),
                PLORA_ERROR_INVALID_ARGUMENT, "turned");
    plora_model_destroy(model);
    check_matrix_free(&matrix);
}

/* ------------------------------------------------------------------------------------------------------------- targets */

static plora_adapters *create(plora_model *model, const char *targets, const char *exclude)
{
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = 2;
    options.targets = targets;
    options.exclude = exclude;
    plora_adapters *adapters = NULL;
    CHECK_OK(plora_adapters_create(model, &options, &adapters));
    return adapters;
}

static void target_patterns(void **state)
{
    (void)state;
    static const struct {
        const char *targets, *exclude, *want; /* want: one digit a layer */
    } cases[] = {
        {NULL, NULL, "0111110"},
        {"all-linear", NULL, "0111110"},
        {"all-linear", "k_proj", "0101110"},
        {"q_proj", NULL, "0100100"},
        {"self_attn.q_proj,down_proj", NULL, "0101100"},
        {"q_proj, k_proj", "model.layers.1.*", "0110000"},
        {"*proj*", NULL, "0111110"},
        {"model.layers.?.self_attn.[qk]_proj", NULL, "0110100"},
        {"model.layers.0.mlp.down_proj", NULL, "0001000"},
        {"lm_head", NULL, "1000001"}, /* tied: the same adapter through both names */
        {"embed_tokens", NULL, "1000001"},
        {"all-linear,lm_head", NULL, "1111111"},
        {"q_proj", "self_attn.q_proj", "0000000"},
    };
    plora_model *model = built();
    for (int i = 0; i < CHECK_COUNT(cases); ++i) {
        plora_adapters *adapters = create(model, cases[i].targets, cases[i].exclude);
        char got[LAYERS + 1] = {0};
        for (int32_t layer = 0; layer < LAYERS; ++layer) {
            plora_adapter adapter = PLORA_ADAPTER_INIT;
            const plora_status status = plora_adapters_layer(adapters, layer, &adapter);
            CHECK(status == PLORA_OK || status == PLORA_ERROR_NOT_FOUND, "layer %d: %s", layer,
                  plora_status_string(status));
            got[layer] = status == PLORA_OK ? '1' : '0';
        }
        CHECK(strcmp(got, cases[i].want) == 0, "targets '%s', exclude '%s': %s, want %s",
              cases[i].targets == NULL ? "(NULL)" : cases[i].targets, cases[i].exclude == NULL ? "" : cases[i].exclude,
              got, cases[i].want);
        plora_adapters_destroy(adapters);
    }
    static const char *const missing[] = {"proj",  "v_proj", "q_proj,o_proj", "elf_attn.q_proj", "model.layers.7.*",
                                          "Q_PROJ"};
    for (int i = 0; i < CHECK_COUNT(missing); ++i) {
        plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
        options.rank = 2;
        options.targets = missing[i];
        plora_adapters *adapters = NULL;
        const char *name = strrchr(missing[i], ',') == NULL ? missing[i] : strrchr(missing[i], ',') + 1;
        CHECK_FAILS(plora_adapters_create(model, &options, &adapters), PLORA_ERROR_NOT_FOUND, name);
        options.targets = NULL;
        options.exclude = missing[i];
        CHECK_FAILS(plora_adapters_create(model, &options, &adapters), PLORA_ERROR_NOT_FOUND, name);
        assert_null(adapters);
    }
    plora_model_destroy(model);
}

static void overrides(void **state)
{
    (void)state;
    plora_model *model = built();
    const plora_adapters_override list[] = {
        {"model.layers.0.*", 0.0, 4, 0}, {"q_proj", 10.0, 3, 0}, {"down_proj", 99.0, 1, 0}, {"q_proj_like", 6.0, 0, 0}};
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = 2;
    options.alpha = 8.0;
    options.overrides = list;
    options.override_count = CHECK_COUNT(list);
    static const struct {
        int32_t layer, rank;
        double alpha;
    } want[] = {{1, 4, 8.0}, {2, 4, 8.0}, {3, 4, 8.0}, {4, 3, 10.0}, {5, 2, 6.0}}; /* the first match counts */
    for (int rslora = 0; rslora < 2; ++rslora) {
        options.rslora = rslora;
        plora_adapters *adapters = NULL;
        CHECK_OK(plora_adapters_create(model, &options, &adapters));
        for (int i = 0; i < CHECK_COUNT(want); ++i) {
            plora_adapter adapter = PLORA_ADAPTER_INIT;
            CHECK_OK(plora_adapters_layer(adapters, want[i].layer, &adapter));
            assert_int_equal(adapter.a.rows, want[i].rank);
            assert_int_equal(adapter.b.columns, want[i].rank);
            CHECK_CLOSE(adapter.scale, want[i].alpha / (rslora ? sqrt(want[i].rank) : want[i].rank),
                        1e-15 * want[i].alpha, "scale of layer %d", want[i].layer);
        }
        plora_adapters_destroy(adapters);
    }
    plora_adapters *adapters = NULL;
    const plora_adapters_override too_large = {"k_proj", 0.0, 6, 0}, unknown = {"v_proj", 0.0, 1, 0},
                                  negative = {"k_proj", 0, -3, 0};
    options.override_count = 1;
    options.overrides = &too_large;
    CHECK_FAILS(plora_adapters_create(model, &options, &adapters), PLORA_ERROR_INVALID_ARGUMENT, "rank 6", "K=12",
                "N=5", "k_proj");
    options.overrides = &negative;
    CHECK_FAILS(plora_adapters_create(model, &options, &adapters), PLORA_ERROR_INVALID_ARGUMENT, "-3", "k_proj");
    options.overrides = &unknown;
    CHECK_FAILS(plora_adapters_create(model, &options, &adapters), PLORA_ERROR_NOT_FOUND, "v_proj");
    options.overrides = NULL;
    CHECK_FAILS(plora_adapters_create(model, &options, &adapters), PLORA_ERROR_INVALID_ARGUMENT, "override");
    assert_null(adapters);
    plora_model_destroy(model);
}

static void bad_options(void **state)
{
    (void)state;
    plora_model *model = built();
    static const struct {
        int32_t rank, init, rslora;
        double alpha, dropout;
        int64_t tokens;
        const char *value;
    } cases[] = {
        {0, 0, 0, 1, 0, 0, "0"},
        {-1, 0, 0, 1, 0, 0, "-1"},
        {6, 0, 0, 1, 0, 0, "rank 6 exceeds min(K=12, N=5)"},
        {2, 2, 0, 1, 0, 0, "init 2"},
        {2, 0, 2, 1, 0, 0, "rslora is 2"},
        {2, 0, 0, NAN, 0, 0, "alpha is"},
        {2, 0, 0, INFINITY, 0, 0, "inf"},
        {2, 0, 0, 1, 1, 0, "dropout is 1"},
        {2, 0, 0, 1, -0.25, 0, "-0.25"},
        {2, 0, 0, 1, NAN, 0, "dropout"},
        {2, 0, 0, 1, 0, -5, "-5"},
    };
    plora_adapters *adapters = NULL;
    for (int i = 0; i < CHECK_COUNT(cases); ++i) {
        plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
        options.rank = cases[i].rank;
        options.init = cases[i].init;
        options.rslora = cases[i].rslora;
        options.alpha = cases[i].alpha;
        options.dropout = cases[i].dropout;
        options.workspace_tokens = cases[i].tokens;
        CHECK_FAILS(plora_adapters_create(model, &options, &adapters), PLORA_ERROR_INVALID_ARGUMENT, cases[i].value);
    }
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = 2;
    CHECK_FAILS(plora_adapters_create(NULL, &options, &adapters), PLORA_ERROR_INVALID_ARGUMENT, "model is NULL");
    CHECK_FAILS(plora_adapters_create(model, &options, NULL), PLORA_ERROR_INVALID_ARGUMENT, "adapters is NULL");
    assert_null(adapters);
    CHECK_OK(plora_adapters_create(model, &options, &adapters));
    plora_adapter adapter = PLORA_ADAPTER_INIT;
    CHECK_FAILS(plora_adapters_layer(adapters, EMBEDDING, &adapter), PLORA_ERROR_NOT_FOUND, "embed_tokens");
    CHECK_FAILS(plora_adapters_layer(adapters, LAYERS, &adapter), PLORA_ERROR_INVALID_ARGUMENT, "7");
    CHECK_FAILS(plora_adapters_layer(adapters, -1, &adapter), PLORA_ERROR_INVALID_ARGUMENT, "-1");
    CHECK_FAILS(plora_adapters_layer(NULL, 1, &adapter), PLORA_ERROR_INVALID_ARGUMENT, "NULL");
    CHECK_FAILS(plora_adapters_layer(adapters, 1, NULL), PLORA_ERROR_INVALID_ARGUMENT, "NULL");
    CHECK_FAILS(plora_adapters_parameters(adapters, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "NULL");
    CHECK_FAILS(plora_adapters_set_dropout_position(NULL, 0, 0), PLORA_ERROR_INVALID_ARGUMENT, "NULL");
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
}

/* ------------------------------------------------------------------------------------------------------ arena, workspace */

static void arena_layout(void **state)
{
    (void)state;
    plora_model *model = built();
    plora_adapters *adapters = create(model, "all-linear,lm_head", NULL);
    float *parameters = NULL, *gradients = NULL;
    int64_t count = 0, gradient_count = 0, end = 0;
    CHECK_OK(plora_adapters_parameters(adapters, &parameters, &count));
    CHECK_OK(plora_adapters_gradients(adapters, &gradients, &gradient_count));
    assert_int_equal(count, gradient_count);
    assert_int_equal((uintptr_t)parameters % 64, 0);
    const float *const own_parameters = parameters, *const own_gradients = gradients;
    parameters = device_mirror(parameters, (size_t)count * sizeof *parameters);
    gradients = device_mirror(gradients, (size_t)count * sizeof *gradients);
    for (int32_t layer = 0; layer < HEAD; ++layer) {
        plora_adapter adapter = PLORA_ADAPTER_INIT;
        CHECK_OK(plora_adapters_layer(adapters, layer, &adapter));
        const int turned = (layers[layer].flags & PLORA_LAYER_FAN_IN_FAN_OUT) != 0;
        const int64_t k = turned ? layers[layer].rows : layers[layer].columns;
        const int64_t n = turned ? layers[layer].columns : layers[layer].rows;
        const plora_matrix *const views[] = {&adapter.a, &adapter.b, &adapter.a_gradient, &adapter.b_gradient};
        for (int i = 0; i < 4; ++i) {
            assert_int_equal(views[i]->rows, i % 2 == 0 ? 2 : n);
            assert_int_equal(views[i]->columns, i % 2 == 0 ? k : 2);
            assert_int_equal(views[i]->stride, views[i]->columns);
            assert_int_equal(views[i]->dtype, PLORA_F32);
        }
        for (int is_b = 0; is_b < 2; ++is_b) {
            const int64_t begin = (float *)views[is_b]->data - own_parameters,
                          used = views[is_b]->rows * views[is_b]->columns;
            CHECK(begin == (end + 15) / 16 * 16, "layer %d, %s starts at %lld, the one before ended at %lld", layer,
                  is_b ? "B" : "A", (long long)begin, (long long)end);
            for (int64_t i = end; i < begin; ++i)
                assert_true(parameters[i] == 0.0f);
            assert_int_equal((float *)views[is_b + 2]->data - own_gradients, begin);
            int64_t zeros = 0;
            for (int64_t i = begin; i < begin + used; ++i)
                zeros += parameters[i] == 0.0f;
            if (is_b)
                assert_int_equal(zeros, used);
            else
                assert_true(zeros < used / 4);
            end = begin + used;
        }
    }
    assert_true(end <= count && count < end + 16);
    for (int64_t i = 0; i < count; ++i)
        assert_true(gradients[i] == 0.0f);
    for (int64_t i = end; i < count; ++i)
        assert_true(parameters[i] == 0.0f);
    assert_int_equal(plora_adapters_stage(adapters), 0);
    device_forget(parameters);
    device_forget(gradients);
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
}

static void workspaces(void **state)
{
    (void)state;
    plora_model *model = built();
    plora_adapters *adapters = create(model, NULL, NULL);
    size_t one = 0, before = 0;
    CHECK_OK(plora_adapters_workspace_size(adapters, 1, &one));
    assert_true(one > 0);
    for (int64_t tokens = 1; tokens < 5000; tokens = tokens * 2 + 1) {
        size_t bytes = 0;
        CHECK_OK(plora_adapters_workspace_size(adapters, tokens, &bytes));
        assert_true(bytes >= before);
        before = bytes;
    }
    size_t bytes = 77;
    CHECK_FAILS(plora_adapters_workspace_size(adapters, 0, &bytes), PLORA_ERROR_INVALID_ARGUMENT, "0");
    CHECK_FAILS(plora_adapters_workspace_size(adapters, -4, &bytes), PLORA_ERROR_INVALID_ARGUMENT, "-4");
    CHECK_FAILS(plora_adapters_workspace_size(adapters, INT64_MAX, &bytes), PLORA_ERROR_INVALID_ARGUMENT,
                "9223372036854775807");
    CHECK_FAILS(plora_adapters_workspace_size(NULL, 1, &bytes), PLORA_ERROR_INVALID_ARGUMENT, "NULL");
    CHECK_FAILS(plora_adapters_workspace_size(adapters, 1, NULL), PLORA_ERROR_INVALID_ARGUMENT, "NULL");
    assert_int_equal(bytes, 77);
    char least[32];
    snprintf(least, sizeof least, "%zu", one);
    unsigned char *memory = aligned_alloc(64, (one + 127) / 64 * 64);
    assert_non_null(memory);
    CHECK_FAILS(plora_adapters_set_workspace(adapters, memory, one - 1), PLORA_ERROR_INVALID_ARGUMENT, least);
    CHECK_FAILS(plora_adapters_set_workspace(adapters, memory + 32, one), PLORA_ERROR_INVALID_ARGUMENT, "aligned");
    CHECK_FAILS(plora_adapters_set_workspace(adapters, NULL, 64), PLORA_ERROR_INVALID_ARGUMENT, "64");
    CHECK_FAILS(plora_adapters_set_workspace(NULL, memory, one), PLORA_ERROR_INVALID_ARGUMENT, "NULL");
    CHECK_OK(plora_adapters_set_workspace(adapters, memory, one));
    CHECK_OK(plora_adapters_set_workspace(adapters, NULL, 0));
    free(memory);
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
}

/* ------------------------------------------------------------------------------------------------------------ life times */

static void one_forward(plora_adapters *adapters)
{
    struct check_matrix x = check_matrix_new(3, 12, 12, PLORA_F32), y = check_matrix_new(3, 12, 12, PLORA_F32);
    check_matrix_random(&x, 1.0);
    const plora_matrix device_x = device_matrix(x.m), device_y = device_matrix(y.m);
    CHECK_OK(DEVICE(plora_linear_forward(adapters, 1, &device_x, &device_y, 0, NULL)));
    for (int64_t i = 0; i < 36; ++i)
        assert_true(isfinite(((float *)y.m.data)[i]));
    check_matrix_guards(&y, "y");
    check_matrix_free(&x);
    check_matrix_free(&y);
}

/* Handles may be destroyed in any order: all 24 orders of four, used until their own end. */
static void every_order_of_destruction(void **state)
{
    (void)state;
    for (int order = 0; order < 24; ++order) {
        int pool[4] = {0, 1, 2, 3}, sequence[4], rest = order;
        for (int i = 0; i < 4; ++i) {
            const int pick = rest % (4 - i);
            rest /= 4 - i;
            sequence[i] = pool[pick];
            for (int j = pick; j < 3; ++j)
                pool[j] = pool[j + 1];
        }
        plora_context *own = NULL;
        struct check_allocator memory = CHECK_ALLOCATOR_INIT;
        CHECK_OK(check_context_create(&memory, NULL, 1, 0, &own));
        plora_context *const kept = context;
        context = own;
        plora_model *model = built();
        context = kept;
        plora_adapters *adapters = create(model, NULL, NULL);
        plora_optimizer *optimizer = NULL;
        CHECK_OK(plora_optimizer_create(adapters, NULL, &optimizer));
        int adapters_live = 1, optimizer_live = 1;
        for (int i = 0; i < 4; ++i) {
            if (sequence[i] == 0) plora_context_destroy(own);
            if (sequence[i] == 1) plora_model_destroy(model);
            if (sequence[i] == 2) plora_adapters_destroy(adapters), adapters_live = 0;
            if (sequence[i] == 3) plora_optimizer_destroy(optimizer), optimizer_live = 0;
            if (adapters_live) one_forward(adapters);
            if (optimizer_live) CHECK_OK(plora_optimizer_step(optimizer, 1.0, NULL, NULL));
        }
        check_allocator_empty(&memory, "after the last handle");
    }
    plora_adapters_destroy(NULL);
    plora_optimizer_destroy(NULL);
    plora_context_destroy(NULL);
}

static void no_layers_while_adapters_exist(void **state)
{
    (void)state;
    plora_model *model = built();
    struct check_matrix matrix = check_matrix_new(4, 6, 8, PLORA_F32);
    plora_adapters *adapters = create(model, NULL, NULL);
    CHECK_FAILS(check_add_linear(model, "late", &matrix.m, NULL, 0, 0, NULL), PLORA_ERROR_INVALID_ARGUMENT, "late",
                "adapters");
    one_forward(adapters);
    plora_adapters_destroy(adapters);
    CHECK_OK(check_add_linear(model, "late", &matrix.m, NULL, 0, 0, NULL));
    plora_model_destroy(model);
    check_matrix_free(&matrix);
}

static void many_layers(void **state)
{
    (void)state;
    enum { MANY = 500 };
    plora_model *model = NULL;
    CHECK_OK(plora_model_create(context, &model));
    struct check_matrix matrix = check_matrix_new(MANY * 2, 3, 3, PLORA_F32);
    for (int32_t i = 0; i < MANY; ++i) {
        char name[32];
        snprintf(name, sizeof name, "layers.%d.proj", i);
        const plora_matrix w = {(float *)matrix.m.data + i * 6, 2, 3, 3, PLORA_F32, 0};
        int32_t layer = -1;
        CHECK_OK(check_add_linear(model, name, &w, NULL, 0, 0, &layer));
        assert_int_equal(layer, i);
        memset(name, 'x', sizeof name); /* the library has its own copy */
    }
    int32_t layer = -1;
    CHECK_OK(plora_model_find_layer(model, "layers.499.proj", &layer));
    assert_int_equal(layer, 499);
    plora_model_destroy(model);
    check_matrix_free(&matrix);
}

/* --------------------------------------------------------------------------------------------------------- out of memory */

/* Makes everything, as far as memory lasts, and takes it down again. */
static plora_status make_all(void)
{
    plora_model *model = NULL;
    plora_adapters *adapters = NULL;
    plora_optimizer *optimizer = NULL;
    plora_status status = build(&model);
    if (status == PLORA_OK) {
        plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
        options.rank = 2;
        status = plora_adapters_create(model, &options, &adapters);
        if (status != PLORA_OK) assert_null(adapters);
    }
    if (status == PLORA_OK) {
        status = plora_optimizer_create(adapters, NULL, &optimizer);
        if (status != PLORA_OK) {
            assert_null(optimizer);
            one_forward(adapters); /* still usable */
        }
    }
    plora_optimizer_destroy(optimizer);
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    return status;
}

static void every_allocation_fails_once(void **state)
{
    (void)state;
    CHECK_OK(make_all());
    plora_model *model = built();
    plora_adapters *adapters = create(model, NULL, NULL);
    one_forward(adapters); /* compiled products stay in the context: they are no leak */
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    const int64_t live = allocator.live, bytes = allocator.live_bytes;
    int64_t failures = 0;
    for (int64_t k = 1;; ++k) {
        allocator.fail_at = allocator.calls + k;
        const int64_t failed = allocator.failed;
        const plora_status status = make_all();
        allocator.fail_at = 0;
        CHECK(allocator.live == live && allocator.live_bytes == bytes,
              "allocation %lld failed: %lld blocks, %lld bytes leaked", (long long)k,
              (long long)(allocator.live - live), (long long)(allocator.live_bytes - bytes));
        if (allocator.failed == failed) {
            CHECK_OK(status);
            break;
        }
        failures++;
        CHECK(status == PLORA_ERROR_OUT_OF_MEMORY, "allocation %lld failed: status '%s'", (long long)k,
              plora_status_string(status));
        CHECK(strstr(plora_last_error(), "bytes") != NULL, "allocation %lld failed: message '%s'", (long long)k,
              plora_last_error());
        assert_int_equal(allocator.errors, 0);
    }
    assert_true(failures >= 10);
}

/* The same for a context, and for the first products of a layer: compiled code and scratch memory are made then. */
static void context_and_first_call_run_out_of_memory(void **state)
{
    (void)state;
    for (int64_t k = 1;; ++k) {
        struct check_allocator memory = CHECK_ALLOCATOR_INIT;
        memory.fail_at = k;
        plora_context *own = NULL;
        plora_status status = check_context_create(&memory, NULL, 2, 0, &own);
        if (status != PLORA_OK) {
            assert_int_equal(status, PLORA_ERROR_OUT_OF_MEMORY);
            assert_null(own);
        } else {
            memory.fail_at = 0;
            plora_context *const kept = context;
            context = own;
            plora_model *model = built();
            context = kept;
            plora_adapters *adapters = create(model, NULL, NULL);
            if (memory.failed == 0) memory.fail_at = memory.calls + k;
            struct check_matrix x = check_matrix_new(3, 12, 12, PLORA_F32), y = check_matrix_new(3, 12, 12, PLORA_F32);
            check_matrix_random(&x, 1.0);
            const plora_matrix device_x = device_matrix(x.m), device_y = device_matrix(y.m);
            status = DEVICE(plora_linear_forward(adapters, 1, &device_x, &device_y, 0, NULL));
            assert_int_equal(status, memory.failed > 0 ? PLORA_ERROR_OUT_OF_MEMORY : PLORA_OK);
            memory.fail_at = 0;
            one_forward(adapters);
            check_matrix_free(&x);
            check_matrix_free(&y);
            plora_adapters_destroy(adapters);
            plora_model_destroy(model);
            plora_context_destroy(own);
        }
        check_allocator_empty(&memory, "after a failed allocation");
        if (memory.failed == 0) break;
    }
}

static void memory_figures(void **state)
{
    (void)state;
    plora_memory_statistics empty = PLORA_MEMORY_STATISTICS_INIT, full = empty, last = empty;
    CHECK_OK(plora_memory_stats(context, &empty));
    plora_model *model = built();
    plora_adapters *adapters = create(model, NULL, NULL);
    CHECK_OK(plora_memory_stats(context, &full));
    assert_int_equal(full.current_bytes + full.device_current_bytes, allocator.live_bytes);
    assert_int_equal(full.allocations + full.device_allocations, allocator.calls);
    assert_true(full.device_peak_bytes >= full.device_current_bytes);
    assert_int_equal(full.device_current_bytes > 0, device_is_cuda());
    assert_true(full.peak_bytes >= full.current_bytes);
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    CHECK_OK(plora_memory_stats(context, &last));
    assert_int_equal(last.current_bytes, empty.current_bytes);
    assert_int_equal(last.device_current_bytes, 0);
    assert_true(last.peak_bytes >= full.current_bytes);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    check_begin("test_model");
    const struct CMUnitTest tests[] = {
        TEST(layers_are_found),
        TEST(bad_layers_are_refused),
        TEST(overlapping_weights),
        TEST(target_patterns),
        TEST(overrides),
        TEST(bad_options),
        TEST(arena_layout),
        TEST(workspaces),
        TEST(every_order_of_destruction),
        TEST(no_layers_while_adapters_exist),
        TEST(many_layers),
        TEST(every_allocation_fails_once),
        TEST(context_and_first_call_run_out_of_memory),
        TEST(memory_figures),
    };
    return cmocka_run_group_tests_name("model", tests, NULL, NULL);
}
