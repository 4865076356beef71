/* test_merge.c: the merge and what it finds out, against the naive reference: the kernels of every instruction level of
 * the CPU, or those of a GPU through its table (device.h). */
#include "check.h"
#include "cpu/merge_kernels.h"
#include "handles.h"
#include "levels.h"
#include "philox.h"
#include "reference_unload.h"
#include "rounding.h"

static plora_context *context;

static size_t merge_workspace(int level, const struct plora__merge_args *args)
{
    return level == LEVEL_DEVICE ? context->backend->merge_workspace(context->device, args)
                                 : cpu_merge_workspace_with(cpu_merge_kernels(level), args);
}

static void merge(int level, int threads, const struct plora__merge_args *args)
{
    if (level != LEVEL_DEVICE) {
        cpu_merge_with(cpu_merge_kernels(level), threads, args);
        return;
    }
    struct plora__merge_args there = *args;
    there.weight = device_matrix(args->weight);
    there.left = device_of(args->left);
    there.right = device_of(args->right);
    there.sums = device_of(args->sums);
    there.overflows = device_of(args->overflows);
    there.residual = device_of(args->residual);
    there.workspace = device_of(args->workspace);
    CHECK_OK(DEVICE(context->backend->merge(context->device, &there, NULL)));
}

static void magnitudes(int level, const struct plora__magnitude_args *args)
{
    if (level != LEVEL_DEVICE) {
        cpu_magnitudes_with(cpu_merge_kernels(level), 2, args);
        return;
    }
    const struct plora__magnitude_args there = {device_of(args->values), device_of(args->segments),
                                                device_of(args->magnitudes), args->segment_count};
    CHECK_OK(DEVICE(context->backend->magnitudes(context->device, &there, NULL)));
}

/* ---------------------------------------------------------------------------------------------------------------
 * merge */

struct merge_case {
    int64_t rows, columns, rank, stride;
    int32_t dtype;
    int transposed; /* left and right as fan_in_fan_out gives them */
    float factor;
    double weight_range;
};

struct merge_inputs {
    struct check_matrix weight;
    float *left, *right;
    double *before, *d, *magnitude;
    struct plora__merge_sums *sums;
    void *workspace;
    size_t workspace_bytes;
    struct plora__merge_args args;
};

static struct merge_inputs make_inputs(const struct merge_case *c, int level)
{
    struct merge_inputs in = {.weight = check_matrix_new(c->rows, c->columns, c->stride, c->dtype)};
    check_matrix_random(&in.weight, c->weight_range);
    const size_t elements = (size_t)(c->rows * c->columns);
    in.left = poisoned_new((size_t)(c->rows * c->rank) * sizeof(float));
    in.right = poisoned_new((size_t)(c->columns * c->rank) * sizeof(float));
    in.before = malloc(elements * sizeof(double));
    in.d = malloc(elements * sizeof(double));
    in.magnitude = malloc(elements * sizeof(double));
    CHECK(in.before != NULL && in.d != NULL && in.magnitude != NULL, "the test itself is out of memory");
    in.sums = poisoned_new(sizeof *in.sums);
    for (int64_t i = 0; i < c->rows * c->rank; ++i)
        in.left[i] = (float)check_uniform();
    for (int64_t i = 0; i < c->columns * c->rank; ++i)
        in.right[i] = (float)check_uniform();
    for (int64_t i = 0; i < c->rows; ++i)
        for (int64_t j = 0; j < c->columns; ++j)
            in.before[i * c->columns + j] = check_element(&in.weight.m, i, j);
    in.args = (struct plora__merge_args){
        .weight = in.weight.m,
        .rank = c->rank,
        .factor = c->factor,
        .left = in.left,
        .left_row_stride = c->transposed ? 1 : c->rank,
        .left_rank_stride = c->transposed ? c->rows : 1,
        .right = in.right,
        .right_rank_stride = c->transposed ? 1 : c->columns,
        .right_column_stride = c->transposed ? c->rank : 1,
    };
    in.workspace_bytes = merge_workspace(level, &in.args);
    in.workspace = in.args.workspace = poisoned_new(in.workspace_bytes);
    reference_delta(c->factor, c->rows, c->columns, c->rank, in.left, in.args.left_row_stride, in.args.left_rank_stride,
                    in.right, in.args.right_rank_stride, in.args.right_column_stride, in.d, in.magnitude);
    return in;
}

