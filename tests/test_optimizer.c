/* test_optimizer.c: the update kernels of every instruction level of the CPU against double, the same through the backend's table, the
 * optimizer against torch's trajectories. */
#include "check.h"
#include "cpu/isa.h"
#include "cpu/optimizer_kernels.h"
#include "handles.h"
#include "vectors_optimizer.h"

/* ------------------------------------------------------------------------------------------------------------ kernels */

enum { MOST = 40000 };

struct arenas {
    float p[MOST], g[MOST], m[MOST], v[MOST];
};

static void fill(struct arenas *arenas, int64_t count)
{
    for (int64_t i = 0; i < count; ++i) {
        arenas->p[i] = (float)check_uniform();
        arenas->g[i] = (float)ldexp(check_uniform(), (int)check_integer(-30, 3));
        arenas->m[i] = (float)ldexp(check_uniform(), (int)check_integer(-30, 3));
        arenas->v[i] = (float)ldexp(fabs(check_uniform()), (int)check_integer(-60, 6));
    }
}

/* Segments of multiples of `unit` elements, at most 64. */
static struct plora__step_args random_args(struct arenas *arenas, int64_t count, int32_t algorithm,
                                           struct plora__segment *segments, int64_t unit)
{
    struct plora__step_args args = {
        .algorithm = algorithm, .count = count, .parameters = arenas->p, .gradients = arenas->g};
    args.first_moment = arenas->m;
    args.second_moment = algorithm == PLORA_OPTIMIZER_ADAMW ? arenas->v : NULL;
    args.segments = segments;
    for (int64_t begin = 0; begin < count; begin = segments[args.segment_count++].end) {
        const int64_t length = unit * check_integer(1, (count - begin < 30000 ? count - begin : 30000) / unit);
        segments[args.segment_count] = (struct plora__segment){begin, args.segment_count == 63 ? count : begin + length,
                                                               args.segment_count % 2, 0};
    }
    args.learning_rate[0] = 1e-2 * (1 + fabs(check_uniform()));
    args.learning_rate[1] = 8 * args.learning_rate[0];
    args.weight_decay = 0.1 * fabs(check_uniform());
    args.beta1 = 0.9;
    args.beta2 = 0.999;
    args.epsilon = 1e-8;
    const int64_t t = check_integer(1, 20);
    args.bias_correction1 = 1 - pow(args.beta1, (double)t);
    args.bias_correction2 = 1 - pow(args.beta2, (double)t);
    args.gradient_scale = 0.25 + fabs(check_uniform());
    return args;
}

/* One element in double. The bounds count fp32 roundings: of each constant, each product and each sum. In the second moment,
 * for example, g^2 has 8: two in each g (the factor, the product), 1 - beta2, two products, the sum. */
static void check_element_step(const struct plora__step_args *args, const struct arenas *before,
                               const struct arenas *after, int64_t i, int is_b, int isa)
{
    const double e = 0x1p-24, tiny = 0x1p-147, rate = args->learning_rate[is_b];
    const double g = before->g[i] * args->gradient_scale, p = before->p[i] * (1 - rate * args->weight_decay);
    if (args->algorithm == PLORA_OPTIMIZER_SGD) {
        const double m = args->beta1 * before->m[i] + g,
                     m_error = 3.01 * e * (fabs(args->beta1 * before->m[i]) + fabs(g)) + tiny;
        CHECK_CLOSE(after->m[i], m, m_error, "first moment %lld, level %d", (long long)i, isa);
        CHECK_CLOSE(after->p[i], p - rate * m, 3.01 * e * (fabs(p) + fabs(rate * m)) + rate * m_error + tiny,
                    "parameter %lld, level %d", (long long)i, isa);
        return;
    }
    const double m = args->beta1 * before->m[i] + (1 - args->beta1) * g,
                 v = args->beta2 * before->v[i] + (1 - args->beta2) * g * g;
    const double m_error = 4 * e * (fabs(args->beta1 * before->m[i]) + fabs(g)) + tiny;
    CHECK_CLOSE(after->m[i], m, m_error, "first moment %lld, level %d", (long long)i, isa);
    CHECK_CLOSE(after->v[i], v, 8.01 * e * v + tiny, "second moment %lld, level %d", (long long)i, isa);
    /* from the moments as stored: the update by itself is good to a few units in the last place */
    const double update =
        rate * after->m[i] / args->bias_correction1 / (sqrt(after->v[i] / args->bias_correction2) + args->epsilon);
    CHECK_CLOSE(after->p[i], p - update, 3.01 * e * fabs(p) + 7 * e * fabs(update) + tiny, "parameter %lld, level %d",
                (long long)i, isa);
}

