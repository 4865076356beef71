/* test_schedule.c: the learning rate of every schedule against its equation, across steps, resets and unloads. */
#include "check.h"

struct run {
    plora_context *context;
    plora_model *model;
    plora_adapters *adapters;
    plora_optimizer *optimizer;
    float weight[6];
};

static void start(struct run *run, const plora_optimizer_options *options)
{
    memset(run, 0, sizeof *run);
    run->context = check_context(NULL, 1, 0);
    CHECK_OK(plora_model_create(run->context, &run->model));
    const plora_matrix weight = {run->weight, 2, 3, 3, PLORA_F32, 0};
    CHECK_OK(check_add_linear(run->model, "layer", &weight, NULL, 0, 0, NULL));
    plora_adapters_options adapters = PLORA_ADAPTERS_OPTIONS_INIT;
    adapters.rank = 1;
    CHECK_OK(plora_adapters_create(run->model, &adapters, &run->adapters));
    CHECK_OK(plora_optimizer_create(run->adapters, options, &run->optimizer));
}

static void finish(struct run *run)
{
    plora_optimizer_destroy(run->optimizer);
    plora_adapters_destroy(run->adapters);
    plora_model_destroy(run->model);
    plora_context_destroy(run->context);
}

/* The header's equations, as they stand there. */
static double expected(const plora_optimizer_options *o, int64_t t)
{
    const double w = (double)o->warmup_steps, n = (double)o->period_steps, f = o->final_ratio, time = (double)t;
    const double warm = fmin(1, (time + 1) / (w + 1)), p = fmin(1, fmax(0, (time - w) / (n - w)));
    if (o->schedule == PLORA_SCHEDULE_CONSTANT) return o->learning_rate * warm;
    if (o->schedule == PLORA_SCHEDULE_LINEAR) return o->learning_rate * warm * (1 - (1 - f) * p);
    return o->learning_rate * warm * (f + (1 - f) * (1 + cos(acos(-1) * p)) / 2);
}

static void step(struct run *run, double want, const char *what)
{
    plora_step_report report = PLORA_STEP_REPORT_INIT;
    CHECK_CLOSE(plora_optimizer_learning_rate(run->optimizer), want, 1e-14 * want, "%s", what);
    CHECK_OK(plora_optimizer_step(run->optimizer, 1.0, &report, NULL));
    CHECK_CLOSE(report.learning_rate, want, 1e-14 * want, "%s", what);
}

static plora_optimizer_options random_options(int32_t schedule)
{
    plora_optimizer_options options = PLORA_OPTIMIZER_OPTIONS_INIT;
    options.schedule = schedule;
    options.learning_rate = 1e-3 * (1.5 + check_uniform());
    options.final_ratio = check_integer(0, 1) ? 0.0 : 0.5 + 0.5 * check_uniform();
    options.warmup_steps = check_integer(0, 5);
    options.period_steps = options.warmup_steps + check_integer(1, 20);
    options.rewarmup_steps = check_integer(0, 5);
    return options;
}

static void test_restarting_schedules(void **state)
{
    (void)state;
    check_reseed(1);
    for (int round = 0; round < 20; ++round)
        for (int32_t schedule = PLORA_SCHEDULE_CONSTANT; schedule <= PLORA_SCHEDULE_COSINE; ++schedule) {
            const plora_optimizer_options options = random_options(schedule);
            struct run run;
            start(&run, &options);
            for (int64_t t = 0; t < options.period_steps + 3; ++t)
                step(&run, expected(&options, t), "first period");
            CHECK_OK(plora_unload(run.adapters, run.optimizer, NULL, NULL, NULL));
            for (int64_t t = 0; t < 4; ++t)
                step(&run, expected(&options, t), "after an unload");
            plora_unload_options keep = PLORA_UNLOAD_OPTIONS_INIT;
            keep.momentum = 0.2;
            CHECK_OK(plora_unload(run.adapters, run.optimizer, &keep, NULL, NULL));
            step(&run, expected(&options, 4), "after an unload that keeps the moments");
            CHECK_OK(plora_optimizer_reset(run.optimizer, NULL));
            step(&run, expected(&options, 0), "after a reset");
            finish(&run);
        }
}