static void free_inputs(struct merge_inputs *in)
{
    const unsigned char *end = (const unsigned char *)in->workspace + in->workspace_bytes;
    for (int i = 0; i < 64; ++i)
        CHECK(end[i] == CHECK_POISON, "wrote %d bytes behind the workspace", i);
    check_matrix_free(&in->weight);
    poisoned_free(in->left);
    poisoned_free(in->right);
    poisoned_free(in->sums);
    poisoned_free(in->workspace);
    free(in->before);
    free(in->d);
    free(in->magnitude);
}

static size_t weight_bytes(const struct merge_case *c)
{
    return (size_t)((c->rows - 1) * c->stride + c->columns) * plora__dtype_size(c->dtype);
}

static const char *describe(const struct merge_case *c, int level)
{
    static char text[200];
    snprintf(text, sizeof text, "level %d, W[%lld,%lld] stride %lld dtype %d, R %lld, transposed %d", level,
             (long long)c->rows, (long long)c->columns, (long long)c->stride, (int)c->dtype, (long long)c->rank,
             c->transposed);
    return text;
}

static void check_merged(const struct merge_case *c, const struct merge_inputs *in, const char *text)
{
    for (int64_t i = 0; i < c->rows; ++i)
        for (int64_t j = 0; j < c->columns; ++j) {
            const int64_t at = i * c->columns + j;
            const double want = in->before[at] + in->d[at];
            const double error = reference_delta_error(c->rank, in->magnitude[at]);
            CHECK_CLOSE(check_element(&in->weight.m, i, j), want, reference_merge_error(c->dtype, want, error),
                        "[%lld,%lld], %s", (long long)i, (long long)j, text);
        }
    check_matrix_guards(&in->weight, text);
}

/* The sums against the same sums over what is in memory now. */
static void check_sums(const struct merge_case *c, const struct merge_inputs *in, const struct plora__merge_sums *sums,
                       const char *text)
{
    double dd = 0, gd = 0, ww = 0, ll = 0, changed = 0, lost_max = 0;
    double dd_error = 0, gd_error = 0, ll_error = 0, lost_error = 0;
    for (int64_t i = 0; i < c->rows; ++i)
        for (int64_t j = 0; j < c->columns; ++j) {
            const int64_t at = i * c->columns + j;
            const double w = in->before[at], d = in->d[at], g = check_element(&in->weight.m, i, j) - w;
            const double error = reference_delta_error(c->rank, in->magnitude[at]);
            dd += d * d;
            gd += g * d;
            ww += w * w;
            changed += plora__float_bits((float)w) != plora__float_bits((float)(w + g));
            ll += (d - g) * (d - g);
            lost_max = fmax(lost_max, fabs(d - g));
            ll_error += 2 * fabs(d - g) * error + error * error;
            dd_error += 2 * fabs(d) * error + error * error;
            gd_error += fabs(g) * error;
            lost_error = fmax(lost_error, error);
        }
    const double slack = 1e-12 * (double)(c->rows * c->columns);
    CHECK_CLOSE(sums->dd, dd, dd_error + slack * dd, "sum d^2, %s", text);
    CHECK_CLOSE(sums->gd, gd, gd_error + slack * dd, "sum g d, %s", text);
    CHECK_CLOSE(sums->ww, ww, slack * ww, "sum W^2, %s", text);
    CHECK_CLOSE(sums->ll, ll, ll_error + slack * dd, "sum (d - g)^2, %s", text);
    CHECK_CLOSE(sums->changed, changed, 0, "changed, %s", text);
    CHECK_CLOSE(sums->lost_max, lost_max, lost_error * 1.001, "lost_max, %s", text);
    const double effective = reference_effective_rank(c->rows, c->columns, in->d);
    CHECK_CLOSE(sums->effective_rank, effective, 1e-9 * (effective + 1), "effective rank, %s", text);
}

/* Where a GPU multiplies by fma it gives the bits of the CPU's fma levels. */
static void check_bits(const struct merge_case *c, const struct merge_inputs *in, const struct check_matrix *start,
                       const char *text)
{
    if (!device_is_cuda() || cpu_isa() < CPU_ISA_AVX2 || c->rank > (c->dtype == PLORA_F32 ? 32 : 16)) return;
    struct check_matrix here = check_matrix_new(c->rows, c->columns, c->stride, c->dtype);
    const size_t bytes = weight_bytes(c);
    memcpy(here.m.data, start->m.data, bytes);
    struct plora__merge_args args = in->args;
    args.weight = here.m;
    args.sums = NULL;
    args.workspace = poisoned_new(merge_workspace(CPU_ISA_AVX2, &args));
    merge(CPU_ISA_AVX2, 2, &args);
    CHECK(memcmp(here.m.data, in->weight.m.data, bytes) == 0, "W differs from the CPU's, %s", text);
    poisoned_free(args.workspace);
    check_matrix_free(&here);
}

