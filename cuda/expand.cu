/* expand.cu: from the low rank back to the wide side, in one pass over the output, which is rounded once.
 *
 *     y[T,N]  = base + bias + u[T,R] B^T         dx[T,K] = base + drop'(v[T,R] A)         base + low[T,R] factor[R,O]
 *
 * base is what `out` holds (the product of cuBLAS, or the host's own), or an fp32 sum where the product must not be rounded before the
 * rest is added, or both. Without a low-rank part this rounds a sum and adds a bias. */
#include "cuda_common.cuh"

/* Where a block stands: its first token and its first column, of 64. */
struct expand_place {
    int64_t token, column;
};

static __device__ __forceinline__ struct expand_place expand_locate(const struct expand_params &p, int tokens)
{
    const uint32_t across = (uint32_t)((p.columns + LINEAR_TILE - 1) / LINEAR_TILE);
    struct expand_place place;
    place.token = (int64_t)(blockIdx.x / across) * tokens;
    place.column = (int64_t)(blockIdx.x % across) * LINEAR_TILE;
    return place;
}

static __device__ __forceinline__ uint32_t expand_keep_bits(const struct expand_params &p, int64_t token,
                                                            int64_t column, int count)
{
    return keep_bits(p.dropout, dropout_element(p.dropout, token, p.first_column + column), count);
}

/* ---------------------------------------------------------------------------------------------------------------- fp32 */

/* Grid: ceil(T / 64) * ceil(O / 64) blocks of 256 threads; thread (column / 4, token / 4) of a block computes 4 tokens x 4 columns.
 * Shared: 9 KB, low[64][16] and factor[16][64], 16 ranks at a time. Reads and writes each element of `out` once, in runs of 4; reads
 * 4 bytes of `sum` where there is one, and from L2 R / 16 each of low and of the factor. `out` may be fp32 or bf16. */
struct expand_stage {
    float4 low[LINEAR_TILE][LINEAR_RANK_PAD / 4 + 1];
    float4 factor[LINEAR_RANK_PAD][LINEAR_TILE / 4];
};

static __device__ __forceinline__ void expand_load(struct expand_stage &stage, const struct expand_params &p,
                                                   const struct expand_place &place, int rank)
{
    const int64_t token = place.token + threadIdx.x / 4;
    const int place4 = (int)threadIdx.x % 4;
    stage.low[threadIdx.x / 4][place4] =
        load_four(p.low, token * p.padded_rank + rank + 4 * place4, PLORA_F32, 1, token < p.tokens ? 4 : 0);
    const int row = (int)threadIdx.x / 16, column4 = (int)threadIdx.x % 16;
    stage.factor[row][column4] =
        load_four(p.factor, (rank + row) * p.factor_stride + place.column + 4 * column4, PLORA_F32, 1, 4);
}

extern "C" __global__ void __launch_bounds__(LINEAR_FMA_THREADS)
    expand_f32_kernel(const __grid_constant__ struct expand_params p)
{
    __shared__ struct expand_stage stage;
    const struct expand_place place = expand_locate(p, LINEAR_TILE);
    const int column4 = (int)threadIdx.x % 16, own_token = (int)threadIdx.x / 16 * 4;
    float4 sums[4] = {};
    for (int rank = 0; rank < p.padded_rank; rank += LINEAR_RANK_PAD) {
        if (rank > 0) __syncthreads();
        expand_load(stage, p, place, rank);
        __syncthreads();
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
    const int64_t column = place.column + 4 * column4, valid = p.columns - column;
    if (valid <= 0) return;
    float4 bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (p.bias != NULL) bias = load_four(p.bias, column, p.bias_dtype, 0, valid);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int64_t token = place.token + own_token + i;
        if (token >= p.tokens) break;
        float4 base = bias;
        if (p.sum != NULL) add_four(base, load_four(p.sum, token * p.sum_stride + column, PLORA_F32, 1, valid));
        if (p.keep_out) add_four(base, load_four(p.out, token * p.stride + column, p.dtype, p.aligned, valid));
        if (p.drop) drop_four(sums[i], expand_keep_bits(p, token, column, 4), p.dropout.scale);
        add_four(base, sums[i]);
        store_four(p.out, token * p.stride + column, p.dtype, p.aligned, valid, base);
    }
}

/* ---------------------------------------------------------------------------------------------------------------- bf16 */

/* Grid: ceil(T / 128) * ceil(O / 64) blocks of 4 warps, each of which computes 2 x 16 tokens x 64 columns by mma.sync, 64 ranks at a
 * time. Shared: 41 KB, two tiles each of `out` and low and one of the factor, which come by cp.async, and the kept elements of the
 * dropout, a bit each. `out` is read and written in chunks of 16 bytes. Of each element: 2 bytes read and 2 written, 4 read of `sum`
 * where there is one, and from L2 R / 32 of low and R / 64 of the factor. `out` is bf16. Precision as in shrink.cu.
 *
 * The functions below work on one of the two tiles, from `place` on. */
#if __CUDA_ARCH__ >= 800
/* Tile i of a block of several. */
static __device__ __forceinline__ struct expand_place expand_tile(const struct expand_place &first, int i)
{
    return {first.token + i * LINEAR_TILE, first.column};
}

