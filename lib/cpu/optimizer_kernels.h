/* optimizer_kernels.h: the kernels under cpu_optimizer.c, one table per instruction level (isa.h).
 * A result depends on the element alone, not on where a range begins or ends. */
#ifndef PLORA_CPU_OPTIMIZER_KERNELS_H
#define PLORA_CPU_OPTIMIZER_KERNELS_H

#include "backend.h"

/* What one step does to the elements of one segment, in fp32:
 *     g = gradient * gradient_factor
 *     AdamW   m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  p = decay p - rate m / (root sqrt(v) + epsilon)
 *     SGD     m = beta1 m + g;              p = decay p - rate m */
struct cpu_step {
    float gradient_factor;
    float beta1, beta1_rest, beta2, beta2_rest; /* rest = 1 - beta */
    float decay;                                /* 1 - lr * weight decay */
    float rate;                                 /* AdamW: lr / (1 - beta1^t) */
    float root;                                 /* 1 / sqrt(1 - beta2^t) */
    float epsilon;
};

struct cpu_optimizer_kernels {
    void (*adamw)(float *parameters, const float *gradients, float *first_moment, float *second_moment, int64_t count,
                  const struct cpu_step *step);
    void (*sgd)(float *parameters, const float *gradients, float *first_moment, int64_t count,
                const struct cpu_step *step);
    double (*sum_of_squares)(const float *values, int64_t count);
    void (*scale)(float *values, int64_t count, float factor);
};

extern const struct cpu_optimizer_kernels cpu_optimizer_kernels_portable;
extern const struct cpu_optimizer_kernels cpu_optimizer_kernels_avx2;
extern const struct cpu_optimizer_kernels cpu_optimizer_kernels_avx512;
extern const struct cpu_optimizer_kernels cpu_optimizer_kernels_amx;

/* The table of a level. */
const struct cpu_optimizer_kernels *cpu_optimizer_kernels(int isa);

/* The launchers below cpu_optimizer_step() and cpu_scale(), for a given table. The factor is gradient_scale, clipped. */
void cpu_optimizer_update_with(const struct cpu_optimizer_kernels *kernels, int threads,
                               const struct plora__step_args *args, double gradient_factor);
double cpu_sum_of_squares_with(const struct cpu_optimizer_kernels *kernels, int threads, const float *values,
                               int64_t count);
void cpu_scale_with(const struct cpu_optimizer_kernels *kernels, int threads, float *values, int64_t count,
                    float factor);

#endif
