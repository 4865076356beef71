/* test_context.c: contexts, error messages, option structs of other versions, allocator hooks, memory figures, log. */
#include "check.h"

#include "handles.h"

static const int32_t known[] = {
#define STATUS_VALUE(name, value, text) value,
    PLORA_STATUS_LIST(STATUS_VALUE)
#undef STATUS_VALUE
};

static void status_strings(void **state)
{
    (void)state;
    for (int i = 0; i < CHECK_COUNT(known); ++i) {
        assert_int_equal(known[i], i); /* pinned, without gaps */
        for (int j = 0; j < i; ++j)
            assert_string_not_equal(plora_status_string(known[i]), plora_status_string(known[j]));
    }
    assert_string_equal(plora_status_string(PLORA_OK), "success");
    assert_string_equal(plora_status_string(PLORA_ERROR_SHAPE), "shape mismatch");
    assert_string_equal(plora_status_string(-1), "unknown status");
    assert_string_equal(plora_status_string(CHECK_COUNT(known)), "unknown status");
}

static void versions(void **state)
{
    (void)state;
    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", PLORA_VERSION_MAJOR, PLORA_VERSION_MINOR, PLORA_VERSION_PATCH);
    assert_string_equal(plora_version(), version);
    assert_int_equal(plora_abi_version(), PLORA_ABI_VERSION);
}

static void defaults(void **state)
{
    (void)state;
    plora_context *context = NULL;
    CHECK_OK(plora_context_create(NULL, &context));
    assert_non_null(context);
    CHECK_OK(plora_synchronize(context, NULL));
    plora_context_destroy(context);
    plora_context_destroy(NULL);
}

static plora_context_options options(void)
{
    const plora_context_options initial = PLORA_CONTEXT_OPTIONS_INIT;
    return initial;
}

/* Fails as it should, and leaves the output alone. */
#define REFUSED(given, status, ...)                                                                                    \
    do {                                                                                                               \
        plora_context *const before_ = (plora_context *)&known;                                                        \
        plora_context *context_ = before_;                                                                             \
        CHECK_FAILS(plora_context_create((given), &context_), (status), __VA_ARGS__);                                  \
        assert_ptr_equal(context_, before_);                                                                           \
    } while (0)