static void run_case(const struct merge_case *c, int level)
{
    const char *text = describe(c, level);
    struct merge_inputs in = make_inputs(c, level);
    struct check_matrix start = check_matrix_new(c->rows, c->columns, c->stride, c->dtype);
    const size_t bytes = weight_bytes(c);
    memcpy(start.m.data, in.weight.m.data, bytes);

    merge(level, 2, &in.args);
    check_merged(c, &in, text);
    check_bits(c, &in, &start, text);
    void *plain = malloc(bytes);
    CHECK(plain != NULL, "the test itself is out of memory");
    memcpy(plain, in.weight.m.data, bytes);

    struct plora__merge_sums first = {0};
    for (int threads = 1; threads <= (level == LEVEL_DEVICE ? 2 : 3); ++threads) { /* the same bits, with sums too */
        memcpy(in.weight.m.data, start.m.data, bytes);
        memset(in.workspace, CHECK_POISON, in.workspace_bytes);
        memset(in.sums, CHECK_POISON, sizeof *in.sums);
        in.args.sums = in.sums;
        merge(level, threads, &in.args);
        CHECK(memcmp(plain, in.weight.m.data, bytes) == 0, "W differs with sums and %d threads, %s", threads, text);
        check_sums(c, &in, in.sums, text);
        if (threads == 1) first = *in.sums;
        CHECK(memcmp(&first, in.sums, sizeof first) == 0, "sums differ with %d threads, %s", threads, text);
    }
    free(plain);
    check_matrix_free(&start);
    free_inputs(&in);
}

static void test_merge_kernels(void **state)
{
    (void)state;
    check_reseed(1);
    static const int64_t shapes[][3] = {{1, 1, 1},      {1, 64, 1},      {6, 64, 8},    {7, 65, 3},    {24, 128, 16},
                                        {25, 129, 5},   {53, 97, 7},     {61, 193, 33}, {128, 64, 64}, {31, 257, 31},
                                        {20, 150, 256}, {130, 131, 130}, {53, 544, 2}};
    for (int level = first_level(); level <= last_level(); ++level)
        for (int s = 0; s < CHECK_COUNT(shapes) - (check_quick() ? 4 : 0); ++s)
            for (int32_t dtype = PLORA_F32; dtype <= PLORA_F16; ++dtype)
                for (int transposed = 0; transposed < 2; ++transposed) {
                    const int64_t extra = check_integer(0, 1) ? check_integer(1, 19) : 0;
                    const struct merge_case c = {shapes[s][0],
                                                 shapes[s][1],
                                                 shapes[s][2],
                                                 shapes[s][1] + extra,
                                                 dtype,
                                                 transposed,
                                                 (float)(check_uniform() * 0.1),
                                                 0.5};
                    run_case(&c, level);
                }
}

static void test_merge_random_shapes(void **state)
{
    (void)state;
    check_reseed(2);
    for (int i = 0; i < (check_quick() ? 3 : 12); ++i) {
        const int64_t rows = check_integer(1, 70), columns = check_integer(1, 160),
                      least = rows < columns ? rows : columns;
        const struct merge_case c = {rows,
                                     columns,
                                     check_integer(1, least),
                                     columns + check_integer(0, 9),
                                     (int32_t)check_integer(0, 2),
                                     (int)check_integer(0, 1),
                                     (float)ldexp(check_uniform(), (int)check_integer(-12, 3)),
                                     ldexp(1, (int)check_integer(-20, 4))};
        for (int level = first_level(); level <= last_level(); ++level)
            run_case(&c, level);
    }
}

