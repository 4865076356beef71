/* check.h: what all tests share.
 *
 *     seed          every run draws new inputs; the seed is printed first, PLORA_TEST_SEED=<number> repeats a run.
 *     buffers       matrices between guard bands; guards and the gaps between rows are bytes 0xff, a NaN in every dtype, so a
 *                   stray read spreads and a stray write is found.
 *                       [guard][row 0][gap][row 1][gap] ... [row n-1][gap][guard]
 *     comparisons   fail on !(error <= bound): a NaN never passes.
 *     allocator     hooks for plora_context_options that count, check every free, and make the k-th allocation fail.
 *     device        PLORA_TEST_BACKEND=cuda makes the contexts CUDA's; a buffer has a twin in device memory then (device.h).
 * PLORA_TEST_QUICK=1 asks for smaller grids (valgrind). Everything is static: each test is one program. */
#ifndef PLORA_TESTS_CHECK_H
#define PLORA_TESTS_CHECK_H

#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "device.h"
#include "dtype.h"
#include "plora.h"

#define CHECK_UNUSED __attribute__((unused))
#define CHECK_COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* --------------------------------------------------------------------------------------------------------------- seed */

static uint64_t check_seed_value CHECK_UNUSED;
static _Thread_local uint64_t check_state CHECK_UNUSED;

static CHECK_UNUSED int check_quick(void)
{
    const char *quick = getenv("PLORA_TEST_QUICK");
    return quick != NULL && strcmp(quick, "0") != 0 && *quick != '\0';
}

/* splitmix64 */
static CHECK_UNUSED uint64_t check_next(void)
{
    uint64_t z = (check_state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* Starts this thread's generator from the run's seed and a salt, so that each test repeats alone. */
static CHECK_UNUSED void check_reseed(uint64_t salt)
{
    check_state = check_seed_value ^ (salt * 0xD1342543DE82EF95u);
}

/* Uniform in [-1, 1). */
static CHECK_UNUSED double check_uniform(void)
{
    return (double)(int64_t)(check_next() >> 11) * 0x1p-52 - 1.0;
}

/* Uniform in low .. high, both included. */
static CHECK_UNUSED int64_t check_integer(int64_t low, int64_t high)
{
    return low + (int64_t)(check_next() % (uint64_t)(high - low + 1));
}

/* Call first in main. */
static CHECK_UNUSED void check_begin(const char *name)
{
    const char *given = getenv("PLORA_TEST_SEED");
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    check_state = (uint64_t)now.tv_sec * 1000000007u + (uint64_t)now.tv_nsec;
    check_seed_value = given != NULL && *given != '\0' ? strtoull(given, NULL, 0) : check_next() >> 16;
    check_reseed(0);
    fprintf(stderr, "%s: PLORA_TEST_SEED=%" PRIu64 "\n", name, check_seed_value);
}

/* Fails the running test with a message that says how to repeat it. Main thread only, as cmocka demands. */
static CHECK_UNUSED void check_fail(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4), noreturn));
static CHECK_UNUSED void check_fail(const char *file, int line, const char *format, ...)
{
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    print_error("%s\nrepeat with PLORA_TEST_SEED=%" PRIu64 "\n", text, check_seed_value);
    _fail(file, line);
    abort(); /* not reached, which the compiler cannot know */
}

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            print_error("CHECK(%s): ", #condition);                                                                    \
            check_fail(__FILE__, __LINE__, __VA_ARGS__);                                                               \
        }                                                                                                              \
    } while (0)

/* ------------------------------------------------------------------------------------------------------------- status */

#define CHECK_OK(expression)                                                                                           \
    do {                                                                                                               \
        const plora_status check_status_ = (expression);                                                               \
        if (check_status_ != PLORA_OK)                                                                                 \
            check_fail(__FILE__, __LINE__, "%s: %s: %s", #expression, plora_status_string(check_status_),              \
                       plora_last_error());                                                                            \
    } while (0)

