/* reference_unload.h: the naive version of the unload, in double, one loop per sum.
 *
 *     D = m s B A      W' = W + D      effective rank = (sum sigma^2)^2 / sum sigma^4 = |D|_F^4 / |D D^T|_F^2 */
#ifndef PLORA_TESTS_REFERENCE_UNLOAD_H
#define PLORA_TESTS_REFERENCE_UNLOAD_H

#include "check.h"
#include "philox.h"

/* d[rows, columns] = factor * left right, and the same sum over magnitudes. left(i, r) = left[i * left_row + r *
 * left_rank]. */
static CHECK_UNUSED void reference_delta(double factor, int64_t rows, int64_t columns, int64_t rank, const float *left,
                                         int64_t left_row, int64_t left_rank, const float *right, int64_t right_rank,
                                         int64_t right_column, double *d, double *magnitude)
{
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
            double sum = 0, sum_magnitude = 0;
            for (int64_t r = 0; r < rank; ++r) {
                const double term =
                    (double)left[i * left_row + r * left_rank] * right[r * right_rank + j * right_column];
                sum += term;
                sum_magnitude += fabs(term);
            }
            d[i * columns + j] = factor * sum;
            magnitude[i * columns + j] = fabs(factor) * sum_magnitude;
        }
}

/* What an fp32 sum of `rank` terms, its product with the factor and the addition to w may be off by, before the
 * rounding to a dtype; `magnitude` as above. */
static CHECK_UNUSED double reference_delta_error(int64_t rank, double magnitude)
{
    return (double)(rank + 3) * 0x1p-24 * magnitude * (1 + (double)rank * 0x1p-22) + (double)(rank + 2) * 0x1p-149;
}

/* How far round(w + d) in the dtype may be from w + d, with d off by `error`. */
static CHECK_UNUSED double reference_merge_error(int32_t dtype, double value, double error)
{
    const double smallest = dtype == PLORA_F16 ? 0x1p-25 : dtype == PLORA_BF16 ? 0x1p-134 : 0x1p-150;
    const double before = error + 0x1p-24 * fabs(value) * 1.0001;
    return before + check_roundoff(dtype) * (fabs(value) + before) + smallest;
}

/* The random number of an element, as lib/rounding.h describes it. */
static CHECK_UNUSED uint16_t reference_random(uint64_t seed, uint64_t stage, int32_t layer, uint64_t element)
{
    const struct plora__words words = plora__draw(seed, PLORA__PURPOSE_ROUNDING, stage, layer, element / 8);
    return (uint16_t)(words.word[element / 2 % 4] >> element % 2 * 16);
}

/* The neighbours of a value in a 16-bit dtype: the one towards 0, and the next one. The value is below the largest
 * number. */
static CHECK_UNUSED void reference_neighbours(double value, int32_t dtype, double *toward, double *away)
{
    const int bits = dtype == PLORA_BF16 ? 8 : 11, smallest = dtype == PLORA_BF16 ? -133 : -24;
    int exponent;
    frexp(value, &exponent);
    const int step = exponent - bits > smallest ? exponent - bits : smallest;
    const double gap = ldexp(1, step), below = floor(fabs(value) / gap) * gap;
    *toward = copysign(below, value);
    *away = copysign(below + gap, value);
}

static CHECK_UNUSED double reference_effective_rank(int64_t rows, int64_t columns, const double *d)
{
    double square = 0, fourth = 0;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < rows; ++k) {
            double sum = 0;
            for (int64_t j = 0; j < columns; ++j)
                sum += d[i * columns + j] * d[k * columns + j];
            if (i == k) square += sum;
            fourth += sum * sum;
        }
    return fourth > 0 ? square * square / fourth : 0;
}

#endif