static void refused_options(void **state)
{
    (void)state;
    CHECK_FAILS(plora_context_create(NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "context is NULL");

    plora_context_options bad = options();
    bad.threads = -3;
    REFUSED(&bad, PLORA_ERROR_INVALID_ARGUMENT, "threads is -3", ">= 0");
    bad = options();
    bad.deterministic = 2;
    REFUSED(&bad, PLORA_ERROR_INVALID_ARGUMENT, "deterministic is 2");
    bad = options();
    bad.reserved = 1;
    REFUSED(&bad, PLORA_ERROR_INVALID_ARGUMENT, "reserved");
    bad = options();
    bad.backend = 7;
    REFUSED(&bad, PLORA_ERROR_INVALID_ARGUMENT, "backend 7");
    bad = options();
    bad.device = 1;
    REFUSED(&bad, PLORA_ERROR_INVALID_ARGUMENT, "device is 1");
    bad = options();
    bad.host_allocate = check_allocate;
    REFUSED(&bad, PLORA_ERROR_INVALID_ARGUMENT, "host_allocate", "host_free");
    bad = options();
    bad.host_free = check_free;
    REFUSED(&bad, PLORA_ERROR_INVALID_ARGUMENT, "host_allocate", "host_free");
}

/* Never a silent fall-back to the CPU: a build without CUDA says so. What the others say is in test_cuda_host.c. */
#if !PLORA_CUDA
static void absent_backend(void **state)
{
    (void)state;
    plora_context_options cuda = options();
    cuda.backend = PLORA_BACKEND_CUDA;
    REFUSED(&cuda, PLORA_ERROR_BACKEND_UNAVAILABLE, "CUDA backend", "CUDA=0");
}
#endif

/* Structs of older and newer callers: what is missing keeps its default, an unknown tail must be zero. */
static void struct_sizes(void **state)
{
    (void)state;
    struct {
        plora_context_options known;
        unsigned char tail[24];
    } newer;
    memset(&newer, 0, sizeof newer);
    newer.known = options();
    newer.known.struct_size = sizeof newer;
    plora_context *context = NULL;
    CHECK_OK(plora_context_create(&newer.known, &context));
    plora_context_destroy(context);
    newer.tail[5] = 1;
    char byte[64];
    snprintf(byte, sizeof byte, "byte %zu", sizeof newer.known + 5);
    REFUSED(&newer.known, PLORA_ERROR_UNSUPPORTED, "plora_context_options", byte, plora_version());

    plora_context_options older = options();
    older.struct_size = offsetof(plora_context_options, threads);
    older.threads = -1; /* beyond the end of the older struct: not read */
    CHECK_OK(plora_context_create(&older, &context));
    plora_context_destroy(context);

    const size_t senseless[] = {0, 1, sizeof(size_t) - 1, 4097, SIZE_MAX};
    for (int i = 0; i < CHECK_COUNT(senseless); ++i) {
        plora_context_options bad = options();
        bad.struct_size = senseless[i];
        char text[32];
        snprintf(text, sizeof text, "is %zu", senseless[i]);
        REFUSED(&bad, PLORA_ERROR_INVALID_ARGUMENT, "plora_context_options.struct_size", text, "_INIT");
    }
}

static void result_sizes(void **state)
{
    (void)state;
    plora_context *context = check_context(NULL, 0, 0);
    plora_memory_statistics full = PLORA_MEMORY_STATISTICS_INIT;
    CHECK_OK(plora_memory_stats(context, &full));
    assert_int_equal(full.struct_size, sizeof full);

    /* An older caller's struct: nothing beyond its end is written. */
    plora_memory_statistics older;
    memset(&older, 0x5a, sizeof older);
    older.struct_size = offsetof(plora_memory_statistics, allocations);
    CHECK_OK(plora_memory_stats(context, &older));
    assert_int_equal(older.struct_size, offsetof(plora_memory_statistics, allocations));
    assert_int_equal(older.current_bytes, full.current_bytes);
    assert_int_equal(older.peak_bytes, full.peak_bytes);
    unsigned char untouched[sizeof older];
    memset(untouched, 0x5a, sizeof untouched);
    assert_memory_equal((char *)&older + older.struct_size, untouched, sizeof older - older.struct_size);

    plora_memory_statistics bad = PLORA_MEMORY_STATISTICS_INIT;
    bad.struct_size = 3;
    CHECK_FAILS(plora_memory_stats(context, &bad), PLORA_ERROR_INVALID_ARGUMENT, "plora_memory_statistics", "is 3");
    CHECK_FAILS(plora_memory_stats(context, NULL), PLORA_ERROR_INVALID_ARGUMENT, "plora_memory_statistics is NULL");
    CHECK_FAILS(plora_memory_stats(NULL, &full), PLORA_ERROR_INVALID_ARGUMENT, "context is NULL");
    CHECK_FAILS(plora_synchronize(NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "context is NULL");
    if (!device_is_cuda()) /* which has streams, and need not survive what is none */
        CHECK_FAILS(plora_synchronize(context, &full), PLORA_ERROR_INVALID_ARGUMENT, "stream");
    plora_context_destroy(context);
}

/* Of host and device memory together. */
static size_t bytes_now(const plora_memory_statistics *statistics)
{
    return statistics->current_bytes + statistics->device_current_bytes;
}

static int64_t allocations(const plora_memory_statistics *statistics)
{
    return statistics->allocations + statistics->device_allocations;
}

/* What the library counts is what the hooks saw. */
static void memory_statistics(void **state)
{
    (void)state;
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    plora_context *context = check_context(&allocator, 1, 0);
    plora_memory_statistics statistics = PLORA_MEMORY_STATISTICS_INIT;
    CHECK_OK(plora_memory_stats(context, &statistics));
    assert_int_equal(bytes_now(&statistics), allocator.live_bytes);
    assert_int_equal(allocations(&statistics), allocator.calls);
    const size_t before = bytes_now(&statistics);

    void *memory = NULL, *device = NULL, *nothing = &nothing, *zeroed = NULL;
    CHECK_OK(plora__allocate(context, 1000, &memory));
    CHECK_OK(plora__device_allocate(context, 500, &device));
    CHECK_OK(plora__allocate(context, 0, &nothing));
    assert_null(nothing);
    assert_int_equal((uintptr_t)memory % 64, 0);
    assert_int_equal((uintptr_t)device % 64, 0);
    CHECK_OK(plora_memory_stats(context, &statistics));
    assert_int_equal(bytes_now(&statistics), allocator.live_bytes);
    assert_int_equal(bytes_now(&statistics), before + 1500);
    assert_int_equal(statistics.device_current_bytes, device_is_cuda() ? 500 : 0);
    assert_int_equal(allocations(&statistics), allocator.calls);
    plora__free(context, memory, 1000);
    CHECK_OK(plora__allocate_zeroed(context, 100, &zeroed));
    for (int i = 0; i < 100; ++i)
        assert_int_equal(((unsigned char *)zeroed)[i], 0);
    CHECK_OK(plora_memory_stats(context, &statistics));
    assert_int_equal(bytes_now(&statistics), before + 600);
    assert_true(statistics.peak_bytes + statistics.device_peak_bytes >= before + 1500);
    assert_int_equal(statistics.mapped_bytes, 0);
    plora__free(context, zeroed, 100);
    plora__device_free(context, device, 500);
    plora_context_destroy(context);
    check_allocator_empty(&allocator, "context");
}

static void sizes_do_not_overflow(void **state)
{
    (void)state;
    size_t product = 0;
    CHECK_OK(plora__multiply(SIZE_MAX / 3, 3, &product));
    assert_true(product == SIZE_MAX / 3 * 3);
    CHECK_FAILS(plora__multiply(SIZE_MAX / 2, 3, &product), PLORA_ERROR_OUT_OF_MEMORY, "overflow", "* 3");
}

/* Each k-th allocation of the creation fails once: an error, nothing leaked, and the next attempt works. */
static void every_allocation_fails(void **state)
{
    (void)state;
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    plora_context_destroy(check_context(&allocator, 1, 0));
    const int64_t calls = allocator.calls;
    assert_true(calls >= 1);
    for (int64_t k = 1; k <= calls; ++k) {
        allocator.calls = 0;
        allocator.fail_at = k;
        plora_context *context = NULL;
        CHECK_FAILS(check_context_create(&allocator, NULL, 1, 0, &context), PLORA_ERROR_OUT_OF_MEMORY, "bytes");
        assert_null(context);
        check_allocator_empty(&allocator, "failed creation");
    }
    assert_int_equal(allocator.failed, calls);
    allocator.fail_at = 0;
    plora_context_destroy(check_context(&allocator, 1, 0));
    check_allocator_empty(&allocator, "creation after failures");
}

static void message_copies(void **state)
{
    (void)state;
    CHECK_FAILS(plora_context_create(NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "");
    const char whole[] = "context is NULL";
    assert_string_equal(plora_last_error(), whole);
    char buffer[64];
    memset(buffer, 'x', sizeof buffer);
    assert_int_equal(plora_last_error_copy(buffer, sizeof buffer), strlen(whole));
    assert_string_equal(buffer, whole);
    memset(buffer, 'x', sizeof buffer);
    assert_int_equal(plora_last_error_copy(buffer, 8), strlen(whole));
    assert_string_equal(buffer, "context");
    assert_int_equal(buffer[8], 'x');
    assert_int_equal(plora_last_error_copy(buffer, 1), strlen(whole));
    assert_string_equal(buffer, "");
    assert_int_equal(plora_last_error_copy(NULL, 0), strlen(whole));

    /* A success leaves the message of the last failure. */
    plora_context_destroy(check_context(NULL, 0, 0));
    assert_string_equal(plora_last_error(), whole);

    /* Longer than the buffer: cut, never overrun. */
    char *text = malloc(5000);
    assert_non_null(text);
    memset(text, 'y', 4999);
    text[4999] = '\0';
    assert_int_equal(plora__fail(PLORA_ERROR_IO, "%s", text), PLORA_ERROR_IO);
    assert_int_equal(strlen(plora_last_error()), 1023);
    assert_int_equal(plora__fail_in(PLORA_ERROR_IO, "model.safetensors"), PLORA_ERROR_IO);
    assert_int_equal(strncmp(plora_last_error(), "model.safetensors: yyy", 22), 0);
    free(text);
}

/* What a thread sees goes back through this: cmocka's own checks belong to the main thread. */
struct thread_result {
    int empty_first, own_message;
};

static void *fail_on_a_thread(void *argument)
{
    struct thread_result *result = argument;
    result->empty_first = plora_last_error()[0] == '\0';
    plora_context_options bad = PLORA_CONTEXT_OPTIONS_INIT;
    plora_context *context = NULL;
    result->own_message = 1;
    for (int i = 1; i <= 200; ++i) {
        char want[32];
        bad.threads = -i;
        snprintf(want, sizeof want, "threads is %d:", -i);
        const plora_status status = plora_context_create(&bad, &context);
        result->own_message &=
            status == PLORA_ERROR_INVALID_ARGUMENT && strncmp(plora_last_error(), want, strlen(want)) == 0;
    }
    return NULL;
}

static void messages_belong_to_threads(void **state)
{
    (void)state;
    CHECK_FAILS(plora_context_create(NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "context is NULL");
    enum { THREADS = 4 };
    pthread_t threads[THREADS];
    struct thread_result results[THREADS];
    memset(results, 0, sizeof results);
    for (int i = 0; i < THREADS; ++i)
        assert_int_equal(pthread_create(&threads[i], NULL, fail_on_a_thread, &results[i]), 0);
    for (int i = 0; i < THREADS; ++i)
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    for (int i = 0; i < THREADS; ++i) {
        assert_true(results[i].empty_first);
        assert_true(results[i].own_message);
    }
    assert_string_equal(plora_last_error(), "context is NULL");
}

struct allocating_thread {
    plora_context *context;
    plora_status status;
};

static void *allocate_on_a_thread(void *argument)
{
    struct allocating_thread *thread = argument;
    for (size_t bytes = 1; bytes <= 300 && thread->status == PLORA_OK; ++bytes) {
        void *memory = NULL;
        thread->status = plora__allocate(thread->context, bytes, &memory);
        plora__free(thread->context, memory, bytes);
        plora__context_retain(thread->context);
        plora__context_release(thread->context);
    }
    return NULL;
}

/* References and figures are counted right when several threads allocate at once. */
static void counters_belong_to_all_threads(void **state)
{
    (void)state;
    enum { THREADS = 4 };
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    plora_context *context = check_context(&allocator, 1, 0);
    plora_memory_statistics before = PLORA_MEMORY_STATISTICS_INIT, after = PLORA_MEMORY_STATISTICS_INIT;
    CHECK_OK(plora_memory_stats(context, &before));
    pthread_t threads[THREADS];
    struct allocating_thread arguments[THREADS];
    for (int i = 0; i < THREADS; ++i) {
        arguments[i] = (struct allocating_thread){context, PLORA_OK};
        assert_int_equal(pthread_create(&threads[i], NULL, allocate_on_a_thread, &arguments[i]), 0);
    }
    for (int i = 0; i < THREADS; ++i) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
        assert_int_equal(arguments[i].status, PLORA_OK);
    }
    CHECK_OK(plora_memory_stats(context, &after));
    assert_int_equal(after.current_bytes, before.current_bytes);
    assert_int_equal(after.allocations, before.allocations + THREADS * 300);
    assert_in_range(after.peak_bytes, before.peak_bytes, before.current_bytes + (size_t)THREADS * 300);
    plora_context_destroy(context);
    check_allocator_empty(&allocator, "threads");
}

static void log_levels(void **state)
{
    (void)state;
    struct check_log log = {0, -1, ""};
    plora_context *context = NULL;
    CHECK_OK(check_context_create(NULL, &log, 1, 0, &context));
    const int64_t before = log.count;
    context->options.log_level = PLORA_LOG_WARNING;
    plora__log(context, PLORA_LOG_INFO, "not wanted");
    assert_int_equal(log.count, before);
    plora__log(context, PLORA_LOG_WARNING, "captured %.2f of stage %d", 0.54, 3);
    assert_int_equal(log.count, before + 1);
    assert_int_equal(log.level, PLORA_LOG_WARNING);
    assert_string_equal(log.text, "captured 0.54 of stage 3");
    plora_context_destroy(context);

    CHECK_OK(plora_context_create(NULL, &context)); /* no log: silent, no crash */
    plora__log(context, PLORA_LOG_ERROR, "nobody listens");
    plora_context_destroy(context);
}

int main(void)
{
    check_begin("test_context");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(status_strings),
        cmocka_unit_test(versions),
        cmocka_unit_test(defaults),
        cmocka_unit_test(refused_options),
#if !PLORA_CUDA
        cmocka_unit_test(absent_backend),
#endif
        cmocka_unit_test(struct_sizes),
        cmocka_unit_test(result_sizes),
        cmocka_unit_test(memory_statistics),
        cmocka_unit_test(sizes_do_not_overflow),
        cmocka_unit_test(every_allocation_fails),
        cmocka_unit_test(message_copies),
        cmocka_unit_test(messages_belong_to_threads),
        cmocka_unit_test(counters_belong_to_all_threads),
        cmocka_unit_test(log_levels),
    };
    return cmocka_run_group_tests_name("context", tests, NULL, NULL);
}
