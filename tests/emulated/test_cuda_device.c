/* test_cuda_device.c: a CUDA context on the emulated device (tests/emulator): its memory and who gives it, streams and capture, the
 * host's current device, and what happens when any call of the CUDA libraries fails, once or for good. */
#include "emulated.h"

static struct check_allocator allocator = CHECK_ALLOCATOR_INIT;

/* A layer A[3,20], B[12,3] with its optimizer; every handle may be missing. */
struct run {
    plora_context *context;
    plora_model *model;
    plora_adapters *adapters;
    plora_optimizer *optimizer;
    struct check_matrix weight;
};

static void finish(struct run *run)
{
    plora_optimizer_destroy(run->optimizer);
    plora_adapters_destroy(run->adapters);
    plora_model_destroy(run->model);
    plora_context_destroy(run->context);
    if (run->weight.memory != NULL) check_matrix_free(&run->weight);
    memset(run, 0, sizeof *run);
}

/* What is to fail in start(), and its calls before. */
static struct {
    const char *kind;
    long k, calls;
} failure;

/* hooks = 0: the runtime's own cudaMalloc(). */
static plora_status start(struct run *run, int hooks, int32_t device)
{
    memset(run, 0, sizeof *run);
    run->weight = check_matrix_new(12, 20, 23, PLORA_BF16);
    if (failure.kind != NULL) {
        failure.calls = cu.emu_calls(failure.kind);
        cu.emu_fail(failure.kind, failure.k);
    }
    plora_context_options options = PLORA_CONTEXT_OPTIONS_INIT;
    options.backend = PLORA_BACKEND_CUDA;
    options.device = device;
    options.host_allocate = check_allocate;
    options.host_free = check_free;
    options.host_user = &allocator;
    if (hooks) {
        options.device_allocate = check_device_allocate;
        options.device_free = check_device_free;
        options.device_user = &allocator;
    }
    plora_status status = plora_context_create(&options, &run->context);
    if (status == PLORA_OK) status = plora_model_create(run->context, &run->model);
    if (status == PLORA_OK) status = check_add_linear(run->model, "layer", &run->weight.m, NULL, 0, 0, NULL);
    plora_adapters_options adapters = PLORA_ADAPTERS_OPTIONS_INIT;
    adapters.rank = 3;
    if (status == PLORA_OK) status = plora_adapters_create(run->model, &adapters, &run->adapters);
    if (status == PLORA_OK) status = plora_optimizer_create(run->adapters, NULL, &run->optimizer);
    return status;
}

static plora_status step(struct run *run, void *stream)
{
    plora_step_report report = PLORA_STEP_REPORT_INIT;
    return plora_optimizer_step(run->optimizer, 1.0, &report, stream);
}

static int current_device(void)
{
    int device = -1;
    assert_int_equal(cu.cudaGetDevice(&device), cudaSuccess);
    return device;
}

/* -------------------------------------------------------------------------------------------------------------- memory */

static void memory_of_the_runtime(void **state)
{
    (void)state;
    struct run run;
    plora_memory_statistics empty = PLORA_MEMORY_STATISTICS_INIT, full = empty, last = empty;
    const long before = cu.emu_calls("malloc");
    CHECK_OK(start(&run, 0, 0));
    CHECK_OK(plora_memory_stats(run.context, &full));
    const long made = cu.emu_calls("malloc") - before - 1; /* one is the twin's of the weight */
    CHECK(full.device_allocations == made, "%lld counted, %ld made", (long long)full.device_allocations, made);
    float *parameters = NULL;
    int64_t count = 0;
    CHECK_OK(plora_adapters_parameters(run.adapters, &parameters, &count));
    CHECK(full.device_current_bytes >= 4 * (size_t)count * sizeof(float), "%zu bytes for two arenas and two moments",
          full.device_current_bytes);
    plora_optimizer_destroy(run.optimizer);
    plora_adapters_destroy(run.adapters);
    plora_model_destroy(run.model); /* its weights keep residuals */
    run.optimizer = NULL;
    run.adapters = NULL;
    run.model = NULL;
    CHECK_OK(plora_memory_stats(run.context, &last));
    CHECK(last.device_current_bytes == 0 && last.device_peak_bytes == full.device_peak_bytes, "%zu bytes left",
          last.device_current_bytes);
    finish(&run);
    check_allocator_empty(&allocator, "memory of the runtime");
}

static void memory_of_the_host(void **state)
{
    (void)state;
    struct run run;
    const int64_t calls = allocator.calls;
    CHECK_OK(start(&run, 1, 0));
    plora_memory_statistics full = PLORA_MEMORY_STATISTICS_INIT;
    CHECK_OK(plora_memory_stats(run.context, &full));
    CHECK(full.device_allocations > 0, "nothing came from the hooks");
    assert_int_equal(full.allocations + full.device_allocations, allocator.calls - calls);
    assert_int_equal(full.current_bytes + full.device_current_bytes, allocator.live_bytes);
    /* Nothing more on the hot path. */
    const int64_t created = allocator.calls;
    const long mallocs = cu.emu_calls("malloc");
    for (int i = 0; i < 3; ++i)
        CHECK_OK(step(&run, NULL));
    CHECK(allocator.calls == created && cu.emu_calls("malloc") == mallocs, "a step has allocated memory");
    finish(&run);
    check_allocator_empty(&allocator, "memory of the host");
}

