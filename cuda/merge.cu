/* merge.cu: W[rows,columns] += factor * left[rows,R] right[R,columns]; W is read once, rounded once, written once.
 *
 *     block   one tile of W of 32 KiB: 128 x 128 of bf16 and f16, 64 x 128 of f32; 8 warps, 2 x 4
 *     warp    8 VECTOR rows x 32 columns, where VECTOR elements, a strip, are 16 bytes
 *     lane    number 4 g + t has the rows 8 k + g, k < VECTOR, and in each of them 8 columns: one strip, of f32 two
 *
 *              t = 0    t = 1    t = 2    t = 3
 *     row g   01234567 01234567 01234567 01234567         acc[k][0 .. 7]; of f32, two such groups of strips of 4
 *
 * An mma.sync tile takes its columns in any order, so they are dealt to make its accumulators such strips: the sums
 * meet W in registers, and both products below, by fma and by tensor cores, share this map.
 *
 * Slices of 16 ranks of the factors come into shared memory by cp.async, the next while this one is multiplied; the
 * tile of W is asked into L2 before the product and waits there. R is small, so the least time is that of W, 2 SIZE
 * bytes an element. On an H100, with 3.35 TB/s, and 60 % of 67 TFLOP/s (fp32) and 495 TFLOP/s (tf32) as what a kernel
 * can reach:
 *
 *     W           1.2 ps an element of bf16, f16; 2.4 of f32
 *     fma         2 R / 40e12  = 0.05 R ps    meets W at R = 24, of f32 at 48
 *     3 x tf32    6 R / 297e12 = 0.02 R ps    meets W at R = 60, of f32 at 120
 *
 * Up to R = 16 (f32: 32) fma hides behind W, with the bits of lib/cpu/merge_kernels.c; above, the tensor cores
 * multiply. W is rounded to nearest, or by lib/rounding.h: at random, or with a residual, the low half of each value,
 * read and written beside W. The report's other kernels are in report.cu. */
#include "backend.h"
#include "cuda_common.cuh"
#include "kernels.h"
#include "report.cuh"
#include "rounding.h"

enum {
    CHUNK = 16,        /* ranks in shared memory at a time */
    LEFT_PITCH = 20,   /* of left[row][rank]: 8 rows of 16 bytes lie in 32 different banks */
    RIGHT_PITCH = 136, /* of right[rank][column]: 4 rows of 2 x 16 bytes likewise */
    WARP_COLUMNS = 32,
    COLUMNS = 8 /* of a lane in each of its rows */
};

template <int32_t DTYPE> struct shape {
    enum {
        SIZE = DTYPE == PLORA_F32 ? 4 : 2,
        VECTOR = 16 / SIZE,        /* elements of a strip */
        STRIPS = COLUMNS / VECTOR, /* of a lane in one row */
        ROWS = VECTOR,             /* of a lane, 8 rows apart */
        TILE_ROWS = MERGE_TILE_BYTES / SIZE / MERGE_TILE_COLUMNS,
        TENSOR_ABOVE = DTYPE == PLORA_F32 ? 32 : 16
    };
};

/* Where a lane is: its first row and the first column of its warp in the tile. */
struct lane {
    int row, column, g, t;
};

template <int32_t DTYPE> static __device__ __forceinline__ struct lane this_lane()
{
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    return {warp / 4 * 8 * shape<DTYPE>::ROWS + g, warp % 4 * WARP_COLUMNS, g, t};
}

/* The first column of strip s of lane t, in those of the warp. */
template <int32_t DTYPE> static __device__ __forceinline__ int strip_column(int s, int t)
{
    return (4 * s + t) * shape<DTYPE>::VECTOR;
}

/* ------------------------------------------------------------------------------------------------------------
 * factors */

/* to[slow][fast] = from[slow * slow_stride + fast * fast_stride], 0 beyond the counts, by cp.async: 16 bytes at a time
 * where `fast` is contiguous and aligned, else 4, with neighbouring threads along the contiguous direction. */
