/* measure.h: what the benchmark programs share: a clock, filled memory, and the limit of every pass that reads and writes
 * a buffer: scaling it once in place. Programs print one JSON object; bench.py makes the medians.
 *
 * Everything is static, so that a program is this header and one file. */
#ifndef PLORA_BENCH_MEASURE_H
#define PLORA_BENCH_MEASURE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <omp.h>

static inline double measure_now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static inline void measure_die(const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(1);
}

/* 64-byte aligned and touched by the threads that will use it. */
static inline void *measure_allocate(size_t bytes)
{
    char *memory = aligned_alloc(64, (bytes + 4095) / 4096 * 4096 + 4096);
    if (memory == NULL) measure_die("out of memory");
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < bytes; i += 4096)
        memset(memory + i, 0, bytes - i < 4096 ? bytes - i : 4096);
    return memory;
}

/* Values of about `scale`, of either sign; no time depends on them, but through denormals and overflow. */
static inline void measure_fill_fp32(float *values, int64_t count, float scale)
{
    uint32_t state = 12345;
    for (int64_t i = 0; i < count; ++i) {
        state = state * 1664525u + 1013904223u;
        values[i] = scale * ((float)(state >> 8) / 8388608.0f - 1.0f);
    }
}

static inline void measure_fill_bf16(uint16_t *values, int64_t count, float scale)
{
    uint32_t state = 12345;
    for (int64_t i = 0; i < count; ++i) {
        state = state * 1664525u + 1013904223u;
        const float value = scale * ((float)(state >> 8) / 8388608.0f - 1.0f);
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        values[i] = (uint16_t)(bits >> 16);
    }
}

static inline void measure_print(const char *name, const double *seconds, int count)
{
    printf("\"%s\": [", name);
    for (int i = 0; i < count; ++i)
        printf("%s%.9g", i ? ", " : "", seconds[i]);
    printf("]");
}

/* ------------------------------------------------------------------------------------------------- scaling in place */

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static inline void measure_scale_512(float *x, int64_t begin, int64_t end,
                                                                        float factor)
{
    const __m512 f = _mm512_set1_ps(factor);
    for (int64_t i = begin; i < end; i += 64) {
        const __m512 a = _mm512_load_ps(x + i), b = _mm512_load_ps(x + i + 16);
        const __m512 c = _mm512_load_ps(x + i + 32), d = _mm512_load_ps(x + i + 48);
        _mm512_store_ps(x + i, _mm512_mul_ps(a, f));
        _mm512_store_ps(x + i + 16, _mm512_mul_ps(b, f));
        _mm512_store_ps(x + i + 32, _mm512_mul_ps(c, f));
        _mm512_store_ps(x + i + 48, _mm512_mul_ps(d, f));
    }
}

__attribute__((target("avx"))) static inline void measure_scale_256(float *x, int64_t begin, int64_t end, float factor)
{
    const __m256 f = _mm256_set1_ps(factor);
    for (int64_t i = begin; i < end; i += 8)
        _mm256_store_ps(x + i, _mm256_mul_ps(_mm256_load_ps(x + i), f));
}
#endif

static inline void measure_scale_any(float *x, int64_t begin, int64_t end, float factor)
{
    for (int64_t i = begin; i < end; ++i)
        x[i] *= factor;
}

/* x *= factor over `count` values, a multiple of 64, by all threads. A buffer of bf16 is scaled as fp32 of the same
 * bytes: what counts is memory, read and written once. Returns the seconds. */
static inline double measure_scale(float *x, int64_t count, float factor)
{
    const double begin = measure_now();
#pragma omp parallel
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num(), blocks = count / 64;
        const int64_t from = blocks * thread / threads * 64, to = blocks * (thread + 1) / threads * 64;
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512f"))
            measure_scale_512(x, from, to, factor);
        else if (__builtin_cpu_supports("avx"))
            measure_scale_256(x, from, to, factor);
        else
#endif
            measure_scale_any(x, from, to, factor);
    }
    return measure_now() - begin;
}

#endif
