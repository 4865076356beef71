/* gradient.cu: the gradients of A and B, sums over the tokens, with dropout drawn on the way.
 *
 *     dA[R,K] += v^T drop(x)[T,K]         dB[N,R] += dy^T u, as its transpose         both as  low^T[R,T] in[T,D]
 *
 * A block sums 128 (fp32: 64) columns of `in` over a run of tokens, for 64 ranks; runs are cut so that the machine is full:
 *
 *                <------------- D ------------->
 *              | split 0 | split 0 | split 0 |          128 columns each
 *         T    | split 1 | split 1 | split 1 |
 *
 * Partial sums lie as the gradient does; reduce_kernel (convert.cu) adds them to it in the order of the splits: no atomics, the same
 * bits every time. One launch does both gradients. */
#include "cuda_common.cuh"

/* Where a block stands. */
struct gradient_place {
    int64_t column, begin, end; /* its first column, its tokens */
    int rank;                   /* its first rank */
    float *partials;            /* of its split, laid out as the gradient */
};

static __device__ __forceinline__ struct gradient_place
gradient_locate(const struct gradient_params &p, const struct gradient_job &job, uint32_t block, int columns)
{
    const uint32_t rank_tiles = (uint32_t)(p.padded_rank + LINEAR_TILE - 1) / LINEAR_TILE;
    const uint32_t column_tiles = (uint32_t)((job.columns + columns - 1) / columns);
    const uint32_t split = block / rank_tiles / column_tiles;
    struct gradient_place place;
    place.rank = (int)(block % rank_tiles) * LINEAR_TILE;
    place.column = (int64_t)(block / rank_tiles % column_tiles) * columns;
    place.begin = (int64_t)split * job.split_tokens;
    place.end = place.begin + job.split_tokens < p.tokens ? place.begin + job.split_tokens : p.tokens;
    place.partials = job.partials + split * p.rank * job.columns;
    return place;
}

static __device__ __forceinline__ void gradient_store(const struct gradient_params &p, const struct gradient_job &job,
                                                      const struct gradient_place &place, int64_t rank, int64_t column,
                                                      float sum)
{
    if (rank < p.rank && column < job.columns)
        place.partials[rank * job.rank_stride + column * job.column_stride] = sum;
}

/* ---------------------------------------------------------------------------------------------------------------- fp32 */

/* Grid: ceil(D / 64) * ceil(padded_rank / 64) * splits blocks of 256 threads. A thread sums 4 columns x 4 ranks, 16 apart; a warp has 4 x
 * 4 columns and 8 ranks side by side, so that it writes whole sectors of 32 bytes, whichever of the two the gradient's rows are. Shared:
 * 32 KB, two stages of in[32][64] and low[32][64]. Of each element of `in`: 4 (bf16: 2) bytes read for every 64 ranks, and from L2 R / 16
 * of low. */
enum { GRADIENT_STEP = 32, GRADIENT_FOURS = LINEAR_TILE / 4 };

struct gradient_stage {
    float4 in[GRADIENT_STEP][GRADIENT_FOURS];
    float4 low[GRADIENT_STEP][GRADIENT_FOURS];
};

struct gradient_registers {
    float4 in[2], low[2];
};

static __device__ __forceinline__ void gradient_load(struct gradient_registers &next, const struct gradient_params &p,
                                                     const struct gradient_job &job, const struct gradient_place &place,
                                                     int64_t first_token)
{
    const int64_t from = place.column + threadIdx.x % GRADIENT_FOURS * 4;
    const int rank = place.rank + (int)threadIdx.x % GRADIENT_FOURS * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t token = first_token + threadIdx.x / GRADIENT_FOURS + i * LINEAR_FMA_THREADS / GRADIENT_FOURS;
        const int64_t valid = token < place.end ? job.columns - from : 0;
        next.in[i] = load_four(job.in, token * job.stride + from, job.dtype, job.aligned, valid);
        if (job.drop && valid > 0)
            drop_four(next.in[i], keep_bits(p.dropout, dropout_element(p.dropout, token, from), 4), p.dropout.scale);
        next.low[i] = load_four(job.low, token * p.padded_rank + rank, PLORA_F32, 1,
                                token < place.end && rank < p.padded_rank ? 4 : 0);
    }
}