template <int SLOW, int FAST, int PITCH>
static __device__ __forceinline__ void stage(float *to, const float *from, int64_t slow_stride, int64_t fast_stride,
                                             int slow_count, int fast_count)
{
    if (fast_stride == 1 && slow_stride % 4 == 0 && (uintptr_t)from % 16 == 0) {
#pragma unroll
        for (int i = threadIdx.x; i < SLOW * FAST / 4; i += MERGE_THREADS) {
            const int slow = i / (FAST / 4), fast = i % (FAST / 4) * 4;
            const int valid = slow < slow_count ? min(max(fast_count - fast, 0), 4) : 0;
            copy_floats(to + slow * PITCH + fast, valid > 0 ? from + slow * slow_stride + fast : from, valid);
        }
        return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < SLOW * FAST; i += MERGE_THREADS) {
        const int slow = fast_stride == 1 ? i / FAST : i % SLOW, fast = fast_stride == 1 ? i % FAST : i / SLOW;
        const int valid = slow < slow_count && fast < fast_count;
        copy_float(to + slow * PITCH + fast, valid ? from + slow * slow_stride + fast * fast_stride : from, valid);
    }
}

/* -----------------------------------------------------------------------------------------------------------
 * products */

/* acc += left right over `ranks` ranks in shared memory. Both pointers are at the warp's rows and columns. */
template <int32_t DTYPE>
static __device__ __forceinline__ void multiply_fma(float (&acc)[shape<DTYPE>::ROWS][COLUMNS], const float *left,
                                                    const float *right, int ranks, int g, int t)
{
    enum { VECTOR = shape<DTYPE>::VECTOR, ROWS = shape<DTYPE>::ROWS };
#pragma unroll 1
    for (int r = 0; r < ranks; ++r) {
        float row[COLUMNS];
#pragma unroll
        for (int c = 0; c < COLUMNS; c += 4)
            *(float4 *)(row + c) =
                *(const float4 *)(right + r * RIGHT_PITCH + strip_column<DTYPE>(c / VECTOR, t) + c % VECTOR);
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            const float value = left[(8 * k + g) * LEFT_PITCH + r];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
                acc[k][c] = fmaf(value, row[c], acc[k][c]);
        }
    }
}

#if __CUDA_ARCH__ >= 800
/* The same by mma.sync m16n8k8 on tf32, 11 bits: x = high + low + rest, |rest| <= 2^-23 |x|, and
 *
 *     left right = high high + (high low + low high)     + low low and rests, at most 2^-21 of the product, left out
 *
 * In tile j, column n of mma is column (VECTOR / 2) n + j % (VECTOR / 2) of strip group j / (VECTOR / 2): so lane t's 2
 * t and 2 t + 1, of all tiles of a group, are a strip, and what lane g loads of `right` is contiguous too. Small
 * products are added first. */
template <int32_t DTYPE>
static __device__ __forceinline__ void multiply_tensor(float (&acc)[shape<DTYPE>::ROWS][COLUMNS], const float *left,
                                                       const float *right, int ranks, int g, int t)
{
    enum { VECTOR = shape<DTYPE>::VECTOR, ROWS = shape<DTYPE>::ROWS, STRIPS = shape<DTYPE>::STRIPS };
    enum { TILES = WARP_COLUMNS / 8, HALF = VECTOR / 2 };
    const int lane = 4 * g + t;
    const float *fragment =
        left + lane % 16 * LEFT_PITCH + lane / 16 * 4; /* the row of 16 bytes that ldmatrix wants of it */
    for (int r = 0; r < ranks; r += 8) {
        uint32_t high[TILES][2], low[TILES][2];
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
            for (int j = 0; j < TILES; ++j)
                split_tf32(
                    right[(r + 4 * part + t) * RIGHT_PITCH + strip_column<DTYPE>(j / HALF, 0) + HALF * g + j % HALF],
                    &high[j][part], &low[j][part]);
#pragma unroll
        for (int i = 0; i < ROWS; i += 2) {
            float value[4];
            uint32_t left_high[4], left_low[4];
            load_float_matrices(value, fragment + 8 * i * LEFT_PITCH + r);
#pragma unroll
            for (int n = 0; n < 4; ++n)
                split_tf32(value[n], &left_high[n], &left_low[n]);
#pragma unroll
            for (int term = 0; term < 3; ++term)
#pragma unroll
                for (int j = 0; j < TILES; ++j) {
                    const int c = j / HALF * VECTOR + j % HALF;
                    multiply_add_tf32(acc[i][c], acc[i][c + HALF], acc[i + 1][c], acc[i + 1][c + HALF],
                                      term == 0 ? left_low : left_high, term == 1 ? low[j] : high[j]);
                }
        }
    }
}
#endif

/* -------------------------------------------------------------------------------------------------------------
 * strips */