static void test_step_kernels(void **state)
{
    (void)state;
    check_reseed(1);
    struct arenas *start = malloc(sizeof *start), *after = malloc(sizeof *after), *again = malloc(sizeof *again);
    CHECK(start != NULL && after != NULL && again != NULL, "the test itself is out of memory");
    struct plora__segment segments[64];
    static const int64_t counts[] = {1, 3, 15, 16, 17, 131, 16384, 16385, MOST};
    for (int isa = 0; isa <= cpu_isa(); ++isa)
        for (int32_t algorithm = PLORA_OPTIMIZER_ADAMW; algorithm <= PLORA_OPTIMIZER_SGD; ++algorithm)
            for (int c = 0; c < CHECK_COUNT(counts); ++c) {
                fill(start, MOST);
                *after = *start;
                struct plora__step_args args = random_args(after, counts[c], algorithm, segments, 1);
                cpu_optimizer_update_with(cpu_optimizer_kernels(isa), 2, &args, args.gradient_scale);
                for (int32_t s = 0; s < args.segment_count; ++s)
                    for (int64_t i = segments[s].begin; i < segments[s].end; ++i)
                        check_element_step(&args, start, after, i, segments[s].is_b, isa);
                const size_t rest = (size_t)(MOST - counts[c]) * sizeof(float);
                CHECK(memcmp(after->p + counts[c], start->p + counts[c], rest) == 0 &&
                          memcmp(after->m + counts[c], start->m + counts[c], rest) == 0 &&
                          memcmp(after->v + counts[c], start->v + counts[c], rest) == 0 &&
                          memcmp(after->g, start->g, sizeof start->g) == 0,
                      "wrote past the end, or to the gradients");
                for (int threads = 1; threads <= 3; threads += 2) {
                    *again = *start;
                    args.parameters = again->p;
                    args.gradients = again->g;
                    args.first_moment = again->m;
                    if (args.second_moment != NULL) args.second_moment = again->v;
                    cpu_optimizer_update_with(cpu_optimizer_kernels(isa), threads, &args, args.gradient_scale);
                    CHECK(memcmp(again, after, sizeof *after) == 0, "bits differ with %d threads, level %d", threads,
                          isa);
                }
            }
    free(start);
    free(after);
    free(again);
}

static void test_sums_and_scale(void **state)
{
    (void)state;
    check_reseed(2);
    static float values[MOST], scaled[MOST];
    static const int64_t counts[] = {0, 1, 7, 63, 64, 65, 5000, MOST};
    for (int isa = 0; isa <= cpu_isa(); ++isa)
        for (int c = 0; c < CHECK_COUNT(counts); ++c) {
            const struct cpu_optimizer_kernels *kernels = cpu_optimizer_kernels(isa);
            const float factor = (float)check_uniform();
            double want = 0;
            for (int64_t i = 0; i < MOST; ++i)
                scaled[i] = values[i] = (float)ldexp(check_uniform(), (int)check_integer(-60, 60));
            for (int64_t i = 0; i < counts[c]; ++i)
                want += (double)values[i] * values[i];
            const double one = cpu_sum_of_squares_with(kernels, 1, values, counts[c]);
            CHECK_CLOSE(one, want, 1e-12 * want, "sum of %lld squares, level %d", (long long)counts[c], isa);
            for (int threads = 2; threads <= 3; ++threads) {
                const double more = cpu_sum_of_squares_with(kernels, threads, values, counts[c]);
                CHECK(memcmp(&one, &more, sizeof one) == 0, "bits differ with %d threads", threads);
            }
            cpu_scale_with(kernels, 2, scaled, counts[c], factor);
            for (int64_t i = 0; i < MOST; ++i)
                CHECK(scaled[i] == (i < counts[c] ? values[i] * factor : values[i]), "scale, element %lld",
                      (long long)i);
            if (counts[c] == 0) continue;
            for (int kind = 0; kind < 2; ++kind) {
                const int64_t at = check_integer(0, counts[c] - 1);
                const float kept = values[at];
                values[at] = kind ? NAN : -INFINITY;
                CHECK(!isfinite(cpu_sum_of_squares_with(kernels, 2, values, counts[c])),
                      "a non-finite value was not seen");
                values[at] = kept;
            }
            values[check_integer(0, counts[c] - 1)] = 3e38f; /* its square does not fit fp32 */
            CHECK(isfinite(cpu_sum_of_squares_with(kernels, 2, values, counts[c])),
                  "a finite value was called infinite");
        }
}

