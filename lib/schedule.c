/* schedule.c: the factor on the learning rate, as plora.h defines it; t = steps since the last restart, w = warm-up, n = period:
 *
 *     warm(t, w) = min(1, (t + 1) / (w + 1))        never 0, so that no step is lost
 *     RELORA     = cosine(all steps) * warm(all steps, w) * warm(steps since the last unload, rewarmup)   (arXiv 2307.05695) */
#include <math.h>

#include "handles.h"

static double warm_up(int64_t t, int64_t steps)
{
    return t >= steps ? 1.0 : ((double)t + 1.0) / ((double)steps + 1.0);
}

static double progress(int64_t t, const plora_optimizer_options *options)
{
    if (t <= options->warmup_steps) return 0.0;
    if (t >= options->period_steps) return 1.0;
    return (double)(t - options->warmup_steps) / (double)(options->period_steps - options->warmup_steps);
}

double plora__schedule_factor(const struct plora_optimizer *optimizer)
{
    const double pi = 3.14159265358979323846;
    const plora_optimizer_options *options = &optimizer->options;
    const int relora = options->schedule == PLORA_SCHEDULE_RELORA;
    const int64_t t = relora ? optimizer->total_steps : optimizer->schedule_step;
    const double warm = warm_up(t, options->warmup_steps);
    if (options->schedule == PLORA_SCHEDULE_CONSTANT) return warm;
    const double p = progress(t, options), f = options->final_ratio;
    if (options->schedule == PLORA_SCHEDULE_LINEAR) return warm * (1.0 - (1.0 - f) * p);
    const double cosine = warm * (f + (1.0 - f) * (1.0 + cos(pi * p)) / 2.0);
    if (!relora || optimizer->last_unload_step < 0) return cosine;
    return cosine * warm_up(optimizer->total_steps - optimizer->last_unload_step, options->rewarmup_steps);
}
