/* test_batch.c: many adapters in one batch, token by token against the naive reference, within the bounds of the linear
 * layer (linear_fixture.h): the kernels of every instruction level of the CPU, or those of a GPU through its table
 * (device.h). */
#include "check.h"
#include "cpu/batch_kernels.h"
#include "handles.h"
#include "levels.h"
#include "linear_fixture.h"
#include "reference.h"

static plora_context *context;

/* ---------------------------------------------------------------------------------------------------------- batches */

enum segments_kind { ANY_SEGMENTS, ONE_TOKEN_EACH, ONE_SEGMENT };

struct batch_case {
    int64_t tokens, in_features, out_features;
    int32_t slots, max_rank;
    int32_t x_dtype, y_dtype;
    enum segments_kind kind;
    int listed;  /* rows of x and y in any order, some not in the list */
    int gaps;    /* strides larger than the number of columns */
    int aligned; /* x and y begin at multiples of 16 bytes */
};

struct batch {
    struct batch_case c;
    struct check_matrix x, y, *a, *b;      /* a[slot], b[slot] */
    struct plora__batch_slot *slots;       /* with the device's pointers */
    struct plora__batch_segment *segments; /* as many as c.tokens + 8 */
    int32_t segment_count;
    int32_t *list;
    void *workspace;
    size_t workspace_bytes;
    struct plora__batch_args args; /* of the host */
    char text[240];
};

static struct check_matrix matrix_new(const struct batch_case *c, int64_t rows, int64_t columns, int32_t dtype)
{
    const struct linear_case like = {.gaps = c->gaps, .aligned = c->aligned};
    return fixture_matrix(&like, rows, columns, dtype, 1.0);
}

static void make_slots(struct batch *batch)
{
    const struct batch_case *c = &batch->c;
    batch->a = calloc((size_t)c->slots, sizeof *batch->a);
    batch->b = calloc((size_t)c->slots, sizeof *batch->b);
    CHECK(batch->a != NULL && batch->b != NULL, "the test itself is out of memory");
    batch->slots = poisoned_new((size_t)c->slots * sizeof *batch->slots);
    for (int32_t i = 0; i < c->slots; ++i) {
        /* the first slot has the largest rank, the others any, also none */
        const int32_t rank = i == 0 ? c->max_rank : (int32_t)check_integer(0, c->max_rank);
        batch->a[i] = check_matrix_new(rank, c->in_features, c->in_features, PLORA_F32);
        batch->b[i] = check_matrix_new(c->out_features, rank, rank, PLORA_F32);
        check_matrix_random(&batch->a[i], sqrt(3.0 / (double)c->in_features));
        check_matrix_random(&batch->b[i], 1.0);
        batch->slots[i] = (struct plora__batch_slot){device_of(batch->a[i].m.data), device_of(batch->b[i].m.data), rank,
                                                     (float)(2 * check_uniform()), NULL};
    }
}

/* Segments of any length, also 0, and of any slot, also none, also the same again. */
static void make_segments(struct batch *batch)
{
    const struct batch_case *c = &batch->c;
    batch->segments = poisoned_new((size_t)(c->tokens + 8) * sizeof *batch->segments);
    int32_t count = 0, done = 0;
    while (done < c->tokens || (count < c->tokens + 7 && check_integer(0, 2) == 0)) {
        const int32_t left = (int32_t)c->tokens - done;
        int32_t length = left == 0 ? 0 : c->kind == ONE_SEGMENT ? left : c->kind == ONE_TOKEN_EACH ? 1 : 0;
        if (left > 0 && c->kind == ANY_SEGMENTS)
            length = (int32_t)check_integer(count < 6 ? 0 : 1,
                                            check_integer(0, 3) == 0 || count > 100 ? left : left / 4 + 1);
        const int32_t slot = c->kind == ONE_SEGMENT ? 0 : (int32_t)check_integer(-1, c->slots - 1);
        batch->segments[count++] = (struct plora__batch_segment){slot, done, length, -1};
        done += length;
    }
    batch->segment_count = count;
}

