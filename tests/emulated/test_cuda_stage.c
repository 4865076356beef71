/* test_cuda_stage.c: a stage of training on the emulated device (tests/emulator), driven as a host drives it: forward, backward, step,
 * unload, one after the other on one stream. What the tests of each operation cannot see, because they wait after every call and put
 * guards around their matrices: that every launch is on the host's stream and its failure is said, that memory is in use until
 * nothing needs it, and that nothing is read behind the last element. */
#include "emulated.h"

enum { TOKENS = 70, IN = 140, OUT = 36, RANK = 20 };

/* -------------------------------------------------------------------------------------------------------------- a stage */

struct stage {
    plora_context *context;
    plora_model *model;
    plora_adapters *adapters;
    plora_optimizer *optimizer;
    plora_matrix weight, x, y, dy, dx; /* on the device; exactly as large as they must be */
    plora_unload_report report;
};

static size_t matrix_bytes(const plora_matrix *matrix)
{
    return (size_t)((matrix->rows - 1) * matrix->stride + matrix->columns) * plora__dtype_size(matrix->dtype);
}

/* No byte before the first element and behind the last. */
static plora_matrix exact_matrix(int64_t rows, int64_t columns, int64_t stride, int32_t dtype)
{
    struct check_matrix host = check_matrix_new(rows, columns, stride, dtype);
    check_matrix_random(&host, 1.0);
    plora_matrix matrix = host.m;
    matrix.data = device_malloc(matrix_bytes(&matrix));
    device_copy(matrix.data, host.m.data, matrix_bytes(&matrix));
    check_matrix_free(&host);
    return matrix;
}

static plora_status begin(struct stage *stage, const plora_context_options *options, int32_t dtype, double dropout)
{
    memset(stage, 0, sizeof *stage);
    check_reseed(1);
    stage->weight = exact_matrix(OUT, IN, IN, dtype);
    stage->x = exact_matrix(TOKENS, IN, IN, dtype);
    stage->y = exact_matrix(TOKENS, OUT, OUT, dtype);
    stage->dy = exact_matrix(TOKENS, OUT, OUT, dtype);
    stage->dx = exact_matrix(TOKENS, IN, IN, dtype);
    plora_status status = plora_context_create(options, &stage->context);
    if (status == PLORA_OK) status = plora_model_create(stage->context, &stage->model);
    plora_linear linear = PLORA_LINEAR_INIT;
    linear.name = "layer";
    linear.weight = stage->weight;
    if (status == PLORA_OK) status = plora_model_add_linear(stage->model, &linear, NULL);
    plora_adapters_options adapters = PLORA_ADAPTERS_OPTIONS_INIT;
    adapters.rank = RANK;
    adapters.dropout = dropout;
    if (status == PLORA_OK) status = plora_adapters_create(stage->model, &adapters, &stage->adapters);
    if (status == PLORA_OK) status = plora_optimizer_create(stage->adapters, NULL, &stage->optimizer);
    return status;
}

/* Nothing waits between the calls but the unload itself. */
static plora_status run(struct stage *stage, void *stream)
{
    stage->report = (plora_unload_report)PLORA_UNLOAD_REPORT_INIT;
    plora_status status = plora_linear_forward(stage->adapters, 0, &stage->x, &stage->y, PLORA_LINEAR_DROPOUT, stream);
    if (status == PLORA_OK)
        status =
            plora_linear_backward(stage->adapters, 0, &stage->x, &stage->dy, &stage->dx, PLORA_LINEAR_DROPOUT, stream);
    if (status == PLORA_OK) status = plora_optimizer_step(stage->optimizer, 1.0, NULL, stream);
    if (status == PLORA_OK) status = plora_unload(stage->adapters, stage->optimizer, NULL, &stage->report, stream);
    return status;
}

static void end_library(struct stage *stage)
{
    plora_optimizer_destroy(stage->optimizer);
    plora_adapters_destroy(stage->adapters);
    plora_model_destroy(stage->model);
    plora_context_destroy(stage->context);
}

static void end(struct stage *stage)
{
    end_library(stage);
    plora_matrix *const matrices[] = {&stage->weight, &stage->x, &stage->y, &stage->dy, &stage->dx};
    for (int i = 0; i < CHECK_COUNT(matrices); ++i)
        device_free(matrices[i]->data);
}

