/* batch.cu: many adapters in one batch: y[t] += s (x[t] A^T) B^T, the adapter of each token from a list of segments.
 *
 * A block works on a tile of at most 64 tokens of one segment; plora__batch_cut() has numbered them. It reads the rows
 * of x and y where they lie, and A and B as they are, in fp32:
 *
 *     list of tokens   | segment 0                      | 1    | 2 (slot -1) | 3            |
 *     tiles            | 0            | 1               | 2    |             | 3            |
 *
 * A launch covers all segments, with a grid for the largest rank: blocks beyond the rank of their slot end at once.
 * shrink cuts the sum over K in parts of BATCH_SPLIT columns, so that few tokens fill the machine too; expand adds the
 * parts in their order. Every token's sums are formed in the same order whatever else is in the batch. */
#include "backend.h"
#include "cuda_common.cuh"

/* Where a block stands. */
struct batch_place {
    struct plora__batch_slot slot;
    int64_t first; /* its first token in the list */
    int count;     /* of its tokens, at most PLORA__BATCH_TILE */
    int ranks;     /* of the slot, rounded up to LINEAR_RANK_PAD */
};

static __device__ __forceinline__ struct batch_place batch_locate(const struct batch_params &p, uint32_t tile)
{
    const struct plora__batch_segment segment = p.segments[plora__batch_find(p.segments, p.segment_count, (int)tile)];
    const int begin = ((int)tile - segment.tile) * PLORA__BATCH_TILE, left = segment.count - begin;
    struct batch_place place;
    place.slot = p.adapters[segment.slot][p.weight];
    place.first = (int64_t)segment.first + begin;
    place.count = left < PLORA__BATCH_TILE ? left : PLORA__BATCH_TILE;
    place.ranks = (place.slot.rank + LINEAR_RANK_PAD - 1) / LINEAR_RANK_PAD * LINEAR_RANK_PAD;
    return place;
}

/* The row of x and y of a token of the tile, -1 behind its end. */
static __device__ __forceinline__ int batch_row(const struct batch_params &p, const struct batch_place &place,
                                                int token)
{
    if (token >= place.count) return -1;
    return p.list != NULL ? p.list[place.first + token] : (int)place.first + token;
}

/* Rows of an fp32 matrix may be read four numbers at a time. */
static __device__ __forceinline__ int batch_aligned(const float *data, int64_t stride)
{
    return (uint64_t)data % 16 == 0 && stride % 4 == 0;
}

/* Numbers of A[R,K] from (rank, column) on, of B[N,R] from (column, rank) on; zeros outside. */
static __device__ __forceinline__ float4 batch_a(const struct batch_params &p, const struct batch_place &place,
                                                 int aligned, int rank, int64_t column)
{
    return load_four(place.slot.a, rank * p.in_features + column, PLORA_F32, aligned,
                     rank < place.slot.rank ? p.in_features - column : 0);
}

static __device__ __forceinline__ float4 batch_b(const struct batch_params &p, const struct batch_place &place,
                                                 int aligned, int64_t column, int rank)
{
    return load_four(place.slot.b, column * place.slot.rank + rank, PLORA_F32, aligned,
                     column < p.out_features ? place.slot.rank - rank : 0);
}

/* s times the sum of the parts, of four ranks of a token of the list. */
static __device__ __forceinline__ float4 batch_low(const struct batch_params &p, const struct batch_place &place,
                                                   int token, int rank)
{
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (token >= place.count || rank >= place.ranks) return sum;
    const float *part = p.low + (place.first + token) * p.low_stride + rank;
#pragma unroll 4
    for (int split = 0; split < p.splits; ++split, part += p.tokens * p.low_stride)
        add_four(sum, *(const float4 *)part);
    return make_float4(sum.x * place.slot.scale, sum.y * place.slot.scale, sum.z * place.slot.scale,
                       sum.w * place.slot.scale);
}

/* ------------------------------------------------------------------------------------------------------------- fp32 */

/* Grid: tiles * ceil(low_stride / 32) * splits blocks of 256 threads; thread (rank % 16, token / 4) of a block sums 4
 * tokens x 2 ranks. Shared: 27 KB, two stages of x[64][32] and A[32][32], rows padded by 16 bytes against bank
 * conflicts; the next stage is on its way in registers while one is multiplied. Reads 4 (bf16: 2) bytes of each element
 * of x for every 32 ranks, 4 bytes of each of A for every tile of its segment. */
