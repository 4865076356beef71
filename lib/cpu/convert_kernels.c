/* convert_kernels.c: plain loops that the compiler vectorises, compiled once per instruction level (isa.h).
 *
 * Dropout keeps element i when its Philox word is at least the threshold (philox.h): one draw serves elements 4j .. 4j+3, so a
 * row is cut into blocks of BLOCK elements whose keep factors are made first and applied after. */
#include "convert_kernels.h"

#include "dtype.h"
#include "philox_lanes.h"

enum { BLOCK = 4 * CPU_DRAWS };

static void widen(float *restrict out, const void *restrict in, int32_t dtype, int64_t count)
{
    const uint16_t *half = in;
    if (dtype == PLORA_F32)
        memcpy(out, in, (size_t)count * sizeof *out);
    else if (dtype == PLORA_BF16)
        for (int64_t i = 0; i < count; ++i)
            out[i] = plora__bf16_to_float(half[i]);
    else
        for (int64_t i = 0; i < count; ++i)
            out[i] = plora__f16_to_float(half[i]);
}

static void narrow(uint16_t *restrict out, const float *restrict in, int64_t count)
{
    for (int64_t i = 0; i < count; ++i)
        out[i] = plora__float_to_bf16(in[i]);
}

static void scale(float *restrict values, uint16_t *restrict rounded, float factor, int64_t count)
{
    for (int64_t i = 0; i < count; ++i)
        values[i] *= factor;
    if (rounded != NULL) narrow(rounded, values, count);
}

static void draw(uint32_t *words, uint64_t seed, enum plora__purpose purpose, uint64_t step, int32_t layer,
                 uint64_t first)
{
    enum { LANES = CPU_PHILOX_LANES };
    const struct cpu_philox_keys keys = cpu_philox_keys(seed);
    for (int begin = 0; begin < CPU_DRAWS; begin += LANES, words += 4 * LANES) {
        const struct plora__words counter = plora__counter(purpose, step, layer, first + (uint64_t)begin);
        cpu_vul c[4];
        for (int i = 0; i < 4; ++i)
            c[i] = (cpu_vul){0} + counter.word[i];
        for (int j = 0; j < LANES; ++j) {
            const uint64_t block = first + (uint64_t)(begin + j);
            c[0][j] = (uint32_t)block;
            c[1][j] = block >> 32;
        }
        cpu_philox(&c, 1, &keys);
        const cpu_vul halves[2] = {(c[0] & UINT32_MAX) | c[1] << 32, (c[2] & UINT32_MAX) | c[3] << 32};
        for (int j = 0; j < LANES; ++j)
            for (int i = 0; i < 2; ++i) {
                const uint64_t two = halves[i][j];
                memcpy(words + 4 * j + 2 * i, &two, sizeof two); /* the lower word comes first */
            }
    }
}

static void symmetric(float *restrict out, const uint32_t *restrict words, float scale, int64_t count)
{
    for (int64_t i = 0; i < count; ++i)
        out[i] = plora__symmetric(words[i]) * scale; /* the fraction is exact, so contraction changes nothing */
}

/* factors[i] = kept(first + i) ? keep_scale : 0 for i in [0, BLOCK), first a multiple of 4. */
static void keep_factors(float *restrict factors, const struct plora__dropout *dropout, uint64_t first)
{
    const uint32_t threshold = plora__dropout_threshold(dropout->probability);
    const float keep_scale = (float)(1.0 / (1.0 - dropout->probability));
    uint32_t words[BLOCK];
    draw(words, dropout->seed, PLORA__PURPOSE_DROPOUT, dropout->step, dropout->layer, first / 4);
    for (int i = 0; i < BLOCK; ++i)
        factors[i] = words[i] >= threshold ? keep_scale : 0.0f;
}

/* Calls below in blocks that start at a multiple of 4: `lead` is how far the first element is past one. */
#define FOR_EACH_BLOCK(first, count, begin, length, lead)                                                              \
    for (int64_t begin = 0, lead = (int64_t)((first) % 4), length = 0; begin < (count); begin += length, lead = 0)     \
        if (length = (count)-begin < BLOCK - lead ? (count)-begin : BLOCK - lead, 1)

static void dropout_row(void *restrict out, const void *restrict in, int32_t dtype,
                        const struct plora__dropout *dropout, uint64_t first, int64_t count)
{
    float factors[BLOCK];
    FOR_EACH_BLOCK(first, count, begin, length, lead)
    {
        keep_factors(factors, dropout, first + (uint64_t)begin - (uint64_t)lead);
        for (int64_t i = 0; i < length; ++i)
            plora__store(out, begin + i, dtype, plora__load(in, begin + i, dtype) * factors[lead + i]);
    }
}

static void dropout_add(void *restrict out, int32_t dtype, const float *restrict delta,
                        const struct plora__dropout *dropout, uint64_t first, int64_t count)
{
    float factors[BLOCK];
    FOR_EACH_BLOCK(first, count, begin, length, lead)
    {
        keep_factors(factors, dropout, first + (uint64_t)begin - (uint64_t)lead);
        for (int64_t i = 0; i < length; ++i) {
            const float sum = plora__load(out, begin + i, dtype) + delta[begin + i] * factors[lead + i];
            plora__store(out, begin + i, dtype, sum);
        }
    }
}

static void add(float *restrict out, const float *restrict in, int64_t count)
{
    for (int64_t i = 0; i < count; ++i)
        out[i] += in[i];
}

static void transpose_add(float *restrict out, const float *restrict in, int64_t rows, int64_t columns, int64_t begin,
                          int64_t end)
{
    for (int64_t j = begin; j < end; ++j)
        for (int64_t i = 0; i < rows; ++i)
            out[j * rows + i] += in[i * columns + j];
}

const struct cpu_convert_kernels CPU_ISA_NAME(cpu_convert_kernels) = {.draw = draw,
                                                                      .symmetric = symmetric,
                                                                      .widen = widen,
                                                                      .narrow = narrow,
                                                                      .scale = scale,
                                                                      .dropout = dropout_row,
                                                                      .dropout_add = dropout_add,
                                                                      .add = add,
                                                                      .transpose_add = transpose_add};