static CHECK_UNUSED void check_failure(const char *file, int line, const char *expression, plora_status got,
                                       plora_status want, const char *const *parts)
{
    if (got != want)
        check_fail(file, line, "%s: status '%s' (message '%s'), want '%s'", expression, plora_status_string(got),
                   got == PLORA_OK ? "" : plora_last_error(), plora_status_string(want));
    if (plora_last_error()[0] == '\0') check_fail(file, line, "%s: no message", expression);
    for (; *parts != NULL; ++parts)
        if (strstr(plora_last_error(), *parts) == NULL)
            check_fail(file, line, "%s: message '%s' does not say '%s'", expression, plora_last_error(), *parts);
}

/* The call must return `status`, with a message that has every one of the given parts in it (at least one, "" for any). */
#define CHECK_FAILS(expression, status, ...)                                                                           \
    check_failure(__FILE__, __LINE__, #expression, (expression), (status), (const char *const[]){__VA_ARGS__, NULL})

/* ------------------------------------------------------------------------------------------------------------ buffers */

enum { CHECK_GUARD = 64, CHECK_POISON = 0xff };

struct check_matrix {
    plora_matrix m;
    unsigned char *memory, *snapshot;
    size_t bytes;
};

/* All poison: every element is NaN. The data is aligned to its element only, not to a vector. */
static CHECK_UNUSED struct check_matrix check_matrix_new(int64_t rows, int64_t columns, int64_t stride, int32_t dtype)
{
    const size_t size = plora__dtype_size(dtype);
    const size_t front = CHECK_GUARD + size * (size_t)check_integer(0, 3);
    struct check_matrix matrix = {{NULL, rows, columns, stride, dtype, 0}, NULL, NULL, 0};
    matrix.bytes = front + size * (size_t)(rows * stride) + CHECK_GUARD;
    matrix.memory = malloc(matrix.bytes);
    matrix.snapshot = malloc(matrix.bytes);
    CHECK(matrix.memory != NULL && matrix.snapshot != NULL, "the test itself is out of memory");
    memset(matrix.memory, CHECK_POISON, matrix.bytes);
    memset(matrix.snapshot, CHECK_POISON, matrix.bytes);
    matrix.m.data = matrix.memory + front;
    device_twin(matrix.memory, matrix.bytes);
    return matrix;
}

static CHECK_UNUSED void check_matrix_free(struct check_matrix *matrix)
{
    device_forget(matrix->memory);
    free(matrix->memory);
    free(matrix->snapshot);
    memset(matrix, 0, sizeof *matrix);
}

/* Elements uniform in [-range, range), rounded to the dtype. */
static CHECK_UNUSED void check_matrix_random(struct check_matrix *matrix, double range)
{
    for (int64_t i = 0; i < matrix->m.rows; ++i)
        for (int64_t j = 0; j < matrix->m.columns; ++j)
            plora__store(matrix->m.data, i * matrix->m.stride + j, matrix->m.dtype, (float)(range * check_uniform()));
    device_refresh(matrix->memory);
}

static CHECK_UNUSED void check_matrix_snapshot(struct check_matrix *matrix)
{
    if (matrix->bytes > 0) memcpy(matrix->snapshot, matrix->memory, matrix->bytes);
}

/* No byte has changed since the snapshot (since creation, if there was none). */
static CHECK_UNUSED void check_matrix_unchanged(const struct check_matrix *matrix, const char *what)
{
    for (size_t i = 0; i < matrix->bytes; ++i)
        CHECK(matrix->memory[i] == matrix->snapshot[i], "%s: byte %zu of %zu has changed", what, i, matrix->bytes);
}

/* Guards and gaps are as they were. */
static CHECK_UNUSED void check_matrix_guards(const struct check_matrix *matrix, const char *what)
{
    const size_t size = plora__dtype_size(matrix->m.dtype);
    const size_t front = (size_t)((unsigned char *)matrix->m.data - matrix->memory);
    const size_t row = size * (size_t)matrix->m.stride, used = size * (size_t)matrix->m.columns;
    const size_t end = front + row * (size_t)matrix->m.rows;
    for (size_t i = 0; i < matrix->bytes; ++i) {
        const int element = i >= front && i < end && (i - front) % row < used;
        CHECK(element || matrix->memory[i] == CHECK_POISON, "%s [%lld,%lld], stride %lld: wrote outside, at byte %lld",
              what, (long long)matrix->m.rows, (long long)matrix->m.columns, (long long)matrix->m.stride,
              (long long)i - (long long)front);
    }
}

static CHECK_UNUSED double check_element(const plora_matrix *matrix, int64_t i, int64_t j)
{
    return plora__load(matrix->data, i * matrix->stride + j, matrix->dtype);
}

/* -------------------------------------------------------------------------------------------------------- comparisons */

/* |got - want| <= bound; a NaN fails. */
#define CHECK_CLOSE(got, want, bound, ...)                                                                             \
    do {                                                                                                               \
        const double check_got_ = (got), check_want_ = (want), check_bound_ = (bound);                                 \
        const double check_error_ = fabs(check_got_ - check_want_);                                                    \
        if (!(check_error_ <= check_bound_)) {                                                                         \
            print_error("%.9g, want %.9g: error %.3g, bound %.3g: ", check_got_, check_want_, check_error_,            \
                        check_bound_);                                                                                 \
            check_fail(__FILE__, __LINE__, __VA_ARGS__);                                                               \
        }                                                                                                              \
    } while (0)

/* Element by element; want and bound are dense [rows, columns]. */
static CHECK_UNUSED void check_matrix_close(const plora_matrix *got, const double *want, const double *bound,
                                            const char *what, const char *context)
{
    for (int64_t i = 0; i < got->rows; ++i)
        for (int64_t j = 0; j < got->columns; ++j)
            CHECK_CLOSE(check_element(got, i, j), want[i * got->columns + j], bound[i * got->columns + j],
                        "%s[%lld,%lld] of [%lld,%lld]: %s", what, (long long)i, (long long)j, (long long)got->rows,
                        (long long)got->columns, context);
}

/* Unit roundoff: half the distance from 1 to the next number. */
static CHECK_UNUSED double check_roundoff(int32_t dtype)
{
    return dtype == PLORA_F32 ? 0x1p-24 : dtype == PLORA_BF16 ? 0x1p-8 : 0x1p-11;
}

/* ---------------------------------------------------------------------------------------------------------- allocator */

/* Fails the allocation number fail_at (1, 2, ...; 0 = none). `errors` counts frees of a wrong size or of a damaged block. */
struct check_allocator {
    pthread_mutex_t lock;
    int64_t calls, live, live_bytes, fail_at, failed, errors;
};

#define CHECK_ALLOCATOR_INIT                                                                                           \
    {                                                                                                                  \
        PTHREAD_MUTEX_INITIALIZER, 0, 0, 0, 0, 0, 0                                                                    \
    }

struct check_block {
    void *base;
    size_t size;
    uint64_t magic;
};

#define CHECK_MAGIC UINT64_C(0x706c6f7261636865)

static CHECK_UNUSED void *check_allocate(size_t size, size_t alignment, void *user)
{
    struct check_allocator *allocator = user;
    pthread_mutex_lock(&allocator->lock);
    const int fails = ++allocator->calls == allocator->fail_at;
    if (alignment == 0 || (alignment & (alignment - 1)) != 0 || size == 0) allocator->errors++;
    if (fails) allocator->failed++;
    pthread_mutex_unlock(&allocator->lock);
    if (fails) return NULL;

    const size_t front = alignment < sizeof(struct check_block) ? 64 : alignment;
    void *base = NULL;
    if (posix_memalign(&base, alignment < 64 ? 64 : alignment, front + size) != 0) return NULL;
    unsigned char *memory = (unsigned char *)base + front;
    memset(memory, CHECK_POISON, size);
    const struct check_block block = {base, size, CHECK_MAGIC};
    memcpy(memory - sizeof block, &block, sizeof block);
    pthread_mutex_lock(&allocator->lock);
    allocator->live++;
    allocator->live_bytes += (int64_t)size;
    pthread_mutex_unlock(&allocator->lock);
    return memory;
}

static CHECK_UNUSED void check_free(void *memory, size_t size, void *user)
{
    struct check_allocator *allocator = user;
    if (memory == NULL) return;
    struct check_block block;
    memcpy(&block, (unsigned char *)memory - sizeof block, sizeof block);
    pthread_mutex_lock(&allocator->lock);
    if (block.magic != CHECK_MAGIC || block.size != size) allocator->errors++;
    allocator->live--;
    allocator->live_bytes -= (int64_t)size;
    pthread_mutex_unlock(&allocator->lock);
    if (block.magic != CHECK_MAGIC) return;
    memset((unsigned char *)memory - sizeof block, 0xdd, sizeof block + block.size);
    free(block.base);
}

/* The same for device memory, in the same account. */
static CHECK_UNUSED void *check_device_allocate(size_t size, void *user)
{
    struct check_allocator *allocator = user;
    pthread_mutex_lock(&allocator->lock);
    const int fails = ++allocator->calls == allocator->fail_at;
    if (size == 0) allocator->errors++;
    if (fails)
        allocator->failed++;
    else {
        allocator->live++;
        allocator->live_bytes += (int64_t)size;
    }
    pthread_mutex_unlock(&allocator->lock);
    return fails ? NULL : device_malloc(size);
}

static CHECK_UNUSED void check_device_free(void *memory, size_t size, void *user)
{
    struct check_allocator *allocator = user;
    pthread_mutex_lock(&allocator->lock);
    allocator->live--;
    allocator->live_bytes -= (int64_t)size;
    pthread_mutex_unlock(&allocator->lock);
    device_free(memory);
}

/* A log for plora_context_options: the number of messages and the last one. */
struct check_log {
    int64_t count;
    int32_t level;
    char text[512];
};

static CHECK_UNUSED void check_log_message(int32_t level, const char *message, void *user)
{
    struct check_log *log = user;
    log->count++;
    log->level = level;
    snprintf(log->text, sizeof log->text, "%s", message);
}

/* A context of the backend under test. allocator and log may be NULL. */
static CHECK_UNUSED plora_status check_context_create(struct check_allocator *allocator, struct check_log *log,
                                                      int32_t threads, int32_t deterministic, plora_context **context)
{
    plora_context_options options = PLORA_CONTEXT_OPTIONS_INIT;
    options.backend = device_backend();
    options.threads = threads;
    options.deterministic = deterministic;
    if (allocator != NULL) {
        options.host_allocate = check_allocate;
        options.host_free = check_free;
        options.host_user = allocator;
        options.device_allocate = check_device_allocate;
        options.device_free = check_device_free;
        options.device_user = allocator;
    }
    if (log != NULL) {
        options.log = check_log_message;
        options.log_user = log;
        options.log_level = PLORA_LOG_INFO;
    }
    return plora_context_create(&options, context);
}

static CHECK_UNUSED plora_context *check_context(struct check_allocator *allocator, int32_t threads,
                                                 int32_t deterministic)
{
    plora_context *context = NULL;
    CHECK_OK(check_context_create(allocator, NULL, threads, deterministic, &context));
    return context;
}

/* Adds a layer whose tensors are the twins of these; returns the status. */
static CHECK_UNUSED plora_status check_add_linear(plora_model *model, const char *name, const plora_matrix *weight,
                                                  const void *bias, int32_t bias_dtype, int32_t flags, int32_t *layer)
{
    plora_linear linear = PLORA_LINEAR_INIT;
    linear.name = name;
    linear.weight = device_matrix(*weight);
    linear.bias = device_of(bias);
    linear.bias_dtype = bias_dtype;
    linear.flags = flags;
    return plora_model_add_linear(model, &linear, layer);
}

/* Everything was given back, and given back right. */
static CHECK_UNUSED void check_allocator_empty(const struct check_allocator *allocator, const char *what)
{
    CHECK(allocator->live == 0 && allocator->live_bytes == 0, "%s: %lld allocations, %lld bytes were not freed", what,
          (long long)allocator->live, (long long)allocator->live_bytes);
    CHECK(allocator->errors == 0, "%s: %lld frees of a wrong size or of damaged memory", what,
          (long long)allocator->errors);
}

#endif