struct batch_stage {
    float4 x[PLORA__BATCH_TILE][LINEAR_FMA_STEP / 4 + 1];
    float4 a[LINEAR_FMA_RANKS][LINEAR_FMA_STEP / 4 + 1];
};

struct batch_registers {
    float4 x[2], a;
};

extern "C" __global__ void __launch_bounds__(LINEAR_FMA_THREADS, 2)
    batch_shrink_f32_kernel(const __grid_constant__ struct batch_params p)
{
    __shared__ struct batch_stage stages[2];
    const uint32_t rank_tiles = (uint32_t)(p.low_stride + LINEAR_FMA_RANKS - 1) / LINEAR_FMA_RANKS;
    const int first_rank = (int)(blockIdx.x % rank_tiles) * LINEAR_FMA_RANKS;
    const struct batch_place place = batch_locate(p, blockIdx.x / rank_tiles % (uint32_t)p.tiles);
    const uint32_t split = blockIdx.x / rank_tiles / (uint32_t)p.tiles;
    if (first_rank >= place.ranks) return;
    const int64_t begin = (int64_t)split * BATCH_SPLIT;
    const int64_t end = begin + BATCH_SPLIT < p.in_features ? begin + BATCH_SPLIT : p.in_features;
    const int line = (int)threadIdx.x / 8, chunk = (int)threadIdx.x % 8;
    const int rows[2] = {batch_row(p, place, line), batch_row(p, place, line + 32)};
    const int a_aligned = batch_aligned(place.slot.a, p.in_features);
    const int own_rank = (int)threadIdx.x % 16, own_token = (int)threadIdx.x / 16 * 4;
    const bool works = own_token < place.count, both = first_rank + 16 < place.ranks;
    float sums[2][4] = {};
    struct batch_registers next = {};
    int at = 0;
    for (int64_t column = begin - LINEAR_FMA_STEP; column < end; column += LINEAR_FMA_STEP) {
        const int64_t from = column + LINEAR_FMA_STEP + 4 * chunk;
        if (column >= begin) {
            stages[at].x[line][chunk] = next.x[0];
            stages[at].x[line + 32][chunk] = next.x[1];
            stages[at].a[line][chunk] = next.a;
            __syncthreads(); /* one is enough: who is here has read the other stage */
        }
        if (column + LINEAR_FMA_STEP < end) {
#pragma unroll
            for (int i = 0; i < 2; ++i)
                next.x[i] = load_four(p.x, rows[i] * p.x_stride + from, p.x_dtype, p.x_aligned,
                                      rows[i] >= 0 ? p.in_features - from : 0);
            next.a = batch_a(p, place, a_aligned, first_rank + line, from);
        }
        if (column < begin) continue;
        const struct batch_stage &stage = stages[at];
        at ^= 1;
        if (!works) continue;
#pragma unroll
        for (int k = 0; k < LINEAR_FMA_STEP / 4; ++k) {
            const float4 low = stage.a[own_rank][k], high = stage.a[own_rank + 16][k];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float4 x = stage.x[own_token + i][k];
                dot_four(sums[0][i], x, low);
                if (both) dot_four(sums[1][i], x, high);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (own_token + i >= place.count) break;
        float *low = p.low + (split * p.tokens + place.first + own_token + i) * p.low_stride + first_rank + own_rank;
        low[0] = sums[0][i];
        if (both) low[16] = sums[1][i];
    }
}

/* Grid: tiles * ceil(N / 64) blocks of 256 threads; thread (column / 4, token / 4) of a block computes 4 tokens x 4
 * columns. Shared: 9 KB, low[64][16] and B^T[16][64], 16 ranks at a time. Reads and writes each element of y once, in
 * runs of 4; reads 4 bytes of each of B for every tile of its segment, and low for every 64 columns. */
struct batch_expand_stage {
    float4 low[PLORA__BATCH_TILE][LINEAR_RANK_PAD / 4 + 1];
    float4 factor[LINEAR_RANK_PAD][LINEAR_TILE / 4];
};

extern "C" __global__ void __launch_bounds__(LINEAR_FMA_THREADS)
    batch_expand_f32_kernel(const __grid_constant__ struct batch_params p)
{
    __shared__ struct batch_expand_stage stage;
    const uint32_t across = (uint32_t)((p.out_features + LINEAR_TILE - 1) / LINEAR_TILE);
    const struct batch_place place = batch_locate(p, blockIdx.x / across);
    const int64_t first_column = (int64_t)(blockIdx.x % across) * LINEAR_TILE;
    const int b_aligned = batch_aligned(place.slot.b, place.slot.rank);
    const int column4 = (int)threadIdx.x % 16, own_token = (int)threadIdx.x / 16 * 4;
    const int b_column = (int)threadIdx.x % LINEAR_TILE, b_rank = (int)threadIdx.x / LINEAR_TILE * 4;
    if (place.slot.rank <= 0) return;
    float4 sums[4] = {};
    for (int rank = 0; rank < place.ranks; rank += LINEAR_RANK_PAD) {
        if (rank > 0) __syncthreads();
        stage.low[threadIdx.x / 4][threadIdx.x % 4] =
            batch_low(p, place, (int)threadIdx.x / 4, rank + (int)threadIdx.x % 4 * 4);
        const float4 b = batch_b(p, place, b_aligned, first_column + b_column, rank + b_rank);
        float *factor = (float *)stage.factor[b_rank] + b_column;
        factor[0] = b.x;
        factor[LINEAR_TILE] = b.y;
        factor[2 * LINEAR_TILE] = b.z;
        factor[3 * LINEAR_TILE] = b.w;
        __syncthreads();
        if (own_token >= place.count) continue;
#pragma unroll
        for (int r = 0; r < LINEAR_RANK_PAD / 4; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float4 low = stage.low[own_token + i][r];
                multiply_four(sums[i], low.x, stage.factor[4 * r][column4]);
                multiply_four(sums[i], low.y, stage.factor[4 * r + 1][column4]);
                multiply_four(sums[i], low.z, stage.factor[4 * r + 2][column4]);
                multiply_four(sums[i], low.w, stage.factor[4 * r + 3][column4]);
            }
    }
    const int64_t column = first_column + 4 * column4, valid = p.out_features - column;
    if (valid <= 0) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int64_t row = batch_row(p, place, own_token + i);
        if (row < 0) break;
        float4 y = load_four(p.y, row * p.y_stride + column, p.y_dtype, p.y_aligned, valid);
        add_four(y, sums[i]);
        store_four(p.y, row * p.y_stride + column, p.y_dtype, p.y_aligned, valid, y);
    }
}

