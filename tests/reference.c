/* reference.c: see reference.h. Plain loops in the order of the formulas; clarity only. */
#include "reference.h"

#include <math.h>

#include "dtype.h"
#include "philox.h"

static void add(struct reference_sum *sum, double term, double magnitude)
{
    sum->value += term;
    sum->magnitude += magnitude;
}

/* drop(x)[t,k] */
static double dropped(const struct reference_linear *l, int64_t t, int64_t k)
{
    const double x = l->x[t * l->in_features + k];
    return l->mask == NULL ? x : x * l->mask[t * l->in_features + k];
}

/* u[t,r] = sum_k drop(x)[t,k] A[r,k] */
static struct reference_sum low_input(const struct reference_linear *l, int64_t t, int64_t r)
{
    struct reference_sum u = {0, 0};
    for (int64_t k = 0; k < l->in_features; ++k) {
        const double term = dropped(l, t, k) * l->a[r * l->in_features + k];
        add(&u, term, fabs(term));
    }
    return u;
}

/* v[t,r] = s sum_n dy[t,n] B[n,r] */
static struct reference_sum low_gradient(const struct reference_linear *l, const double *dy, int64_t t, int64_t r)
{
    struct reference_sum v = {0, 0};
    for (int64_t n = 0; n < l->out_features; ++n) {
        const double term = l->scale * dy[t * l->out_features + n] * l->b[n * l->rank + r];
        add(&v, term, fabs(term));
    }
    return v;
}

void reference_linear_forward(const struct reference_linear *l, struct reference_sum *base, struct reference_sum *low)
{
    for (int64_t t = 0; t < l->tokens; ++t)
        for (int64_t n = 0; n < l->out_features; ++n) {
            struct reference_sum *out = &base[t * l->out_features + n];
            *out = (struct reference_sum){0, 0};
            for (int64_t k = 0; k < l->in_features; ++k) {
                const double term = l->x[t * l->in_features + k] * l->w[n * l->in_features + k];
                add(out, term, fabs(term));
            }
            if (l->bias != NULL) add(out, l->bias[n], fabs(l->bias[n]));
            low[t * l->out_features + n] = (struct reference_sum){0, 0};
        }
    for (int64_t t = 0; t < l->tokens; ++t)
        for (int64_t r = 0; r < l->rank; ++r) {
            const struct reference_sum u = low_input(l, t, r);
            for (int64_t n = 0; n < l->out_features; ++n) {
                const double factor = l->scale * l->b[n * l->rank + r];
                add(&low[t * l->out_features + n], u.value * factor, u.magnitude * fabs(factor));
            }
        }
}

static void input_gradient(const struct reference_linear *l, const double *dy, struct reference_sum *base,
                           struct reference_sum *low)
{
    for (int64_t t = 0; t < l->tokens; ++t) {
        for (int64_t k = 0; k < l->in_features; ++k) {
            struct reference_sum *out = &base[t * l->in_features + k];
            *out = (struct reference_sum){0, 0};
            for (int64_t n = 0; n < l->out_features; ++n) {
                const double term = dy[t * l->out_features + n] * l->w[n * l->in_features + k];
                add(out, term, fabs(term));
            }
            low[t * l->in_features + k] = (struct reference_sum){0, 0};
        }
        for (int64_t r = 0; r < l->rank; ++r) {
            const struct reference_sum v = low_gradient(l, dy, t, r);
            for (int64_t k = 0; k < l->in_features; ++k) {
                const double keep = l->mask == NULL ? 1.0 : l->mask[t * l->in_features + k];
                const double factor = keep * l->a[r * l->in_features + k];
                add(&low[t * l->in_features + k], v.value * factor, v.magnitude * fabs(factor));
            }
        }
    }
}

void reference_linear_backward(const struct reference_linear *l, const double *dy, struct reference_sum *base,
                               struct reference_sum *low, struct reference_sum *da, struct reference_sum *db)
{
    input_gradient(l, dy, base, low);
    for (int64_t i = 0; i < l->rank * l->in_features; ++i)
        da[i] = (struct reference_sum){0, 0};
    for (int64_t i = 0; i < l->out_features * l->rank; ++i)
        db[i] = (struct reference_sum){0, 0};
    for (int64_t t = 0; t < l->tokens; ++t)
        for (int64_t r = 0; r < l->rank; ++r) {
            const struct reference_sum u = low_input(l, t, r), v = low_gradient(l, dy, t, r);
            for (int64_t k = 0; k < l->in_features; ++k)
                add(&da[r * l->in_features + k], v.value * dropped(l, t, k), v.magnitude * fabs(dropped(l, t, k)));
            for (int64_t n = 0; n < l->out_features; ++n) {
                const double factor = l->scale * dy[t * l->out_features + n];
                add(&db[n * l->rank + r], factor * u.value, fabs(factor) * u.magnitude);
            }
        }
}