static struct batch *batch_new(const struct batch_case *c)
{
    struct batch *batch = calloc(1, sizeof *batch);
    CHECK(batch != NULL, "the test itself is out of memory");
    batch->c = *c;
    snprintf(batch->text, sizeof batch->text,
             "T=%lld K=%lld N=%lld %d slots R<=%d x %s y %s segments %d listed %d gaps %d aligned %d",
             (long long)c->tokens, (long long)c->in_features, (long long)c->out_features, c->slots, c->max_rank,
             plora__dtype_name(c->x_dtype), plora__dtype_name(c->y_dtype), (int)c->kind, c->listed, c->gaps,
             c->aligned);
    const int64_t rows = c->listed ? c->tokens + check_integer(0, 5) : c->tokens;
    batch->x = matrix_new(c, rows, c->in_features, c->x_dtype);
    batch->y = matrix_new(c, rows, c->out_features, c->y_dtype);
    make_slots(batch);
    make_segments(batch);
    if (c->listed) {
        batch->list = poisoned_new((size_t)rows * sizeof *batch->list);
        for (int32_t i = 0; i < rows; ++i) { /* a permutation, of which the list has the first c->tokens */
            const int64_t other = check_integer(0, i);
            batch->list[i] = batch->list[other];
            batch->list[other] = i;
        }
    }
    return batch;
}

static void batch_free(struct batch *batch)
{
    for (int32_t i = 0; i < batch->c.slots; ++i) {
        check_matrix_free(&batch->a[i]);
        check_matrix_free(&batch->b[i]);
    }
    check_matrix_free(&batch->x);
    check_matrix_free(&batch->y);
    poisoned_free(batch->slots);
    poisoned_free(batch->segments);
    if (batch->list != NULL) poisoned_free(batch->list);
    free(batch->a);
    free(batch->b);
    free(batch);
}

/* Each adapter is a list of slots of its own, of which the first is used. */
static const struct plora__batch_slot **make_adapters(const struct batch *batch)
{
    const struct plora__batch_slot **adapters = poisoned_new((size_t)batch->c.slots * sizeof(void *));
    for (int32_t i = 0; i < batch->c.slots; ++i)
        adapters[i] = device_of(&batch->slots[i]);
    device_refresh(adapters);
    return adapters;
}

static struct plora__batch_target make_target(const struct batch *batch)
{
    return (struct plora__batch_target){0, batch->c.max_rank, batch->c.out_features, device_matrix(batch->y.m)};
}

/* The call, for `segments` that cover `tokens` of the list. */
static void forward(struct batch *batch, int level, int threads, const struct plora__batch_segment *segments,
                    int32_t segment_count, int64_t tokens)
{
    struct plora__batch_segment *cut = poisoned_new((size_t)segment_count * sizeof *cut);
    memcpy(cut, segments, (size_t)segment_count * sizeof *cut);
    const struct plora__batch_slot **adapters = make_adapters(batch);
    const struct plora__batch_target target = make_target(batch);
    struct plora__batch_args args = {.tokens = tokens,
                                     .in_features = batch->c.in_features,
                                     .segment_count = segment_count,
                                     .tiles = plora__batch_cut(cut, segment_count),
                                     .target_count = 1,
                                     .targets = &target,
                                     .segments = device_of(cut),
                                     .adapters = device_of(adapters),
                                     .list = device_of(batch->list),
                                     .x = device_matrix(batch->x.m)};
    const size_t bytes = level == LEVEL_DEVICE ? context->backend->batch_workspace(context->device, &args)
                                               : cpu_batch_workspace_with(cpu_batch_kernels(level), threads, &args);
    unsigned char *workspace = poisoned_new(bytes);
    args.workspace = device_of(workspace);
    if (level == LEVEL_DEVICE)
        CHECK_OK(DEVICE(context->backend->batch_forward(context->device, &args, NULL)));
    else
        cpu_batch_forward_with(cpu_batch_kernels(level), threads, &args);
    for (size_t i = 0; i < 64; ++i)
        CHECK(workspace[bytes + i] == CHECK_POISON, "wrote %zu bytes behind the workspace: %s", i, batch->text);
    poisoned_free(workspace);
    poisoned_free(adapters);
    poisoned_free(cut);
}

static int64_t row_of(const struct batch *batch, int64_t place)
{
    return batch->list != NULL ? batch->list[place] : place;
}