/* ------------------------------------------------------------------------------------------------------------- bf16 */

#if __CUDA_ARCH__ >= 800
/* What a thread owns of a tile: the chunks of number threadIdx.x % 8 of four rows, 16 apart. */
enum { BATCH_OWN_ROWS = 4 };

struct batch_rows {
    int row[BATCH_OWN_ROWS]; /* of x and y, or -1 */
};

static __device__ __forceinline__ struct batch_rows batch_own_rows(const struct batch_params &p,
                                                                   const struct batch_place &place)
{
    struct batch_rows own;
#pragma unroll
    for (int i = 0; i < BATCH_OWN_ROWS; ++i)
        own.row[i] = batch_row(p, place, (int)threadIdx.x / 8 + 16 * i);
    return own;
}

/* Starts to fill a tile with the tokens' rows, from a column on; zeros outside. */
static __device__ __forceinline__ void batch_fill(struct bf16_tile *tile, const struct batch_rows &own,
                                                  const void *data, int64_t stride, int aligned, int64_t column,
                                                  int64_t columns)
{
    const int chunk = (int)threadIdx.x % 8;
    const int64_t from = column + 8 * chunk, valid = columns - from;
#pragma unroll
    for (int i = 0; i < BATCH_OWN_ROWS; ++i) {
        uint4 *place = &tile->chunks[chunk_place((int)threadIdx.x / 8 + 16 * i, chunk)];
        const uint16_t *source = (const uint16_t *)data + own.row[i] * stride + from;
        if (own.row[i] >= 0 && aligned && valid >= 8)
            copy_chunk(place, source);
        else
            *place = gather_chunk(source, own.row[i] >= 0 ? valid : 0);
    }
}

