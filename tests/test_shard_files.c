/* test_shard_files.c: what is refused of shards (plora_shard), and what files say of them: checkpoints, ledgers, exports. Numbers are
 * test_shard.c's. */
#include "file_fixture.h"
#include "quantised_fixture.h"
#include "shard_fixture.h"

static plora_context *shared;

static struct whole small(int32_t dtype, int32_t rounding)
{
    struct whole whole = {.n = 12,
                          .k = 10,
                          .rank = 3,
                          .dtype = dtype,
                          .rounding = rounding,
                          .residual = rounding == PLORA_ROUND_RESIDUAL ? PLORA_RESIDUAL_DEFAULT : PLORA_RESIDUAL_NONE};
    whole_create(shared, &whole);
    return whole;
}

static const struct part upper = {0, 0, 6, 10}, lower = {6, 0, 6, 10}, right = {0, 5, 12, 5};

/* ------------------------------------------------------------------------------------------------------------- refused */

static void places_out_of_the_whole(void **state)
{
    (void)state;
    static const struct {
        plora_shard shard;
        const char *says;
    } cases[] = {
        {{-1, 0, 9, 9}, "from row -1, column 0"},
        {{0, -2, 9, 9}, "from row 0, column -2"},
        {{4, 0, 6, 9}, "from row 4, column 0 on exceeds the whole [N=6,K=9]"},
        {{0, 5, 9, 9}, "from row 0, column 5 on exceeds the whole [N=9,K=9]"},
        {{1, 0, 0, 0}, "exceeds the whole [N=0,K=0]"},
        {{0, 0, 9, 0}, "exceeds the whole [N=9,K=0]"},
        {{0, 0, 2, 9}, "exceeds the whole [N=2,K=9]"},
        {{INT64_MAX, 0, 9, 9}, "exceeds"},
        {{INT64_MAX - 1, 0, INT64_MAX, 9}, "exceeds"},
        {{0, 0, INT64_MAX / 16, 1 << 5}, "more than 2^61 elements"},
        {{0, 0, INT64_MAX, INT64_MAX}, "more than 2^61 elements"},
    };
    for (int turned = 0; turned < 2; ++turned) {
        plora_model *model = NULL;
        struct check_matrix w = check_matrix_new(turned ? 5 : 3, turned ? 3 : 5, turned ? 3 : 5, PLORA_F32);
        CHECK_OK(plora_model_create(shared, &model));
        plora_linear linear = PLORA_LINEAR_INIT;
        linear.name = "layer";
        linear.weight = device_matrix(w.m);
        linear.flags = turned ? PLORA_LAYER_FAN_IN_FAN_OUT : 0;
        for (int i = 0; i < CHECK_COUNT(cases); ++i) {
            linear.shard = cases[i].shard;
            CHECK_FAILS(plora_model_add_linear(model, &linear, NULL), PLORA_ERROR_SHAPE, "layer 'layer'",
                        cases[i].says);
        }
        assert_int_equal(plora_model_layer_count(model), 0);
        const plora_shard good[] = {
            {0, 0, 0, 0}, {0, 0, 3, 5}, {0, 0, 4, 5}, {6, 4, 9, 9}, {1, 2, (int64_t)1 << 40, 1 << 20}};
        struct check_matrix others[CHECK_COUNT(good)];
        for (int32_t i = 0; i < CHECK_COUNT(good); ++i) {
            char name[16];
            plora_linear back = PLORA_LINEAR_INIT;
            others[i] = check_matrix_new(w.m.rows, w.m.columns, w.m.columns, PLORA_F32);
            snprintf(name, sizeof name, "layer.%d", i);
            linear.name = name;
            linear.weight = device_matrix(others[i].m);
            linear.shard = good[i];
            CHECK_OK(plora_model_add_linear(model, &linear, NULL));
            CHECK_OK(plora_model_layer(model, i, &back));
            const plora_shard want = i == 1 ? (plora_shard){0, 0, 0, 0} : good[i]; /* all of its whole */
            assert_memory_equal(&back.shard, &want, sizeof want);
        }
        plora_model_destroy(model);
        for (int i = 0; i < CHECK_COUNT(good); ++i)
            check_matrix_free(&others[i]);
        check_matrix_free(&w);
    }
}

/* A caller of a library before shards had a shorter struct. */
static void a_struct_without_a_shard(void **state)
{
    (void)state;
    plora_model *model = NULL;
    struct check_matrix w = check_matrix_new(3, 5, 5, PLORA_F32);
    CHECK_OK(plora_model_create(shared, &model));
    plora_linear linear = PLORA_LINEAR_INIT;
    linear.struct_size = offsetof(plora_linear, shard);
    linear.name = "layer";
    linear.weight = device_matrix(w.m);
    linear.shard = (plora_shard){-1, -1, -1, -1};
    CHECK_OK(plora_model_add_linear(model, &linear, NULL));
    plora_model_destroy(model);
    check_matrix_free(&w);
}

