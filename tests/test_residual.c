/* test_residual.c: what 16-bit weights hold over many unloads: with a residual the bits of fp32 weights, at random the bits that
 * reference_unload.h draws; who owns a residual, where it lies, and what it costs. */
#include "check.h"
#include "cpu/isa.h"
#include "file_fixture.h"
#include "reference_unload.h"
#include "residual_fixture.h"

enum { LAYERS = 3, RANK = 5, SIDE_MOST = 140 };

static const int64_t shapes[LAYERS][2] = {{37, 72}, {64, 33}, {19, SIDE_MOST}}; /* N, K; the last is stored [K,N] */

/* A model of one dtype with a set of adapters. */
struct run {
    plora_context *context;
    plora_model *model;
    struct check_matrix weights[LAYERS];
    plora_adapters *adapters;
};

static plora_adapters_options adapters_options(int32_t residual)
{
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = RANK;
    options.seed = 1234567890123u;
    options.residual = residual;
    return options;
}

/* Runs with the same `salt` start from the same values, numbers of the 16-bit dtype `like`. */
static void model_open(struct run *run, struct check_allocator *allocator, int32_t dtype, int32_t like, int32_t threads,
                       uint64_t salt)
{
    memset(run, 0, sizeof *run);
    check_reseed(salt);
    run->context = check_context(allocator, threads, 0);
    CHECK_OK(plora_model_create(run->context, &run->model));
    for (int i = 0; i < LAYERS; ++i) {
        static const char *const names[LAYERS] = {"a", "b", "c"};
        const int transposed = i == 2;
        const int64_t rows = shapes[i][transposed], columns = shapes[i][!transposed];
        run->weights[i] = check_matrix_new(rows, columns, columns + i, dtype);
        for (int64_t e = 0; e < rows * columns; ++e) {
            uint16_t half;
            plora__store(&half, 0, like, (float)ldexp(check_uniform(), (int)check_integer(-16, 1)));
            plora__store(run->weights[i].m.data, e / columns * (columns + i) + e % columns, dtype,
                         plora__load(&half, 0, like));
        }
        CHECK_OK(check_add_linear(run->model, names[i], &run->weights[i].m, NULL, 0,
                                  transposed ? PLORA_LAYER_FAN_IN_FAN_OUT : 0, NULL));
    }
}

static void run_open(struct run *run, int32_t dtype, int32_t like, int32_t residual, int32_t threads, uint64_t salt)
{
    const plora_adapters_options options = adapters_options(residual);
    model_open(run, NULL, dtype, like, threads, salt);
    CHECK_OK(plora_adapters_create(run->model, &options, &run->adapters));
}

static void run_close(struct run *run)
{
    plora_adapters_destroy(run->adapters);
    plora_model_destroy(run->model);
    plora_context_destroy(run->context);
    for (int i = 0; i < LAYERS; ++i)
        check_matrix_free(&run->weights[i]);
}

/* Random A and B that depend on `salt` alone. */
static void train(plora_adapters *adapters, double size, uint64_t salt)
{
    check_reseed(salt);
    for (int32_t i = 0; i < LAYERS; ++i) {
        plora_adapter view = PLORA_ADAPTER_INIT;
        CHECK_OK(plora_adapters_layer(adapters, i, &view));
        const plora_matrix *const factors[2] = {&view.a, &view.b};
        for (int k = 0; k < 2; ++k) {
            const int64_t count = factors[k]->rows * factors[k]->columns;
            float *values = malloc((size_t)count * sizeof *values);
            CHECK(values != NULL, "the test itself is out of memory");
            for (int64_t e = 0; e < count; ++e)
                values[e] = (float)(check_uniform() * (k ? size : 1));
            device_transfer(factors[k]->data, values, (size_t)count * sizeof *values);
            free(values);
        }
    }
}

static void unload(plora_adapters *adapters, double momentum, int32_t rounding)
{
    plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
    options.momentum = momentum;
    options.rounding = rounding;
    CHECK_OK(DEVICE(plora_unload(adapters, NULL, &options, NULL, NULL)));
}

/* Element e of a stored weight, with its residual if it keeps one. */
static float value_of(const struct run *run, int layer, const uint16_t *residual, int64_t e)
{
    const plora_matrix *w = &run->weights[layer].m;
    const int64_t at = e / w->columns * w->stride + e % w->columns;
    if (residual == NULL) return plora__load(w->data, at, w->dtype);
    return plora__join_residual(((const uint16_t *)w->data)[at], residual[e], w->dtype);
}