/* Every 16-bit pattern of W, plus a fixed d: exact rounding to nearest even, ties included, infinities and NaN kept. */
static void check_rounding(int level, int32_t dtype, float d)
{
    struct check_matrix weight = check_matrix_new(256, 256, 256, dtype);
    uint16_t *bits = weight.m.data;
    for (int j = 0; j < 65536; ++j)
        bits[j] = (uint16_t)j;
    float *left = poisoned_new(256 * sizeof *left), *right = poisoned_new(256 * sizeof *right);
    for (int j = 0; j < 256; ++j) {
        left[j] = 1.0f;
        right[j] = d;
    }
    int64_t *overflows = poisoned_new(sizeof *overflows), expected = 0;
    struct plora__merge_args args = {.weight = weight.m,
                                     .rank = 1,
                                     .factor = 1.0f,
                                     .left = left,
                                     .left_row_stride = 1,
                                     .left_rank_stride = 1,
                                     .right = right,
                                     .right_rank_stride = 256,
                                     .right_column_stride = 1,
                                     .overflows = overflows};
    args.workspace = poisoned_new(merge_workspace(level, &args));
    check_matrix_snapshot(&weight);
    merge(level, 2, &args);
    check_matrix_unchanged(&weight, "W after the dry run");
    args.overflows = NULL;
    merge(level, 2, &args);
    for (int j = 0; j < 65536; ++j) {
        const uint16_t start = (uint16_t)j;
        uint16_t want_bits;
        plora__store(&want_bits, 0, dtype, plora__load(&start, 0, dtype) + d);
        const float want = plora__load(&want_bits, 0, dtype), got = plora__load(bits, j, dtype);
        CHECK(isnan(want) ? isnan(got) : bits[j] == want_bits,
              "level %d, dtype %d: 0x%04x + %g: got 0x%04x, want 0x%04x", level, dtype, j, d, bits[j], want_bits);
        expected += isfinite(plora__load(&start, 0, dtype)) && !isfinite(want);
    }
    CHECK(*overflows == expected, "level %d, dtype %d, d %g: %lld overflows, want %lld", level, dtype, d,
          (long long)*overflows, (long long)expected);
    poisoned_free(args.workspace);
    poisoned_free(overflows);
    poisoned_free(left);
    poisoned_free(right);
    check_matrix_free(&weight);
}

static void test_merge_rounding(void **state)
{
    (void)state;
    check_reseed(3);
    for (int level = first_level(); level <= last_level(); ++level)
        for (int32_t dtype = PLORA_BF16; dtype <= PLORA_F16; ++dtype)
            for (int exponent = -30; exponent <= 12; exponent += check_quick() ? 14 : 3)
                check_rounding(level, dtype,
                               (float)ldexp(1.0 + (double)check_integer(0, 3) / 4, exponent) *
                                   (check_integer(0, 1) ? 1 : -1));
}

/* -----------------------------------------------------------------------------------------------------------
 * rounding */

static float random_value(int32_t dtype)
{
    return (float)ldexp(check_uniform(),
                        (int)check_integer(dtype == PLORA_BF16 ? -140 : -40, dtype == PLORA_BF16 ? 120 : 15));
}

/* One of the two neighbours, the farther one as seldom as it is far, whatever the sign; numbers of the dtype stay. */
static void test_stochastic_rounding(void **state)
{
    (void)state;
    check_reseed(5);
    enum { DRAWS = 4096 };
    for (int32_t dtype = PLORA_BF16; dtype <= PLORA_F16; ++dtype) {
        for (int i = 0; i < 65536; ++i) {
            const uint16_t bits = (uint16_t)i;
            const float value = plora__load(&bits, 0, dtype);
            const uint16_t rounded = plora__round_stochastic(value, (uint16_t)check_next(), dtype);
            CHECK(isnan(value) ? isnan(plora__load(&rounded, 0, dtype)) : rounded == bits,
                  "dtype %d: 0x%04x became 0x%04x", dtype, i, rounded);
        }
        for (int i = 0; i < 200; ++i) {
            const float value = random_value(dtype);
            double toward, away, steps = 0;
            reference_neighbours(value, dtype, &toward, &away);
            for (int draw = 0; draw < DRAWS; ++draw) { /* words spread evenly, so that there is no chance in it */
                const uint16_t random = (uint16_t)(draw * (65536 / DRAWS) + check_integer(0, 65536 / DRAWS - 1));
                const uint16_t bits = plora__round_stochastic(value, random, dtype);
                const double got = plora__load(&bits, 0, dtype);
                CHECK(got == toward || got == away, "dtype %d: %.9g became %.9g", dtype, value, got);
                steps += got == away;
            }
            const double chance = (value - toward) / (away - toward);
            CHECK_CLOSE(steps / DRAWS, chance, 1.0 / DRAWS + 0x1p-13, "dtype %d: %.9g", dtype, value);
        }
    }
}