/* -------------------------------------------------------------------------------------------------------------- backend */

/* What optimizer_step works on, with a twin of each block. */
struct step_buffers {
    struct arenas *start, *after, *again;
    struct plora__segment segments[64];
    struct plora__step_state state;
    void *workspace;
};

static double norm_of(const float *gradients, int64_t count, double scale)
{
    double sum = 0;
    for (int64_t i = 0; i < count; ++i)
        sum += (double)gradients[i] * gradients[i];
    return sqrt(sum) * scale;
}

/* One step through the table, against double; on CUDA also against the CPU's kernels, bit for bit. */
static void check_backend_step(const plora_context *context, struct step_buffers *b, int64_t count, int32_t algorithm,
                               int clips)
{
    fill(b->start, MOST);
    *b->after = *b->start;
    struct plora__step_args args = random_args(b->after, count, algorithm, b->segments, 16);
    const double scale = args.gradient_scale, norm = norm_of(b->start->g, count, scale);
    args.max_norm = clips > 0 ? norm * 0.375 : clips < 0 ? norm * 2 : 0;
    struct plora__step_args given = args;
    given.parameters = device_of(b->after->p);
    given.gradients = device_of(b->after->g);
    given.first_moment = device_of(b->after->m);
    given.second_moment = algorithm == PLORA_OPTIMIZER_ADAMW ? device_of(b->after->v) : NULL;
    given.segments = device_of(b->segments);
    given.state = device_of(&b->state);
    given.workspace = device_of(b->workspace);
    const int64_t refused = b->state.refused;
    CHECK_OK(DEVICE(context->backend->optimizer_step(context->device, &given, NULL)));
    CHECK_CLOSE(b->state.norm, norm, 1e-12 * norm, "norm of %lld", (long long)count);
    CHECK(b->state.refused == refused, "%lld steps were refused", (long long)(b->state.refused - refused));

    const double factor = clips > 0 ? scale * (args.max_norm / b->state.norm) : scale;
    args.gradient_scale = factor;
    for (int32_t s = 0; s < args.segment_count; ++s)
        for (int64_t i = b->segments[s].begin; i < b->segments[s].end; ++i)
            check_element_step(&args, b->start, b->after, i, b->segments[s].is_b, -1);
    const size_t rest = (size_t)(MOST - count) * sizeof(float);
    CHECK(memcmp(b->after->p + count, b->start->p + count, rest) == 0 &&
              memcmp(b->after->m + count, b->start->m + count, rest) == 0 &&
              memcmp(b->after->v + count, b->start->v + count, rest) == 0 &&
              memcmp(b->after->g, b->start->g, sizeof b->start->g) == 0,
          "wrote past the end, or to the gradients");
    if (cpu_isa() != CPU_ISA_PORTABLE) { /* which rounds products and sums apart */
        *b->again = *b->start;
        args.parameters = b->again->p;
        args.gradients = b->again->g;
        args.first_moment = b->again->m;
        args.second_moment = algorithm == PLORA_OPTIMIZER_ADAMW ? b->again->v : NULL;
        cpu_optimizer_update_with(cpu_optimizer_kernels(cpu_isa()), 1, &args, factor);
        CHECK(memcmp(b->again, b->after, sizeof *b->after) == 0, "other bits than the CPU's, count %lld",
              (long long)count);
    }
    /* And a step that is refused. */
    b->after->g[check_integer(0, count - 1)] = clips ? NAN : -INFINITY;
    *b->again = *b->after;
    CHECK_OK(DEVICE(context->backend->optimizer_step(context->device, &given, NULL)));
    CHECK(!isfinite(b->state.norm) && b->state.refused == refused + 1, "norm %g, %lld refused", b->state.norm,
          (long long)(b->state.refused - refused));
    CHECK(memcmp(b->again, b->after, sizeof *b->after) == 0, "a refused step has changed something");
}

