/* init.cu: the fresh A of an adapter, from the words of philox.h: element i is a function of (seed, stage, layer, i) alone, with the
 * same bits as lib/cpu/cpu_init.c. Compiled without floating-point contraction, as normal.h asks.
 *
 * Grid: one thread for four elements, which share one draw. Writes 4 bytes an element, 16 at a time; no shared memory. */
#include "kernels.h"
#include "normal.h"
#include "philox.h"

/* UNIT(word): the random number of standard scale that an element gets from its word. */
#define INIT_KERNEL(name, UNIT)                                                                                        \
    extern "C" __global__ void __launch_bounds__(INIT_THREADS) name(const __grid_constant__ struct init_params p)      \
    {                                                                                                                  \
        const int64_t quad = (int64_t)blockIdx.x * INIT_THREADS + threadIdx.x, begin = 4 * quad;                       \
        if (begin >= p.count) return;                                                                                  \
        const struct plora__words words = plora__draw(p.seed, PLORA__PURPOSE_INIT, p.stage, p.layer, (uint64_t)quad);  \
        float value[4];                                                                                                \
        for (int i = 0; i < 4; ++i)                                                                                    \
            value[i] = UNIT(words.word[i]) * p.scale;                                                                  \
        if (begin + 4 <= p.count) {                                                                                    \
            *(float4 *)(p.out + begin) = make_float4(value[0], value[1], value[2], value[3]);                          \
        } else {                                                                                                       \
            for (int i = 0; begin + i < p.count; ++i)                                                                  \
                p.out[begin + i] = value[i];                                                                           \
        }                                                                                                              \
    }

INIT_KERNEL(init_uniform_kernel, plora__symmetric)
INIT_KERNEL(init_gaussian_kernel, plora__normal)
