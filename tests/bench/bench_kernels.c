/* bench_kernels.c: how near the unload and the optimizer come to what the machine allows. One JSON object a line.
 *
 *     unload      limit = max(time of scaling the bytes of W, and of its residual, once in place, 2 R N K FLOP at the fp32
 *                 multiply-add peak)
 *     optimizer   limit = 28 bytes an element at the in-place rate
 *
 * Every figure is the least of alternating runs of the work and its limit, so that both see the same disturbances.
 * usage: bench_kernels [repeats [level of the merge]]      OMP_NUM_THREADS sets the threads. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "cpu/isa.h"
#include "cpu/merge_kernels.h"
#include "cpu/optimizer_kernels.h"
#include "cpu/threads.h"
#include "dtype.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

static int threads, repeats = 9, level;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void *allocate(size_t bytes)
{
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes) != 0) exit(1);
    return memory;
}

static void least(double *best, double seconds)
{
    if (seconds < *best) *best = seconds;
}

enum { PEAK_ROUNDS = 200000, CHAINS = 12 };

#ifdef __x86_64__
__attribute__((target("avx512f"))) static double peak_avx512(void)
{
    __m512 sum[CHAINS], factor = _mm512_set1_ps(0.999f);
    for (int i = 0; i < CHAINS; ++i)
        sum[i] = _mm512_set1_ps(1.0f + (float)i);
    for (int round = 0; round < PEAK_ROUNDS; ++round)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; ++i)
            sum[i] = _mm512_fmadd_ps(sum[i], factor, factor);
    for (int i = 1; i < CHAINS; ++i)
        sum[0] = _mm512_add_ps(sum[0], sum[i]);
    return _mm512_reduce_add_ps(sum[0]);
}

__attribute__((target("avx2,fma"))) static double peak_avx2(void)
{
    __m256 sum[CHAINS], factor = _mm256_set1_ps(0.999f);
    for (int i = 0; i < CHAINS; ++i)
        sum[i] = _mm256_set1_ps(1.0f + (float)i);
    for (int round = 0; round < PEAK_ROUNDS; ++round)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; ++i)
            sum[i] = _mm256_fmadd_ps(sum[i], factor, factor);
    for (int i = 1; i < CHAINS; ++i)
        sum[0] = _mm256_add_ps(sum[0], sum[i]);
    return ((float *)&sum[0])[0];
}
#endif

static double peak_portable(void)
{
    typedef float lanes __attribute__((vector_size(16)));
    lanes sum[CHAINS] = {{0}}, factor = {0.999f, 0.999f, 0.999f, 0.999f};
    for (int round = 0; round < PEAK_ROUNDS; ++round)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; ++i)
            sum[i] = sum[i] * factor + factor;
    for (int i = 1; i < CHAINS; ++i)
        sum[0] += sum[i];
    return sum[0][0];
}

/* FLOP a second of independent multiply-adds in registers, all threads. */
static double measure_peak(void)
{
    static volatile double sink;
    const double lanes = cpu_isa() >= CPU_ISA_AVX512 ? 16 : cpu_isa() == CPU_ISA_AVX2 ? 8 : 4;
    double best = 1e9;
    for (int repeat = 0; repeat < 50; ++repeat) {
        const double start = now();
        double total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total)
        for (int i = 0; i < threads; ++i)
#ifdef __x86_64__
            total += cpu_isa() >= CPU_ISA_AVX512 ? peak_avx512()
                     : cpu_isa() == CPU_ISA_AVX2 ? peak_avx2()
                                                 : peak_portable();
#else
            total += peak_portable();
#endif
        least(&best, now() - start);
        sink = total;
    }
    (void)sink;
    return 2.0 * lanes * CHAINS * PEAK_ROUNDS * threads / best;
}

