/* rows_body.h: the element-wise kernels of the trainer for one instruction set and one element type. rows.c includes it
 * several times with these macros:
 *     ROWS_NAME(x)       the name of function x in this version
 *     ROWS_ELEMENT       float or uint16_t (bf16);  ROWS_LOAD(p, i) and ROWS_STORE(p, i, v) convert from and to float
 *     ROWS_FMA(a, b, c)  a * b + c, fused where the instruction set has it
 * Loops are plain C marked `omp simd`: with no intrinsics, the compiler's vectoriser does the rest. Every row is reduced in an
 * order that depends on the instruction set alone, so the bits do not depend on the number of threads. */

/* exp(x) to about 2 units in the last place, branch-free: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
static inline float ROWS_NAME(exp)(float x)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float shifted = ROWS_FMA(x, 1.44269504089f, magic);
    const float n = shifted - magic;
    float r = ROWS_FMA(n, -0.693359375f, x);
    r = ROWS_FMA(n, 2.12194440e-4f, r);
    float p = ROWS_FMA(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = ROWS_FMA(p, r, 8.3334519073e-3f);
    p = ROWS_FMA(p, r, 4.1665795894e-2f);
    p = ROWS_FMA(p, r, 1.6666665459e-1f);
    p = ROWS_FMA(p, r, 5.0000001201e-1f);
    p = ROWS_FMA(p, r * r, r) + 1.0f;
    union {
        float f;
        uint32_t u;
    } scale;
    scale.f = shifted; /* its low bits hold n in two's complement */
    scale.u = (scale.u + 127u) << 23;
    return p * scale.f;
}

/* sum = x + add (skipped when add is NULL), y = sum / rms(sum) * w. */
static void ROWS_NAME(rms_forward)(int64_t rows, int64_t width, float epsilon, const void *x, const void *add,
                                   void *sum, const float *w, void *y)
{
    for (int64_t i = 0; i < rows; i++) {
        const ROWS_ELEMENT *in = (const ROWS_ELEMENT *)x + i * width;
        float squares = 0.0f;
        if (add) {
            const ROWS_ELEMENT *other = (const ROWS_ELEMENT *)add + i * width;
            ROWS_ELEMENT *out = (ROWS_ELEMENT *)sum + i * width;
#pragma omp simd reduction(+ : squares)
            for (int64_t j = 0; j < width; j++) {
                ROWS_STORE(out, j, ROWS_LOAD(in, j) + ROWS_LOAD(other, j));
                const float value = ROWS_LOAD(out, j);
                squares += value * value;
            }
            in = out;
        } else {
#pragma omp simd reduction(+ : squares)
            for (int64_t j = 0; j < width; j++)
                squares += ROWS_LOAD(in, j) * ROWS_LOAD(in, j);
        }
        if (!y) continue;
        const float inverse = 1.0f / sqrtf(squares / (float)width + epsilon);
        ROWS_ELEMENT *normalised = (ROWS_ELEMENT *)y + i * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++)
            ROWS_STORE(normalised, j, ROWS_LOAD(in, j) * inverse * w[j]);
    }
}

/* dx += d rms_forward(x) / dx applied to dy. */
static void ROWS_NAME(rms_backward)(int64_t rows, int64_t width, float epsilon, const void *x, const float *w,
                                    const void *dy, void *dx)
{
    for (int64_t i = 0; i < rows; i++) {
        const ROWS_ELEMENT *in = (const ROWS_ELEMENT *)x + i * width, *gradient = (const ROWS_ELEMENT *)dy + i * width;
        ROWS_ELEMENT *out = (ROWS_ELEMENT *)dx + i * width;
        float squares = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : squares, dot)
        for (int64_t j = 0; j < width; j++) {
            const float value = ROWS_LOAD(in, j);
            squares += value * value;
            dot += value * ROWS_LOAD(gradient, j) * w[j];
        }
        const float mean = squares / (float)width + epsilon;
        const float inverse = 1.0f / sqrtf(mean);
        const float along = dot * inverse / mean / (float)width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            const float delta = ROWS_LOAD(gradient, j) * w[j] * inverse - ROWS_LOAD(in, j) * along;
            ROWS_STORE(out, j, ROWS_LOAD(out, j) + delta);
        }
    }
}