/* A strip as 16 bytes, with zeros beyond `length`. */
template <int32_t DTYPE> static __device__ __forceinline__ uint4 load_strip(const void *from, int length, int aligned)
{
    enum { VECTOR = shape<DTYPE>::VECTOR };
    if (aligned && length == VECTOR) return __ldcs((const uint4 *)from);
    uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
        if (e >= length) continue;
        if (DTYPE == PLORA_F32)
            word[e] = ((const uint32_t *)from)[e];
        else
            word[e / 2] |= (uint32_t)((const uint16_t *)from)[e] << e % 2 * 16;
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
}

template <int32_t DTYPE>
static __device__ __forceinline__ void store_strip(void *to, uint4 strip, int length, int aligned)
{
    enum { VECTOR = shape<DTYPE>::VECTOR };
    if (aligned && length == VECTOR) {
        __stcs((uint4 *)to, strip);
        return;
    }
    const uint32_t word[4] = {strip.x, strip.y, strip.z, strip.w};
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
        if (e >= length) continue;
        if (DTYPE == PLORA_F32)
            ((uint32_t *)to)[e] = word[e];
        else
            ((uint16_t *)to)[e] = (uint16_t)(word[e / 2] >> e % 2 * 16);
    }
}

template <int32_t DTYPE>
static __device__ __forceinline__ void unpack(float (&value)[shape<DTYPE>::VECTOR], uint4 strip)
{
    const uint32_t word[4] = {strip.x, strip.y, strip.z, strip.w};
#pragma unroll
    for (int e = 0; e < shape<DTYPE>::VECTOR; ++e)
        value[e] = DTYPE == PLORA_F32   ? __uint_as_float(word[e])
                   : DTYPE == PLORA_F16 ? f16_to_float(word[e / 2] >> e % 2 * 16 & 0xffffu)
                   : e % 2 == 0         ? bf16_to_float(word[e / 2])
                                        : __uint_as_float(word[e / 2] & 0xffff0000u);
}

template <int32_t DTYPE> static __device__ __forceinline__ uint4 pack(const float (&value)[shape<DTYPE>::VECTOR])
{
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        word[i] = DTYPE == PLORA_F32    ? __float_as_uint(value[i])
                  : DTYPE == PLORA_BF16 ? pack_bf16(value[2 * i], value[2 * i + 1])
                                        : float_to_f16(value[2 * i]) | float_to_f16(value[2 * i + 1]) << 16;
    return make_uint4(word[0], word[1], word[2], word[3]);
}

/* -----------------------------------------------------------------------------------------------------------
 * rounding */

/* The random numbers of 8 elements from this one on, by pairs. */
static __device__ __forceinline__ void draw_strip(uint32_t (&pair)[4], const struct merge_params &p, int64_t element)
{
    const int lead = (int)(element % PLORA__ROUNDING_BLOCK);
    const uint64_t block = (uint64_t)element / PLORA__ROUNDING_BLOCK;
    uint32_t drawn[8] = {}, word[5];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (i == 1 && lead == 0) continue;
        const struct plora__words words =
            plora__draw(p.seed, PLORA__PURPOSE_ROUNDING, p.stage, p.layer, block + (uint64_t)i);
#pragma unroll
        for (int j = 0; j < 4; ++j)
            drawn[4 * i + j] = words.word[j];
    }
#pragma unroll
    for (int i = 0; i < 5; ++i)
        word[i] = lead < 2   ? drawn[i]
                  : lead < 4 ? drawn[i + 1]
                  : lead < 6 ? drawn[i + 2]
                             : drawn[i + 3 < 8 ? i + 3 : 7];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        pair[i] = lead % 2 == 0 ? word[i] : word[i] >> 16 | word[i + 1] << 16;
}

static __device__ __forceinline__ uint16_t half_of(uint4 strip, int e)
{
    const uint32_t word[4] = {strip.x, strip.y, strip.z, strip.w};
    return (uint16_t)(word[e / 2] >> e % 2 * 16);
}

static __device__ __forceinline__ uint4 strip_of(const uint16_t (&half)[8])
{
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        word[i] = half[2 * i] | (uint32_t)half[2 * i + 1] << 16;
    return make_uint4(word[0], word[1], word[2], word[3]);
}

template <int32_t DTYPE> static __device__ __forceinline__ void join_strip(float (&value)[8], uint4 strip, uint4 low)
{
#pragma unroll
    for (int e = 0; e < 8; ++e)
        value[e] = plora__join_residual(half_of(strip, e), half_of(low, e), DTYPE);
}

