/* cuda_common.cuh: what the kernels share: the numbers of every dtype, dropout masks, and the tensor-core tile. The only home of
 * inline assembly.
 *
 * A bf16_tile is 64 rows of 64 bf16, 128 bytes a row in eight chunks of 16 bytes. Chunk c of row r lies at place c ^ (r % 8) of its
 * row, so that the eight rows that ldmatrix reads at once lie in different banks:
 *
 *     row 0   | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |
 *     row 1   | 1 | 0 | 3 | 2 | 5 | 4 | 7 | 6 |
 *     row 2   | 2 | 3 | 0 | 1 | 6 | 7 | 4 | 5 |   ...
 *
 * A block of LINEAR_TILE_THREADS = 4 warps fills a tile together: thread i owns the chunks i, i + 128, i + 256, i + 384. */
#ifndef PLORA_CUDA_COMMON_CUH
#define PLORA_CUDA_COMMON_CUH

#include "kernels.h"
#include "philox.h"
#include "plora.h"

/* ------------------------------------------------------------------------------------------------------------- numbers */

static __device__ __forceinline__ float bf16_to_float(uint32_t low_half)
{
    return __uint_as_float(low_half << 16);
}

/* Rounds to nearest, ties to even; NaN stays NaN, overflow becomes infinity: the bits of plora__float_to_bf16(). */
static __device__ __forceinline__ uint32_t float_to_bf16(float value)
{
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

static __device__ __forceinline__ float f16_to_float(uint32_t low_half)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((uint16_t)low_half));
    return value;
}

/* Two fp32 rounded to bf16: `low` in the low half. */
static __device__ __forceinline__ uint32_t pack_bf16(float low, float high)
{
#if __CUDA_ARCH__ >= 800
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return float_to_bf16(low) | float_to_bf16(high) << 16;
#endif
}

static __device__ __forceinline__ float load_number(const void *data, int64_t index, int32_t dtype)
{
    if (dtype == PLORA_F32) return ((const float *)data)[index];
    const uint32_t half = ((const uint16_t *)data)[index];
    return dtype == PLORA_BF16 ? bf16_to_float(half) : f16_to_float(half);
}

/* The numbers index .. index + 3, of which the first `valid` exist; zero for the others. aligned: the four may be read at once. */
static __device__ __forceinline__ float4 load_four(const void *data, int64_t index, int32_t dtype, int aligned,
                                                   int64_t valid)
{
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (aligned && valid >= 4) {
        if (dtype == PLORA_F32) return *(const float4 *)((const float *)data + index);
        const uint2 halves = *(const uint2 *)((const uint16_t *)data + index);
        if (dtype == PLORA_BF16)
            return make_float4(bf16_to_float(halves.x), __uint_as_float(halves.x & 0xffff0000u),
                               bf16_to_float(halves.y), __uint_as_float(halves.y & 0xffff0000u));
        return make_float4(f16_to_float(halves.x & 0xffffu), f16_to_float(halves.x >> 16),
                           f16_to_float(halves.y & 0xffffu), f16_to_float(halves.y >> 16));
    }
    if (valid > 0) four.x = load_number(data, index, dtype);
    if (valid > 1) four.y = load_number(data, index + 1, dtype);
    if (valid > 2) four.z = load_number(data, index + 2, dtype);
    if (valid > 3) four.w = load_number(data, index + 3, dtype);
    return four;
}

static __device__ __forceinline__ void store_number(void *data, int64_t index, int32_t dtype, float value)
{
    if (dtype == PLORA_F32)
        ((float *)data)[index] = value;
    else
        ((uint16_t *)data)[index] = (uint16_t)float_to_bf16(value);
}

/* One access of 8 or 16 bytes. A plain store would be taken apart where its other branch stores the same numbers one by one. */
static __device__ __forceinline__ void store_eight_bytes(void *global, uint2 words)
{
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(global), "r"(words.x), "r"(words.y) : "memory");
}

static __device__ __forceinline__ void store_sixteen_bytes(void *global, uint4 words)
{
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words.x), "r"(words.y), "r"(words.z),
                 "r"(words.w)
                 : "memory");
}