static void tied_layers(void **state)
{
    (void)state;
    struct whole whole = small(PLORA_F32, PLORA_ROUND_NEAREST);
    plora_model *model = NULL;
    struct piece piece = {.part = lower};
    piece_fill(&whole, &piece);
    CHECK_OK(plora_model_create(shared, &model));
    plora_linear linear = piece_linear(&whole, &piece);
    CHECK_OK(plora_model_add_linear(model, &linear, NULL));
    linear.name = "tied";
    CHECK_OK(plora_model_add_linear(model, &linear, NULL));
    linear.name = "third";
    linear.flags |= PLORA_LAYER_GATHERED;
    CHECK_FAILS(plora_model_add_linear(model, &linear, NULL), PLORA_ERROR_INVALID_ARGUMENT, "third", "block.layer",
                "not as the same shard");
    linear.flags = 0;
    linear.shard.first_row -= 1;
    CHECK_FAILS(plora_model_add_linear(model, &linear, NULL), PLORA_ERROR_INVALID_ARGUMENT, "third", "block.layer",
                "not as the same shard");
    linear.shard = (plora_shard){0, 0, 0, 0};
    CHECK_FAILS(plora_model_add_linear(model, &linear, NULL), PLORA_ERROR_INVALID_ARGUMENT, "not as the same shard");
    assert_int_equal(plora_model_layer_count(model), 2);
    plora_model_destroy(model);
    check_matrix_free(&piece.other);
    check_matrix_free(&piece.w);
    whole_free(&whole);
}

/* Gathered layers take the low-rank part alone. */
static void gathered_layers(void **state)
{
    (void)state;
    struct whole whole = small(PLORA_F32, PLORA_ROUND_NEAREST);
    struct piece *piece = piece_create(shared, &whole, &lower, 1);
    struct check_matrix x = check_matrix_new(2, whole.k, whole.k, PLORA_F32),
                        y = check_matrix_new(2, whole.n, whole.n, PLORA_F32);
    struct check_matrix short_y = check_matrix_new(2, lower.rows, lower.rows, PLORA_F32);
    check_matrix_random(&x, 1.0);
    check_matrix_random(&y, 1.0);
    const plora_matrix device_x = device_matrix(x.m), device_y = device_matrix(y.m),
                       device_short = device_matrix(short_y.m);
    check_matrix_snapshot(&y);
    const char *const says = "is PLORA_LAYER_GATHERED: its x W^T is the host's, calls take PLORA_LINEAR_DELTA_ONLY";
    CHECK_FAILS(DEVICE(plora_linear_forward(piece->adapters, SHARD_LAYER, &device_x, &device_y, 0, NULL)),
                PLORA_ERROR_INVALID_ARGUMENT, "block.layer", says);
    CHECK_FAILS(DEVICE(plora_linear_backward(piece->adapters, SHARD_LAYER, &device_x, &device_y, NULL, 0, NULL)),
                PLORA_ERROR_INVALID_ARGUMENT, "block.layer", says);
    CHECK_FAILS(DEVICE(plora_linear_forward(piece->adapters, SHARD_LAYER, &device_x, &device_short,
                                            PLORA_LINEAR_DELTA_ONLY, NULL)),
                PLORA_ERROR_SHAPE, "y is [2,6]: must be [2,12]");
    plora_batch *batch = NULL;
    CHECK_OK(plora_batch_create(piece->model, NULL, &batch));
    const int32_t slots[2] = {-1, -1}, layer = SHARD_LAYER;
    CHECK_OK(plora_batch_begin(batch, 2, slots, NULL, 0, NULL));
    CHECK_FAILS(DEVICE(plora_batch_forward(batch, &layer, 1, &device_x, &device_y, 0, NULL)),
                PLORA_ERROR_INVALID_ARGUMENT, "block.layer", says);
    check_matrix_unchanged(&y, "y");
    CHECK_OK(DEVICE(plora_batch_forward(batch, &layer, 1, &device_x, &device_y, PLORA_LINEAR_DELTA_ONLY, NULL)));
    plora_batch_destroy(batch);

    plora_model *model = NULL;
    CHECK_OK(plora_model_create(shared, &model));
    plora_linear linear = piece_linear(&whole, piece);
    linear.bias = device_of(y.m.data);
    CHECK_FAILS(plora_model_add_linear(model, &linear, NULL), PLORA_ERROR_INVALID_ARGUMENT, "block.layer",
                "has a bias");
    plora_model_destroy(model);
    check_matrix_free(&x);
    check_matrix_free(&y);
    check_matrix_free(&short_y);
    piece_free(piece);
    whole_free(&whole);
}