/* Of each weight, whether it was ever below 2^-14, where f16 and a residual hold less than fp32. */
static unsigned char was_small[LAYERS][SIDE_MOST * SIDE_MOST];

static void note_small(const struct run *wide)
{
    for (int i = 0; i < LAYERS; ++i)
        for (int64_t e = 0; e < shapes[i][0] * shapes[i][1]; ++e)
            was_small[i][e] |= fabsf(value_of(wide, i, NULL, e)) < 0x1p-14f;
}

/* Weight and residual of `run` against the fp32 weights of `wide`: the same bits, and W is the number nearest to them. What an f16 lost
 * while it was small may make later sums round otherwise. */
static void check_one_value(const struct run *run, const struct run *wide, int unloads)
{
    for (int i = 0; i < LAYERS; ++i) {
        const plora_matrix *w = &run->weights[i].m;
        uint16_t *residual = residual_of(run->model, i);
        CHECK(residual != NULL, "layer %d keeps no residual", i);
        for (int64_t e = 0; e < w->rows * w->columns; ++e) {
            const float got = value_of(run, i, residual, e), want = value_of(wide, i, NULL, e);
            const int exact = w->dtype == PLORA_BF16 || !was_small[i][e];
            const double error = exact ? 0 : unloads * (0x1p-40 + 0x1p-23 * fabs(want));
            CHECK_CLOSE(got, want, error, "layer %d, element %lld, dtype %d", i, (long long)e, w->dtype);
            uint16_t nearest, low;
            plora__split_residual(got, w->dtype, &nearest, &low);
            const uint16_t stored = ((const uint16_t *)w->data)[e / w->columns * w->stride + e % w->columns];
            CHECK(stored == nearest || (stored ^ nearest) == 0x8000, "layer %d, element %lld: 0x%04x of %.9g", i,
                  (long long)e, stored, got);
        }
        free(residual);
        check_matrix_guards(&run->weights[i], "W");
    }
}

static void accumulates(void **state)
{
    (void)state;
    for (int32_t dtype = PLORA_BF16; dtype <= PLORA_F16; ++dtype)
        for (int32_t residual = PLORA_RESIDUAL_DEVICE; residual <= PLORA_RESIDUAL_HOST; ++residual) {
            struct run run, wide;
            run_open(&run, dtype, dtype, residual, 2, 21);
            run_open(&wide, PLORA_F32, dtype, residual, 1, 21);
            for (int i = 0; i < LAYERS; ++i)
                CHECK(residual_of(wide.model, i) == NULL, "an fp32 weight keeps a residual");
            const int unloads = check_quick() ? 6 : 24;
            memset(was_small, 0, sizeof was_small);
            note_small(&wide);
            for (int t = 0; t < unloads; ++t) {
                const double momentum = t % 3 == 2 ? 0.3 : 1.0;
                const int32_t rounding = t % 2 ? PLORA_ROUND_DEFAULT : PLORA_ROUND_RESIDUAL;
                train(run.adapters, ldexp(1e-3, -(t % 4) * 3), 100 + (uint64_t)t);
                train(wide.adapters, ldexp(1e-3, -(t % 4) * 3), 100 + (uint64_t)t);
                unload(run.adapters, momentum, rounding);
                unload(wide.adapters, momentum, rounding);
                note_small(&wide);
                check_one_value(&run, &wide, t + 1);
            }
            run_close(&run);
            run_close(&wide);
        }
}