static void test_backend_step(void **state)
{
    (void)state;
    check_reseed(5);
    plora_context *context = check_context(NULL, 2, 0);
    struct step_buffers *b = calloc(1, sizeof *b);
    CHECK(b != NULL, "the test itself is out of memory");
    b->start = malloc(sizeof *b->start);
    b->after = malloc(sizeof *b->after);
    b->again = malloc(sizeof *b->again);
    const struct plora__step_args most = {.count = MOST};
    const size_t bytes = context->backend->step_workspace(context->device, &most);
    b->workspace = aligned_alloc(64, (bytes + 64) / 64 * 64);
    CHECK(b->start != NULL && b->after != NULL && b->again != NULL && b->workspace != NULL, "out of memory");
    memset(b->workspace, 0, bytes);
    device_twin(b->after, sizeof *b->after);
    device_twin(b->segments, sizeof b->segments);
    device_twin(&b->state, sizeof b->state);
    device_twin(b->workspace, bytes);
    static const int64_t counts[] = {16, 48, 1040, 4096, 4112, 16384, MOST};
    for (int32_t algorithm = PLORA_OPTIMIZER_ADAMW; algorithm <= PLORA_OPTIMIZER_SGD; ++algorithm)
        for (int c = 0; c < CHECK_COUNT(counts); ++c)
            for (int clips = -1; clips <= 1; ++clips)
                check_backend_step(context, b, counts[c], algorithm, clips);
    void *const blocks[] = {b->after, b->segments, &b->state, b->workspace};
    for (int i = 0; i < CHECK_COUNT(blocks); ++i)
        device_forget(blocks[i]);
    free(b->start);
    free(b->after);
    free(b->again);
    free(b->workspace);
    free(b);
    plora_context_destroy(context);
}

static void test_backend_scale(void **state)
{
    (void)state;
    check_reseed(6);
    plora_context *context = check_context(NULL, 2, 0);
    static float values[MOST], before[MOST];
    device_twin(values, sizeof values);
    static const int64_t counts[] = {0, 1, 2, 3, 4, 5, 4095, 4096, 4097, 20000, MOST};
    for (int c = 0; c < CHECK_COUNT(counts); ++c) {
        const float factor = (float)check_uniform();
        for (int64_t i = 0; i < MOST; ++i)
            before[i] = values[i] = (float)ldexp(check_uniform(), (int)check_integer(-60, 60));
        CHECK_OK(DEVICE(context->backend->scale(context->device, device_of(values), counts[c], factor, NULL)));
        for (int64_t i = 0; i < MOST; ++i)
            CHECK(values[i] == (i < counts[c] ? before[i] * factor : before[i]), "scale, element %lld of %lld",
                  (long long)i, (long long)counts[c]);
    }
    device_forget(values);
    plora_context_destroy(context);
}

/* ---------------------------------------------------------------------------------------------------------- optimizer */

/* One layer: A[2,4], B[16,2], in an arena of 16 + 32 elements. */
struct run {
    struct check_allocator allocator;
    plora_context *context;
    plora_model *model;
    plora_adapters *adapters;
    plora_optimizer *optimizer;
    float weight[16 * 4];
    float *parameters, *gradients, *first, *second;
    int64_t count, b_offset;
};

