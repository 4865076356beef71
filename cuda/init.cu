/* init.cu: the fresh A of an adapter, from the words of philox.h: an element is a function of (seed, stage, layer, its number) alone,
 * with the same bits as lib/cpu/cpu_init.c. Compiled without floating-point contraction, as normal.h asks.
 *
 * Grid: a row of blocks for each row of A where it is a shard's, which may begin inside of a draw; else one for all. One thread for the
 * four elements of a draw. Writes 4 bytes an element, 16 at a time where they are aligned; no shared memory. */
#include "cuda_common.cuh"
#include "normal.h"
#include "philox.h"

/* UNIT(word): the random number of standard scale that an element gets from its word. */
#define INIT_KERNEL(name, UNIT)                                                                                        \
    extern "C" __global__ void __launch_bounds__(INIT_THREADS) name(const __grid_constant__ struct init_params p)      \
    {                                                                                                                  \
        const int64_t row = blockIdx.y, first = p.first_element + row * p.row_elements;                                \
        const int64_t quad = (int64_t)blockIdx.x * INIT_THREADS + threadIdx.x, begin = 4 * quad - first % 4;           \
        if (begin >= p.columns) return;                                                                                \
        const struct plora__words words =                                                                              \
            plora__draw(p.seed, PLORA__PURPOSE_INIT, p.stage, p.layer, (uint64_t)(first + begin) / 4);                 \
        float value[4];                                                                                                \
        for (int i = 0; i < 4; ++i)                                                                                    \
            value[i] = UNIT(words.word[i]) * p.scale;                                                                  \
        float *to = p.out + row * p.columns + begin;                                                                   \
        if (begin >= 0 && begin + 4 <= p.columns && (uintptr_t)to % 16 == 0) {                                         \
            store_sixteen_bytes(to, make_uint4(__float_as_uint(value[0]), __float_as_uint(value[1]),                   \
                                               __float_as_uint(value[2]), __float_as_uint(value[3])));                 \
        } else {                                                                                                       \
            for (int i = 0; i < 4; ++i)                                                                                \
                if (begin + i >= 0 && begin + i < p.columns) to[i] = value[i];                                         \
        }                                                                                                              \
    }

INIT_KERNEL(init_uniform_kernel, plora__symmetric)
INIT_KERNEL(init_gaussian_kernel, plora__normal)