/* As load_four(), for F32 and BF16 outputs. */
static __device__ __forceinline__ void store_four(void *data, int64_t index, int32_t dtype, int aligned, int64_t valid,
                                                  float4 four)
{
    if (aligned && valid >= 4) {
        if (dtype == PLORA_F32)
            store_sixteen_bytes((float *)data + index, make_uint4(__float_as_uint(four.x), __float_as_uint(four.y),
                                                                  __float_as_uint(four.z), __float_as_uint(four.w)));
        else
            store_eight_bytes((uint16_t *)data + index,
                              make_uint2(pack_bf16(four.x, four.y), pack_bf16(four.z, four.w)));
        return;
    }
    if (valid > 0) store_number(data, index, dtype, four.x);
    if (valid > 1) store_number(data, index + 1, dtype, four.y);
    if (valid > 2) store_number(data, index + 2, dtype, four.z);
    if (valid > 3) store_number(data, index + 3, dtype, four.w);
}

static __device__ __forceinline__ void add_four(float4 &sum, float4 term)
{
    sum.x += term.x;
    sum.y += term.y;
    sum.z += term.z;
    sum.w += term.w;
}

/* sum += a . b */
static __device__ __forceinline__ void dot_four(float &sum, float4 a, float4 b)
{
    sum = fmaf(a.x, b.x, sum);
    sum = fmaf(a.y, b.y, sum);
    sum = fmaf(a.z, b.z, sum);
    sum = fmaf(a.w, b.w, sum);
}

/* sum += a * b */
static __device__ __forceinline__ void multiply_four(float4 &sum, float a, float4 b)
{
    sum.x = fmaf(a, b.x, sum.x);
    sum.y = fmaf(a, b.y, sum.y);
    sum.z = fmaf(a, b.z, sum.z);
    sum.w = fmaf(a, b.w, sum.w);
}

/* ------------------------------------------------------------------------------------------------------------- dropout */

/* Bit i: element + i is kept, for i < count. Four elements are one draw; those of a count that begins inside of a draw are count / 4
 * + 1 draws. */
static __device__ __forceinline__ uint32_t keep_bits(const struct linear_dropout &dropout, uint64_t element, int count)
{
    const int lead = (int)(element % 4);
    uint32_t bits = 0;
    for (int done = 0; done < lead + count; done += 4) {
        const struct plora__words words = plora__draw(dropout.seed, PLORA__PURPOSE_DROPOUT, dropout.step, dropout.layer,
                                                      element / 4 + (uint64_t)(done / 4));
#pragma unroll
        for (int i = 0; i < 4; ++i)
            bits |= (uint32_t)(words.word[i] >= dropout.threshold) << (done + i);
    }
    return bits >> lead;
}

/* The number of x[token, column] among the elements that the mask is drawn for. */
static __device__ __forceinline__ uint64_t dropout_element(const struct linear_dropout &dropout, int64_t token,
                                                           int64_t column)
{
    return dropout.first_element + (uint64_t)token * dropout.row_elements + (uint64_t)column;
}

static __device__ __forceinline__ void drop_four(float4 &four, uint32_t keep, float scale)
{
    four.x *= keep & 1 ? scale : 0.0f;
    four.y *= keep & 2 ? scale : 0.0f;
    four.z *= keep & 4 ? scale : 0.0f;
    four.w *= keep & 8 ? scale : 0.0f;
}

/* ------------------------------------------------------------------------------------------------- tiles of tensor cores */

#if __CUDA_ARCH__ >= 800

struct __align__(128) bf16_tile
{
    uint4 chunks[LINEAR_TILE * 8];
};

/* A bf16 matrix from which tiles are cut; aligned: its rows begin at multiples of 16 bytes. */
struct tile_source {
    const uint16_t *data;
    int64_t stride, rows, columns;
    int aligned;
};

static __device__ __forceinline__ int chunk_place(int row, int chunk)
{
    return row * 8 + (chunk ^ (row & 7));
}

static __device__ __forceinline__ uint32_t shared_address(const void *memory)
{
    return (uint32_t)__cvta_generic_to_shared(memory);
}

/* The first `valid` of eight numbers from global to shared memory, zero for the others; there after copies_wait(). */
static __device__ __forceinline__ void copy_chunk(uint4 *shared, const void *global, int valid = 8)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(2 * valid)
                 : "memory");
}

