/* cpu_optimizer.c: the launchers of the optimizer: one fused pass over the arena, its norm, its scaling.
 *
 * The arena is cut into blocks of BLOCK elements, a block into the parts of it that lie in one segment. An element's update depends
 * on nothing but the element. The norm is summed over at most PARTS pieces that depend on the count alone, and their sums are added
 * in order: the same bits for any number of threads. */
#include <math.h>

#include "cpu_backend.h"
#include "isa.h"
#include "optimizer_kernels.h"

enum { BLOCK = 1 << 14, PARTS = 256, PART_ALIGNMENT = 64 };

static int64_t at_most(int64_t value, int64_t limit)
{
    return value < limit ? value : limit;
}

static struct cpu_step step_of(const struct plora__step_args *args, double gradient_factor, int is_b)
{
    const double rate = args->learning_rate[is_b];
    const int adamw = args->algorithm == PLORA_OPTIMIZER_ADAMW;
    return (struct cpu_step){
        .gradient_factor = (float)gradient_factor,
        .beta1 = (float)args->beta1,
        .beta1_rest = (float)(1.0 - args->beta1),
        .beta2 = (float)args->beta2,
        .beta2_rest = (float)(1.0 - args->beta2),
        .decay = (float)(1.0 - rate * args->weight_decay),
        .rate = (float)(adamw ? rate / args->bias_correction1 : rate),
        .root = (float)(adamw ? 1.0 / sqrt(args->bias_correction2) : 0.0),
        .epsilon = (float)args->epsilon,
    };
}

/* The segment that holds element `begin`. */
static int32_t find_segment(const struct plora__step_args *args, int64_t begin)
{
    int32_t low = 0, high = args->segment_count - 1;
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (args->segments[middle].end <= begin)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

void cpu_optimizer_update_with(const struct cpu_optimizer_kernels *kernels, int threads,
                               const struct plora__step_args *args, double gradient_factor)
{
    const struct cpu_step steps[2] = {step_of(args, gradient_factor, 0), step_of(args, gradient_factor, 1)};
    const int adamw = args->algorithm == PLORA_OPTIMIZER_ADAMW;
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < args->count; block += BLOCK) {
        const int64_t block_end = at_most(block + BLOCK, args->count);
        int32_t number = find_segment(args, block);
        for (int64_t begin = block, end; begin < block_end; begin = end, ++number) {
            const struct plora__segment *segment = &args->segments[number];
            end = at_most(segment->end, block_end);
            const struct cpu_step *step = &steps[segment->is_b != 0];
            float *p = args->parameters + begin, *m = args->first_moment + begin;
            if (adamw)
                kernels->adamw(p, args->gradients + begin, m, args->second_moment + begin, end - begin, step);
            else
                kernels->sgd(p, args->gradients + begin, m, end - begin, step);
        }
    }
}

double cpu_sum_of_squares_with(const struct cpu_optimizer_kernels *kernels, int threads, const float *values,
                               int64_t count)
{
    const int64_t part = ((count + PARTS - 1) / PARTS + PART_ALIGNMENT - 1) / PART_ALIGNMENT * PART_ALIGNMENT;
    double sums[PARTS] = {0};
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < PARTS; ++i)
        if (i * part < count) sums[i] = kernels->sum_of_squares(values + i * part, at_most(part, count - i * part));
    double total = 0;
    for (int i = 0; i < PARTS; ++i)
        total += sums[i];
    return total;
}

void cpu_scale_with(const struct cpu_optimizer_kernels *kernels, int threads, float *values, int64_t count,
                    float factor)
{
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < count; block += BLOCK)
        kernels->scale(values + block, at_most(BLOCK, count - block), factor);
}

const struct cpu_optimizer_kernels *cpu_optimizer_kernels(int isa)
{
    static const struct cpu_optimizer_kernels *const tables[CPU_ISA_COUNT] = {
        &cpu_optimizer_kernels_portable,
        &cpu_optimizer_kernels_avx2,
        &cpu_optimizer_kernels_avx512,
        &cpu_optimizer_kernels_amx,
    };
    return tables[isa];
}

size_t cpu_step_workspace(void *device, const struct plora__step_args *args)
{
    (void)device;
    (void)args;
    return 0;
}

plora_status cpu_optimizer_step(void *device, const struct plora__step_args *args, void *stream)
{
    (void)stream;
    const struct cpu_optimizer_kernels *kernels = cpu_optimizer_kernels(cpu_isa());
    const double count = (double)args->count;
    const double sum =
        cpu_sum_of_squares_with(kernels, cpu_threads_for(device, 4.0 * count), args->gradients, args->count);
    const double norm = sqrt(sum) * args->gradient_scale;
    args->state->norm = norm;
    if (!isfinite(norm)) {
        args->state->refused++;
        return PLORA_OK;
    }
    const double clip = args->max_norm > 0.0 && norm > args->max_norm ? args->max_norm / norm : 1.0;
    cpu_optimizer_update_with(kernels, cpu_threads_for(device, 16.0 * count), args, args->gradient_scale * clip);
    return PLORA_OK;
}

plora_status cpu_scale(void *device, float *values, int64_t count, float factor, void *stream)
{
    (void)stream;
    cpu_scale_with(cpu_optimizer_kernels(cpu_isa()), cpu_threads_for(device, 2.0 * (double)count), values, count,
                   factor);
    return PLORA_OK;
}