static __device__ __forceinline__ uint4 batch_pack(float4 first, float4 second)
{
    return make_uint4(pack_bf16(first.x, first.y), pack_bf16(first.z, first.w), pack_bf16(second.x, second.y),
                      pack_bf16(second.z, second.w));
}

/* The thread's chunks of a tile of A, on their way: `ranks` rows from first_rank on, 64 columns from `column` on. */
struct batch_factor {
    uint4 chunks[BATCH_OWN_ROWS];
};

static __device__ __forceinline__ void batch_load_a(struct batch_factor &next, const struct batch_params &p,
                                                    const struct batch_place &place, int aligned, int first_rank,
                                                    int ranks, int64_t column)
{
#pragma unroll
    for (int i = 0; i < BATCH_OWN_ROWS; ++i) {
        const int row = (int)threadIdx.x / 8 + 16 * i;
        const int64_t from = column + threadIdx.x % 8 * 8;
        if (16 * i >= ranks) break;
        next.chunks[i] = batch_pack(batch_a(p, place, aligned, first_rank + row, from),
                                    batch_a(p, place, aligned, first_rank + row, from + 4));
    }
}

static __device__ __forceinline__ void batch_store_a(struct bf16_tile *tile, const struct batch_factor &next, int ranks)
{
#pragma unroll
    for (int i = 0; i < BATCH_OWN_ROWS; ++i) {
        if (16 * i >= ranks) break;
        tile->chunks[chunk_place((int)threadIdx.x / 8 + 16 * i, (int)threadIdx.x % 8)] = next.chunks[i];
    }
}
#endif

/* Grid: tiles * ceil(low_stride / 64) * splits blocks of 4 warps, each of which sums 16 tokens x 64 ranks by mma.sync;
 * those without tokens only fill. Shared: 32 KB, two stages of a tile of x and a tile of A; x comes by cp.async, A
 * through registers, where it is rounded. Reads 2 bytes of each element of x for every 64 ranks, 4 bytes of each of A
 * for every tile of its segment. */
extern "C" __global__ void __launch_bounds__(LINEAR_TILE_THREADS, 4)
    batch_shrink_bf16_kernel(const __grid_constant__ struct batch_params p)
{
#if __CUDA_ARCH__ >= 800
    __shared__ struct bf16_tile x_tiles[2], a_tiles[2];
    const uint32_t rank_tiles = (uint32_t)(p.low_stride + LINEAR_TILE - 1) / LINEAR_TILE;
    const int first_rank = (int)(blockIdx.x % rank_tiles) * LINEAR_TILE;
    const struct batch_place place = batch_locate(p, blockIdx.x / rank_tiles % (uint32_t)p.tiles);
    const uint32_t split = blockIdx.x / rank_tiles / (uint32_t)p.tiles;
    if (first_rank >= place.ranks) return;
    const int ranks = place.ranks - first_rank < LINEAR_TILE ? place.ranks - first_rank : LINEAR_TILE;
    const int64_t begin = (int64_t)split * BATCH_SPLIT;
    const int64_t end = begin + BATCH_SPLIT < p.in_features ? begin + BATCH_SPLIT : p.in_features;
    const struct batch_rows own = batch_own_rows(p, place);
    const int a_aligned = batch_aligned(place.slot.a, p.in_features);
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    float sums[8][4] = {};
    struct batch_factor next;
    batch_fill(&x_tiles[0], own, p.x, p.x_stride, p.x_aligned, begin, p.in_features);
    copies_commit();
    batch_load_a(next, p, place, a_aligned, first_rank, ranks, begin);
    int at = 0;
    for (int64_t column = begin; column < end; column += LINEAR_TILE, at ^= 1) {
        batch_store_a(&a_tiles[at], next, ranks);
        copies_wait<0>();
        __syncthreads(); /* this stage is filled, and the other one has been read */
        if (column + LINEAR_TILE < end) {
            batch_fill(&x_tiles[at ^ 1], own, p.x, p.x_stride, p.x_aligned, column + LINEAR_TILE, p.in_features);
            batch_load_a(next, p, place, a_aligned, first_rank, ranks, column + LINEAR_TILE);
        }
        copies_commit();
        if (16 * warp < place.count)
            tile_multiply<false, false>(sums, &x_tiles[at], &a_tiles[at], ranks / 16, LINEAR_TILE / 16);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int token = 16 * warp + 8 * half + lane / 4;
        if (token >= place.count) break;
        float *low = p.low + (split * p.tokens + place.first + token) * p.low_stride + first_rank + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 8; ++n)
            if (8 * n < ranks) *(float2 *)(low + 8 * n) = make_float2(sums[n][2 * half], sums[n][2 * half + 1]);
    }