/* The whole sets the bound: a shard of one row has what its neighbours have. */
static void ranks_of_the_whole(void **state)
{
    (void)state;
    struct whole whole = {.n = 9,
                          .k = 11,
                          .rank = 9,
                          .dtype = PLORA_BF16,
                          .rounding = PLORA_ROUND_NEAREST,
                          .residual = PLORA_RESIDUAL_NONE};
    whole_create(shared, &whole);
    const struct part thin = {4, 0, 1, 11};
    struct piece *piece = piece_create(shared, &whole, &thin, 0);
    piece_set_factors(&whole, piece);
    piece_set_factors(&whole, whole.all);
    plora_unload_report report = PLORA_UNLOAD_REPORT_INIT;
    plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
    CHECK_OK(DEVICE(plora_unload(whole.all->adapters, NULL, &options, &report, NULL)));
    CHECK_OK(DEVICE(plora_unload(piece->adapters, NULL, &options, &report, NULL)));
    CHECK_CLOSE(report.effective_rank, 1.0, 1e-6, "the effective rank of one row");
    piece_check_weight(&whole, whole.all, piece);
    plora_adapters *more = NULL;
    plora_adapters_options wanted = piece_options(&whole);
    wanted.rank = 10;
    CHECK_FAILS(plora_adapters_create(piece->model, &wanted, &more), PLORA_ERROR_INVALID_ARGUMENT,
                "rank 10 exceeds min(K=11, N=9)");
    piece_free(piece);
    whole_free(&whole);
}

/* ----------------------------------------------------------------------------------------------------------- quantised */