static void *allocate_crooked(size_t size, void *user)
{
    (void)user;
    return (char *)device_malloc(size + 8) + 8;
}

static void free_crooked(void *memory, size_t size, void *user)
{
    (void)size;
    (void)user;
    device_free((char *)memory - 8);
}

static void crooked_memory_is_refused(void **state)
{
    (void)state;
    plora_context_options options = PLORA_CONTEXT_OPTIONS_INIT;
    options.backend = PLORA_BACKEND_CUDA;
    options.device_allocate = allocate_crooked;
    options.device_free = free_crooked;
    plora_context *context = NULL;
    plora_model *model = NULL;
    plora_adapters *adapters = NULL;
    struct check_matrix weight = check_matrix_new(12, 20, 20, PLORA_F32);
    CHECK_OK(plora_context_create(&options, &context));
    CHECK_OK(plora_model_create(context, &model));
    CHECK_OK(check_add_linear(model, "layer", &weight.m, NULL, 0, 0, NULL));
    CHECK_FAILS(plora_adapters_create(model, NULL, &adapters), PLORA_ERROR_BACKEND, "device_allocate", "64 bytes");
    assert_null(adapters);
    plora_model_destroy(model);
    plora_context_destroy(context);
    check_matrix_free(&weight);
}

/* ------------------------------------------------------------------------------------------------------ devices, streams */

static void device_of_the_host_stays(void **state)
{
    (void)state;
    struct run run;
    for (int32_t device = 0; device < 2; ++device) {
        assert_int_equal(cu.cudaSetDevice(1 - device), cudaSuccess);
        CHECK_OK(start(&run, 0, device));
        assert_int_equal(current_device(), 1 - device);
        CHECK_OK(step(&run, NULL));
        CHECK_OK(plora_optimizer_zero_gradients(run.optimizer, NULL));
        CHECK_OK(plora_synchronize(run.context, NULL));
        assert_int_equal(current_device(), 1 - device);
        finish(&run);
        assert_int_equal(current_device(), 1 - device);
    }
    assert_int_equal(cu.cudaSetDevice(0), cudaSuccess);
    plora_context_options options = PLORA_CONTEXT_OPTIONS_INIT;
    options.backend = PLORA_BACKEND_CUDA;
    static const int32_t none[] = {2, -1};
    for (int i = 0; i < 2; ++i) {
        char value[32];
        snprintf(value, sizeof value, "device is %d", none[i]);
        options.device = none[i];
        plora_context *context = NULL;
        CHECK_FAILS(plora_context_create(&options, &context), PLORA_ERROR_INVALID_ARGUMENT, value, "2 CUDA devices");
        assert_null(context);
    }
}