/* Two sets on one model take turns. */
static void shared(void **state)
{
    (void)state;
    struct run run, wide;
    run_open(&run, PLORA_BF16, PLORA_BF16, PLORA_RESIDUAL_DEFAULT, 2, 22);
    run_open(&wide, PLORA_F32, PLORA_BF16, PLORA_RESIDUAL_DEFAULT, 2, 22);
    plora_memory_statistics before = PLORA_MEMORY_STATISTICS_INIT, with = PLORA_MEMORY_STATISTICS_INIT,
                            without = PLORA_MEMORY_STATISTICS_INIT;
    CHECK_OK(plora_memory_stats(run.context, &before));
    plora_adapters *second[2], *third;
    plora_adapters_options options = adapters_options(PLORA_RESIDUAL_HOST);
    options.seed = 5;
    CHECK_OK(plora_adapters_create(run.model, &options, &second[0]));
    CHECK_OK(plora_memory_stats(run.context, &with));
    options.residual = PLORA_RESIDUAL_NONE;
    CHECK_OK(plora_adapters_create(run.model, &options, &third));
    CHECK_OK(plora_memory_stats(run.context, &without));
    CHECK(with.current_bytes - before.current_bytes == without.current_bytes - with.current_bytes &&
              with.device_current_bytes - before.device_current_bytes ==
                  without.device_current_bytes - with.device_current_bytes,
          "a second set made residuals of its own");
    CHECK_OK(plora_adapters_create(wide.model, &options, &second[1]));
    for (int t = 0; t < 8; ++t) {
        train(t % 2 ? run.adapters : second[0], 1e-3, 200 + (uint64_t)t);
        train(t % 2 ? wide.adapters : second[1], 1e-3, 200 + (uint64_t)t);
        unload(t % 2 ? run.adapters : second[0], 1.0, PLORA_ROUND_DEFAULT);
        unload(t % 2 ? wide.adapters : second[1], 1.0, PLORA_ROUND_DEFAULT);
        check_one_value(&run, &wide, t + 1);
    }
    plora_adapters_destroy(run.adapters); /* the residual stays, for the weight is still there */
    run.adapters = third;
    train(third, 1e-3, 300);
    train(second[1], 1e-3, 300);
    unload(third, 1.0, PLORA_ROUND_DEFAULT);
    unload(second[1], 1.0, PLORA_ROUND_DEFAULT);
    check_one_value(&run, &wide, 9);
    plora_adapters_destroy(second[0]);
    plora_adapters_destroy(second[1]);
    run_close(&run);
    run_close(&wide);
}