static plora_context_options cuda_options(void)
{
    plora_context_options options = PLORA_CONTEXT_OPTIONS_INIT;
    options.backend = PLORA_BACKEND_CUDA;
    return options;
}

static void no_findings(const char *what)
{
    CHECK(cu.emu_findings() == 0, "%s: %s", what, cu.emu_last_finding());
}

/* ------------------------------------------------------------------------------------------------------------- streams */

struct results {
    unsigned char weight[OUT * IN * 4], y[TOKENS * OUT * 4], dx[TOKENS * IN * 4];
    plora_unload_report report;
};

static void fetch(struct stage *stage, struct results *results)
{
    memset(results, 0, sizeof *results);
    device_wait();
    device_copy(results->weight, stage->weight.data, matrix_bytes(&stage->weight));
    device_copy(results->y, stage->y.data, matrix_bytes(&stage->y));
    device_copy(results->dx, stage->dx.data, matrix_bytes(&stage->dx));
    results->report = stage->report;
}

/* On a stream that does not wait for the default one, nor that for it. */
static void same_bits_on_any_stream(void **state)
{
    (void)state;
    static struct results first, second;
    const plora_context_options options = cuda_options();
    for (int32_t dtype = PLORA_F32; dtype <= PLORA_BF16; ++dtype) {
        for (int own = 0; own < 2; ++own) {
            struct stage stage;
            CHECK_OK(begin(&stage, &options, dtype, 0.25));
            void *stream = own ? device_stream_create() : NULL;
            CHECK_OK(run(&stage, stream));
            fetch(&stage, own ? &second : &first);
            if (own) device_stream_destroy(stream);
            end(&stage);
        }
        CHECK(memcmp(&first, &second, sizeof first) == 0, "%s: other results on another stream",
              plora__dtype_name(dtype));
        CHECK(first.report.effective_rank > 0 && first.report.update_rms > 0, "nothing was unloaded");
        no_findings("on a stream");
    }
}

/* ------------------------------------------------------------------------------------------------------------ failures */

/* Whichever launch fails, its call says so, and the next stage works. */
static void every_launch_may_fail(void **state)
{
    (void)state;
    const plora_context_options options = cuda_options();
    for (int32_t dtype = PLORA_F32; dtype <= PLORA_BF16; ++dtype) {
        struct stage stage;
        CHECK_OK(begin(&stage, &options, dtype, 0.25));
        int failures = 0;
        for (int k = 1;; ++k) {
            const long before = cu.emu_calls("launch");
            cu.emu_fail("launch", k);
            const plora_status status = run(&stage, NULL);
            const int reached = cu.emu_calls("launch") - before >= k;
            cu.emu_fail("launch", 0);
            if (!reached) {
                CHECK_OK(status);
                break;
            }
            failures++;
            CHECK_FAILS(status, PLORA_ERROR_BACKEND, "CUDA device 0", "_kernel: cudaErrorLaunchOutOfResources");
            CHECK_OK(run(&stage, NULL));
        }
        CHECK(failures >= 15, "%d launches are a stage", failures);
        end(&stage);
    }
    no_findings("after failed launches");
}

/* -------------------------------------------------------------------------------------------------------------- memory */

static cudaStream_t elsewhere;

/* A caching allocator's way: what was given back is the next one's, at once. */
static void *allocate_elsewhere(size_t size, void *user)
{
    (void)user;
    return device_malloc(size);
}

static void free_elsewhere(void *memory, size_t size, void *user)
{
    (void)size;
    (void)user;
    CUDA_OK(cu.cudaFreeAsync(memory, elsewhere));
    CUDA_OK(cu.cudaStreamSynchronize(elsewhere));
}

/* Destroyed while the device has not even begun. */
static void memory_is_in_use_until_the_end(void **state)
{
    (void)state;
    plora_context_options options = cuda_options();
    options.device_allocate = allocate_elsewhere;
    options.device_free = free_elsewhere;
    CUDA_OK(cu.cudaStreamCreateWithFlags(&elsewhere, cudaStreamNonBlocking));
    struct stage stage;
    CHECK_OK(begin(&stage, &options, PLORA_BF16, 0.0));
    void *stream = device_stream_create();
    CHECK_OK(plora_linear_forward(stage.adapters, 0, &stage.x, &stage.y, 0, stream));
    CHECK_OK(plora_linear_backward(stage.adapters, 0, &stage.x, &stage.dy, &stage.dx, 0, stream));
    end(&stage);
    device_stream_destroy(stream);
    CUDA_OK(cu.cudaStreamDestroy(elsewhere));
    no_findings("destroyed early");
}

