/* optimizer.c: the optimizer handle: AdamW and SGD over the whole parameter arena, in one fused pass of the backend.
 *
 *     gradient arena -> norm (checked, clipped) -> parameters, first moment, second moment: same layout, same offsets
 *
 * The update itself is the backend's optimizer_step; the schedule is schedule.c; which counters an unload restarts is decided in
 * unload.c and done in plora__optimizer_unload(). */
#include <float.h>
#include <math.h>

#include "handles.h"

static plora_status check_schedule(const plora_optimizer_options *options)
{
    PLORA_CHECK(options->schedule >= PLORA_SCHEDULE_CONSTANT && options->schedule <= PLORA_SCHEDULE_RELORA,
                PLORA_ERROR_INVALID_ARGUMENT, "schedule %d is unknown", options->schedule);
    PLORA_CHECK(options->final_ratio >= 0.0 && options->final_ratio <= 1.0, PLORA_ERROR_INVALID_ARGUMENT,
                "final_ratio is %g: must be in [0, 1]", options->final_ratio);
    PLORA_CHECK(options->warmup_steps >= 0, PLORA_ERROR_INVALID_ARGUMENT, "warmup_steps is %lld: must be >= 0",
                (long long)options->warmup_steps);
    PLORA_CHECK(options->period_steps >= 0, PLORA_ERROR_INVALID_ARGUMENT, "period_steps is %lld: must be >= 0",
                (long long)options->period_steps);
    PLORA_CHECK(options->rewarmup_steps >= 0, PLORA_ERROR_INVALID_ARGUMENT, "rewarmup_steps is %lld: must be >= 0",
                (long long)options->rewarmup_steps);
    PLORA_CHECK(options->schedule == PLORA_SCHEDULE_CONSTANT || options->period_steps > options->warmup_steps,
                PLORA_ERROR_INVALID_ARGUMENT, "period_steps %lld must exceed warmup_steps %lld in this schedule",
                (long long)options->period_steps, (long long)options->warmup_steps);
    return PLORA_OK;
}

static plora_status check_learning_rate(double learning_rate)
{
    PLORA_CHECK(learning_rate >= 0.0 && learning_rate <= FLT_MAX, PLORA_ERROR_INVALID_ARGUMENT,
                "learning_rate is %g: must be finite and >= 0", learning_rate);
    return PLORA_OK;
}

static plora_status check_options(const plora_optimizer_options *options)
{
    PLORA_CHECK(options->algorithm == PLORA_OPTIMIZER_ADAMW || options->algorithm == PLORA_OPTIMIZER_SGD,
                PLORA_ERROR_INVALID_ARGUMENT, "algorithm %d is unknown", options->algorithm);
    PLORA_TRY(check_learning_rate(options->learning_rate));
    PLORA_CHECK(options->beta1 >= 0.0 && options->beta1 < 1.0, PLORA_ERROR_INVALID_ARGUMENT,
                "beta1 is %g: must be in [0, 1)", options->beta1);
    PLORA_CHECK(options->beta2 >= 0.0 && options->beta2 < 1.0, PLORA_ERROR_INVALID_ARGUMENT,
                "beta2 is %g: must be in [0, 1)", options->beta2);
    /* Of 0, an element that never had a gradient would become 0 / 0. */
    PLORA_CHECK(options->epsilon >= FLT_MIN && options->epsilon <= FLT_MAX, PLORA_ERROR_INVALID_ARGUMENT,
                "epsilon is %g: must be a positive normal fp32 number", options->epsilon);
    PLORA_CHECK(options->weight_decay >= 0.0 && options->weight_decay <= FLT_MAX, PLORA_ERROR_INVALID_ARGUMENT,
                "weight_decay is %g: must be finite and >= 0", options->weight_decay);
    PLORA_CHECK(options->b_ratio > 0.0 && options->b_ratio <= FLT_MAX, PLORA_ERROR_INVALID_ARGUMENT,
                "b_ratio is %g: must be finite and > 0", options->b_ratio);
    PLORA_CHECK(options->max_gradient_norm >= 0.0 && options->max_gradient_norm <= DBL_MAX,
                PLORA_ERROR_INVALID_ARGUMENT, "max_gradient_norm is %g: must be finite and >= 0",
                options->max_gradient_norm);
    return check_schedule(options);
}

static size_t moment_bytes(const struct plora_optimizer *optimizer)
{
    return (size_t)optimizer->adapters->parameter_count * sizeof(float);
}

static plora_context *context_of(const struct plora_optimizer *optimizer)
{
    return optimizer->adapters->model->context;
}