/* Ends the group of the copies since the last one. */
static __device__ __forceinline__ void copies_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most `pending` of this thread's groups are under way. */
template <int pending> static __device__ __forceinline__ void copies_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/* Eight numbers of one row, of which the first `valid` exist. */
static __device__ __forceinline__ uint4 gather_chunk(const uint16_t *data, int64_t valid)
{
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        pairs[i] = 2 * i < valid ? data[2 * i] : 0u;
        pairs[i] |= 2 * i + 1 < valid ? (uint32_t)data[2 * i + 1] << 16 : 0u;
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

/* The opposite; in one access where the row is aligned and all eight exist. */
static __device__ __forceinline__ void scatter_chunk(uint16_t *data, uint4 chunk, int64_t valid, int aligned)
{
    if (aligned && valid >= 8) {
        store_sixteen_bytes(data, chunk);
        return;
    }
    const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < valid) data[i] = (uint16_t)(i % 2 == 0 ? pairs[i / 2] : pairs[i / 2] >> 16);
}

/* Starts to fill the first used_rows rows of a tile from (row, column) of the source on; zeros outside of it. */
static __device__ __forceinline__ void tile_fill(struct bf16_tile *tile, const struct tile_source &source, int64_t row,
                                                 int64_t column, int used_rows)
{
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int own = (int)threadIdx.x + i * LINEAR_TILE_THREADS, tile_row = own / 8;
        if (tile_row >= used_rows) break;
        uint4 *place = &tile->chunks[chunk_place(tile_row, own % 8)];
        const int64_t from = column + own % 8 * 8;
        const int64_t valid = row + tile_row < source.rows ? source.columns - from : 0;
        const uint16_t *data = source.data + (row + tile_row) * source.stride + from;
        if (source.aligned)
            copy_chunk(place, valid > 0 ? data : source.data, (int)(valid < 0 ? 0 : valid < 8 ? valid : 8));
        else
            *place = gather_chunk(data, valid);
    }
}

/* Applies the dropout to this thread's chunks of a filled tile of x: (row, column) as before, `columns` those of a row of x. */
static __device__ __forceinline__ void tile_drop(struct bf16_tile *tile, const struct linear_dropout &dropout,
                                                 int64_t row, int64_t rows, int64_t column, int64_t columns)
{
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
        const int own = (int)threadIdx.x + i * LINEAR_TILE_THREADS;
        const int64_t token = row + own / 8, from = column + own % 8 * 8;
        if (token >= rows || from >= columns) continue;
        const uint32_t keep = keep_bits(dropout, dropout_element(dropout, token, from), 8);
        uint4 *place = &tile->chunks[chunk_place(own / 8, own % 8)];
        const uint4 chunk = *place;
        uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
            pairs[j] =
                pack_bf16(bf16_to_float(pairs[j]) * (keep >> (2 * j) & 1 ? dropout.scale : 0.0f),
                          __uint_as_float(pairs[j] & 0xffff0000u) * (keep >> (2 * j + 1) & 1 ? dropout.scale : 0.0f));
        *place = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

/* Four 8 x 8 matrices; lanes 8 i .. 8 i + 7 give the addresses of the rows of matrix i. Each lane gets, of each matrix, the numbers
 * (lane / 4, lane % 4 * 2) and the next of the row; transposed: of the column. */
template <bool transposed>
static __device__ __forceinline__ void load_matrices(uint32_t (&pairs)[4], const struct bf16_tile *tile, int row,
                                                     int chunk)
{
    const uint32_t address = shared_address(&tile->chunks[chunk_place(row, chunk)]);
    if (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                     : "r"(address)
                     : "memory");
}

/* sum[16,8] += a[16,16] b[16,8] by one warp. With g = lane / 4, q = lane % 4: sum is (g, 2q), (g, 2q+1), (g+8, 2q), (g+8, 2q+1). */
static __device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* sum[64, 16 pairs] += left right over 16 steps terms: warp w computes the rows 16 w .. 16 w + 15 of the sum, sum[n] its columns 8 n ..
 * 8 n + 7. A tile holds its operand by the sum's index, left[m][k] and right[n][k], or by k: left[k][m], right[k][n]. Of several tiles
 * of left, sum[i] is that of left[i]; what a warp reads of right serves all of them. */
template <bool left_by_k, bool right_by_k, int tiles>
static __device__ __forceinline__ void tile_multiply(float (&sum)[tiles][8][4], const struct bf16_tile (&left)[tiles],
                                                     const struct bf16_tile *right, int pairs, int steps)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int low = lane & 7, second = lane >> 3 & 1, third = lane >> 4; /* matrix second + 2 third */
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        uint32_t a[tiles][4];
#pragma unroll
        for (int i = 0; i < tiles; ++i)
            if (left_by_k)
                load_matrices<true>(a[i], &left[i], 16 * step + low + 8 * third, 2 * warp + second);
            else
                load_matrices<false>(a[i], &left[i], 16 * warp + low + 8 * second, 2 * step + third);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            if (pair >= pairs) break;
            uint32_t b[4];
            if (right_by_k)
                load_matrices<true>(b, right, 16 * step + low + 8 * second, 2 * pair + third);
            else
                load_matrices<false>(b, right, 16 * pair + low + 8 * third, 2 * step + second);
#pragma unroll
            for (int i = 0; i < tiles; ++i) {
                multiply_add(sum[i][2 * pair], a[i], b[0], b[1]);
                multiply_add(sum[i][2 * pair + 1], a[i], b[2], b[3]);
            }
        }
    }
}

