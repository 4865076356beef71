/* optimizer_kernels.c: the fused update of parameters and moments, compiled once per instruction level (isa.h).
 *
 * Bytes moved per element: AdamW reads p, g, m, v and writes p, m, v, 28 bytes; SGD 20. One square root and one division per
 * element: the bias corrections are factors of the step. A rest shorter than a register goes through a padded copy, so that every
 * element sees the same operations. */
#include "optimizer_kernels.h"

#include "vector.h"

CPU_INLINE void adamw_lanes(float *p, const float *g, float *m, float *v, const struct cpu_step *step)
{
    const cpu_vf gradient = cpu_load(g) * cpu_broadcast(step->gradient_factor);
    const cpu_vf first = cpu_fma(cpu_load(m), cpu_broadcast(step->beta1), gradient * cpu_broadcast(step->beta1_rest));
    const cpu_vf second =
        cpu_fma(cpu_load(v), cpu_broadcast(step->beta2), gradient * cpu_broadcast(step->beta2_rest) * gradient);
    const cpu_vf divisor = cpu_fma(cpu_sqrt(second), cpu_broadcast(step->root), cpu_broadcast(step->epsilon));
    const cpu_vf kept = cpu_load(p) * cpu_broadcast(step->decay);
    cpu_store(m, first);
    cpu_store(v, second);
    cpu_store(p, cpu_fma(first / divisor, cpu_broadcast(-step->rate), kept));
}

static void adamw(float *restrict p, const float *restrict g, float *restrict m, float *restrict v, int64_t count,
                  const struct cpu_step *step)
{
    const struct cpu_step constants = *step; /* a copy: the stores below cannot change it */
    int64_t i = 0;
    for (; i + CPU_LANES <= count; i += CPU_LANES)
        adamw_lanes(p + i, g + i, m + i, v + i, &constants);
    if (i == count) return;
    const size_t rest = (size_t)(count - i) * sizeof(float);
    float copies[4][CPU_LANES] = {{0}};
    memcpy(copies[0], p + i, rest);
    memcpy(copies[1], g + i, rest);
    memcpy(copies[2], m + i, rest);
    memcpy(copies[3], v + i, rest);
    adamw_lanes(copies[0], copies[1], copies[2], copies[3], &constants);
    memcpy(p + i, copies[0], rest);
    memcpy(m + i, copies[2], rest);
    memcpy(v + i, copies[3], rest);
}

CPU_INLINE void sgd_lanes(float *p, const float *g, float *m, const struct cpu_step *step)
{
    const cpu_vf gradient = cpu_load(g) * cpu_broadcast(step->gradient_factor);
    const cpu_vf first = cpu_fma(cpu_load(m), cpu_broadcast(step->beta1), gradient);
    const cpu_vf kept = cpu_load(p) * cpu_broadcast(step->decay);
    cpu_store(m, first);
    cpu_store(p, cpu_fma(first, cpu_broadcast(-step->rate), kept));
}

static void sgd(float *restrict p, const float *restrict g, float *restrict m, int64_t count,
                const struct cpu_step *step)
{
    const struct cpu_step constants = *step;
    int64_t i = 0;
    for (; i + CPU_LANES <= count; i += CPU_LANES)
        sgd_lanes(p + i, g + i, m + i, &constants);
    if (i == count) return;
    const size_t rest = (size_t)(count - i) * sizeof(float);
    float copies[3][CPU_LANES] = {{0}};
    memcpy(copies[0], p + i, rest);
    memcpy(copies[1], g + i, rest);
    memcpy(copies[2], m + i, rest);
    sgd_lanes(copies[0], copies[1], copies[2], &constants);
    memcpy(p + i, copies[0], rest);
    memcpy(m + i, copies[2], rest);
}

static double sum_of_squares(const float *values, int64_t count)
{
    enum { CHAINS = 4, HALF = CPU_LANES / 2 };
    cpu_vd sum[CHAINS];
    memset(sum, 0, sizeof sum);
    int64_t i = 0;
    for (; i + CHAINS * HALF <= count; i += CHAINS * HALF)
        for (int chain = 0; chain < CHAINS; ++chain) {
            const cpu_vd value = cpu_load_double(values + i + chain * HALF);
            sum[chain] = cpu_fma_double(value, value, sum[chain]);
        }
    double total = cpu_sum_double((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < count; ++i)
        total += (double)values[i] * values[i];
    return total;
}

static void scale(float *values, int64_t count, float factor)
{
    for (int64_t i = 0; i < count; ++i)
        values[i] *= factor;
}

const struct cpu_optimizer_kernels CPU_ISA_NAME(cpu_optimizer_kernels) = {
    .adamw = adamw,
    .sgd = sgd,
    .sum_of_squares = sum_of_squares,
    .scale = scale,
};