/* h = silu(gate) * up. */
static void ROWS_NAME(gate_forward)(int64_t count, const void *gate, const void *up, void *h)
{
    const ROWS_ELEMENT *g = gate, *u = up;
    ROWS_ELEMENT *out = h;
#pragma omp simd
    for (int64_t j = 0; j < count; j++) {
        const float value = ROWS_LOAD(g, j);
        ROWS_STORE(out, j, value * ROWS_LOAD(u, j) / (1.0f + ROWS_NAME(exp)(-value)));
    }
}

/* gate <- dgate, up <- dup for the gradient dh. */
static void ROWS_NAME(gate_backward)(int64_t count, void *gate, void *up, const void *dh)
{
    ROWS_ELEMENT *g = gate, *u = up;
    const ROWS_ELEMENT *gradient = dh;
#pragma omp simd
    for (int64_t j = 0; j < count; j++) {
        const float value = ROWS_LOAD(g, j), d = ROWS_LOAD(gradient, j), other = ROWS_LOAD(u, j);
        const float sigmoid = 1.0f / (1.0f + ROWS_NAME(exp)(-value));
        const float silu = value * sigmoid;
        ROWS_STORE(u, j, d * silu);
        ROWS_STORE(g, j, d * other * (sigmoid + silu * (1.0f - sigmoid)));
    }
}

/* Rotates the pairs (j, j + width / 2) of each head by +angle (sign = 1) or back (sign = -1); input float or element. */
static void ROWS_NAME(rotate)(int64_t heads, int64_t width, const float *cosine, const float *sine, float sign, void *x)
{
    const int64_t half = width / 2;
    for (int64_t h = 0; h < heads; h++) {
        ROWS_ELEMENT *low = (ROWS_ELEMENT *)x + h * width, *high = low + half;
#pragma omp simd
        for (int64_t j = 0; j < half; j++) {
            const float a = ROWS_LOAD(low, j), b = ROWS_LOAD(high, j), c = cosine[j], s = sign * sine[j];
            ROWS_STORE(low, j, a * c - b * s);
            ROWS_STORE(high, j, b * c + a * s);
        }
    }
}

/* The same from one fp32 head into elements. */
static void ROWS_NAME(rotate_out)(int64_t width, const float *cosine, const float *sine, float sign, const float *x,
                                  void *y)
{
    const int64_t half = width / 2;
    ROWS_ELEMENT *low = y, *high = low + half;
#pragma omp simd
    for (int64_t j = 0; j < half; j++) {
        const float a = x[j], b = x[half + j], c = cosine[j], s = sign * sine[j];
        ROWS_STORE(low, j, a * c - b * s);
        ROWS_STORE(high, j, b * c + a * s);
    }
}

/* out = in * factor, from fp32. */
static void ROWS_NAME(scale_out)(int64_t count, const float *in, float factor, void *out)
{
    ROWS_ELEMENT *result = out;
#pragma omp simd
    for (int64_t j = 0; j < count; j++)
        ROWS_STORE(result, j, in[j] * factor);
}

static float ROWS_NAME(dot)(int64_t count, const void *a, const void *b)
{
    const ROWS_ELEMENT *x = a, *y = b;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; j++)
        sum += ROWS_LOAD(x, j) * ROWS_LOAD(y, j);
    return sum;
}

/* sum += weight * row. */
static void ROWS_NAME(add_scaled)(int64_t count, const void *row, float weight, float *sum)
{
    const ROWS_ELEMENT *x = row;
#pragma omp simd
    for (int64_t j = 0; j < count; j++)
        sum[j] += weight * ROWS_LOAD(x, j);
}