/* One token at a time against the reference; `before` is y as it was. */
static void check_token(const struct batch *batch, int level, int32_t slot, int64_t row, const double *before)
{
    const struct batch_case *c = &batch->c;
    const struct plora__batch_slot *adapter = &batch->slots[slot];
    const struct linear_case bounds = {
        .rank = adapter->rank, .x_dtype = c->x_dtype, .w_dtype = c->x_dtype == PLORA_BF16 ? c->y_dtype : PLORA_F32};
    double *x = fixture_doubles(c->in_features);
    struct reference_sum *low = fixture_sums(c->out_features);
    for (int64_t k = 0; k < c->in_features; ++k)
        x[k] = check_element(&batch->x.m, row, k);
    reference_batch_token(x, batch->a[slot].m.data, batch->b[slot].m.data, adapter->scale, adapter->rank,
                          c->in_features, c->out_features, low);
    for (int64_t n = 0; n < c->out_features; ++n) {
        double want, bound;
        fixture_output_bound(&bounds, c->y_dtype, c->in_features, before[row * c->out_features + n],
                             (struct reference_sum){0, 0}, low[n], &want, &bound);
        CHECK_CLOSE(check_element(&batch->y.m, row, n), want, bound, "level %d, y(%lld,%lld), slot %d of rank %d: %s",
                    level, (long long)row, (long long)n, slot, adapter->rank, batch->text);
    }
    free(x);
    free(low);
}

static void check_same_row(const struct batch *batch, int level, int64_t row, const char *what)
{
    const size_t size = plora__dtype_size(batch->c.y_dtype), at = (size_t)(row * batch->y.m.stride) * size;
    const size_t front = (size_t)((unsigned char *)batch->y.m.data - batch->y.memory);
    CHECK(memcmp(batch->y.memory + front + at, batch->y.snapshot + front + at, (size_t)batch->c.out_features * size) ==
              0,
          "level %d, row %lld, %s: %s", level, (long long)row, what, batch->text);
}

static void check_batch(struct batch *batch, int level, const double *before)
{
    for (int32_t i = 0; i < batch->segment_count; ++i) {
        const struct plora__batch_segment *segment = &batch->segments[i];
        for (int32_t j = 0; j < segment->count; ++j) {
            const int64_t row = row_of(batch, segment->first + j);
            if (segment->slot >= 0)
                check_token(batch, level, segment->slot, row, before);
            else
                check_same_row(batch, level, row, "without adapter, has changed");
        }
    }
    for (int64_t i = batch->c.tokens; i < batch->y.m.rows; ++i)
        check_same_row(batch, level, row_of(batch, i), "not in the list, has changed");
    check_matrix_guards(&batch->y, batch->text);
}

static void restore(struct batch *batch)
{
    memcpy(batch->y.memory, batch->y.snapshot, batch->y.bytes);
}

/* With B packed beforehand the same bits come out. */
static void check_packed(struct batch *batch, int level)
{
    const struct cpu_batch_kernels *kernels = cpu_batch_kernels(level);
    const int64_t columns = kernels->panel_columns, n = batch->c.out_features,
                  all = (n + columns - 1) / columns * columns;
    unsigned char *got = malloc(batch->y.bytes);
    CHECK(got != NULL, "the test itself is out of memory");
    memcpy(got, batch->y.memory, batch->y.bytes);
    for (int32_t i = 0; i < batch->c.slots; ++i) {
        struct plora__batch_slot *slot = &batch->slots[i];
        float *panels = poisoned_new((size_t)(all * slot->rank) * sizeof(float));
        kernels->pack(slot->b, slot->rank, n, panels);
        slot->panels = panels;
    }
    restore(batch);
    forward(batch, level, 2, batch->segments, batch->segment_count, batch->c.tokens);
    CHECK(memcmp(got, batch->y.memory, batch->y.bytes) == 0, "level %d: packed, other bits: %s", level, batch->text);
    for (int32_t i = 0; i < batch->c.slots; ++i) {
        poisoned_free((void *)(uintptr_t)batch->slots[i].panels);
        batch->slots[i].panels = NULL;
    }
    free(got);
}

static void run(const struct batch_case *c)
{
    struct batch *batch = batch_new(c);
    double *before = fixture_doubles(batch->y.m.rows * c->out_features);
    reference_load(&batch->y.m, 0, before);
    check_matrix_snapshot(&batch->y);
    for (int level = first_level(); level <= last_level(); ++level) {
        restore(batch);
        forward(batch, level, (int)check_integer(1, 3), batch->segments, batch->segment_count, c->tokens);
        check_batch(batch, level, before);
        if (level != LEVEL_DEVICE) check_packed(batch, level);
    }
    free(before);
    batch_free(batch);
}