template <bool left_by_k, bool right_by_k>
static __device__ __forceinline__ void tile_multiply(float (&sum)[8][4], const struct bf16_tile *left,
                                                     const struct bf16_tile *right, int pairs, int steps)
{
    tile_multiply<left_by_k, right_by_k>(reinterpret_cast<float(&)[1][8][4]>(sum),
                                         reinterpret_cast<const struct bf16_tile(&)[1]>(*left), right, pairs, steps);
}

/* Adds a warp's sums, as tile_multiply() leaves them, to the tile, or writes them to it; rounded once. */
static __device__ __forceinline__ void tile_add(struct bf16_tile *tile, const float (&sum)[8][4], int keep)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            uint32_t *pair = (uint32_t *)&tile->chunks[chunk_place(16 * warp + 8 * half + lane / 4, n)] + lane % 4;
            const uint32_t old = keep ? *pair : 0u;
            *pair = pack_bf16(bf16_to_float(old) + sum[n][2 * half],
                              __uint_as_float(old & 0xffff0000u) + sum[n][2 * half + 1]);
        }
}

#endif /* __CUDA_ARCH__ >= 800 */

/* ------------------------------------------------------------------------------------------ fp32 on tensor cores, W's way */

#if __CUDA_ARCH__ < 800
static __device__ __forceinline__ void copies_commit()
{
}

template <int pending> static __device__ __forceinline__ void copies_wait()
{
}
#endif

/* The first `valid` of four floats from global to shared memory, zero for the others; 16-byte aligned. Where there is cp.async, they
 * are there after copies_wait(). */
static __device__ __forceinline__ void copy_floats(float *shared, const float *global, int valid)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(4 * valid)
                 : "memory");
#else
    *(float4 *)shared = load_four(global, 0, PLORA_F32, 1, valid);
#endif
}

/* The same of one float. */
static __device__ __forceinline__ void copy_float(float *shared, const float *global, int valid)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(4 * valid)
                 : "memory");
#else
    *shared = valid ? *global : 0.0f;
#endif
}

/* Asks a line of memory into L2, to be read later. */
static __device__ __forceinline__ void prefetch_l2(const void *global)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

static __device__ __forceinline__ uint32_t float_to_f16(float value)
{
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

static __device__ __forceinline__ int is_finite(float value)
{
    return (__float_as_uint(value) & 0x7fffffffu) < 0x7f800000u;
}

#if __CUDA_ARCH__ >= 800

/* value = high + low + rest: high has the upper 11 bits of value, rounded to nearest, low the next ones; |rest| <= 2^-23 |value|. */
static __device__ __forceinline__ void split_tf32(float value, uint32_t *high, uint32_t *low)
{
    *high = (__float_as_uint(value) + 0x1000u) & 0xffffe000u;
    *low = __float_as_uint(value - __uint_as_float(*high)) & 0xffffe000u;
}

/* Four 8 x 4 matrices of 32-bit numbers; lanes 8 i .. 8 i + 7 give the addresses of the rows, 16 bytes each, of matrix i. Each lane
 * gets the element (lane / 4, lane % 4) of each. */
static __device__ __forceinline__ void load_float_matrices(float (&values)[4], const float *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* sum[16,8] += a[16,8] b[8,8] by one warp, of tf32 numbers. With g = lane / 4, t = lane % 4: sum is (g, 2t), (g, 2t+1), (g+8, 2t),
 * (g+8, 2t+1); a is (g, t), (g+8, t), (g, t+4), (g+8, t+4); b is (t, g), (t+4, g). */
static __device__ __forceinline__ void multiply_add_tf32(float &sum0, float &sum1, float &sum2, float &sum3,
                                                         const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(sum0), "+f"(sum1), "+f"(sum2), "+f"(sum3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

/* The body of a tensor-core kernel where there are none: the launcher never chooses it. */
static __device__ __forceinline__ void unreachable()
{
    asm volatile("trap;");
}

#endif
