/* tensor_sums.c: whether the merge's sums on tensor cores keep to the bound that tests/test_merge.c asks of an fp32 sum, for ways in
 * which a GPU may add that are not documented. A row is a way, a figure the largest error of a sum over that bound:
 *
 *     acc  <-  trunc24(trunc(acc) + trunc(p_1) + ... + trunc(p_4))
 *
 * The products of two tf32 numbers are exact. `exact`: only the sum is truncated, to the 24 bits of fp32. `n bits`: first the five
 * terms are cut at n bits below the last bit that fp32 has at the exponent of the largest of them. The order of the products is that of
 * multiply_tensor() in cuda/merge.cu.
 *
 * usage: tensor_sums      prints a table in Markdown; fails where a way leaves the bound */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "check.h"
#include "reference_unload.h"

enum { RANK_MAX = 256, SUMS = 2000, STEP = 8, GROUP = 4, EXACT = 64 };

/* The upper 11 bits of a value, rounded to nearest, and the next ones: split_tf32() in cuda/cuda_common.cuh. */
static void split(float value, float *high, float *low)
{
    *high = plora__float_from_bits((plora__float_bits(value) + 0x1000u) & 0xffffe000u);
    *low = plora__float_from_bits(plora__float_bits(value - *high) & 0xffffe000u);
}

/* Cuts a value below 2^exponent, towards 0. */
static double cut(double value, int exponent)
{
    return ldexp(trunc(ldexp(value, -exponent)), exponent);
}

static int exponent_of(double value)
{
    int exponent;
    frexp(value, &exponent);
    return exponent;
}

/* acc and four products, added in the way of `bits`. All sums of doubles here are exact: 24 + 64 bits are cut before, or four products of 22
 * bits and a float lie in the same few binades. */
static float add_group(float acc, const double *product, int bits)
{
    double largest = fabs((double)acc), sum = acc;
    for (int i = 0; i < GROUP; ++i)
        largest = fmax(largest, fabs(product[i]));
    if (largest == 0) return acc;
    const int last = exponent_of(largest) - 24 - bits;
    if (bits != EXACT) sum = cut(acc, last);
    for (int i = 0; i < GROUP; ++i)
        sum += bits == EXACT ? product[i] : cut(product[i], last);
    return sum == 0 ? 0.0f : (float)cut(sum, exponent_of(sum) - 24);
}

static float tensor_sum(const float *left, const float *right, int rank, int bits)
{
    float acc = 0;
    for (int r = 0; r < rank; r += STEP)
        for (int term = 0; term < 3; ++term)
            for (int first = r; first < r + STEP; first += GROUP) {
                double product[GROUP] = {0};
                for (int i = 0; i < GROUP && first + i < rank; ++i) {
                    float left_high, left_low, right_high, right_low;
                    split(left[first + i], &left_high, &left_low);
                    split(right[first + i], &right_high, &right_low);
                    product[i] =
                        (double)(term == 0 ? left_low : left_high) * (double)(term == 1 ? right_low : right_high);
                }
                acc = add_group(acc, product, bits);
            }
    return acc;
}

/* The largest error of many sums of a rank over the bound. */
static double worst(int rank, int bits, int one_sign)
{
    float left[RANK_MAX], right[RANK_MAX];
    double most = 0;
    for (int n = 0; n < SUMS; ++n) {
        double sum, magnitude;
        for (int r = 0; r < rank; ++r) {
            left[r] = (float)check_uniform();
            right[r] = (float)check_uniform();
            if (one_sign) left[r] = fabsf(left[r]);
            if (one_sign) right[r] = fabsf(right[r]);
        }
        reference_delta(1, 1, 1, rank, left, rank, 1, right, 1, rank, &sum, &magnitude);
        const double error = fabs((double)tensor_sum(left, right, rank, bits) - sum);
        most = fmax(most, error / reference_delta_error(rank, magnitude));
    }
    return most;
}

int main(void)
{
    static const int ranks[] = {17, 24, 32, 48, 64, 96, 128, 192, 256};
    static const struct {
        const char *name;
        int bits;
    } ways[] = {{"exact", EXACT}, {"2 bits", 2}, {"1 bit", 1}, {"0 bits", 0}};
    int failed = 0;
    setenv("PLORA_TEST_SEED", "1", 0); /* the same table every time */
    check_begin("tensor_sums");
    printf("| terms are cut at | signs |");
    for (int i = 0; i < CHECK_COUNT(ranks); ++i)
        printf(" R = %d |", ranks[i]);
    printf("\n|---|---|");
    for (int i = 0; i < CHECK_COUNT(ranks); ++i)
        printf("---|");
    for (int way = 0; way < CHECK_COUNT(ways); ++way)
        for (int one_sign = 0; one_sign < 2; ++one_sign) {
            printf("\n| %s | %s |", ways[way].name, one_sign ? "one" : "both");
            for (int i = 0; i < CHECK_COUNT(ranks); ++i) {
                const double share = worst(ranks[i], ways[way].bits, one_sign);
                printf(" %.2f |", share);
                failed |= !(share <= 1);
            }
        }
    printf("\n");
    return failed;
}