static void start_run(struct run *run, const plora_optimizer_options *options)
{
    memset(run, 0, sizeof *run);
    run->allocator = (struct check_allocator)CHECK_ALLOCATOR_INIT;
    run->context = check_context(&run->allocator, 2, 0);
    CHECK_OK(plora_model_create(run->context, &run->model));
    device_twin(run->weight, sizeof run->weight);
    const plora_matrix weight = {run->weight, 16, 4, 4, PLORA_F32, 0};
    CHECK_OK(check_add_linear(run->model, "layer", &weight, NULL, 0, 0, NULL));
    plora_adapters_options adapters = PLORA_ADAPTERS_OPTIONS_INIT;
    adapters.rank = 2;
    CHECK_OK(plora_adapters_create(run->model, &adapters, &run->adapters));
    CHECK_OK(plora_optimizer_create(run->adapters, options, &run->optimizer));
    CHECK_OK(plora_adapters_parameters(run->adapters, &run->parameters, &run->count));
    CHECK_OK(plora_adapters_gradients(run->adapters, &run->gradients, &run->count));
    CHECK_OK(plora_optimizer_state(run->optimizer, &run->first, &run->second, NULL, NULL));
    plora_adapter view = PLORA_ADAPTER_INIT;
    CHECK_OK(plora_adapters_layer(run->adapters, 0, &view));
    run->b_offset = (float *)view.b.data - run->parameters;
    const size_t bytes = (size_t)run->count * sizeof(float);
    run->parameters = device_mirror(run->parameters, bytes);
    run->gradients = device_mirror(run->gradients, bytes);
    run->first = device_mirror(run->first, bytes);
    run->second = device_mirror(run->second, bytes);
}

static void finish_run(struct run *run)
{
    float *const host[] = {run->parameters, run->gradients, run->first, run->second, run->weight};
    for (int i = 0; i < CHECK_COUNT(host); ++i)
        device_forget(host[i]);
    plora_optimizer_destroy(run->optimizer);
    plora_adapters_destroy(run->adapters);
    plora_model_destroy(run->model);
    plora_context_destroy(run->context);
    check_allocator_empty(&run->allocator, "after an optimizer");
}

static void test_torch_trajectories(void **state)
{
    (void)state;
    for (int c = 0; c < CHECK_COUNT(vector_cases); ++c)
        for (int accumulated = 1; accumulated <= 4; accumulated *= 4) { /* gradients summed over micro-batches */
            const struct vector_case *vector = &vector_cases[c];
            plora_optimizer_options options = PLORA_OPTIMIZER_OPTIONS_INIT;
            options.algorithm = vector->algorithm;
            options.learning_rate = vector->learning_rate;
            options.beta1 = vector->beta1;
            options.beta2 = vector->beta2;
            options.epsilon = vector->epsilon;
            options.weight_decay = vector->weight_decay;
            struct run run;
            start_run(&run, &options);
            CHECK(run.count - run.b_offset >= VECTOR_COUNT, "the arena of %lld elements is too small",
                  (long long)run.count);
            float *p = run.parameters + run.b_offset;
            memcpy(p, vector_start, sizeof vector_start);
            for (int step = 0; step < VECTOR_STEPS; ++step) {
                for (int i = 0; i < VECTOR_COUNT; ++i)
                    run.gradients[run.b_offset + i] = (float)accumulated * vector_gradients[step][i];
                CHECK_OK(DEVICE(plora_optimizer_step(run.optimizer, 1.0 / accumulated, NULL, NULL)));
                for (int i = 0; i < VECTOR_COUNT; ++i) {
                    const double want = vector->parameters[step][i];
                    CHECK_CLOSE(p[i], want, (step + 1) * 0x1p-23 * (fabs(want) + 10 * vector->learning_rate),
                                "case %d, step %d, element %d", c, step, i);
                }
            }
            finish_run(&run);
        }
}