void reference_dropout(double probability, uint64_t seed, uint64_t step, int32_t layer, uint64_t first_token,
                       int64_t tokens, int64_t in_features, double *mask)
{
    const uint32_t threshold = plora__dropout_threshold(probability);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t k = 0; k < in_features; ++k) {
            const uint64_t element = (first_token + (uint64_t)t) * (uint64_t)in_features + (uint64_t)k;
            const struct plora__words words = plora__draw(seed, PLORA__PURPOSE_DROPOUT, step, layer, element / 4);
            mask[t * in_features + k] = words.word[element % 4] >= threshold ? 1.0 / (1.0 - probability) : 0.0;
        }
}

void reference_init_words(uint64_t seed, uint64_t stage, int32_t layer, int64_t count, uint32_t *words)
{
    for (int64_t i = 0; i < count; ++i)
        words[i] = plora__draw(seed, PLORA__PURPOSE_INIT, stage, layer, (uint64_t)i / 4).word[i % 4];
}

void reference_init_kaiming(uint64_t seed, uint64_t stage, int32_t layer, int64_t rank, int64_t in_features, double *a)
{
    for (int64_t i = 0; i < rank * in_features; ++i) {
        const uint32_t word = plora__draw(seed, PLORA__PURPOSE_INIT, stage, layer, (uint64_t)i / 4).word[i % 4];
        a[i] = (((double)(word >> 8)) * 0x1p-23 - 1.0) / sqrt((double)in_features);
    }
}

void reference_batch_token(const double *x, const float *a, const float *b, double scale, int64_t rank,
                           int64_t in_features, int64_t out_features, struct reference_sum *low)
{
    for (int64_t n = 0; n < out_features; ++n)
        low[n] = (struct reference_sum){0, 0};
    for (int64_t r = 0; r < rank; ++r) {
        struct reference_sum u = {0, 0};
        for (int64_t k = 0; k < in_features; ++k) {
            const double term = x[k] * a[r * in_features + k];
            add(&u, term, fabs(term));
        }
        for (int64_t n = 0; n < out_features; ++n) {
            const double factor = scale * b[n * rank + r];
            add(&low[n], u.value * factor, u.magnitude * fabs(factor));
        }
    }
}

float reference_int8(const int8_t *codes, const float *scales, int64_t columns, int64_t group, int64_t i, int64_t j)
{
    const int64_t groups = (columns + group - 1) / group;
    return (float)((double)codes[i * columns + j] * scales[i * groups + j / group]); /* exact in double */
}

float reference_nf4(const uint8_t *codes, const float *absmax, const uint8_t *nested_codes, const float *map,
                    float offset, int64_t columns, int64_t i, int64_t j)
{
    static const double values[16] = {-1.0,
                                      -0.6961928009986877,
                                      -0.5250730514526367,
                                      -0.39491748809814453,
                                      -0.28444138169288635,
                                      -0.18477343022823334,
                                      -0.09105003625154495,
                                      0.0,
                                      0.07958029955625534,
                                      0.16093020141124725,
                                      0.24611230194568634,
                                      0.33791524171829224,
                                      0.44070982933044434,
                                      0.5626170039176941,
                                      0.7229568362236023,
                                      1.0};
    const int64_t element = i * columns + j, block = element / 64;
    const int code = element % 2 == 0 ? codes[element / 2] >> 4 : codes[element / 2] & 15;
    float scale;
    if (nested_codes == NULL) {
        scale = absmax[block];
    } else {
        scale = (float)((double)map[nested_codes[block]] * absmax[block / 256]); /* exact in double */
        scale = (float)((double)scale + offset); /* of two floats: rounding twice gives what rounding once gives */
    }
    return (float)((double)(float)values[code] * scale);
}

void reference_load(const plora_matrix *matrix, int transposed, double *dense)
{
    for (int64_t i = 0; i < matrix->rows; ++i)
        for (int64_t j = 0; j < matrix->columns; ++j)
            dense[transposed ? j * matrix->rows + i : i * matrix->columns + j] =
                plora__load(matrix->data, i * matrix->stride + j, matrix->dtype);
}