static void test_residual(void **state)
{
    (void)state;
    check_reseed(6);
    for (int32_t dtype = PLORA_BF16; dtype <= PLORA_F16; ++dtype) {
        for (int i = 0; i < 65536; ++i) { /* a low half of 0 changes nothing */
            const uint16_t bits = (uint16_t)i;
            const float value = plora__load(&bits, 0, dtype), joined = plora__join_residual(bits, 0, dtype);
            CHECK(isnan(value) ? isnan(joined) : joined == value, "dtype %d: 0x%04x joined is %g", dtype, i, joined);
            uint16_t weight, low;
            plora__split_residual(value, dtype, &weight, &low);
            CHECK(low == 0 && (isnan(value) ? isnan(plora__load(&weight, 0, dtype)) : weight == bits),
                  "dtype %d: 0x%04x split is 0x%04x, 0x%04x", dtype, i, weight, low);
        }
        for (int i = 0; i < 100000; ++i) {
            const float value = random_value(dtype);
            uint16_t weight, low;
            double toward, away;
            plora__split_residual(value, dtype, &weight, &low);
            reference_neighbours(value, dtype, &toward, &away);
            const double stored = plora__load(&weight, 0, dtype), error = fabs(stored - value);
            CHECK(stored == toward || stored == away, "dtype %d: %.9g became %.9g", dtype, value, stored);
            const int exact = dtype == PLORA_BF16 || fabs(value) >= 0x1p-14;
            CHECK(error <= fabs(away - toward) / 2 + (exact ? 0 : 0x1p-41), "dtype %d: %.9g became %.9g", dtype, value,
                  stored);
            CHECK_CLOSE(plora__join_residual(weight, low, dtype), value, exact ? 0 : 0x1p-41,
                        "dtype %d: 0x%04x, 0x%04x", dtype, weight, low);
        }
    }
}

/* Whether a level gives the bits of merged_value(): a GPU's tensor cores and the CPU's matrix tiles sum otherwise. */
static int has_exact_bits(int level, int64_t rank)
{
    return level == LEVEL_DEVICE ? rank <= 16 : level != CPU_ISA_AMX;
}

/* What a chain of multiplications and additions makes of element (i, j), before it is rounded: fused, or at the portable level not. */
static float merged_value(const struct merge_case *c, const struct plora__merge_args *args, int fused, float before,
                          int64_t i, int64_t j)
{
    volatile float sum = 0; /* contracts nothing */
    for (int64_t r = 0; r < c->rank; ++r) {
        const float left = args->left[i * args->left_row_stride + r * args->left_rank_stride];
        const float right = args->right[r * args->right_rank_stride + j * args->right_column_stride];
        volatile float product = left * right;
        sum = fused ? fmaf(left, right, sum) : product + sum;
    }
    volatile float delta = c->factor * sum;
    return fused ? fmaf(c->factor, sum, before) : delta + before;
}

/* A merge that rounds at random, or keeps a residual. W and low halves by rows of the case's columns. */
struct rounded_merge {
    struct merge_case c;
    int level;
    struct merge_inputs in;
    uint16_t *low; /* with a twin; rows low_stride apart */
    int64_t low_stride;
    uint16_t *start, *low_start, *want, *low_want; /* before, and after where the product is a chain of fma */
};

static uint16_t *halves(const struct merge_case *c)
{
    uint16_t *memory = malloc((size_t)(c->rows * c->columns) * sizeof *memory);
    CHECK(memory != NULL, "the test itself is out of memory");
    return memory;
}

static double joined(const struct rounded_merge *m, uint16_t weight, uint16_t low)
{
    if (m->in.args.residual != NULL) return plora__join_residual(weight, low, m->c.dtype);
    return m->c.dtype == PLORA_BF16 ? plora__bf16_to_float(weight) : plora__f16_to_float(weight);
}

/* Draws the low half of element (i, j), and works out what becomes of it. */
static void expect_rounded(struct rounded_merge *m, int64_t i, int64_t j)
{
    const struct merge_case *c = &m->c;
    const struct plora__merge_draw *draw = &m->in.args.draw;
    const int64_t at = i * c->columns + j;
    plora__store(m->start, at, c->dtype, (float)m->in.before[at]);
    m->low_start[at] = (uint16_t)check_next();
    if ((m->start[at] & 0x7fff) == 0) m->low_start[at] &= 0x7fff; /* nothing is below 0 */
    m->in.before[at] = joined(m, m->start[at], m->low_start[at]);
    const float value = merged_value(c, &m->in.args, m->level != CPU_ISA_PORTABLE, (float)m->in.before[at], i, j);
    if (m->in.args.residual != NULL) {
        plora__split_residual(value, c->dtype, &m->want[at], &m->low_want[at]);
        return;
    }
    const uint64_t element = (uint64_t)(draw->first_element + i * draw->row_elements + j);
    const uint16_t random = reference_random(draw->seed, draw->stage, draw->layer, element);
    m->want[at] = plora__round_stochastic(value, random, c->dtype);
    m->low_want[at] = m->low_start[at];
}