#else
    unreachable();
#endif
}

/* Grid: tiles * ceil(N / 64) blocks of 4 warps, each of which computes 16 tokens x 64 columns by mma.sync, 64 ranks at
 * a time. Shared: 24 KB, a tile each of y, low and B. The tile of y comes by cp.async and goes in chunks of 16 bytes: 2
 * bytes read and 2 written for each element. Reads 4 bytes of each element of B for every tile of its segment, and low
 * for every 64 columns. */
extern "C" __global__ void __launch_bounds__(LINEAR_TILE_THREADS, 4)
    batch_expand_bf16_kernel(const __grid_constant__ struct batch_params p)
{
#if __CUDA_ARCH__ >= 800
    __shared__ struct bf16_tile y_tile, low_tile, b_tile;
    const uint32_t across = (uint32_t)((p.out_features + LINEAR_TILE - 1) / LINEAR_TILE);
    const struct batch_place place = batch_locate(p, blockIdx.x / across);
    const int64_t first_column = (int64_t)(blockIdx.x % across) * LINEAR_TILE;
    if (place.slot.rank <= 0) return;
    const struct batch_rows own = batch_own_rows(p, place);
    const int b_aligned = batch_aligned(place.slot.b, place.slot.rank);
    const int warp = (int)threadIdx.x / 32, chunk = (int)threadIdx.x % 8;
    float sums[8][4] = {};
    batch_fill(&y_tile, own, p.y, p.y_stride, p.y_aligned, first_column, p.out_features);
    copies_commit();
    for (int rank = 0; rank < place.ranks; rank += LINEAR_TILE) {
        const int ranks = place.ranks - rank < LINEAR_TILE ? place.ranks - rank : LINEAR_TILE;
        if (rank > 0) __syncthreads();
        if (8 * chunk < ranks) {
#pragma unroll 2
            for (int i = 0; i < BATCH_OWN_ROWS; ++i) {
                const int row = (int)threadIdx.x / 8 + 16 * i, from = rank + 8 * chunk;
                const int to = chunk_place(row, chunk);
                low_tile.chunks[to] = batch_pack(batch_low(p, place, row, from), batch_low(p, place, row, from + 4));
                b_tile.chunks[to] = batch_pack(batch_b(p, place, b_aligned, first_column + row, from),
                                               batch_b(p, place, b_aligned, first_column + row, from + 4));
            }
        }
        __syncthreads();
        if (16 * warp < place.count)
            tile_multiply<false, false>(sums, &low_tile, &b_tile, LINEAR_TILE / 16, ranks / 16);
    }
    copies_wait<0>();
    __syncthreads();
    tile_add(&y_tile, sums, 1);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < BATCH_OWN_ROWS; ++i) {
        const int64_t row = batch_row(p, place, (int)threadIdx.x / 8 + 16 * i), column = first_column + 8 * chunk;
        if (row < 0) break;
        scatter_chunk((uint16_t *)p.y + row * p.y_stride + column,
                      y_tile.chunks[chunk_place((int)threadIdx.x / 8 + 16 * i, chunk)], p.out_features - column,
                      p.y_aligned);
    }
#else
    unreachable();
#endif
}

/* Grid: 1 block of 256 threads: words that came as arguments go to where others read them, on the stream and without a wait. */
extern "C" __global__ void __launch_bounds__(BATCH_WRITE_THREADS) batch_write_kernel(const __grid_constant__ struct batch_write_params p)
{
    for (int32_t i = (int32_t)threadIdx.x; i < p.count; i += BATCH_WRITE_THREADS)
        p.to[i] = p.words[i];
}