/* Rounds the values of a strip at (row, column) of W. */
template <int32_t DTYPE>
static __device__ __forceinline__ void round_strip(uint4 &strip, uint4 &low, const float (&value)[8],
                                                   const struct merge_params &p, int64_t row, int64_t column)
{
    uint16_t half[8], rest[8] = {};
    if (p.rounding == PLORA_ROUND_STOCHASTIC) {
        uint32_t pair[4];
        draw_strip(pair, p, p.first_element + row * p.row_elements + column);
#pragma unroll
        for (int e = 0; e < 8; ++e)
            half[e] = plora__round_stochastic(value[e], (uint16_t)(pair[e / 2] >> e % 2 * 16), DTYPE);
    } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
            plora__split_residual(value[e], DTYPE, &half[e], &rest[e]);
    }
    strip = strip_of(half);
    low = strip_of(rest);
}

/* -------------------------------------------------------------------------------------------------------------
 * report */

/* Adds what one strip of `length` elements gives, with d = factor * sum and g = after - before, exact in double.
 * `stored` is what W holds afterwards. */
template <int VECTOR>
static __device__ __forceinline__ void add_report(struct merge_partial &total, const float (&before)[VECTOR],
                                                  const float (&after)[VECTOR], const float (&stored)[VECTOR],
                                                  const float *sum, float factor, int length)
{
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
        if (e >= length) continue;
        const double w = before[e], d = (double)factor * (double)sum[e], g = (double)after[e] - w;
        total.dd = fma(d, d, total.dd);
        total.gd = fma(g, d, total.gd);
        total.ww = fma(w, w, total.ww);
        total.ll = fma(d - g, d - g, total.ll);
        total.lost_max = fmax(total.lost_max, fabs(d - g));
        total.changed += __float_as_uint(before[e]) != __float_as_uint(after[e]);
        total.overflows += is_finite(before[e]) && !is_finite(stored[e]);
    }
}

static __device__ __forceinline__ void write_partial(struct merge_partial *to, const struct merge_partial &total)
{
    const struct merge_partial sum = {block_sum(total.dd),       block_sum(total.gd),      block_sum(total.ww),
                                      block_sum(total.ll),       block_sum(total.changed), block_max(total.lost_max),
                                      block_sum(total.overflows)};
    if (threadIdx.x == 0) *to = sum;
}

/* -------------------------------------------------------------------------------------------------------------
 * kernel */

/* The part of W that a block has, from (row, column) on. */
struct tile {
    int64_t row, column;
    int rows, columns; /* that exist */
};

template <int32_t DTYPE> static __device__ __forceinline__ struct tile this_tile(const struct merge_params &p)
{
    const int64_t row = (int64_t)(blockIdx.x / p.panels) * shape<DTYPE>::TILE_ROWS,
                  column = (int64_t)(blockIdx.x % p.panels) * MERGE_TILE_COLUMNS;
    return {row, column, (int)min(p.rows - row, (int64_t)shape<DTYPE>::TILE_ROWS),
            (int)min(p.columns - column, (int64_t)MERGE_TILE_COLUMNS)};
}

/* One 128-byte line a thread: the whole tile. */
template <int32_t DTYPE>
static __device__ __forceinline__ void prefetch_tile(const struct merge_params &p, const struct tile &tile)
{
    enum { LINE = 128 / shape<DTYPE>::SIZE, LINES = MERGE_TILE_COLUMNS / LINE };
    const int row = threadIdx.x / LINES, column = threadIdx.x % LINES * LINE;
    if (row < tile.rows && column < tile.columns)
        prefetch_l2((const char *)p.weight + ((tile.row + row) * p.stride + tile.column + column) * shape<DTYPE>::SIZE);
}