static struct rounded_merge make_rounded(const struct merge_case *c, int level, int32_t rounding)
{
    struct rounded_merge m = {
        .c = *c, .level = level, .in = make_inputs(c, level), .low_stride = c->columns + check_integer(0, 1) * 8};
    m.low = poisoned_new((size_t)(c->rows * m.low_stride) * sizeof *m.low);
    m.start = halves(c), m.low_start = halves(c), m.want = halves(c), m.low_want = halves(c);
    m.in.args.rounding = rounding;
    m.in.args.draw = (struct plora__merge_draw){.seed = check_next(),
                                                .stage = check_next() % 100,
                                                .first_element = check_integer(0, 1000),
                                                .row_elements = c->columns + check_integer(0, 50),
                                                .layer = (int32_t)check_integer(0, 200)};
    if (rounding == PLORA_ROUND_RESIDUAL) {
        m.in.args.residual = m.low;
        m.in.args.residual_stride = m.low_stride;
    }
    for (int64_t i = 0; i < c->rows; ++i)
        for (int64_t j = 0; j < c->columns; ++j)
            expect_rounded(&m, i, j);
    return m;
}

static void free_rounded(struct rounded_merge *m)
{
    free(m->start);
    free(m->low_start);
    free(m->want);
    free(m->low_want);
    poisoned_free(m->low);
    free_inputs(&m->in);
}

/* The very bits, or what the error of other sums allows. Element (i, j) as it is stored now. */
static double check_rounded(const struct rounded_merge *m, int64_t i, int64_t j, double error, const char *text)
{
    const struct merge_case *c = &m->c;
    const int64_t at = i * c->columns + j;
    const uint16_t got = ((const uint16_t *)m->in.weight.m.data)[i * c->stride + j],
                   low = m->low[i * m->low_stride + j];
    const double stored = joined(m, got, low), want = m->in.before[at] + m->in.d[at];
    if (has_exact_bits(m->level, c->rank)) {
        CHECK(got == m->want[at], "[%lld,%lld] is 0x%04x, want 0x%04x, %s", (long long)i, (long long)j, got,
              m->want[at], text);
        CHECK(low == m->low_want[at], "low half of [%lld,%lld] is 0x%04x, want 0x%04x, %s", (long long)i, (long long)j,
              low, m->low_want[at], text);
        return stored;
    }
    CHECK(m->in.args.residual != NULL || low == m->low_want[at], "low half of [%lld,%lld] was touched, %s",
          (long long)i, (long long)j, text);
    double toward, away;
    reference_neighbours(want, c->dtype, &toward, &away);
    const double gap = m->in.args.residual != NULL ? 0x1p-41 : fabs(away - toward);
    CHECK_CLOSE(stored, want, 2 * gap + error + 0x1p-23 * fabs(want), "[%lld,%lld], %s", (long long)i, (long long)j,
                text);
    return stored;
}

static void run_rounded(const struct merge_case *c, int level, int32_t rounding)
{
    const char *text = describe(c, level);
    struct rounded_merge m = make_rounded(c, level, rounding);
    const int runs = level == LEVEL_DEVICE ? 2 : 4;
    for (int run = 0; run < runs; ++run) { /* the last with a report; the CPU's with 1, 2, 3, 2 threads */
        const int report = run == runs - 1;
        for (int64_t i = 0; i < c->rows; ++i)
            for (int64_t j = 0; j < c->columns; ++j) {
                ((uint16_t *)m.in.weight.m.data)[i * c->stride + j] = m.start[i * c->columns + j];
                m.low[i * m.low_stride + j] = m.low_start[i * c->columns + j];
            }
        m.in.args.sums = report ? m.in.sums : NULL;
        merge(level, 1 + run % 3 + (run == 3), &m.in.args);
        struct plora__merge_sums want = {.changed = 0};
        double bound = 0, most_error = 0;
        for (int64_t at = 0; at < c->rows * c->columns; ++at) {
            const double error = reference_delta_error(c->rank, m.in.magnitude[at]), before = m.in.before[at];
            const double stored = check_rounded(&m, at / c->columns, at % c->columns, error, text), d = m.in.d[at];
            want.changed += plora__float_bits((float)stored) != plora__float_bits((float)before);
            want.gd += (stored - before) * d;
            want.dd += d * d;
            want.ww += before * before;
            want.ll += (d - (stored - before)) * (d - (stored - before));
            want.lost_max = fmax(want.lost_max, fabs(d - (stored - before)));
            bound += 2 * (fabs(stored - before) + fabs(d)) * error + error * error;
            most_error = fmax(most_error, 1.001 * error);
        }
        check_matrix_guards(&m.in.weight, text);
        if (!report) continue;
        const double slack = 1e-12 * (double)(c->rows * c->columns);
        CHECK_CLOSE(m.in.sums->dd, want.dd, bound + slack * want.dd, "sum d^2, %s", text);
        CHECK_CLOSE(m.in.sums->gd, want.gd, bound + slack * (want.dd + fabs(want.gd)), "sum g d, %s", text);
        CHECK_CLOSE(m.in.sums->ww, want.ww, slack * want.ww, "sum W^2, %s", text);
        CHECK_CLOSE(m.in.sums->ll, want.ll, bound + slack * want.dd, "sum (d - g)^2, %s", text);
        CHECK_CLOSE(m.in.sums->changed, want.changed, 0, "changed, %s", text);
        CHECK_CLOSE(m.in.sums->lost_max, want.lost_max, most_error, "lost_max, %s", text);
    }
    free_rounded(&m);
}