static __device__ __forceinline__ void gradient_keep(struct gradient_stage &stage,
                                                     const struct gradient_registers &next)
{
    const int row = (int)threadIdx.x / GRADIENT_FOURS, place = (int)threadIdx.x % GRADIENT_FOURS;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        stage.in[row + i * LINEAR_FMA_THREADS / GRADIENT_FOURS][place] = next.in[i];
        stage.low[row + i * LINEAR_FMA_THREADS / GRADIENT_FOURS][place] = next.low[i];
    }
}

/* The sums of four columns. */
static __device__ __forceinline__ void gradient_store_four(const struct gradient_params &p,
                                                           const struct gradient_job &job,
                                                           const struct gradient_place &place, int64_t rank,
                                                           int64_t column, float4 sums)
{
    float *to = place.partials + rank * job.rank_stride + column * job.column_stride;
    if (job.column_stride == 1 && rank < p.rank && column + 4 <= job.columns && (uintptr_t)to % 16 == 0) {
        store_four(to, 0, PLORA_F32, 1, 4, sums);
        return;
    }
    gradient_store(p, job, place, rank, column, sums.x);
    gradient_store(p, job, place, rank, column + 1, sums.y);
    gradient_store(p, job, place, rank, column + 2, sums.z);
    gradient_store(p, job, place, rank, column + 3, sums.w);
}