/* The thread's sums += sum + bias. */
static __device__ __forceinline__ void expand_base(float (&sums)[8][4], const struct expand_params &p,
                                                   const struct expand_place &place)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int64_t column = place.column + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t token = place.token + 16 * warp + 8 * half + lane / 4;
        if (token >= p.tokens) break;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const bool pair = column + 8 * n + 1 < p.columns;
            float *const own = &sums[n][2 * half];
            if (column + 8 * n >= p.columns) break;
            if (p.sum != NULL) {
                const float *sum = p.sum + token * p.sum_stride + column + 8 * n; /* aligned to a pair */
                const float2 terms = pair ? *(const float2 *)sum : make_float2(*sum, 0.0f);
                own[0] += terms.x;
                own[1] += terms.y;
            }
            if (p.bias != NULL) {
                own[0] += load_number(p.bias, column + 8 * n, p.bias_dtype);
                if (pair) own[1] += load_number(p.bias, column + 8 * n + 1, p.bias_dtype);
            }
        }
    }
}

/* Bit i of keep[64 tokens][8]: the element of column 8 c + i is kept. */
static __device__ __forceinline__ void expand_draw(unsigned char *keep, const struct expand_params &p,
                                                   const struct expand_place &place)
{
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
        const int own = (int)threadIdx.x + i * LINEAR_TILE_THREADS;
        const int64_t token = place.token + own / 8, column = place.column + own % 8 * 8;
        if (token < p.tokens && column < p.columns)
            keep[own] = (unsigned char)expand_keep_bits(p, token, column, 8);
        else
            keep[own] = 0;
    }
}

/* The thread's sums after dropout. */
static __device__ __forceinline__ void expand_drop(float (&sums)[8][4], const unsigned char *keep, float scale)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned char *bits = &keep[(16 * warp + lane / 4 + i / 2 * 8) * 8];
#pragma unroll
        for (int n = 0; n < 8; ++n)
            sums[n][i] *= bits[n] >> (lane % 4 * 2 + i % 2) & 1 ? scale : 0.0f;
    }
}

static __device__ __forceinline__ void expand_write(const struct bf16_tile *tile, const struct expand_params &p,
                                                    const struct expand_place &place)
{
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
        const int own = (int)threadIdx.x + i * LINEAR_TILE_THREADS;
        const int64_t token = place.token + own / 8, column = place.column + own % 8 * 8;
        if (token >= p.tokens) break;
        scatter_chunk((uint16_t *)p.out + token * p.stride + column, tile->chunks[chunk_place(own / 8, own % 8)],
                      p.columns - column, p.aligned);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(LINEAR_TILE_THREADS, 4)
    expand_bf16_kernel(const __grid_constant__ struct expand_params p)
{
#if __CUDA_ARCH__ >= 800
    enum { TILES = LINEAR_BLOCK / LINEAR_TILE };
    __shared__ struct bf16_tile out_tiles[TILES], low_tiles[TILES], factor_tile;
    __shared__ unsigned char keep[TILES][LINEAR_TILE * 8];
    const struct expand_place place = expand_locate(p, LINEAR_BLOCK);
    const struct tile_source out = {(const uint16_t *)p.out, p.stride, p.tokens, p.columns, p.aligned};
    const struct tile_source low = {(const uint16_t *)p.low, p.padded_rank, p.tokens, p.padded_rank, 1};
    const struct tile_source factor = {(const uint16_t *)p.factor, p.factor_stride, p.padded_rank, p.factor_stride, 1};
    float sums[TILES][8][4] = {};
#pragma unroll 1
    for (int i = 0; i < TILES && p.keep_out; ++i)
        tile_fill(&out_tiles[i], out, place.token + i * LINEAR_TILE, place.column, LINEAR_TILE);
    for (int rank = 0; rank < p.padded_rank; rank += LINEAR_TILE) {
        const int ranks = p.padded_rank - rank < LINEAR_TILE ? p.padded_rank - rank : LINEAR_TILE;
        if (rank > 0) __syncthreads();
#pragma unroll 1
        for (int i = 0; i < TILES; ++i)
            tile_fill(&low_tiles[i], low, place.token + i * LINEAR_TILE, rank, LINEAR_TILE);
        tile_fill(&factor_tile, factor, rank, place.column, ranks);
        copies_commit();
#pragma unroll 1
        for (int i = 0; i < TILES && p.drop && rank == 0; ++i)
            expand_draw(keep[i], p, expand_tile(place, i));
        copies_wait<0>();
        __syncthreads();
        tile_multiply<false, true>(sums, low_tiles, &factor_tile, LINEAR_TILE / 16, ranks / 16);
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        if (p.drop) expand_drop(sums[i], keep[i], p.dropout.scale);
        if (p.sum != NULL || p.bias != NULL) expand_base(sums[i], p, expand_tile(place, i));
        tile_add(&out_tiles[i], sums[i], p.keep_out);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < TILES; ++i)
        expand_write(&out_tiles[i], p, expand_tile(place, i));
#else
    unreachable();
#endif
}