/* ------------------------------------------------------------------------------------------------------------ tests */

static void random_dtypes(struct batch_case *c)
{
    c->x_dtype = check_integer(0, 1) ? PLORA_F32 : PLORA_BF16;
    c->y_dtype = check_integer(0, 2) ? c->x_dtype : check_integer(0, 1) ? PLORA_F32 : PLORA_BF16;
    c->listed = (int)check_integer(0, 1);
    c->gaps = (int)check_integer(0, 1);
    c->aligned = (int)check_integer(0, 1);
}

static void test_batch_shapes(void **state)
{
    (void)state;
    check_reseed(1);
    static const struct batch_case shapes[] = {
        {1, 1, 1, 1, 1, 0, 0, ANY_SEGMENTS, 0, 0, 0},          {1, 576, 192, 1, 16, 0, 0, ONE_SEGMENT, 0, 0, 0},
        {64, 64, 64, 1, 16, 0, 0, ONE_SEGMENT, 0, 0, 0},       {65, 96, 128, 1, 8, 0, 0, ONE_SEGMENT, 0, 0, 0},
        {40, 576, 576, 40, 16, 0, 0, ONE_TOKEN_EACH, 0, 0, 0}, {33, 130, 67, 5, 64, 0, 0, ANY_SEGMENTS, 0, 0, 0},
        {130, 1031, 77, 3, 20, 0, 0, ANY_SEGMENTS, 0, 0, 0},   {19, 520, 515, 4, 512, 0, 0, ANY_SEGMENTS, 0, 0, 0},
        {70, 513, 129, 6, 33, 0, 0, ANY_SEGMENTS, 0, 0, 0},    {7, 2100, 300, 3, 100, 0, 0, ANY_SEGMENTS, 0, 0, 0},
    };
    for (int s = 0; s < CHECK_COUNT(shapes); ++s)
        for (int dtypes = 0; dtypes < (check_quick() ? 1 : 4); ++dtypes) {
            struct batch_case c = shapes[s];
            random_dtypes(&c);
            c.x_dtype = dtypes % 2 ? PLORA_BF16 : PLORA_F32;
            c.y_dtype = dtypes == 0 || dtypes == 3 ? c.x_dtype : PLORA_F32 + PLORA_BF16 - c.x_dtype;
            if (check_integer(0, 1)) c.gaps = 0, c.aligned = 1;
            run(&c);
        }
}

/* Small ones, 1,000 of them on the CPU, each at one level. */
static void test_batch_random(void **state)
{
    (void)state;
    check_reseed(2);
    const int count = check_quick() ? 60 : device_is_cuda() ? 100 : 1000;
    for (int i = 0; i < count; ++i) {
        struct batch_case c = {.tokens = check_integer(1, 24),
                               .in_features = check_integer(1, 90),
                               .out_features = check_integer(1, 90),
                               .slots = (int32_t)check_integer(1, 6),
                               .max_rank = (int32_t)(check_integer(0, 9) == 0 ? 512 : check_integer(1, 24)),
                               .kind = (enum segments_kind)check_integer(0, 2)};
        random_dtypes(&c);
        run(&c);
    }
}

/* A token's result has the same bits alone, in any batch, with any number of threads, and again. */
static void test_batch_same_bits(void **state)
{
    (void)state;
    check_reseed(3);
    for (int i = 0; i < (check_quick() ? 2 : 8); ++i) {
        struct batch_case c = {.tokens = check_integer(20, 90),
                               .in_features = check_integer(100, 1500),
                               .out_features = check_integer(1, 200),
                               .slots = 3,
                               .max_rank = (int32_t)check_integer(1, 70)};
        random_dtypes(&c);
        c.x_dtype = c.y_dtype = i % 2 ? PLORA_BF16 : PLORA_F32;
        struct batch *batch = batch_new(&c);
        unsigned char *before = malloc(batch->y.bytes);
        CHECK(before != NULL, "the test itself is out of memory");
        memcpy(before, batch->y.memory, batch->y.bytes);
        for (int level = first_level(); level <= last_level(); ++level) {
            memcpy(batch->y.memory, before, batch->y.bytes);
            forward(batch, level, 1, batch->segments, batch->segment_count, c.tokens);
            check_matrix_snapshot(&batch->y);
            memcpy(batch->y.memory, before, batch->y.bytes);
            forward(batch, level, 4, batch->segments, batch->segment_count, c.tokens);
            check_matrix_unchanged(&batch->y, batch->text);
            for (int32_t s = 0; s < batch->segment_count; ++s) {
                const struct plora__batch_segment *segment = &batch->segments[s];
                if (segment->count == 0) continue;
                const int32_t place = segment->first + (int32_t)check_integer(0, segment->count - 1);
                const struct plora__batch_segment alone[3] = {
                    {-1, 0, place, 0}, {segment->slot, place, 1, 0}, {-1, place + 1, (int32_t)c.tokens - place - 1, 0}};
                memcpy(batch->y.memory, before, batch->y.bytes);
                forward(batch, level, 1, alone, 3, c.tokens);
                check_same_row(batch, level, row_of(batch, place), "is another one alone");
                if (device_is_cuda() && s == 4) break;
            }
        }
        free(before);
        batch_free(batch);
    }
}