static plora_status clear_state(struct plora_optimizer *optimizer, void *stream)
{
    const plora_context *context = context_of(optimizer);
    const size_t bytes = moment_bytes(optimizer);
    PLORA_TRY(context->backend->clear(context->device, optimizer->state, sizeof *optimizer->state, stream));
    PLORA_TRY(context->backend->clear(context->device, optimizer->first_moment, bytes, stream));
    if (optimizer->second_moment != NULL)
        PLORA_TRY(context->backend->clear(context->device, optimizer->second_moment, bytes, stream));
    return PLORA_OK;
}

plora_status plora_optimizer_create(plora_adapters *adapters, const plora_optimizer_options *given,
                                    plora_optimizer **optimizer)
{
    PLORA_CHECK(adapters != NULL && optimizer != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                adapters == NULL ? "adapters" : "optimizer");
    plora_optimizer_options options = PLORA_OPTIMIZER_OPTIONS_INIT;
    PLORA_TRY(plora__read_options(&options, sizeof options, given, "plora_optimizer_options"));
    PLORA_TRY(check_options(&options));

    plora_context *context = adapters->model->context;
    void *memory = NULL;
    PLORA_TRY(plora__allocate_zeroed(context, sizeof **optimizer, &memory));
    struct plora_optimizer *made = memory;
    made->adapters = adapters;
    made->options = options;
    made->last_unload_step = -1;
    plora__adapters_retain(adapters);

    plora_status status = PLORA_OK;
    PLORA_TRY_OUT(plora__device_allocate(context, moment_bytes(made), &memory));
    made->first_moment = memory;
    if (options.algorithm == PLORA_OPTIMIZER_ADAMW) {
        PLORA_TRY_OUT(plora__device_allocate(context, moment_bytes(made), &memory));
        made->second_moment = memory;
    }
    PLORA_TRY_OUT(plora__device_allocate(context, sizeof *made->state, &memory));
    made->state = memory;
    const struct plora__step_args shape = {.count = adapters->parameter_count};
    made->workspace_bytes = context->backend->step_workspace(context->device, &shape);
    PLORA_TRY_OUT(plora__device_allocate(context, made->workspace_bytes, &made->workspace));
    if (made->workspace_bytes > 0)
        PLORA_TRY_OUT(context->backend->clear(context->device, made->workspace, made->workspace_bytes, NULL));
    PLORA_TRY_OUT(clear_state(made, NULL));
    PLORA_TRY_OUT(context->backend->synchronize(context->device, NULL));
    *optimizer = made;
    return PLORA_OK;
out:
    plora_optimizer_destroy(made);
    return status;
}

void plora_optimizer_destroy(plora_optimizer *optimizer)
{
    if (optimizer == NULL) return;
    plora_adapters *adapters = optimizer->adapters;
    plora_context *context = context_of(optimizer);
    const size_t bytes = moment_bytes(optimizer);
    plora__device_free(context, optimizer->first_moment, bytes);
    plora__device_free(context, optimizer->second_moment, bytes);
    plora__device_free(context, optimizer->state, sizeof *optimizer->state);
    plora__device_free(context, optimizer->workspace, optimizer->workspace_bytes);
    plora__free(context, optimizer, sizeof *optimizer);
    plora__adapters_release(adapters);
}

plora_status plora__optimizer_settle(struct plora_optimizer *optimizer, int64_t pending, double *norm, void *stream)
{
    const plora_context *context = context_of(optimizer);
    struct plora__step_state state;
    PLORA_TRY(plora__read_device(context, &state, optimizer->state, sizeof state, stream));
    *norm = state.norm;
    if (state.refused == 0) return PLORA_OK;
    PLORA_TRY(context->backend->clear(context->device, optimizer->state, sizeof state, stream));
    const int64_t counted = state.refused - pending;
    optimizer->step -= counted;
    optimizer->schedule_step -= counted;
    optimizer->total_steps -= counted;
    return plora__fail(PLORA_ERROR_NON_FINITE, "%lld optimizer step%s changed nothing: the gradient norm was last %g",
                       (long long)state.refused, state.refused == 1 ? "" : "s", state.norm);
}

