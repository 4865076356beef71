/* rows.h: element-wise kernels (RMSNorm, rotary embedding, gated SiLU, softmax, cross entropy) for fp32 and bf16 elements.
 * Inside a kernel everything is fp32, with one rounding when an element is stored. They run on the calling thread; the callers
 * split rows over threads. What each does is said in rows_body.h. */
#ifndef FINETUNE_ROWS_H
#define FINETUNE_ROWS_H

#include <stddef.h>
#include <stdint.h>

struct row_kernels {
    void (*rms_forward)(int64_t rows, int64_t width, float epsilon, const void *x, const void *add, void *sum,
                        const float *w, void *y);
    void (*rms_backward)(int64_t rows, int64_t width, float epsilon, const void *x, const float *w, const void *dy,
                         void *dx);
    void (*gate_forward)(int64_t count, const void *gate, const void *up, void *h);
    void (*gate_backward)(int64_t count, void *gate, void *up, const void *dh);
    void (*rotate)(int64_t heads, int64_t width, const float *cosine, const float *sine, float sign, void *x);
    void (*rotate_out)(int64_t width, const float *cosine, const float *sine, float sign, const float *x, void *y);
    void (*scale_out)(int64_t count, const float *in, float factor, void *out);
    float (*dot)(int64_t count, const void *a, const void *b);
    void (*add_scaled)(int64_t count, const void *row, float weight, float *sum);
    float (*softmax)(int64_t valid, int64_t count, float scale, float *s, void *p, float *maximum);
    void (*softmax_backward)(int64_t valid, int64_t count, float scale, float lse, float delta, const float *s,
                             const float *dp, void *p, void *ds);
    double (*cross_entropy)(int64_t count, float *logits, int64_t target, float factor, void *gradient);
};

/* The kernels for PLORA_F32 or PLORA_BF16 elements on this processor. */
const struct row_kernels *row_kernels_for(int32_t dtype);

/* Conversions between PLORA_F32, BF16 and F16, to nearest even. */
void convert_elements(int64_t count, const void *in, int32_t in_dtype, void *out, int32_t out_dtype);

static inline size_t element_size(int32_t dtype)
{
    return dtype == 0 ? 4 : 2;
}

#endif