static void test_merge_rounded(void **state)
{
    (void)state;
    check_reseed(7);
    static const int64_t shapes[][3] = {{1, 1, 1},     {7, 65, 3},    {24, 128, 16},
                                        {130, 257, 5}, {61, 193, 33}, {53, 544, 2}};
    for (int s = 0; s < CHECK_COUNT(shapes) - (check_quick() ? 3 : 0); ++s)
        for (int32_t dtype = PLORA_BF16; dtype <= PLORA_F16; ++dtype)
            for (int32_t rounding = PLORA_ROUND_STOCHASTIC; rounding <= PLORA_ROUND_RESIDUAL; ++rounding) {
                const int64_t extra = check_integer(0, 1) ? check_integer(1, 19) : 0;
                const struct merge_case c = {shapes[s][0],
                                             shapes[s][1],
                                             shapes[s][2],
                                             shapes[s][1] + extra,
                                             dtype,
                                             (int)check_integer(0, 1),
                                             (float)ldexp(check_uniform(), (int)check_integer(-8, 0)),
                                             0.5};
                for (int level = first_level(); level <= last_level(); ++level)
                    run_rounded(&c, level, rounding);
            }
}

/* Every 16-bit pattern of W, with every kind of low half, plus a fixed d: the bits of rounding.h, infinities and the largest number
 * included, and what a trial counts. */
static void check_edges(int level, int32_t dtype, int32_t rounding, float d)
{
    enum { SIDE = 256 };
    struct check_matrix weight = check_matrix_new(SIDE, SIDE, SIDE, dtype);
    uint16_t *bits = weight.m.data, *low = poisoned_new(SIDE * SIDE * sizeof *low);
    float *left = poisoned_new(SIDE * sizeof *left), *right = poisoned_new(SIDE * sizeof *right);
    int64_t *overflows = poisoned_new(sizeof *overflows), expected = 0;
    static const uint16_t lows[] = {0, 1, 0x7fff, 0x8000, 0xffff};
    for (int j = 0; j < SIDE * SIDE; ++j) {
        bits[j] = (uint16_t)j;
        low[j] = check_integer(0, 1) ? (uint16_t)check_next() : lows[check_integer(0, 4)];
        const uint16_t magnitude = bits[j] & 0x7fff;
        if (magnitude == 0 || magnitude == (dtype == PLORA_BF16 ? 0x7f7f : 0x7bff)) low[j] &= 0x7fff;
        if (magnitude >= (dtype == PLORA_BF16 ? 0x7f80 : 0x7c00)) low[j] = 0;
    }
    for (int j = 0; j < SIDE; ++j) {
        left[j] = 1.0f;
        right[j] = d;
    }
    struct plora__merge_args args = {.weight = weight.m,
                                     .rank = 1,
                                     .factor = 1.0f,
                                     .rounding = rounding,
                                     .left = left,
                                     .left_row_stride = 1,
                                     .left_rank_stride = 1,
                                     .right = right,
                                     .right_rank_stride = SIDE,
                                     .right_column_stride = 1,
                                     .draw = {.seed = check_next(), .stage = 7, .row_elements = SIDE, .layer = 3},
                                     .residual = rounding == PLORA_ROUND_RESIDUAL ? low : NULL,
                                     .residual_stride = SIDE,
                                     .overflows = overflows};
    args.workspace = poisoned_new(merge_workspace(level, &args));
    uint16_t *low_start = malloc(SIDE * SIDE * sizeof *low_start);
    CHECK(low_start != NULL, "the test itself is out of memory");
    memcpy(low_start, low, SIDE * SIDE * sizeof *low);
    check_matrix_snapshot(&weight);
    merge(level, 2, &args);
    check_matrix_unchanged(&weight, "W after the dry run");
    CHECK(memcmp(low, low_start, SIDE * SIDE * sizeof *low) == 0, "the residual after the dry run");
    args.overflows = NULL;
    merge(level, 2, &args);
    for (int j = 0; j < SIDE * SIDE; ++j) {
        const uint16_t start = (uint16_t)j;
        const int residual = rounding == PLORA_ROUND_RESIDUAL;
        const float value =
            (residual ? plora__join_residual(start, low_start[j], dtype) : plora__load(&start, 0, dtype)) + d;
        const uint16_t random = reference_random(args.draw.seed, 7, 3, (uint64_t)j);
        uint16_t want_bits = plora__round_stochastic(value, random, dtype), want_low = low_start[j];
        if (residual) plora__split_residual(value, dtype, &want_bits, &want_low);
        const float want = plora__load(&want_bits, 0, dtype);
        CHECK(isnan(want) ? isnan(plora__load(bits, j, dtype)) : bits[j] == want_bits && low[j] == want_low,
              "level %d, dtype %d, rounding %d: 0x%04x, 0x%04x + %g: got 0x%04x, 0x%04x, want 0x%04x, 0x%04x", level,
              dtype, rounding, j, low_start[j], d, bits[j], low[j], want_bits, want_low);
        expected += isfinite(plora__load(&start, 0, dtype)) && !isfinite(want);
    }
    CHECK(*overflows == expected, "level %d, dtype %d, rounding %d, d %g: %lld overflows, want %lld", level, dtype,
          rounding, d, (long long)*overflows, (long long)expected);
    free(low_start);
    poisoned_free(args.workspace);
    poisoned_free(overflows);
    poisoned_free(left);
    poisoned_free(right);
    poisoned_free(low);
    check_matrix_free(&weight);
}

