/* cuda_optimizer.c: the launchers of optimizer.cu: a step is two launches, the norm with clipping and refusal, then the update. */
#include <math.h>

#include "cuda.h"

static unsigned tiles(int64_t count)
{
    return (unsigned)((count + OPTIMIZER_TILE - 1) / OPTIMIZER_TILE);
}

/* A function of the count alone, as are the sums. An empty arena has a norm too. */
static unsigned norm_blocks(int64_t count)
{
    const unsigned blocks = tiles(count);
    return blocks < 1 ? 1 : blocks > NORM_BLOCKS_MAX ? NORM_BLOCKS_MAX : blocks;
}

static plora_status check_count(int64_t count)
{
    PLORA_CHECK(count / OPTIMIZER_TILE < INT32_MAX, PLORA_ERROR_UNSUPPORTED, "an arena of %lld elements is too large",
                (long long)count);
    return PLORA_OK;
}

size_t cuda_step_workspace(void *device, const struct plora__step_args *args)
{
    (void)device;
    return sizeof(struct optimizer_scratch) + norm_blocks(args->count) * sizeof(double);
}

static struct optimizer_rates rates_of(const struct plora__step_args *args, int is_b)
{
    const double rate = args->learning_rate[is_b];
    return (struct optimizer_rates){
        .decay = (float)(1.0 - rate * args->weight_decay),
        .rate = (float)(args->algorithm == PLORA_OPTIMIZER_ADAMW ? rate / args->bias_correction1 : rate),
    };
}

plora_status cuda_optimizer_step(void *device, const struct plora__step_args *args, void *stream)
{
    PLORA_TRY(check_count(args->count));
    const dim3 threads = {OPTIMIZER_THREADS, 1, 1};
    const struct gradient_norm_params norm = {
        .gradients = args->gradients,
        .count = args->count,
        .scratch = args->workspace,
        .state = args->state,
        .gradient_scale = args->gradient_scale,
        .max_norm = args->max_norm,
    };
    PLORA_TRY(cuda_launch(device, CUDA_KERNEL_GRADIENT_NORM, (dim3){norm_blocks(args->count), 1, 1}, threads, 0, &norm,
                          stream));
    const int adamw = args->algorithm == PLORA_OPTIMIZER_ADAMW;
    const struct optimizer_params update = {
        .parameters = args->parameters,
        .gradients = args->gradients,
        .first_moment = args->first_moment,
        .second_moment = args->second_moment,
        .count = args->count,
        .segments = args->segments,
        .scratch = args->workspace,
        .rates = {rates_of(args, 0), rates_of(args, 1)},
        .beta1 = (float)args->beta1,
        .beta1_rest = (float)(1.0 - args->beta1),
        .beta2 = (float)args->beta2,
        .beta2_rest = (float)(1.0 - args->beta2),
        .root = (float)(adamw ? 1.0 / sqrt(args->bias_correction2) : 0.0),
        .epsilon = (float)args->epsilon,
        .segment_count = args->segment_count,
    };
    return cuda_launch(device, adamw ? CUDA_KERNEL_ADAMW : CUDA_KERNEL_SGD, (dim3){tiles(args->count), 1, 1}, threads,
                       0, &update, stream);
}

plora_status cuda_scale(void *device, float *values, int64_t count, float factor, void *stream)
{
    PLORA_TRY(check_count(count));
    struct scale_params params = {.count = count, .factor = factor};
    params.values = values;
    return cuda_launch(device, CUDA_KERNEL_SCALE, (dim3){tiles(count), 1, 1}, (dim3){OPTIMIZER_THREADS, 1, 1}, 0,
                       &params, stream);
}