static void bench_unload(int64_t rows, int64_t columns, int64_t rank, int32_t dtype, int32_t rounding, double peak)
{
    static const char *const names[] = {"nearest", "stochastic", "residual"};
    const struct cpu_merge_kernels *kernels = cpu_merge_kernels(level);
    const struct cpu_optimizer_kernels *scaling = cpu_optimizer_kernels(cpu_isa());
    const size_t bytes = (size_t)(rows * columns) * plora__dtype_size(dtype);
    float *left = allocate((size_t)(rows * rank) * sizeof(float)),
          *right = allocate((size_t)(rank * columns) * sizeof(float));
    void *weight = allocate(bytes);
    const int64_t residual_stride = columns + 64; /* as lib/residual.c pads this one */
    uint16_t *residual =
        rounding == PLORA_ROUND_RESIDUAL ? allocate((size_t)(rows * residual_stride) * sizeof *residual) : NULL;
    memset(weight, 0, bytes);
    if (residual != NULL) memset(residual, 0, (size_t)(rows * residual_stride) * sizeof *residual);
    for (int64_t i = 0; i < rows * rank; ++i)
        left[i] = 1e-3f * (float)(i % 17 - 8);
    for (int64_t i = 0; i < rank * columns; ++i)
        right[i] = 1e-3f * (float)(i % 13 - 6);
    struct plora__merge_args args = {
        .weight = {weight, rows, columns, columns, dtype, 0},
        .rank = rank,
        .factor = 0.5f,
        .rounding = rounding,
        .residual = residual,
        .residual_stride = residual_stride,
        .draw = {.seed = 1, .row_elements = columns},
        .left = left,
        .left_row_stride = rank,
        .left_rank_stride = 1,
        .right = right,
        .right_rank_stride = columns,
        .right_column_stride = 1,
    };
    args.workspace = allocate(cpu_merge_workspace_with(kernels, &args));
    struct plora__merge_sums sums;
    double merge = 1e9, report = 1e9, scale = 1e9;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        double start = now();
        cpu_scale_with(scaling, threads, weight, (int64_t)(bytes / sizeof(float)), 1.0f);
        if (residual != NULL)
            cpu_scale_with(scaling, threads, (float *)residual, (int64_t)(bytes / sizeof(float)), 1.0f);
        least(&scale, now() - start);
        args.sums = NULL;
        start = now();
        cpu_merge_with(kernels, threads, &args);
        least(&merge, now() - start);
        if (repeat % 3 != 0) continue;
        args.sums = &sums;
        start = now();
        cpu_merge_with(kernels, threads, &args);
        least(&report, now() - start);
    }
    const double compute = 2.0 * (double)rank * (double)rows * (double)columns / peak,
                 limit = scale > compute ? scale : compute;
    printf("{\"bench\": \"unload\", \"dtype\": \"%s\", \"rounding\": \"%s\", \"rows\": %lld, \"columns\": %lld, "
           "\"rank\": %lld, \"ms\": %.3f, "
           "\"report_ms\": %.3f, \"scale_ms\": %.3f, \"compute_ms\": %.3f, \"share_of_limit\": %.3f}\n",
           plora__dtype_name(dtype), names[rounding], (long long)rows, (long long)columns, (long long)rank, 1e3 * merge,
           1e3 * report, 1e3 * scale, 1e3 * compute, limit / merge);
    fflush(stdout);
    free(args.workspace);
    free(weight);
    free(residual);
    free(left);
    free(right);
}

static void bench_optimizer(int64_t count)
{
    const struct cpu_optimizer_kernels *kernels = cpu_optimizer_kernels(cpu_isa());
    const size_t bytes = (size_t)count * sizeof(float);
    float *p = allocate(bytes), *g = allocate(bytes), *m = allocate(bytes), *v = allocate(bytes),
          *plain = allocate(4 * bytes);
    for (int64_t i = 0; i < count; ++i) {
        p[i] = 0.1f;
        g[i] = 1e-3f * (float)(i % 101 - 50);
        m[i] = v[i] = 0.0f;
    }
    memset(plain, 0, 4 * bytes);
    const struct plora__segment segment = {0, count, 0, 0};
    const struct plora__step_args args = {
        .algorithm = PLORA_OPTIMIZER_ADAMW,
        .segment_count = 1,
        .count = count,
        .parameters = p,
        .gradients = g,
        .first_moment = m,
        .second_moment = v,
        .segments = &segment,
        .learning_rate = {1e-4, 1e-4},
        .weight_decay = 0.01,
        .beta1 = 0.9,
        .beta2 = 0.999,
        .epsilon = 1e-8,
        .bias_correction1 = 0.1,
        .bias_correction2 = 1e-3,
    };
    double step = 1e9, scale = 1e9, norm = 1e9, sum = 0;
    for (int repeat = 0; repeat < 3 * repeats; ++repeat) {
        double start = now();
        cpu_scale_with(kernels, threads, plain, 4 * count, 1.0f);
        least(&scale, now() - start);
        start = now();
        cpu_optimizer_update_with(kernels, threads, &args, 1.0);
        least(&step, now() - start);
        start = now();
        sum += cpu_sum_of_squares_with(kernels, threads, g, count);
        least(&norm, now() - start);
    }
    const double rate = 8.0 * 4.0 * (double)count / scale, limit = 28.0 * (double)count / rate;
    printf("{\"bench\": \"optimizer\", \"parameters\": %lld, \"ms\": %.3f, \"norm_ms\": %.3f, \"in_place_GBps\": %.1f, "
           "\"share_of_limit\": %.3f}\n",
           (long long)count, 1e3 * step, 1e3 * norm, rate / 1e9, sum >= 0 ? limit / step : 0);
    free(p);
    free(g);
    free(m);
    free(v);
    free(plain);
}

int main(int argc, char **argv)
{
    if (argc > 1) repeats = atoi(argv[1]);
    level = argc > 2 && atoi(argv[2]) < cpu_isa() ? atoi(argv[2]) : cpu_isa();
    threads = cpu_default_threads();
    const double peak = measure_peak();
    printf("{\"bench\": \"machine\", \"level\": %d, \"threads\": %d, \"fp32_GFLOPs\": %.1f}\n", cpu_isa(), threads,
           peak / 1e9);
    static const int64_t rows[] = {4096, 11008}, ranks[] = {8, 16, 64};
    for (int s = 0; s < 2; ++s)
        for (int r = 0; r < 3; ++r)
            for (int32_t dtype = PLORA_F32; dtype <= PLORA_BF16; ++dtype)
                for (int32_t rounding = PLORA_ROUND_NEAREST;
                     rounding <= (dtype == PLORA_F32 ? 0 : PLORA_ROUND_RESIDUAL); ++rounding)
                    bench_unload(rows[s], 4096, ranks[r], dtype, rounding, peak);
    bench_optimizer(5000000);
    return 0;
}