static void test_batch_nothing(void **state)
{
    (void)state;
    check_reseed(4);
    struct batch_case c = {.tokens = 9, .in_features = 20, .out_features = 30, .slots = 1, .max_rank = 4};
    random_dtypes(&c);
    struct batch *batch = batch_new(&c);
    check_matrix_snapshot(&batch->y);
    const struct plora__batch_segment none[2] = {{-1, 0, 5, 0}, {-1, 5, 4, 0}}, empty[1] = {{0, 0, 0, 0}};
    for (int level = first_level(); level <= last_level(); ++level) {
        forward(batch, level, 2, none, 2, 9);
        forward(batch, level, 2, empty, 1, 0);
        batch->slots[0].rank = 0;
        forward(batch, level, 2, batch->segments, batch->segment_count, 9);
        check_matrix_unchanged(&batch->y, batch->text);
    }
    batch_free(batch);
}

/* In a CUDA graph the call is repeated with what the slots and the list hold then. */
static void test_batch_graph(void **state)
{
    (void)state;
    check_reseed(5);
    const struct batch_case c = {
        .tokens = 30, .in_features = 72, .out_features = 80, .slots = 2, .max_rank = 8, .kind = ONE_SEGMENT};
    struct batch *batch = batch_new(&c);
    const struct plora__batch_slot **adapters = make_adapters(batch);
    const struct plora__batch_target target = make_target(batch);
    struct plora__batch_args args = {.tokens = c.tokens,
                                     .in_features = c.in_features,
                                     .segment_count = batch->segment_count,
                                     .tiles = plora__batch_cut(batch->segments, batch->segment_count),
                                     .target_count = 1,
                                     .targets = &target,
                                     .segments = device_of(batch->segments),
                                     .adapters = device_of(adapters),
                                     .x = device_matrix(batch->x.m)};
    void *workspace = poisoned_new(context->backend->batch_workspace(context->device, &args));
    args.workspace = device_of(workspace);
    void *stream = device_stream_create();
    device_upload();
    device_capture_begin(stream);
    const plora_status status = context->backend->batch_forward(context->device, &args, stream);
    void *graph = device_capture_end(stream);
    CHECK_OK(status);
    double *before = fixture_doubles(batch->y.m.rows * c.out_features);
    for (int repeat = 0; repeat < 2; ++repeat) {
        reference_load(&batch->y.m, 0, before);
        batch->slots[0].scale = (float)check_uniform();
        batch->slots[0].rank = 8 - 5 * repeat;
        device_upload();
        device_wait();
        device_graph_launch(graph, stream);
        device_download(PLORA_OK);
        check_batch(batch, LEVEL_DEVICE, before); /* the second time A and B are read as of rank 3 */
    }
    device_graph_destroy(graph);
    device_stream_destroy(stream);
    poisoned_free(workspace);
    poisoned_free(adapters);
    free(before);
    batch_free(batch);
}

int main(void)
{
    check_begin("test_batch");
    if (device_is_cuda()) context = check_context(NULL, 0, 0);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_batch_shapes),
        cmocka_unit_test(test_batch_random),
        cmocka_unit_test(test_batch_same_bits),
        cmocka_unit_test(test_batch_nothing),
    };
    const struct CMUnitTest device_tests[] = {cmocka_unit_test(test_batch_graph)};
    int failures = cmocka_run_group_tests(tests, NULL, NULL);
    if (device_is_cuda()) failures += cmocka_run_group_tests(device_tests, NULL, NULL);
    plora_context_destroy(context);
    return failures;
}