static void test_merge_edges(void **state)
{
    (void)state;
    check_reseed(8);
    for (int level = first_level(); level <= last_level(); ++level)
        for (int32_t dtype = PLORA_BF16; dtype <= PLORA_F16; ++dtype)
            for (int32_t rounding = PLORA_ROUND_STOCHASTIC; rounding <= PLORA_ROUND_RESIDUAL; ++rounding) {
                static const float large[2][2] = {{0x1p119f, 0x1p127f}, {17.0f, 40000.0f}};
                for (int exponent = -30; exponent <= 12; exponent += check_quick() ? 14 : 5)
                    check_edges(level, dtype, rounding, (float)ldexp(check_uniform(), exponent));
                for (int i = 0; i < 2; ++i)
                    check_edges(level, dtype, rounding, large[dtype == PLORA_F16][i] * (check_integer(0, 1) ? 1 : -1));
            }
}

static void test_magnitudes(void **state)
{
    (void)state;
    check_reseed(4);
    enum { SEGMENTS = 5 };
    for (int level = first_level(); level <= last_level(); ++level)
        for (int kind = 0; kind < 4; ++kind) {
            struct plora__segment *segments = poisoned_new(SEGMENTS * sizeof *segments);
            double want[SEGMENTS] = {0}, *got = poisoned_new(SEGMENTS * sizeof *got);
            int64_t count = 0;
            for (int i = 0; i < SEGMENTS; ++i) {
                const int64_t end = count + check_integer(1, 300);
                segments[i] = (struct plora__segment){count, end, i % 2, 0};
                count = end;
            }
            float *values = poisoned_new((size_t)count * sizeof *values);
            for (int i = 0; i < SEGMENTS; ++i)
                for (int64_t at = segments[i].begin; at < segments[i].end; ++at) {
                    values[at] = (float)(100 * check_uniform());
                    want[i] = fmax(want[i], fabs((double)values[at]));
                }
            const int64_t bad = check_integer(0, SEGMENTS - 1);
            if (kind > 0) {
                values[check_integer(segments[bad].begin, segments[bad].end - 1)] = kind == 1   ? NAN
                                                                                    : kind == 2 ? INFINITY
                                                                                                : -INFINITY;
                want[bad] = INFINITY;
            }
            const struct plora__magnitude_args args = {values, segments, got, SEGMENTS};
            magnitudes(level, &args);
            for (int i = 0; i < SEGMENTS; ++i)
                CHECK(got[i] == want[i], "level %d, kind %d, segment %d: %g, want %g", level, kind, i, got[i], want[i]);
            poisoned_free(values);
            poisoned_free(segments);
            poisoned_free(got);
        }
}

int main(void)
{
    check_begin("test_merge");
    if (device_is_cuda()) context = check_context(NULL, 0, 0);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_merge_kernels),       cmocka_unit_test(test_merge_random_shapes),
        cmocka_unit_test(test_merge_rounding),      cmocka_unit_test(test_magnitudes),
        cmocka_unit_test(test_stochastic_rounding), cmocka_unit_test(test_residual),
        cmocka_unit_test(test_merge_rounded),       cmocka_unit_test(test_merge_edges),
    };
    const int failures = cmocka_run_group_tests(tests, NULL, NULL);
    plora_context_destroy(context);
    return failures;
}
