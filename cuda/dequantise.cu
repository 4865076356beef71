/* dequantise.cu: a panel of a quantised W as fp32 or bf16. The layouts are those of plora__quantised (lib/backend.h).
 *
 *     int8   out = code * scale
 *     nf4    out = value[nibble] * absmax,       absmax = scale, or map[nested code] * nested scale + offset
 *
 * Each operation is rounded to fp32 by itself, nothing is contracted: the bits of the CPU. */
#include "backend.h"
#include "cuda_common.cuh"

/* The run of this thread: DEQUANTISE_RUN columns of the panel, of which `valid` exist. */
struct dequantise_place {
    int64_t element; /* of W, of the first */
    int64_t column;  /* of W */
    int64_t row;     /* of W */
    int64_t out;     /* index into `out` */
    int valid;
};

static __device__ __forceinline__ struct dequantise_place dequantise_locate(const struct dequantise_params &p)
{
    const int64_t block = DEQUANTISE_THREADS * DEQUANTISE_RUN;
    const uint32_t across = (uint32_t)((p.columns + block - 1) / block);
    const int64_t row = blockIdx.x / across;
    const int64_t column = (int64_t)(blockIdx.x % across) * block + (int64_t)threadIdx.x * DEQUANTISE_RUN;
    const int64_t valid = p.columns - column;
    struct dequantise_place place;
    place.row = p.first_row + row;
    place.column = p.first_column + column;
    place.element = place.row * p.all_columns + place.column;
    place.out = row * p.stride + column;
    place.valid = valid < DEQUANTISE_RUN ? (int)valid : DEQUANTISE_RUN;
    return place;
}

static __device__ __forceinline__ void dequantise_store(const struct dequantise_params &p,
                                                        const struct dequantise_place &place,
                                                        const float (&values)[DEQUANTISE_RUN])
{
    if (p.dtype == PLORA_BF16 && p.aligned && place.valid == DEQUANTISE_RUN) {
        store_sixteen_bytes((uint16_t *)p.out + place.out,
                            make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                                       pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7])));
        return;
    }
    store_four(p.out, place.out, p.dtype, p.aligned, place.valid,
               make_float4(values[0], values[1], values[2], values[3]));
    store_four(p.out, place.out + 4, p.dtype, p.aligned, place.valid - 4,
               make_float4(values[4], values[5], values[6], values[7]));
}

/* Grid: rows * ceil(columns / 1024) blocks of 128 threads, 8 neighbours of a row a thread. No shared memory. 1 byte
 * read (and 4 for each scale) and 4 (bf16: 2) written for each element; 8 codes at once where they begin at a multiple
 * of 8. */
extern "C" __global__ void __launch_bounds__(DEQUANTISE_THREADS)
    dequantise_int8_kernel(const __grid_constant__ struct dequantise_params p)
{
    const struct dequantise_place place = dequantise_locate(p);
    if (place.valid <= 0) return;
    const int8_t *codes = (const int8_t *)p.codes + place.element;
    const float *scales = p.scales + place.row * p.groups;
    uint32_t words[2] = {0, 0};
    if (place.valid == DEQUANTISE_RUN && (uint64_t)codes % 8 == 0) {
        const uint2 both = *(const uint2 *)codes;
        words[0] = both.x;
        words[1] = both.y;
    } else {
#pragma unroll
        for (int i = 0; i < DEQUANTISE_RUN; ++i)
            if (i < place.valid) words[i / 4] |= (uint32_t)(uint8_t)codes[i] << (8 * (i % 4));
    }
    int64_t group = place.column / p.group, left = p.group - place.column % p.group; /* columns that share its scale */
    float scale = scales[group], values[DEQUANTISE_RUN];
#pragma unroll
    for (int i = 0; i < DEQUANTISE_RUN; ++i) {
        if (left == 0 && i < place.valid) {
            scale = scales[++group];
            left = p.group;
        }
        values[i] = __fmul_rn((float)(int8_t)(words[i / 4] >> (8 * (i % 4))), scale);
        --left;
    }
    dequantise_store(p, place, values);
}

static __device__ __forceinline__ float dequantise_absmax(const struct dequantise_params &p, int64_t block)
{
    if (p.nested_codes == NULL) return p.scales[block];
    return __fadd_rn(__fmul_rn(p.map[p.nested_codes[block]], p.scales[block / PLORA__NF4_NESTED_BLOCK]), p.offset);
}

/* Grid as above. Shared: the 16 values, in 16 banks: lanes that want the same one get it at once. Half a byte read (and
 * 4 bytes for each 64 elements, doubly quantised 1) and 4 (bf16: 2) written for each element; 8 nibbles at once where
 * they begin at a multiple of 8. */
extern "C" __global__ void __launch_bounds__(DEQUANTISE_THREADS)
    dequantise_nf4_kernel(const __grid_constant__ struct dequantise_params p)
{
    __shared__ float table[16];
#pragma unroll
    for (int i = 0; i < 16; ++i)
        if (threadIdx.x == i) table[i] = p.values[i];
    __syncthreads();
    const struct dequantise_place place = dequantise_locate(p);
    if (place.valid <= 0) return;
    const uint8_t *bytes = (const uint8_t *)p.codes;
    uint32_t word = 0; /* element i is its bits 4 i .. 4 i + 3 */
    if (place.valid == DEQUANTISE_RUN && place.element % 8 == 0 && (uint64_t)bytes % 4 == 0) {
        word = *(const uint32_t *)(bytes + place.element / 2);
        word = (word >> 4 & 0x0f0f0f0fu) | (word & 0x0f0f0f0fu) << 4; /* the first of two is in the upper half */
    } else {
#pragma unroll
        for (int i = 0; i < DEQUANTISE_RUN; ++i) {
            const int64_t element = place.element + i;
            if (i < place.valid) word |= ((uint32_t)bytes[element / 2] >> (element % 2 ? 0 : 4) & 15u) << (4 * i);
        }
    }
    int64_t block = place.element / PLORA__NF4_BLOCK;
    int left = PLORA__NF4_BLOCK - (int)(place.element % PLORA__NF4_BLOCK);
    float absmax = dequantise_absmax(p, block), values[DEQUANTISE_RUN];
#pragma unroll
    for (int i = 0; i < DEQUANTISE_RUN; ++i) {
        if (i == left && i < place.valid) absmax = dequantise_absmax(p, block + 1);
        values[i] = __fmul_rn(table[word >> (4 * i) & 15u], absmax);
    }
    dequantise_store(p, place, values);
}