/* Clipping, LoRA+'s ratio, the report, and that a refused step changes nothing. */
static void test_step(void **state)
{
    (void)state;
    check_reseed(3);
    plora_optimizer_options options = PLORA_OPTIMIZER_OPTIONS_INIT;
    options.algorithm = PLORA_OPTIMIZER_SGD;
    options.beta1 = 0;
    options.learning_rate = 0.5;
    options.b_ratio = 4;
    options.max_gradient_norm = 1;
    struct run run;
    start_run(&run, &options);
    for (int round = 0; round < 8; ++round) {
        const double range = ldexp(1, round - 5), scale = 0.5;
        float before[64];
        double norm = 0;
        for (int64_t i = 0; i < run.count; ++i) {
            const int inside = i < 8 || (i >= run.b_offset && i < run.b_offset + 32);
            before[i] = run.parameters[i] = inside ? (float)check_uniform() : 0.0f;
            run.gradients[i] = inside ? (float)(range * check_uniform()) : 0.0f;
            norm += run.gradients[i] * scale * run.gradients[i] * scale;
        }
        norm = sqrt(norm);
        plora_step_report report = PLORA_STEP_REPORT_INIT;
        CHECK_OK(DEVICE(plora_optimizer_step(run.optimizer, scale, &report, NULL)));
        CHECK_CLOSE(report.gradient_norm, norm, 1e-12 * norm, "gradient_norm");
        CHECK(report.step == round + 1 && report.learning_rate == 0.5, "step %lld, lr %g", (long long)report.step,
              report.learning_rate);
        const double factor = scale * fmin(1, 1 / norm);
        for (int64_t i = 0; i < run.count; ++i) {
            const double update = (i >= run.b_offset ? 2.0 : 0.5) * factor * run.gradients[i];
            CHECK_CLOSE(run.parameters[i], before[i] - update, 0x1p-22 * (fabs(update) + fabs(before[i])),
                        "element %lld, norm %g", (long long)i, norm);
        }
    }
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int kind = 0; kind < 3; ++kind) {
        float p[64], m[64];
        memcpy(p, run.parameters, (size_t)run.count * sizeof(float));
        memcpy(m, run.first, (size_t)run.count * sizeof(float));
        const int64_t at = check_integer(0, 7);
        run.gradients[at] = bad[kind];
        plora_step_report report = PLORA_STEP_REPORT_INIT, untouched = PLORA_STEP_REPORT_INIT;
        CHECK_FAILS(DEVICE(plora_optimizer_step(run.optimizer, 1.0, &report, NULL)), PLORA_ERROR_NON_FINITE, "norm");
        CHECK(memcmp(&report, &untouched, sizeof report) == 0, "the report was touched");
        CHECK(memcmp(p, run.parameters, (size_t)run.count * sizeof(float)) == 0 &&
                  memcmp(m, run.first, (size_t)run.count * sizeof(float)) == 0,
              "a refused step has changed something");
        int64_t step = 0;
        CHECK_OK(plora_optimizer_state(run.optimizer, NULL, NULL, NULL, &step));
        CHECK(step == 8, "a refused step was counted: %lld", (long long)step);
        run.gradients[at] = 0;
    }
    const double scales[] = {0.0, -1.0, NAN, INFINITY};
    for (int i = 0; i < 4; ++i)
        CHECK_FAILS(plora_optimizer_step(run.optimizer, scales[i], NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                    "gradient_scale");
    CHECK_FAILS(plora_optimizer_step(NULL, 1.0, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "optimizer");
    run.gradients[3] = 5;
    CHECK_OK(DEVICE(plora_optimizer_zero_gradients(run.optimizer, NULL)));
    for (int64_t i = 0; i < run.count; ++i)
        CHECK(run.gradients[i] == 0, "gradient %lld", (long long)i);
    finish_run(&run);
}

static void test_state_and_reset(void **state)
{
    (void)state;
    check_reseed(4);
    struct run run;
    start_run(&run, NULL);
    CHECK(run.second != NULL, "AdamW without a second moment");
    for (int64_t i = 0; i < run.count; ++i)
        CHECK(run.first[i] == 0 && run.second[i] == 0, "moment %lld at creation", (long long)i);
    for (int64_t i = 0; i < 8; ++i)
        run.gradients[i] = (float)(1 + fabs(check_uniform()));
    for (int i = 0; i < 3; ++i)
        CHECK_OK(DEVICE(plora_optimizer_step(run.optimizer, 1.0, NULL, NULL)));
    for (int64_t i = 0; i < 8; ++i)
        CHECK(run.first[i] > 0 && run.second[i] > 0, "moment %lld after steps", (long long)i);
    for (int64_t i = 8; i < run.b_offset; ++i)
        CHECK(run.parameters[i] == 0, "padding %lld has become %g", (long long)i, run.parameters[i]);
    int64_t step = 0, count = 0;
    CHECK_OK(plora_optimizer_state(run.optimizer, NULL, NULL, &count, &step));
    CHECK(step == 3 && count == run.count, "step %lld, count %lld", (long long)step, (long long)count);
    CHECK_OK(DEVICE(plora_optimizer_reset(run.optimizer, NULL)));
    CHECK_OK(plora_optimizer_state(run.optimizer, NULL, NULL, NULL, &step));
    CHECK(step == 0, "step %lld after a reset", (long long)step);
    for (int64_t i = 0; i < run.count; ++i)
        CHECK(plora__float_bits(run.first[i]) == 0 && plora__float_bits(run.second[i]) == 0, "moment %lld",
              (long long)i);
    finish_run(&run);
}

static void test_create_refused(void **state)
{
    (void)state;
    struct run run;
    start_run(&run, NULL);
    plora_optimizer *made = NULL;
#define REFUSE(field, value, word)                                                                                     \
    do {                                                                                                               \
        plora_optimizer_options bad = PLORA_OPTIMIZER_OPTIONS_INIT;                                                    \
        bad.field = (value);                                                                                           \
        CHECK_FAILS(plora_optimizer_create(run.adapters, &bad, &made), PLORA_ERROR_INVALID_ARGUMENT, word);            \
        CHECK(made == NULL, "the output was touched");                                                                 \
    } while (0)
    REFUSE(algorithm, 2, "algorithm 2");
    REFUSE(learning_rate, -1.0, "learning_rate");
    REFUSE(learning_rate, NAN, "learning_rate");
    REFUSE(learning_rate, INFINITY, "learning_rate");
    REFUSE(beta1, 1.0, "beta1");
    REFUSE(beta1, -0.1, "beta1");
    REFUSE(beta2, 1.0, "beta2");
    REFUSE(beta2, NAN, "beta2");
    REFUSE(epsilon, 0.0, "epsilon");
    REFUSE(epsilon, 1e-60, "epsilon");
    REFUSE(weight_decay, -0.1, "weight_decay");
    REFUSE(weight_decay, INFINITY, "weight_decay");
    REFUSE(b_ratio, 0.0, "b_ratio");
    REFUSE(b_ratio, NAN, "b_ratio");
    REFUSE(max_gradient_norm, -1.0, "max_gradient_norm");
    REFUSE(max_gradient_norm, NAN, "max_gradient_norm");
#undef REFUSE
    CHECK_FAILS(plora_optimizer_create(NULL, NULL, &made), PLORA_ERROR_INVALID_ARGUMENT, "adapters");
    CHECK_FAILS(plora_optimizer_create(run.adapters, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "optimizer");
    for (int64_t failing = 1; failing <= 3; ++failing) { /* the k-th allocation fails; then all is as before */
        run.allocator.fail_at = run.allocator.calls + failing;
        const int64_t live = run.allocator.live;
        CHECK_FAILS(plora_optimizer_create(run.adapters, NULL, &made), PLORA_ERROR_OUT_OF_MEMORY, "");
        CHECK(made == NULL && run.allocator.live == live, "allocation %lld: something was left", (long long)failing);
    }
    run.allocator.fail_at = 0;
    finish_run(&run);
}

int main(void)
{
    check_begin("test_optimizer");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_step_kernels),       cmocka_unit_test(test_backend_step),
        cmocka_unit_test(test_backend_scale),      cmocka_unit_test(test_sums_and_scale),
        cmocka_unit_test(test_torch_trajectories), cmocka_unit_test(test_step),
        cmocka_unit_test(test_state_and_reset),    cmocka_unit_test(test_create_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