plora_status plora_optimizer_step(plora_optimizer *optimizer, double gradient_scale, plora_step_report *report,
                                  void *stream)
{
    PLORA_CHECK(optimizer != NULL, PLORA_ERROR_INVALID_ARGUMENT, "optimizer is NULL");
    PLORA_CHECK(isfinite(gradient_scale) && gradient_scale > 0.0, PLORA_ERROR_INVALID_ARGUMENT,
                "gradient_scale is %g: must be finite and > 0", gradient_scale);
    PLORA_TRY(plora__check_stream(context_of(optimizer), stream, 1));
    plora_step_report result = PLORA_STEP_REPORT_INIT;
    PLORA_TRY(plora__read_options(&result, sizeof result, report, "plora_step_report"));

    const plora_optimizer_options *options = &optimizer->options;
    const plora_adapters *adapters = optimizer->adapters;
    const plora_context *context = context_of(optimizer);
    result.step = optimizer->step + 1;
    result.learning_rate = plora_optimizer_learning_rate(optimizer);
    const struct plora__step_args args = {
        .algorithm = options->algorithm,
        .segment_count = adapters->segment_count,
        .count = adapters->parameter_count,
        .parameters = adapters->parameters,
        .gradients = adapters->gradients,
        .first_moment = optimizer->first_moment,
        .second_moment = optimizer->second_moment,
        .segments = adapters->segments,
        .state = optimizer->state,
        .learning_rate = {result.learning_rate, result.learning_rate * options->b_ratio},
        .weight_decay = options->weight_decay,
        .beta1 = options->beta1,
        .beta2 = options->beta2,
        .epsilon = options->epsilon,
        .bias_correction1 = 1.0 - pow(options->beta1, (double)result.step),
        .bias_correction2 = 1.0 - pow(options->beta2, (double)result.step),
        .gradient_scale = gradient_scale,
        .max_norm = options->max_gradient_norm,
        .workspace = optimizer->workspace,
    };
    PLORA_TRY(context->backend->optimizer_step(context->device, &args, stream));
    if (report != NULL || !context->backend->asynchronous)
        PLORA_TRY(plora__optimizer_settle(optimizer, 1, &result.gradient_norm, stream));
    optimizer->step++;
    optimizer->schedule_step++;
    optimizer->total_steps++;
    return report == NULL ? PLORA_OK : plora__write_result(report, &result, sizeof result, "plora_step_report");
}

plora_status plora_optimizer_zero_gradients(plora_optimizer *optimizer, void *stream)
{
    PLORA_CHECK(optimizer != NULL, PLORA_ERROR_INVALID_ARGUMENT, "optimizer is NULL");
    const plora_context *context = context_of(optimizer);
    PLORA_TRY(plora__check_stream(context, stream, 0));
    return context->backend->clear(context->device, optimizer->adapters->gradients, moment_bytes(optimizer), stream);
}

double plora_optimizer_learning_rate(const plora_optimizer *optimizer)
{
    return optimizer == NULL ? 0.0 : optimizer->options.learning_rate * plora__schedule_factor(optimizer);
}

plora_status plora_optimizer_set_learning_rate(plora_optimizer *optimizer, double learning_rate)
{
    PLORA_CHECK(optimizer != NULL, PLORA_ERROR_INVALID_ARGUMENT, "optimizer is NULL");
    PLORA_TRY(check_learning_rate(learning_rate));
    optimizer->options.learning_rate = learning_rate;
    return PLORA_OK;
}

plora_status plora_optimizer_state(plora_optimizer *optimizer, float **first_moment, float **second_moment,
                                   int64_t *count, int64_t *step)
{
    PLORA_CHECK(optimizer != NULL, PLORA_ERROR_INVALID_ARGUMENT, "optimizer is NULL");
    if (first_moment != NULL) *first_moment = optimizer->first_moment;
    if (second_moment != NULL) *second_moment = optimizer->second_moment;
    if (count != NULL) *count = optimizer->adapters->parameter_count;
    if (step != NULL) *step = optimizer->step;
    return PLORA_OK;
}

plora_status plora_optimizer_reset(plora_optimizer *optimizer, void *stream)
{
    PLORA_CHECK(optimizer != NULL, PLORA_ERROR_INVALID_ARGUMENT, "optimizer is NULL");
    PLORA_TRY(plora__check_stream(context_of(optimizer), stream, 1));
    PLORA_TRY(clear_state(optimizer, stream));
    optimizer->step = 0;
    optimizer->schedule_step = 0;
    return PLORA_OK;
}

plora_status plora__optimizer_unload(struct plora_optimizer *optimizer, int32_t moments, double momentum, void *stream)
{
    if (moments == PLORA_MOMENTS_RESET) {
        PLORA_TRY(plora_optimizer_reset(optimizer, stream));
    } else {
        const plora_context *context = context_of(optimizer);
        const int64_t count = optimizer->adapters->parameter_count;
        PLORA_TRY(context->backend->scale(context->device, optimizer->first_moment, count, (float)sqrt(1.0 - momentum),
                                          stream));
        if (optimizer->second_moment != NULL)
            PLORA_TRY(context->backend->scale(context->device, optimizer->second_moment, count, (float)(1.0 - momentum),
                                              stream));
    }
    optimizer->last_unload_step = optimizer->total_steps;
    return PLORA_OK;
}