/* p[0..valid) = exp(scale s - max(scale s)), p[valid..count) = 0; returns the sum, *maximum = max(scale s). p may be s. count is a
 * multiple of ROWS_GROUP: loops run over whole groups, because a scalar remainder would cost more than all the rest. What is beyond
 * `valid` becomes too small to count in a sum that is at least 1. */
static float ROWS_NAME(softmax)(int64_t valid, int64_t count, float scale, float *s, void *p, float *maximum)
{
    const int64_t whole = (valid + ROWS_GROUP - 1) / ROWS_GROUP * ROWS_GROUP;
    ROWS_ELEMENT *out = p;
    for (int64_t j = valid; j < whole; j++)
        s[j] = -1e30f;
    float top = s[0], sum = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < whole; j++)
        top = s[j] > top ? s[j] : top;
    top *= scale;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < whole; j++) {
        const float value = ROWS_NAME(exp)(ROWS_FMA(s[j], scale, -top));
        sum += value;
        ROWS_STORE(out, j, value);
    }
    memset(out + valid, 0, (size_t)(count - valid) * sizeof *out);
    *maximum = top;
    return sum;
}

/* p = exp(scale s - lse), ds = scale p (dp - delta); both 0 from `valid` on. p may be s, ds may be dp; groups as above. */
static void ROWS_NAME(softmax_backward)(int64_t valid, int64_t count, float scale, float lse, float delta,
                                        const float *s, const float *dp, void *p, void *ds)
{
    const int64_t whole = (valid + ROWS_GROUP - 1) / ROWS_GROUP * ROWS_GROUP;
    ROWS_ELEMENT *out = p, *gradient = ds;
#pragma omp simd
    for (int64_t j = 0; j < whole; j++) {
        const float value = ROWS_NAME(exp)(ROWS_FMA(s[j], scale, -lse));
        ROWS_STORE(gradient, j, value * (dp[j] - delta) * scale);
        ROWS_STORE(out, j, value);
    }
    memset(out + valid, 0, (size_t)(count - valid) * sizeof *out);
    memset(gradient + valid, 0, (size_t)(count - valid) * sizeof *gradient);
}

/* Cross entropy of one row of logits: returns the loss; gradient (may be NULL) = factor (softmax - onehot). logits is scratch
 * afterwards; gradient may be logits. */
static double ROWS_NAME(cross_entropy)(int64_t count, float *logits, int64_t target, float factor, void *gradient)
{
    const double chosen = logits[target];
    float top = logits[0], sum = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < count; j++)
        top = logits[j] > top ? logits[j] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; j++) {
        logits[j] = ROWS_NAME(exp)(logits[j] - top);
        sum += logits[j];
    }
    if (gradient) {
        ROWS_ELEMENT *out = gradient;
        const float share = factor / sum, at_target = logits[target] * share - factor;
#pragma omp simd
        for (int64_t j = 0; j < count; j++)
            ROWS_STORE(out, j, logits[j] * share);
        ROWS_STORE(out, target, at_target);
    }
    return (double)top + log((double)sum) - chosen;
}

static const struct row_kernels ROWS_NAME(kernels) = {
    ROWS_NAME(rms_forward), ROWS_NAME(rms_backward), ROWS_NAME(gate_forward),     ROWS_NAME(gate_backward),
    ROWS_NAME(rotate),      ROWS_NAME(rotate_out),   ROWS_NAME(scale_out),        ROWS_NAME(dot),
    ROWS_NAME(add_scaled),  ROWS_NAME(softmax),      ROWS_NAME(softmax_backward), ROWS_NAME(cross_entropy)};

#undef ROWS_NAME
#undef ROWS_ELEMENT
#undef ROWS_LOAD
#undef ROWS_STORE