static void captured_streams(void **state)
{
    (void)state;
    struct run run;
    CHECK_OK(start(&run, 0, 0));
    float *gradients = NULL;
    int64_t count = 0;
    CHECK_OK(plora_adapters_gradients(run.adapters, &gradients, &count));
    float *host = device_mirror(gradients, (size_t)count * sizeof *host);
    cudaStream_t stream = NULL;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t executable = NULL;
    assert_int_equal(cu.cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cu.cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    CHECK_FAILS(step(&run, stream), PLORA_ERROR_UNSUPPORTED, "captured");
    CHECK_FAILS(plora_synchronize(run.context, stream), PLORA_ERROR_UNSUPPORTED, "captured");
    CHECK_FAILS(plora_optimizer_reset(run.optimizer, stream), PLORA_ERROR_UNSUPPORTED, "captured");
    CHECK_OK(plora_optimizer_zero_gradients(run.optimizer, stream));
    assert_int_equal(cu.cudaStreamEndCapture(stream, &graph), cudaSuccess); /* the refused calls have not broken it */
    assert_int_equal(cu.cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    for (int round = 0; round < 2; ++round) {
        for (int64_t i = 0; i < count; ++i)
            host[i] = 1.0f;
        device_upload();
        assert_int_equal(cu.cudaGraphLaunch(executable, stream), cudaSuccess);
        CHECK_OK(plora_synchronize(run.context, stream));
        device_download(PLORA_OK);
        for (int64_t i = 0; i < count; ++i)
            assert_true(host[i] == 0.0f);
    }
    assert_int_equal(cu.cudaGraphExecDestroy(executable), cudaSuccess);
    assert_int_equal(cu.cudaGraphDestroy(graph), cudaSuccess);
    assert_int_equal(cu.cudaStreamDestroy(stream), cudaSuccess);
    device_forget(host);
    finish(&run);
}

/* ------------------------------------------------------------------------------------------------------------- failures */

/* Calls of a kind fail, one at a time: the library says so, gives everything back, and works the next time. */
static void calls_fail_one_at_a_time(void **state)
{
    (void)state;
    static const struct {
        const char *kind;
        plora_status status;
        const char *said;
    } kinds[] = {
        {"malloc", PLORA_ERROR_OUT_OF_MEMORY, "cudaMalloc"},
        {"library", PLORA_ERROR_OUT_OF_MEMORY, "cudaLibraryLoadData"},
        {"kernel", PLORA_ERROR_BACKEND, "cudaLibraryGetKernel"},
        {"cublas", PLORA_ERROR_OUT_OF_MEMORY, "cublasCreate"},
        {"launch", PLORA_ERROR_BACKEND, "kernel: cudaErrorLaunchOutOfResources"},
        {"copy", PLORA_ERROR_BACKEND, "cudaMemcpyAsync: cudaErrorInvalidValue"},
        {"set", PLORA_ERROR_BACKEND, "cudaMemsetAsync: cudaErrorInvalidValue"},
        {"wait", PLORA_ERROR_BACKEND, "Synchronize: cudaErrorUnknown"},
    };
    for (int i = 0; i < CHECK_COUNT(kinds); ++i) {
        int failures = 0;
        for (int k = 1;; k += k < 10 ? 1 : k / 2) { /* of many, those at the beginning and some of the others */
            struct run run;
            failure.kind = kinds[i].kind;
            failure.k = k;
            plora_status status = start(&run, 0, 0);
            if (status == PLORA_OK) status = step(&run, NULL);
            const int reached = cu.emu_calls(failure.kind) - failure.calls >= k;
            cu.emu_fail(failure.kind, 0);
            failure.kind = NULL;
            if (!reached) {
                CHECK_OK(status);
                finish(&run);
                break;
            }
            failures++;
            CHECK_FAILS(status, kinds[i].status, kinds[i].said, "CUDA device 0");
            CHECK(cu.cudaGetLastError() == cudaSuccess, "%s %d: the error was left to the host", kinds[i].kind, k);
            if (run.optimizer != NULL) CHECK_OK(step(&run, NULL));
            finish(&run);
            check_allocator_empty(&allocator, kinds[i].kind);
        }
        CHECK(failures > 0, "no call of kind %s was made", kinds[i].kind);
        print_message("%s: %d calls failed, one at a time\n", kinds[i].kind, failures);
    }
}

/* The other side of the test below: a kernel faults, and the error comes with the next call that waits. */
static int lose_the_device(void)
{
    struct run run;
    CHECK_OK(start(&run, 0, 0));
    cu.emu_fail("fault", 1);
    CHECK_OK(plora_optimizer_step(run.optimizer, 1.0, NULL, NULL)); /* nothing was executed yet */
    CHECK_FAILS(plora_synchronize(run.context, NULL), PLORA_ERROR_BACKEND, "cudaDeviceSynchronize",
                "cudaErrorLaunchFailure", "last launch was adamw_kernel");
    for (int i = 0; i < 2; ++i)
        CHECK_FAILS(plora_synchronize(run.context, NULL), PLORA_ERROR_BACKEND, "lost to an earlier error",
                    "cudaErrorLaunchFailure");
    CHECK_FAILS(plora_optimizer_step(run.optimizer, 1.0, NULL, NULL), PLORA_ERROR_BACKEND, "lost");
    plora_optimizer_destroy(run.optimizer);
    plora_adapters_destroy(run.adapters);
    plora_model_destroy(run.model);
    plora_context_destroy(run.context);
    printf("lost as it should\n");
    fflush(stdout);
    _exit(0); /* what a lost device still holds is no leak */
}

static void late_errors_are_reported_once(void **state)
{
    (void)state;
    const struct emulated_result result = emulated_run("lose", NULL);
    CHECK(result.status == 0 && strstr(result.output, "lost as it should") != NULL, "status %d: %s", result.status,
          result.output);
}

int main(int count, char **arguments)
{
    setenv("PLORA_TEST_BACKEND", "cuda", 1);
    setenv("EMU_DEVICES", "2", 1);
    emulated_open();
    if (count == 2 && strcmp(arguments[1], "lose") == 0) return lose_the_device();
    check_begin("test_cuda_device");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(memory_of_the_runtime),
        cmocka_unit_test(memory_of_the_host),
        cmocka_unit_test(crooked_memory_is_refused),
        cmocka_unit_test(device_of_the_host_stays),
        cmocka_unit_test(captured_streams),
        cmocka_unit_test(calls_fail_one_at_a_time),
        cmocka_unit_test(late_errors_are_reported_once),
    };
    return cmocka_run_group_tests_name("cuda_device", tests, NULL, NULL);
}