static void test_relora(void **state)
{
    (void)state;
    check_reseed(2);
    for (int round = 0; round < 20; ++round) {
        const plora_optimizer_options options = random_options(PLORA_SCHEDULE_RELORA);
        struct run run;
        start(&run, &options);
        int64_t t = 0;
        for (; t < options.period_steps / 2; ++t)
            step(&run, expected(&options, t), "before any unload");
        for (int unload = 0; unload < 3; ++unload) {
            plora_unload_options given = PLORA_UNLOAD_OPTIONS_INIT;
            if (unload == 1) given.momentum = 0.5;
            CHECK_OK(plora_unload(run.adapters, run.optimizer, &given, NULL, NULL));
            for (int64_t since = 0; since < options.rewarmup_steps + 2; ++since, ++t) {
                const double again = fmin(1, ((double)since + 1) / ((double)options.rewarmup_steps + 1));
                step(&run, expected(&options, t) * again, "after an unload");
            }
        }
        finish(&run);
    }
}

/* The schedule goes on as a factor on the rate that the host sets. */
static void test_set_learning_rate(void **state)
{
    (void)state;
    check_reseed(3);
    for (int32_t schedule = PLORA_SCHEDULE_CONSTANT; schedule <= PLORA_SCHEDULE_COSINE; ++schedule) {
        plora_optimizer_options options = random_options(schedule);
        struct run run;
        start(&run, &options);
        for (int64_t t = 0; t < options.period_steps + 3; ++t) {
            options.learning_rate = t == 4 ? 0.0 : 1e-3 * (1.5 + check_uniform());
            CHECK_OK(plora_optimizer_set_learning_rate(run.optimizer, options.learning_rate));
            step(&run, expected(&options, t), "a rate that was set");
        }
        const double before = plora_optimizer_learning_rate(run.optimizer);
        CHECK_FAILS(plora_optimizer_set_learning_rate(run.optimizer, -1e-3), PLORA_ERROR_INVALID_ARGUMENT, "-0.001");
        CHECK_FAILS(plora_optimizer_set_learning_rate(run.optimizer, NAN), PLORA_ERROR_INVALID_ARGUMENT, "nan");
        CHECK_FAILS(plora_optimizer_set_learning_rate(NULL, 1.0), PLORA_ERROR_INVALID_ARGUMENT, "NULL");
        CHECK(plora_optimizer_learning_rate(run.optimizer) == before, "a refused rate was taken");
        finish(&run);
    }
}

static void test_refused(void **state)
{
    (void)state;
    struct run run;
    plora_optimizer_options options = PLORA_OPTIMIZER_OPTIONS_INIT;
    start(&run, &options);
    plora_optimizer *made = NULL;
#define REFUSE(field, value, word)                                                                                     \
    do {                                                                                                               \
        plora_optimizer_options bad = PLORA_OPTIMIZER_OPTIONS_INIT;                                                    \
        bad.schedule = PLORA_SCHEDULE_COSINE;                                                                          \
        bad.period_steps = 10;                                                                                         \
        bad.field = (value);                                                                                           \
        CHECK_FAILS(plora_optimizer_create(run.adapters, &bad, &made), PLORA_ERROR_INVALID_ARGUMENT, word);            \
        CHECK(made == NULL, "the output was touched");                                                                 \
    } while (0)
    REFUSE(schedule, 4, "schedule 4");
    REFUSE(schedule, -1, "schedule -1");
    REFUSE(period_steps, 0, "period_steps 0");
    REFUSE(period_steps, -2, "period_steps is -2");
    REFUSE(warmup_steps, 10, "warmup_steps 10");
    REFUSE(warmup_steps, -1, "warmup_steps is -1");
    REFUSE(rewarmup_steps, -1, "rewarmup_steps is -1");
    REFUSE(final_ratio, -0.1, "final_ratio");
    REFUSE(final_ratio, 1.1, "final_ratio");
    REFUSE(final_ratio, NAN, "final_ratio");
#undef REFUSE
    finish(&run);
}

int main(void)
{
    check_begin("test_schedule");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_restarting_schedules),
        cmocka_unit_test(test_relora),
        cmocka_unit_test(test_set_learning_rate),
        cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