/* A quantised shard has its place, too: its A, and in its master what a whole one has. */
static void quantised_shards(void **state)
{
    (void)state;
    check_reseed(1);
    struct whole whole = small(PLORA_F32, PLORA_ROUND_NEAREST);
    whole.rounding = PLORA_ROUND_DEFAULT;
    piece_set_factors(&whole, whole.all);
    plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
    CHECK_OK(DEVICE(plora_unload(whole.all->adapters, NULL, &options, NULL, NULL)));
    for (int i = 0; i < CHECK_COUNT(kinds); ++i) {
        struct arrays *arrays = arrays_new(&kinds[i], right.rows, right.columns);
        struct piece piece = {.part = right}; /* the values of the right half */
        piece_fill(&whole, &piece);
        CHECK_OK(plora_model_create(shared, &piece.model));
        CHECK_OK(check_add_linear(piece.model, "other", &piece.other.m, NULL, 0, 0, NULL));
        plora_quantised_linear linear = PLORA_QUANTISED_LINEAR_INIT, back = PLORA_QUANTISED_LINEAR_INIT;
        linear.name = "block.layer";
        linear.weight = on_device(arrays);
        linear.master = PLORA_MASTER_MEMORY;
        linear.values = device_matrix(piece.w.m);
        linear.flags = PLORA_LAYER_GATHERED;
        linear.shard = (plora_shard){0, 5, 12, 10};
        CHECK_FAILS(plora_model_add_quantised(piece.model, &linear, NULL), PLORA_ERROR_UNSUPPORTED,
                    "PLORA_LAYER_GATHERED");
        linear.flags = 0;
        linear.shard.first_column = 6;
        CHECK_FAILS(plora_model_add_quantised(piece.model, &linear, NULL), PLORA_ERROR_SHAPE, "column 6 on exceeds");
        linear.shard.first_column = 5;
        CHECK_OK(DEVICE(plora_model_add_quantised(piece.model, &linear, NULL)));
        linear.name = "tied";
        linear.master = PLORA_MASTER_NONE;
        linear.values.data = NULL;
        linear.shard.rows = 13;
        CHECK_FAILS(plora_model_add_quantised(piece.model, &linear, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                    "not as the same shard");
        const plora_adapters_options wanted = piece_options(&whole);
        CHECK_OK(DEVICE(plora_adapters_create(piece.model, &wanted, &piece.adapters)));
        piece.adapter = (plora_adapter)PLORA_ADAPTER_INIT;
        CHECK_OK(plora_adapters_layer(piece.adapters, SHARD_LAYER, &piece.adapter));
        fixture_mirror(&piece.adapter);
        piece_set_factors(&whole, &piece);
        CHECK_OK(DEVICE(plora_unload(piece.adapters, NULL, &options, NULL, NULL)));
        for (int64_t r = 0; r < whole.rank; ++r)
            for (int64_t j = 0; j < right.columns; ++j)
                assert_true(((float *)piece.adapter.a.data)[r * right.columns + j] ==
                            ((float *)whole.all->adapter.a.data)[r * whole.k + right.first_column + j]);
        CHECK_OK(plora_model_quantised(piece.model, SHARD_LAYER, &back));
        const plora_shard want = {0, 5, 12, 10};
        assert_memory_equal(&back.shard, &want, sizeof want);
        for (int64_t row = 0; row < right.rows; ++row)
            for (int64_t j = 0; j < right.columns; ++j)
                CHECK_CLOSE(check_element(&back.values, row, j),
                            *(float *)piece_element(whole.all, row, right.first_column + j), 0.0,
                            "master [%lld,%lld]: %s", (long long)row, (long long)j,
                            describe(&kinds[i], right.rows, right.columns));
        fixture_forget(&piece.adapter);
        plora_adapters_destroy(piece.adapters);
        plora_model_destroy(piece.model);
        check_matrix_free(&piece.other);
        check_matrix_free(&piece.w);
        arrays_free(arrays);
    }
    whole_free(&whole);
}

/* --------------------------------------------------------------------------------------------------------------- files */

/* A checkpoint is for the shard that it was made of. */
static void checkpoints(void **state)
{
    (void)state;
    check_reseed(2);
    struct whole whole = small(PLORA_BF16, PLORA_ROUND_RESIDUAL);
    const char *path = file_path("checkpoint");
    for (int gathered = 0; gathered < 2; ++gathered) {
        struct piece *piece = piece_create(shared, &whole, &lower, gathered);
        struct piece *same = piece_create(shared, &whole, &lower, gathered);
        struct piece *mirror = piece_create(shared, &whole, &lower, !gathered);
        struct piece *other = piece_create(shared, &whole, &upper, gathered);
        plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
        piece_set_factors(&whole, piece);
        CHECK_OK(DEVICE(plora_unload(piece->adapters, NULL, &options, NULL, NULL)));
        CHECK_OK(plora_checkpoint_save(piece->adapters, NULL, path, PLORA_CHECKPOINT_WEIGHTS));
        CHECK_FAILS(plora_checkpoint_load(other->adapters, NULL, path), PLORA_ERROR_INVALID_ARGUMENT,
                    "shard=6,0 of 12,10", "shard=0,0 of 12,10");
        CHECK_FAILS(plora_checkpoint_load(mirror->adapters, NULL, path), PLORA_ERROR_INVALID_ARGUMENT,
                    "gathered [6,10]");
        CHECK_FAILS(plora_checkpoint_load(whole.all->adapters, NULL, path), PLORA_ERROR_INVALID_ARGUMENT,
                    "shard=6,0 of 12,10", "here is 'block.layer N=12 K=10 rank=3 scale=1'");
        CHECK_OK(DEVICE(plora_checkpoint_load(same->adapters, NULL, path)));
        assert_int_equal(plora_adapters_stage(same->adapters), 1);
        for (int64_t i = 0; i < lower.rows; ++i)
            for (int64_t j = 0; j < lower.columns; ++j)
                assert_memory_equal(piece_element(same, i, j), piece_element(piece, i, j), sizeof(uint16_t));
        assert_true(same_residuals(same->model, piece->model));
        piece_free(piece);
        piece_free(same);
        piece_free(mirror);
        piece_free(other);
    }
    whole_free(&whole);
}

/* The shard's own original, as a model. */
static plora_model *original_of(const struct whole *whole, const struct piece *piece, struct check_matrix *w)
{
    struct piece copy = {.part = piece->part, .gathered = piece->gathered, .fan_in_fan_out = piece->fan_in_fan_out};
    plora_model *model = NULL;
    piece_fill(whole, &copy);
    check_matrix_free(&copy.other);
    CHECK_OK(plora_model_create(shared, &model));
    const plora_linear linear = piece_linear(whole, &copy);
    CHECK_OK(plora_model_add_linear(model, &linear, NULL));
    *w = copy.w;
    return model;
}

static plora_status open_ledger(struct piece *piece, plora_model *original, const char *path, plora_ledger **ledger)
{
    plora_ledger_options options = PLORA_LEDGER_OPTIONS_INIT;
    options.path = path;
    options.original = original;
    options.sync = 0;
    return plora_ledger_open(piece->adapters, &options, ledger);
}

/* What an export of a piece holds fits the piece, or where it is gathered the whole. */
static void check_export(const struct whole *whole, struct piece *piece, plora_ledger *ledger)
{
    const char *directory = file_path(piece->gathered ? "whole" : "shard");
    plora_export_options options = PLORA_EXPORT_OPTIONS_INIT;
    plora_adapters *loaded = NULL;
    CHECK_OK(plora_ledger_export(ledger, directory, &options, NULL));
    CHECK_OK(plora_adapters_load(piece->model, directory, NULL, &loaded));
    plora_adapters_destroy(loaded);
    if (piece->gathered) {
        CHECK_OK(plora_adapters_load(whole->all->model, directory, NULL, &loaded));
        plora_adapters_destroy(loaded);
    } else {
        CHECK_FAILS(plora_adapters_load(whole->all->model, directory, NULL, &loaded), PLORA_ERROR_SHAPE,
                    "[N=12,K=10]: lora_A is [6,10], lora_B is [6,6]");
        options.format = PLORA_EXPORT_GGUF;
        options.heads = 1;
        CHECK_FAILS(plora_ledger_export(ledger, file_path("shard.gguf"), &options, NULL), PLORA_ERROR_UNSUPPORTED,
                    "block.layer", "is a shard");
    }
}

/* Records of a shard rebuild the shard, with its own random numbers. */
static void ledgers(void **state)
{
    (void)state;
    check_reseed(3);
    static const int32_t modes[] = {PLORA_ROUND_STOCHASTIC, PLORA_ROUND_RESIDUAL};
    for (int i = 0; i < 2 * CHECK_COUNT(modes); ++i) {
        const int gathered = i & 1;
        struct whole whole = small(PLORA_BF16, modes[i / 2]);
        struct piece *piece = piece_create(shared, &whole, &lower, gathered);
        struct piece *other = piece_create(shared, &whole, &upper, gathered);
        struct piece *mirror = piece_create(shared, &whole, &lower, !gathered);
        struct check_matrix first, second;
        plora_model *original = original_of(&whole, piece, &first);
        char name[16];
        snprintf(name, sizeof name, "ledger%d", i);
        const char *path = file_path(name);
        plora_ledger *ledger = NULL, *refused = NULL;
        plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
        options.rounding = whole.rounding;
        CHECK_OK(open_ledger(piece, original, path, &ledger));
        for (int stage = 0; stage < 2; ++stage) {
            options.momentum = stage == 0 ? 0.5 : 1.0;
            piece_set_factors(&whole, piece);
            piece_set_factors(&whole, whole.all);
            CHECK_OK(DEVICE(plora_unload(whole.all->adapters, NULL, &options, NULL, NULL)));
            CHECK_OK(DEVICE(plora_unload(piece->adapters, NULL, &options, NULL, NULL)));
        }
        piece_check_weight(&whole, whole.all, piece);
        CHECK_OK(DEVICE(plora_ledger_roll_back(ledger, 0, 0)));
        CHECK_OK(DEVICE(plora_ledger_roll_back(ledger, 2, 0)));
        piece_check_weight(&whole, whole.all, piece);
        CHECK_OK(plora_ledger_verify(ledger));
        check_export(&whole, piece, ledger);
        plora_ledger_destroy(ledger);
        plora_model *others = original_of(&whole, other, &second);
        CHECK_FAILS(open_ledger(other, others, path, &refused), PLORA_ERROR_INVALID_ARGUMENT, "block.layer",
                    "is of the shard from element 60 on, rows 10 apart", "here it is 0, 10");
        CHECK_FAILS(open_ledger(mirror, original, path, &refused), PLORA_ERROR_INVALID_ARGUMENT, "block.layer",
                    gathered ? "N=12, K=10" : "N=6, K=10");
        plora_model_destroy(original);
        plora_model_destroy(others);
        check_matrix_free(&first);
        check_matrix_free(&second);
        piece_free(piece);
        piece_free(other);
        piece_free(mirror);
        whole_free(&whole);
    }
}

int main(void)
{
    check_begin("test_shard_files");
    shared = check_context(NULL, 0, 0);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(places_out_of_the_whole),
        cmocka_unit_test(a_struct_without_a_shard),
        cmocka_unit_test(tied_layers),
        cmocka_unit_test(gathered_layers),
        cmocka_unit_test(ranks_of_the_whole),
        cmocka_unit_test(quantised_shards),
        cmocka_unit_test(checkpoints),
        cmocka_unit_test(ledgers),
    };
    const int failed = cmocka_run_group_tests_name("shard_files", tests, file_setup, file_teardown);
    plora_context_destroy(shared);
    return failed;
}