/* The sums of the tile: both factors pass through shared memory, a slice of CHUNK ranks at a time. */
template <int32_t DTYPE>
static __device__ __forceinline__ void product(float (&acc)[shape<DTYPE>::ROWS][COLUMNS], const struct merge_params &p,
                                               const struct tile &tile, const struct lane &lane)
{
    enum { TILE_ROWS = shape<DTYPE>::TILE_ROWS };
    __shared__ __align__(16) float left[2][TILE_ROWS * LEFT_PITCH], right[2][CHUNK * RIGHT_PITCH];
#pragma unroll
    for (int k = 0; k < shape<DTYPE>::ROWS; ++k)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            acc[k][c] = 0.0f;
    for (int next = 0, r = -CHUNK; r < p.rank; r += CHUNK, next ^= 1) {
        const int ahead = r + CHUNK;
        if (ahead < p.rank) {
            stage<TILE_ROWS, CHUNK, LEFT_PITCH>(left[next],
                                                p.left + tile.row * p.left_row_stride + ahead * p.left_rank_stride,
                                                p.left_row_stride, p.left_rank_stride, tile.rows, p.rank - ahead);
            stage<CHUNK, MERGE_TILE_COLUMNS, RIGHT_PITCH>(
                right[next], p.right + tile.column * p.right_column_stride + ahead * p.right_rank_stride,
                p.right_rank_stride, p.right_column_stride, p.rank - ahead, tile.columns);
        }
        copies_commit();
        if (r < 0) continue;
        copies_wait<1>();
        __syncthreads();
        const float *left_rows = left[next ^ 1] + (lane.row - lane.g) * LEFT_PITCH,
                    *right_columns = right[next ^ 1] + lane.column;
        const int ranks = min(p.rank - r, (int)CHUNK);
#if __CUDA_ARCH__ >= 800
        if (p.rank > shape<DTYPE>::TENSOR_ABOVE)
            multiply_tensor<DTYPE>(acc, left_rows, right_columns, ranks, lane.g, lane.t);
        else
#endif
            multiply_fma<DTYPE>(acc, left_rows, right_columns, ranks, lane.g, lane.t);
        __syncthreads();
    }
}

/* Strip n of a lane, in the tile. */
struct strip_place {
    int row, column, length; /* of it in W */
};

template <int32_t DTYPE>
static __device__ __forceinline__ struct strip_place strip_at(const struct tile &tile, const struct lane &lane, int n)
{
    const int row = lane.row + 8 * (n / shape<DTYPE>::STRIPS),
              column = lane.column + strip_column<DTYPE>(n % shape<DTYPE>::STRIPS, lane.t);
    return {row, column, row < tile.rows ? min(max(tile.columns - column, 0), (int)shape<DTYPE>::VECTOR) : 0};
}

template <int32_t DTYPE>
static __device__ __forceinline__ char *weight_at(const struct merge_params &p, int64_t row, int64_t column)
{
    return (char *)p.weight + (row * p.stride + column) * shape<DTYPE>::SIZE;
}

/* Adds its sums to a strip at (row, column) of W, which has been read: rounds, reports, writes. */
template <int32_t DTYPE, bool REPORT, bool ROUNDED>
static __device__ __forceinline__ void merge_strip(struct merge_partial &total, const struct merge_params &p,
                                                   uint4 strip, int64_t row, int64_t column, int length,
                                                   const float *sum)
{
    enum { VECTOR = shape<DTYPE>::VECTOR };
    const int residual = ROUNDED && p.rounding == PLORA_ROUND_RESIDUAL;
    uint16_t *const low_place = p.residual + row * p.residual_stride + column;
    uint4 low = make_uint4(0, 0, 0, 0);
    float before[VECTOR], after[VECTOR], stored[VECTOR];
    unpack<DTYPE>(before, strip);
    if constexpr (ROUNDED) {
        if (residual) {
            low = load_strip<DTYPE>(low_place, length, p.aligned);
            join_strip<DTYPE>(before, strip, low);
        }
    }
#pragma unroll
    for (int e = 0; e < VECTOR; ++e)
        after[e] = fmaf(p.factor, sum[e], before[e]);
    if constexpr (ROUNDED)
        round_strip<DTYPE>(strip, low, after, p, row, column);
    else
        strip = pack<DTYPE>(after);
    if (REPORT) {
        unpack<DTYPE>(stored, strip);
        unpack<DTYPE>(after, strip);
        if constexpr (ROUNDED)
            if (residual) join_strip<DTYPE>(after, strip, low);
        add_report(total, before, after, stored, sum, p.factor, length);
        if (p.trial) return;
    }
    store_strip<DTYPE>(weight_at<DTYPE>(p, row, column), strip, length, p.aligned);
    if (residual) store_strip<DTYPE>(low_place, low, length, p.aligned);
}

