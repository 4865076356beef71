// forms.cu: one kernel for each instruction of forms.h: d[i] = instruction(a[i], b[i], c[i]). Everything lies in 64-bit slots.
#include "forms.h"

#include <stdint.h>

struct forms_params {
    const uint64_t *a, *b, *c;
    uint64_t *d;
    int count;
};

#define TYPE_W uint32_t
#define TYPE_D uint64_t
#define TYPE_H uint16_t
#define TYPE_F uint32_t
#define TYPE_G uint64_t
#define LETTER_W "r"
#define LETTER_D "l"
#define LETTER_H "h"
#define LETTER_F "r"
#define LETTER_G "l"

#define FORM(name, D, A, B, C, text, reference)                                                                        \
    extern "C" __global__ void form_##name##_kernel(const __grid_constant__ struct forms_params p)                     \
    {                                                                                                                  \
        const int i = blockIdx.x * blockDim.x + threadIdx.x;                                                           \
        if (i >= p.count) return;                                                                                      \
        const TYPE_##A x = (TYPE_##A)p.a[i];                                                                           \
        const TYPE_##B y = (TYPE_##B)p.b[i];                                                                           \
        const TYPE_##C z = (TYPE_##C)p.c[i];                                                                           \
        TYPE_##D d;                                                                                                    \
        asm volatile(text : "=" LETTER_##D(d) : LETTER_##A(x), LETTER_##B(y), LETTER_##C(z));                          \
        p.d[i] = d;                                                                                                    \
    }

FORMS(FORM)
APPROXIMATIONS(FORM)
#if __CUDA_ARCH__ >= 800 || !defined __CUDA_ARCH__
FORMS_80(FORM)
#endif