/* A set whose weights keep residuals in part, for another set. */
static void mixed(void **state)
{
    (void)state;
    struct run run;
    model_open(&run, NULL, PLORA_F16, PLORA_F16, 1, 23);
    plora_adapters_options options = adapters_options(PLORA_RESIDUAL_DEVICE);
    plora_adapters *part;
    options.targets = "b";
    CHECK_OK(plora_adapters_create(run.model, &options, &part));
    options = adapters_options(PLORA_RESIDUAL_NONE);
    CHECK_OK(plora_adapters_create(run.model, &options, &run.adapters));
    for (int i = 0; i < LAYERS; ++i)
        check_matrix_snapshot(&run.weights[i]);
    train(run.adapters, 1, 31);
    plora_unload_options unloading = PLORA_UNLOAD_OPTIONS_INIT;
    CHECK_FAILS(plora_unload(run.adapters, NULL, &unloading, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "layer 'b' keeps a residual", "layer 'c' does not");
    unloading.rounding = PLORA_ROUND_RESIDUAL;
    CHECK_FAILS(plora_unload(run.adapters, NULL, &unloading, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "rounding 2 takes a residual, which layer 'c' does not keep");
    for (int i = 0; i < LAYERS; ++i)
        check_matrix_unchanged(&run.weights[i], "W after a refused unload");
    plora_adapters *all;
    options.residual = PLORA_RESIDUAL_DEVICE;
    CHECK_OK(plora_adapters_create(run.model, &options, &all));
    unload(run.adapters, 1.0, PLORA_ROUND_DEFAULT);
    plora_adapters_destroy(all);
    plora_adapters_destroy(part);
    options.residual = 4;
    CHECK_FAILS(plora_adapters_create(run.model, &options, &all), PLORA_ERROR_INVALID_ARGUMENT, "residual 4");
    options.residual = -1;
    CHECK_FAILS(plora_adapters_create(run.model, &options, &all), PLORA_ERROR_INVALID_ARGUMENT, "residual -1");
    run_close(&run);
}

/* The host's share of a merge at random, element by element. */
static uint16_t expect_random(const struct run *run, int layer, int64_t stage, const float *a, const float *b,
                              float factor, const float *before, int64_t e)
{
    const int64_t columns = run->weights[layer].m.columns, row = e / columns, column = e % columns;
    const int64_t n = layer == 2 ? column : row, k = layer == 2 ? row : column;
    const int fused = device_is_cuda() || cpu_isa() > CPU_ISA_PORTABLE;
    volatile float sum = 0;
    for (int64_t r = 0; r < RANK; ++r) {
        volatile float product = b[n * RANK + r] * a[r * shapes[layer][1] + k];
        sum = fused ? fmaf(b[n * RANK + r], a[r * shapes[layer][1] + k], sum) : sum + product;
    }
    volatile float delta = factor * sum;
    const float value = fused ? fmaf(factor, sum, before[e]) : before[e] + delta;
    return plora__round_stochastic(value, reference_random(1234567890123u, (uint64_t)stage, layer, (uint64_t)e),
                                   run->weights[layer].m.dtype);
}

static void random_bits_of_layer(struct run *run, int layer, int stage, const float *before, const float *a,
                                 const float *b, float factor)
{
    const plora_matrix *w = &run->weights[layer].m;
    for (int64_t e = 0; e < w->rows * w->columns; ++e) {
        const uint16_t got = ((const uint16_t *)w->data)[e / w->columns * w->stride + e % w->columns];
        const uint16_t want = expect_random(run, layer, stage, a, b, factor, before, e);
        CHECK(got == want, "layer %d, stage %d, element %lld: 0x%04x, want 0x%04x", layer, stage, (long long)e, got,
              want);
    }
}

static void random_bits(void **state)
{
    (void)state;
    for (int32_t dtype = PLORA_BF16; dtype <= PLORA_F16; ++dtype)
        for (int32_t threads = 1; threads <= 3; threads += 2) {
            struct run run;
            run_open(&run, dtype, dtype, PLORA_RESIDUAL_NONE, threads, 24);
            for (int stage = 0; stage < 3; ++stage) {
                float *before[LAYERS], *factors[LAYERS][2], scale[LAYERS];
                train(run.adapters, 1e-3, 400 + (uint64_t)stage);
                for (int i = 0; i < LAYERS; ++i) {
                    const int64_t count = shapes[i][0] * shapes[i][1];
                    plora_adapter view = PLORA_ADAPTER_INIT;
                    CHECK_OK(plora_adapters_layer(run.adapters, i, &view));
                    const plora_matrix *const from[2] = {&view.a, &view.b};
                    scale[i] = (float)view.scale;
                    before[i] = malloc((size_t)count * sizeof(float));
                    CHECK(before[i] != NULL, "the test itself is out of memory");
                    for (int64_t e = 0; e < count; ++e)
                        before[i][e] = value_of(&run, i, NULL, e);
                    for (int k = 0; k < 2; ++k) {
                        const size_t bytes = (size_t)(from[k]->rows * from[k]->columns) * sizeof(float);
                        factors[i][k] = malloc(bytes);
                        CHECK(factors[i][k] != NULL, "the test itself is out of memory");
                        device_transfer(factors[i][k], from[k]->data, bytes);
                    }
                }
                unload(run.adapters, 1.0, PLORA_ROUND_STOCHASTIC);
                for (int i = 0; i < LAYERS; ++i) {
                    random_bits_of_layer(&run, i, stage, before[i], factors[i][0], factors[i][1], scale[i]);
                    free(before[i]);
                    free(factors[i][0]);
                    free(factors[i][1]);
                }
            }
            run_close(&run);
        }
}

/* 2 bytes a weight and the rows' padding, where the options say; and none of it is left. */
static void memory(void **state)
{
    (void)state;
    size_t host[4], device[4], expected = 0;
    for (int i = 0; i < LAYERS; ++i) {
        const int64_t rows = shapes[i][i == 2], columns = shapes[i][i != 2];
        expected += (size_t)(rows * ((columns + 63) / 64 | 1) * 64) * sizeof(uint16_t);
    }
    for (int32_t residual = PLORA_RESIDUAL_NONE; residual <= PLORA_RESIDUAL_HOST; ++residual) {
        struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
        struct run run;
        const plora_adapters_options options = adapters_options(residual);
        plora_memory_statistics memory = PLORA_MEMORY_STATISTICS_INIT;
        model_open(&run, &allocator, PLORA_BF16, PLORA_BF16, 1, 25);
        CHECK_OK(plora_adapters_create(run.model, &options, &run.adapters));
        CHECK_OK(plora_memory_stats(run.context, &memory));
        host[residual] = memory.current_bytes;
        device[residual] = memory.device_current_bytes;
        run_close(&run);
        check_allocator_empty(&allocator, "residuals");
    }
    const int cuda = device_is_cuda();
    const size_t on_device = cuda ? device[PLORA_RESIDUAL_DEVICE] - device[PLORA_RESIDUAL_NONE]
                                  : host[PLORA_RESIDUAL_DEVICE] - host[PLORA_RESIDUAL_NONE];
    CHECK(on_device == expected, "%zu bytes of residuals on the device, want %zu", on_device, expected);
    CHECK(host[PLORA_RESIDUAL_HOST] - host[PLORA_RESIDUAL_NONE] == expected, "%zu bytes on the host, want %zu",
          host[PLORA_RESIDUAL_HOST] - host[PLORA_RESIDUAL_NONE], expected);
    CHECK(!cuda || device[PLORA_RESIDUAL_HOST] - device[PLORA_RESIDUAL_NONE] < expected,
          "%zu bytes on the device for residuals on the host",
          device[PLORA_RESIDUAL_HOST] - device[PLORA_RESIDUAL_NONE]);
}

/* A set that cannot be made leaves no residual behind. */
static void out_of_memory(void **state)
{
    (void)state;
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    struct run run;
    model_open(&run, &allocator, PLORA_BF16, PLORA_BF16, 1, 26);
    const plora_adapters_options options = adapters_options(PLORA_RESIDUAL_HOST);
    const int64_t base = allocator.live;
    int done = 0;
    for (int64_t k = 1; !done; ++k) {
        allocator.fail_at = allocator.calls + k;
        const int64_t failed = allocator.failed;
        const plora_status status = plora_adapters_create(run.model, &options, &run.adapters);
        done = allocator.failed == failed;
        CHECK(status == (done ? PLORA_OK : PLORA_ERROR_OUT_OF_MEMORY), "allocation %lld: status %d", (long long)k,
              status);
        CHECK(done || allocator.live == base, "allocation %lld: %lld blocks left", (long long)k,
              (long long)(allocator.live - base));
        for (int i = 0; !done && i < LAYERS; ++i)
            CHECK(residual_of(run.model, i) == NULL, "allocation %lld: layer %d keeps a residual", (long long)k, i);
        CHECK(done ? k > LAYERS : k < 100, "%lld allocations", (long long)k);
    }
    allocator.fail_at = 0;
    run_close(&run);
    check_allocator_empty(&allocator, "out of memory");
}

/* A host that writes weights itself. */
static void cleared(void **state)
{
    (void)state;
    for (int32_t residual = PLORA_RESIDUAL_DEVICE; residual <= PLORA_RESIDUAL_HOST; ++residual) {
        struct run run;
        run_open(&run, PLORA_F16, PLORA_F16, residual, 1, 27);
        train(run.adapters, 1e-2, 500);
        unload(run.adapters, 1.0, PLORA_ROUND_DEFAULT);
        for (int round = 0; round < 2; ++round) {
            int64_t others = 0;
            for (int i = 0; i < LAYERS; ++i) {
                uint16_t *low = residual_of(run.model, i);
                for (int64_t e = 0; e < shapes[i][0] * shapes[i][1]; ++e)
                    others += low[e] != 0;
                free(low);
            }
            CHECK(round == 0 ? others > 1000 : others == 0, "%lld low halves are not 0, round %d", (long long)others,
                  round);
            for (int i = 0; i < LAYERS; ++i)
                check_matrix_snapshot(&run.weights[i]);
            CHECK_OK(DEVICE(plora_model_clear_residuals(run.model, NULL)));
            for (int i = 0; i < LAYERS; ++i)
                check_matrix_unchanged(&run.weights[i], "W whose residual was cleared");
        }
        run_close(&run);
    }
    CHECK_FAILS(plora_model_clear_residuals(NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "model");
}

/* Adapters from a file keep no residual unless they are asked to. */
static void loaded(void **state)
{
    (void)state;
    struct run run;
    plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
    plora_adapters *saved;
    const plora_adapters_options given = adapters_options(PLORA_RESIDUAL_NONE);
    model_open(&run, NULL, PLORA_BF16, PLORA_BF16, 1, 28);
    CHECK_OK(plora_adapters_create(run.model, &given, &saved));
    CHECK_OK(plora_adapters_save(saved, file_path("adapter")));
    CHECK_OK(plora_adapters_load(run.model, file_path("adapter"), NULL, &run.adapters));
    CHECK(residual_of(run.model, 0) == NULL, "loaded adapters made a residual");
    options.rounding = PLORA_ROUND_RESIDUAL;
    CHECK_FAILS(plora_unload(run.adapters, NULL, &options, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "takes a residual");
    unload(run.adapters, 1.0, PLORA_ROUND_DEFAULT);
    plora_adapters_destroy(run.adapters);
    const plora_adapters_options kept = adapters_options(PLORA_RESIDUAL_DEVICE);
    CHECK_OK(plora_adapters_load(run.model, file_path("adapter"), &kept, &run.adapters));
    unload(run.adapters, 1.0, PLORA_ROUND_RESIDUAL);
    plora_adapters_destroy(saved);
    run_close(&run);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(accumulates), cmocka_unit_test(shared), cmocka_unit_test(mixed),
        cmocka_unit_test(random_bits), cmocka_unit_test(memory), cmocka_unit_test(out_of_memory),
        cmocka_unit_test(cleared),     cmocka_unit_test(loaded),
    };
    check_begin("test_residual");
    return cmocka_run_group_tests(tests, file_setup, file_teardown);
}