/* All strips of a lane, some at a time: as many are in flight as there are registers for. */
template <int32_t DTYPE, bool REPORT>
static __device__ __forceinline__ void merge_strips(struct merge_partial &total, const struct merge_params &p,
                                                    const float (&acc)[shape<DTYPE>::ROWS][COLUMNS],
                                                    const struct tile &tile, const struct lane &lane)
{
    enum { VECTOR = shape<DTYPE>::VECTOR, STRIPS = shape<DTYPE>::STRIPS, BATCH = REPORT ? 1 : 4 };
#pragma unroll
    for (int batch = 0; batch < shape<DTYPE>::ROWS * STRIPS; batch += BATCH) {
        uint4 strips[BATCH];
#pragma unroll
        for (int n = 0; n < BATCH; ++n) {
            const struct strip_place at = strip_at<DTYPE>(tile, lane, batch + n);
            strips[n] = load_strip<DTYPE>(weight_at<DTYPE>(p, tile.row + at.row, tile.column + at.column), at.length,
                                          p.aligned);
        }
#pragma unroll
        for (int n = 0; n < BATCH; ++n) {
            const struct strip_place at = strip_at<DTYPE>(tile, lane, batch + n);
            merge_strip<DTYPE, REPORT, false>(total, p, strips[n], tile.row + at.row, tile.column + at.column,
                                              at.length, acc[(batch + n) / STRIPS] + (batch + n) % STRIPS * VECTOR);
        }
    }
}

/* The same one after the other, where a lane has one in each row, and its rounding is long: the sums move along. */
template <int32_t DTYPE, bool REPORT>
static __device__ __forceinline__ void merge_strips_rounded(struct merge_partial &total, const struct merge_params &p,
                                                            float (&acc)[shape<DTYPE>::ROWS][COLUMNS],
                                                            const struct tile &tile, const struct lane &lane)
{
#pragma unroll 1
    for (int n = 0; n < shape<DTYPE>::ROWS; ++n) {
        const struct strip_place at = strip_at<DTYPE>(tile, lane, n);
        const int64_t row = tile.row + at.row, column = tile.column + at.column;
        const uint4 strip = load_strip<DTYPE>(weight_at<DTYPE>(p, row, column), at.length, p.aligned);
        merge_strip<DTYPE, REPORT, true>(total, p, strip, row, column, at.length, acc[0]);
#pragma unroll
        for (int k = 1; k < shape<DTYPE>::ROWS; ++k)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
                acc[k - 1][c] = acc[k][c];
    }
}

template <int32_t DTYPE, bool REPORT, bool ROUNDED>
static __device__ __forceinline__ void merge(const struct merge_params &p)
{
    const struct tile tile = this_tile<DTYPE>(p);
    const struct lane lane = this_lane<DTYPE>();
    prefetch_tile<DTYPE>(p, tile);
    float acc[shape<DTYPE>::ROWS][COLUMNS];
    product<DTYPE>(acc, p, tile, lane);
    struct merge_partial total = {};
    if constexpr (ROUNDED)
        merge_strips_rounded<DTYPE, REPORT>(total, p, acc, tile, lane);
    else
        merge_strips<DTYPE, REPORT>(total, p, acc, tile, lane);
    if (REPORT) write_partial(p.partials + blockIdx.x, total);
}

/* Grid: one block a tile, tiles of a row of W side by side. Block: 256 threads. Shared memory: static, 37 KiB (f32: 27
 * KiB). Bytes of an element: 2 SIZE from and to memory, and 4 R (1 / 128 + 1 / TILE_ROWS) of the factors, from L2. A
 * report adds its partial sums, a residual 2 bytes read and 2 written. */
#define MERGE_KERNEL(name, dtype, report, rounded)                                                                     \
    extern "C" __global__ void __launch_bounds__(MERGE_THREADS, (report) && (rounded) ? 1 : 2)                         \
        name(const __grid_constant__ struct merge_params p)                                                            \
    {                                                                                                                  \
        merge<dtype, report, rounded>(p);                                                                              \
    }

MERGE_KERNEL(merge_f32_kernel, PLORA_F32, false, false)
MERGE_KERNEL(merge_bf16_kernel, PLORA_BF16, false, false)
MERGE_KERNEL(merge_f16_kernel, PLORA_F16, false, false)
MERGE_KERNEL(merge_report_f32_kernel, PLORA_F32, true, false)
MERGE_KERNEL(merge_report_bf16_kernel, PLORA_BF16, true, false)
MERGE_KERNEL(merge_report_f16_kernel, PLORA_F16, true, false)
MERGE_KERNEL(merge_rounded_bf16_kernel, PLORA_BF16, false, true)
MERGE_KERNEL(merge_rounded_f16_kernel, PLORA_F16, false, true)
MERGE_KERNEL(merge_rounded_report_bf16_kernel, PLORA_BF16, true, true)
MERGE_KERNEL(merge_rounded_report_f16_kernel, PLORA_F16, true, true)