extern "C" __global__ void __launch_bounds__(LINEAR_FMA_THREADS, 2)
    gradient_f32_kernel(const __grid_constant__ struct gradient_params p)
{
    __shared__ struct gradient_stage stages[2];
    const bool second = blockIdx.x >= p.first_blocks;
    const struct gradient_job job = second ? p.jobs[1] : p.jobs[0];
    const struct gradient_place place =
        gradient_locate(p, job, second ? blockIdx.x - p.first_blocks : blockIdx.x, LINEAR_TILE);
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int own_four = warp / 2 * 4 + lane / 8, own_rank = warp % 2 * 8 + lane % 8;
    const int ranks = p.padded_rank - place.rank;
    float4 sums[4] = {}; /* [rank / 16] */
    struct gradient_registers next;
    gradient_load(next, p, job, place, place.begin);
    int at = 0;
    for (int64_t token = place.begin; token < place.end; token += GRADIENT_STEP, at ^= 1) {
        gradient_keep(stages[at], next);
        __syncthreads(); /* one is enough: who is here has read the other stage */
        if (token + GRADIENT_STEP < place.end) gradient_load(next, p, job, place, token + GRADIENT_STEP);
        const struct gradient_stage &stage = stages[at];
#pragma unroll 8
        for (int t = 0; t < GRADIENT_STEP; ++t) {
            const float4 in = stage.in[t][own_four];
            const float *low = &stage.low[t][0].x + own_rank;
#pragma unroll
            for (int r = 0; r < 4; ++r)
                if (16 * r < ranks) multiply_four(sums[r], low[16 * r], in);
        }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
        gradient_store_four(p, job, place, place.rank + own_rank + 16 * r, place.column + 4 * own_four, sums[r]);
}

/* ---------------------------------------------------------------------------------------------------------------- bf16 */

/* Grid: ceil(D / 128) * ceil(padded_rank / 64) * splits blocks of 4 warps, each of which sums 2 x 16 columns x 64 ranks by mma.sync, over
 * 64 tokens a step. Shared: 48 KB, two stages of two tiles of `in`, side by side, and a tile of `low`, one of them on its way by cp.async
 * while the other is multiplied; all are read transposed. Of each element of `in`: 2 bytes read for every 64 ranks, and from L2 R / 64
 * of low. Precision as in shrink.cu. */
#if __CUDA_ARCH__ >= 800
/* The sums of one column's ranks `rank` and the next. */
static __device__ __forceinline__ void gradient_store_pair(const struct gradient_params &p,
                                                           const struct gradient_job &job,
                                                           const struct gradient_place &place, int64_t rank,
                                                           int64_t column, float low, float high)
{
    float *to = place.partials + rank * job.rank_stride + column * job.column_stride;
    if (job.rank_stride == 1 && rank + 2 <= p.rank && column < job.columns && (uintptr_t)to % 8 == 0) {
        store_eight_bytes(to, make_uint2(__float_as_uint(low), __float_as_uint(high)));
        return;
    }
    gradient_store(p, job, place, rank, column, low);
    gradient_store(p, job, place, rank + 1, column, high);
}
#endif

extern "C" __global__ void __launch_bounds__(LINEAR_TILE_THREADS, 3)
    gradient_bf16_kernel(const __grid_constant__ struct gradient_params p)
{
#if __CUDA_ARCH__ >= 800
    enum { STAGES = 2, TILES = LINEAR_BLOCK / LINEAR_TILE };
    __shared__ struct bf16_tile in_tiles[STAGES][TILES], low_tiles[STAGES];
    const bool second = blockIdx.x >= p.first_blocks;
    const struct gradient_job job = second ? p.jobs[1] : p.jobs[0];
    const struct gradient_place place =
        gradient_locate(p, job, second ? blockIdx.x - p.first_blocks : blockIdx.x, LINEAR_BLOCK);
    const int ranks = p.padded_rank - place.rank < LINEAR_TILE ? p.padded_rank - place.rank : LINEAR_TILE;
    const struct tile_source in = {(const uint16_t *)job.in, job.stride, place.end, job.columns, job.aligned};
    const struct tile_source low = {(const uint16_t *)job.low, p.padded_rank, place.end, p.padded_rank, 1};
    float sums[TILES][8][4] = {};
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        const int64_t token = place.begin + stage * LINEAR_TILE;
        if (token < place.end) {
#pragma unroll 1
            for (int i = 0; i < TILES; ++i)
                tile_fill(&in_tiles[stage][i], in, token, place.column + i * LINEAR_TILE, LINEAR_TILE);
            tile_fill(&low_tiles[stage], low, token, place.rank, LINEAR_TILE);
        }
        copies_commit();
    }
    int now = 0;
    for (int64_t token = place.begin; token < place.end; token += LINEAR_TILE) {
        copies_wait<STAGES - 2>();
#pragma unroll 1
        for (int i = 0; i < TILES && job.drop; ++i)
            tile_drop(&in_tiles[now][i], p.dropout, token, place.end, place.column + i * LINEAR_TILE, job.columns);
        __syncthreads(); /* this stage is filled, and the one before it is free */
        const int64_t ahead = token + (STAGES - 1) * LINEAR_TILE;
        const int free = now == 0 ? STAGES - 1 : now - 1;
        if (ahead < place.end) {
#pragma unroll 1
            for (int i = 0; i < TILES; ++i)
                tile_fill(&in_tiles[free][i], in, ahead, place.column + i * LINEAR_TILE, LINEAR_TILE);
            tile_fill(&low_tiles[free], low, ahead, place.rank, LINEAR_TILE);
        }
        copies_commit();
        tile_multiply<true, true>(sums, in_tiles[now], &low_tiles[now], ranks / 16, LINEAR_TILE / 16);
        now = now == STAGES - 1 ? 0 : now + 1;
    }
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int64_t column = place.column + 16 * warp + lane / 4, rank = place.rank + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2 * TILES; ++half) /* 8 columns each */
#pragma unroll
        for (int n = 0; n < 8; ++n)
            gradient_store_pair(p, job, place, rank + 8 * n, column + half / 2 * LINEAR_TILE + half % 2 * 8,
                                sums[half / 2][n][half % 2 * 2], sums[half / 2][n][half % 2 * 2 + 1]);
#else
    unreachable();
#endif
}