/* -------------------------------------------------------------------------------------------------------------- bounds */

/* Every dtype, with rows that end anywhere, and such of 7 that begin at multiples of 16 bytes. */
static void nothing_behind_the_last_element(void **state)
{
    (void)state;
    const plora_context_options options = cuda_options();
    plora_context *context = NULL;
    CHECK_OK(plora_context_create(&options, &context));
    static const int64_t shapes[][3] = {{1, 1, 1}, {3, 7, 7}, {5, 16, 8}, {66, 70, 67}, {2, 130, 515}};
    for (int s = 0; s < CHECK_COUNT(shapes); ++s)
        for (int dtypes = 0; dtypes < 24; ++dtypes) {
            const int64_t tokens = shapes[s][0], in = shapes[s][1], out = shapes[s][2], gap = s % 2;
            const int32_t x_dtype = dtypes % 2, y_dtype = dtypes / 2 % 2, w_dtype = dtypes / 4 % 3;
            const int turned = dtypes / 12;
            plora_model *model = NULL;
            plora_adapters *adapters = NULL;
            CHECK_OK(plora_model_create(context, &model));
            plora_linear linear = PLORA_LINEAR_INIT;
            plora_matrix bias = exact_matrix(1, out, out, (int32_t)check_integer(PLORA_F32, PLORA_F16));
            linear.name = "layer";
            linear.weight =
                turned ? exact_matrix(in, out, out + gap, w_dtype) : exact_matrix(out, in, in + gap, w_dtype);
            linear.bias = bias.data;
            linear.bias_dtype = bias.dtype;
            linear.flags = turned ? PLORA_LAYER_FAN_IN_FAN_OUT : 0;
            CHECK_OK(plora_model_add_linear(model, &linear, NULL));
            plora_adapters_options how = PLORA_ADAPTERS_OPTIONS_INIT;
            how.rank = 1 + s % 3 * (in > 2 && out > 2);
            how.dropout = 0.3;
            CHECK_OK(plora_adapters_create(model, &how, &adapters));
            plora_matrix x = exact_matrix(tokens, in, in + gap, x_dtype),
                         dx = exact_matrix(tokens, in, in + gap, x_dtype);
            plora_matrix y = exact_matrix(tokens, out, out + gap, y_dtype),
                         dy = exact_matrix(tokens, out, out + gap, y_dtype);
            CHECK_OK(plora_linear_forward(adapters, 0, &x, &y, PLORA_LINEAR_DROPOUT, NULL));
            CHECK_OK(plora_linear_backward(adapters, 0, &x, &dy, &dx, PLORA_LINEAR_DROPOUT, NULL));
            CHECK_OK(plora_unload(adapters, NULL, NULL, NULL, NULL));
            plora_adapters_destroy(adapters);
            plora_model_destroy(model);
            void *const blocks[] = {bias.data, linear.weight.data, x.data, dx.data, y.data, dy.data};
            for (int i = 0; i < CHECK_COUNT(blocks); ++i)
                device_free(blocks[i]);
            char text[128];
            snprintf(text, sizeof text, "T=%d K=%d N=%d, x %d y %d W %d, turned %d, gap %d", (int)tokens, (int)in,
                     (int)out, x_dtype, y_dtype, w_dtype, turned, (int)gap);
            no_findings(text);
        }
    plora_context_destroy(context);
}

int main(void)
{
    setenv("PLORA_TEST_BACKEND", "cuda", 1);
    emulated_open();
    check_begin("test_cuda_stage");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_bits_on_any_stream),
        cmocka_unit_test(every_launch_may_fail),
        cmocka_unit_test(memory_is_in_use_until_the_end),
        cmocka_unit_test(nothing_behind_the_last_element),
    };
    return cmocka_run_group_tests_name("cuda_stage", tests, NULL, NULL);
}
